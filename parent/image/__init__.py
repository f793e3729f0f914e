"""How an enclave image is made: from a root file system to a file that a Nitro enclave starts from."""

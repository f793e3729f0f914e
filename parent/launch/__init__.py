"""How an enclave is started on this host."""

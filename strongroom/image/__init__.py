"""``strongroom image``: what an enclave image file is, taken apart, verified, and turned into a policy."""

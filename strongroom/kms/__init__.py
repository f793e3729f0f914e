"""``strongroom kms``: what AWS KMS answers about keys and their policies, and what is asked of it."""

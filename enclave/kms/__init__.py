"""What KMS releases to this measured image, and the way to it."""

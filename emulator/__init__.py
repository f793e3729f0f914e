"""Stand-ins with real cryptography for a machine without Nitro or AWS. Never part of an image."""

"""Runs the test vectors of PROTOCOL.md sections 2 and 3 against any verifier. README.md in this folder says how."""

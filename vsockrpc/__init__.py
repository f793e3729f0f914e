"""The wire: addresses, frames, calls, the sealed channel, messages."""

"""The engine process: prompts become tokens, and tokens answers. No key comes here, and no other process imports it."""

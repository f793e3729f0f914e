"""From a JSON schema to a grammar that llama.cpp follows token by token."""

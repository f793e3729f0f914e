"""What a user imports and types: session, gateway, chat."""

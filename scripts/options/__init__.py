"""How commands declare, check and parse their settings."""

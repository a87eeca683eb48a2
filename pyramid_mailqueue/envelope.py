"""The envelope of a message (stub; being written)."""

"""Who can be offered a message."""

"""Where messages are durable until they are delivered."""

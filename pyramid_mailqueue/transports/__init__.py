"""The transports: where messages go."""

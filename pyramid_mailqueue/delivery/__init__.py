"""What happens to a message after the commit: offering it to transports, settling its claim, telling the world."""

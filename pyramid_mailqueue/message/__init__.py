"""Messages: their addresses, header and content, and how they are made of the objects of a program."""

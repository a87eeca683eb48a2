"""A message: the addresses it goes to, its header and its content, and how it is made of what a program has."""

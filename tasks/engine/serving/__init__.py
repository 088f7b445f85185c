"""A server in a process group of its own, and how it is spoken to."""

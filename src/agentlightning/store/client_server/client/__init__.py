"""A store that asks a server, and is still of use while it cannot be reached."""

"""The store over HTTP: what is said on the wire, the server, and a client that rides out what goes wrong."""

"""The HTTP server of a store."""

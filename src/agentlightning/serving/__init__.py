"""A port, bounded connections on it, and an event loop in a thread of its own that answers there."""

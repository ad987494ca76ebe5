"""The HTTP client of a store, which stays usable while the server cannot be reached."""

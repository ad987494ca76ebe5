"""Answers the routes with a store, within bounds that no client can break."""

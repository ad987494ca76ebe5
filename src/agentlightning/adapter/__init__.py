"""Adapters: spans in, training data out."""

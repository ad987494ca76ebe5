"""Spans on disk, until they are delivered."""

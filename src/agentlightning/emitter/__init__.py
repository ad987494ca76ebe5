"""Emitters: what an agent says of itself, as spans of its attempt; and the readers of those spans."""

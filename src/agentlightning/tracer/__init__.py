"""Tracers: what happens inside an agent, as spans of its attempt."""

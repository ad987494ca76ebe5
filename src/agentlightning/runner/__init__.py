"""Runners: claim rollouts from the store, run the agent on them, and report how it went."""

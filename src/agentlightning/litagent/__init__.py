"""Agents: what a user writes, and how it is called for a rollout."""

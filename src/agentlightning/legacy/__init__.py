"""The interface of v0.1: a server that hands out tasks by HTTP, and its client. For scripts that still use it.

Everything is in memory and nothing is authenticated; new work belongs into a ``LightningStore``.
"""

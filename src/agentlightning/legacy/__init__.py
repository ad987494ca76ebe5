"""The interface of v0.1, for scripts that still use it: a server that hands out tasks over HTTP, and its client.

Everything is in memory and there is no authentication. New code uses a ``LightningStore``.
"""

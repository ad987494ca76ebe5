"""Keeps the backend's key away from the agent, the log and the store, whatever the backend says."""

from __future__ import annotations

import re

from agentlightning.proxy.models import Backend

__all__ = ["Scrubber"]

_HIDDEN = "***"
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie", re.IGNORECASE)
_SHORTEST = 6
"""Shorter ones are words like ``EMPTY`` or ``none``, not secrets; replacing those would garble what models say."""


class Scrubber:
    """Replaces a backend's secrets by ``***``: its key, and what its extra headers carry of that kind.

    Args:
        backend: whose secrets they are; None: there are none.
    """

    def __init__(self, backend: Backend | None) -> None:
        found = set[str]()
        if backend is not None:
            found.add(backend.api_key or "")
            for name, value in backend.headers.items():
                if _SECRET_HEADER.search(name):
                    found.update((value, value.rpartition(" ")[2]))  # without the scheme before it, too
        longest_first = sorted(found, key=len, reverse=True)
        self._secrets = [secret.encode() for secret in longest_first if len(secret) >= _SHORTEST]

    def bytes(self, data: bytes) -> bytes:
        """``data`` without the secrets."""
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, _HIDDEN.encode())
        return data

    def text(self, text: str) -> str:
        """``text`` without the secrets."""
        return self.bytes(text.encode("utf-8", "replace")).decode("utf-8", "replace") if self._secrets else text

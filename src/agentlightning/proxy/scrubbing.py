"""Keeps the backend's key away from the agent, the log and the store, whatever the backend says."""

from __future__ import annotations

import re
from dataclasses import replace

from agentlightning.proxy.answers import Answer
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
        found.update([secret.replace("/", r"\/") for secret in found])  # as some write it in JSON
        longest_first = sorted(found, key=len, reverse=True)
        self._secrets = [secret.encode() for secret in longest_first if len(secret) >= _SHORTEST]

    def bytes(self, data: bytes) -> bytes:
        """``data`` without the secrets."""
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, _HIDDEN.encode())
        return data

    def answer(self, answer: Answer) -> Answer:
        """``answer`` with no secret in its body and its texts."""
        if not self._secrets:
            return answer
        return replace(
            answer,
            body=self.bytes(answer.body),
            response_id=self._text_if_any(answer.response_id),
            model=self._text_if_any(answer.model),
            fingerprint=self._text_if_any(answer.fingerprint),
            finish_reasons=[self.text(reason) for reason in answer.finish_reasons],
        )

    def _text_if_any(self, text: str | None) -> str | None:
        return None if text is None else self.text(text)

    def text(self, text: str) -> str:
        """``text`` without the secrets."""
        return self.bytes(text.encode("utf-8", "replace")).decode("utf-8", "replace") if self._secrets else text

"""The error that ends a request in the proxy, and the removal of the backend's secrets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping


class ProxyError(Exception):
    """A request ends here, with this status and this error.

    The body of the reply is written by the ``WireDialect`` of the request, since each wire's clients parse their own
    shape. Clients repeat a call by themselves after 429 and 5xx, as ``Retry-After`` says.

    Args:
        status: HTTP status.
        code: what went wrong, for programs.
        message: what went wrong, and what to do about it.
        param: the field of the request that is wrong.
        retry_after_seconds: when a repeat may succeed.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> dict[str, str]:
        """Return ``Retry-After`` in whole seconds (RFC 9110), and in milliseconds, which OpenAI's clients prefer."""
        if self.retry_after_seconds is None:
            return {}
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_seconds))),
            "retry-after-ms": str(max(1, round(self.retry_after_seconds * 1000))),
        }


_REPLACEMENT = b"***"
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie", re.IGNORECASE)
_MIN_SECRET_CHARS = 6
"""Shorter keys are placeholders such as ``EMPTY`` or ``none``; replacing those would garble what models write."""


class Scrubber:
    """Replaces a backend's secrets by ``***``, in what the agent, the log and the store get.

    A backend may repeat its key: in an error message, in a header, or in what the model writes.

    Args:
        api_key: the backend's key.
        headers: the backend's extra headers; the values of those that look like credentials are secrets too.
    """

    def __init__(self, api_key: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        found = {api_key or ""}
        for name, value in (headers or {}).items():
            if _SECRET_HEADER.search(name):
                found.update((value, value.rpartition(" ")[2]))  # also without the scheme before it
        found.update([secret.replace("/", r"\/") for secret in found])  # some JSON encoders escape slashes
        # The longest first, because one secret may be a part of another.
        longest_first = sorted(found, key=len, reverse=True)
        self._secrets = [secret.encode() for secret in longest_first if len(secret) >= _MIN_SECRET_CHARS]

    def bytes(self, data: bytes) -> bytes:
        """Return ``data`` without the secrets."""
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, _REPLACEMENT)
        return data

    def text(self, text: str) -> str:
        """Return ``text`` without the secrets."""
        return self.bytes(text.encode("utf-8", "replace")).decode("utf-8", "replace") if self._secrets else text

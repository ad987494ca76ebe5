"""What the proxy answers when it does not pass a call on, in the shape of OpenAI's errors.

Every OpenAI client turns ``{"error": {"message", "type", "param", "code"}}`` and the HTTP status into an
exception of its own, and repeats a call by itself after 429 and 5xx, as ``Retry-After`` says
(https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import msgspec

from agentlightning.proxy.models import Backend
from agentlightning.proxy.replies import Answer


class Refused(Exception):
    """A call ends here, with this status and this error.

    Args:
        status: HTTP status.
        code: what went wrong, for programs.
        message: what went wrong, and what to do about it.
        kind: OpenAI's ``type``; by default what belongs to the status.
        param: the field of the request that is wrong.
        retry_after_seconds: when a repeat may succeed.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind or ("invalid_request_error" if status < 429 else "proxy_error")
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    def body(self) -> bytes:
        """The error as JSON."""
        return error_body(self.message, self.kind, self.code, self.param)

    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds, as HTTP has it, and in milliseconds, which OpenAI clients prefer."""
        if self.retry_after_seconds is None:
            return {}
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_seconds))),
            "retry-after-ms": str(max(1, round(self.retry_after_seconds * 1000))),
        }


def error_body(message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """An error in OpenAI's shape, as JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


# --- Keeps the backend's key away from the agent, the log and the store, whatever the backend s ---

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

"""What the proxy answers when it does not pass a call on, in the shape of OpenAI's errors.

Every OpenAI client turns ``{"error": {"message", "type", "param", "code"}}`` and the HTTP status into an
exception of its own, and repeats a call by itself after 429 and 5xx, as ``Retry-After`` says
(https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

import math

import msgspec

__all__ = ["Refused", "error_body"]


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

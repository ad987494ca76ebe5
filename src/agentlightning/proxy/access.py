"""Who may call the proxy.

Whoever reaches the proxy spends what its backends cost. So a proxy that other machines can reach always has a key;
one that listens on the loopback interface needs none, and then takes care of the one thing that still can reach it
from outside: a web page in a browser on this machine.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping

from agentlightning.proxy.refusals import Refused

__all__ = ["Access", "is_loopback"]


class Access:
    """Checks the headers of requests.

    Args:
        api_key: what callers must show as bearer token (or in ``x-api-key``); None: only the browser is kept out.
    """

    def __init__(self, api_key: str | None) -> None:
        self._api_key = None if api_key is None else api_key.encode()

    def check(self, headers: Mapping[str, str]) -> None:
        """Let the request pass, or not.

        Raises:
            Refused: 401 without the key; 403 for a browser, if there is no key.
        """
        if self._api_key is not None:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode(), self._api_key):
                raise Refused(
                    401,
                    "invalid_api_key",
                    "The proxy's API key is missing or wrong; use the api_key of the LLM resource.",
                    kind="authentication_error",
                )
        elif "origin" in headers or not is_loopback(_host_of(headers.get("host", ""))):
            raise Refused(
                403,
                "forbidden_origin",
                "A proxy without a key answers programs on this machine only, and no web pages; give it an api_key.",
                kind="permission_error",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    """The host of a ``Host`` header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header

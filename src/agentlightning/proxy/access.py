"""Who may call the proxy.

Whoever reaches the proxy spends what its backends cost. So a proxy that other machines can reach always has a key;
one that listens on the loopback interface needs none, and then takes care of the one thing that still can reach it
from outside: a web page in a browser on this machine.
"""

from __future__ import annotations

from starlette.datastructures import Headers

from agentlightning.proxy.refusals import Refused
from agentlightning.security.hosts import AllowedHosts
from agentlightning.security.keys import ApiKey

__all__ = ["Access"]


class Access:
    """Checks the headers of requests.

    Args:
        api_key: what callers must show as bearer token; None: only web pages are kept out.
    """

    def __init__(self, api_key: ApiKey | None) -> None:
        self._api_key = api_key
        self._hosts = AllowedHosts()

    def check(self, headers: Headers) -> None:
        """Let the request pass, or not.

        Raises:
            Refused: 401 without the key; 403 for a web page, if there is no key.
        """
        if self._api_key is not None:
            if not self._api_key.opens(_raw(headers, "authorization")):
                raise Refused(
                    401,
                    "invalid_api_key",
                    "The proxy's API key is missing or wrong; use the api_key of the LLM resource.",
                    kind="authentication_error",
                )
        elif "origin" in headers or not self._hosts.allows(_raw(headers, "host")):
            raise Refused(
                403,
                "forbidden_origin",
                "A proxy without a key answers programs on this machine only, and no web pages; give it an api_key.",
                kind="permission_error",
            )


def _raw(headers: Headers, name: str) -> bytes | None:
    value = headers.get(name)
    return None if value is None else value.encode("latin-1")

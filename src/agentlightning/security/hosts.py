"""Under which names a server answers, and to web pages from where.

A web page that a user happens to look at can make the browser send requests to any address, also to
servers on the user's own machine. Two headers, which no page can forge, tell: ``Host`` (a page that
made its own name resolve to 127.0.0.1 still names itself there: DNS rebinding) and ``Origin``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from agentlightning.errors import InvalidValue

_REMEMBERED = 256


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``, a name or an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class AllowedHosts:
    """The names in ``Host`` that a server answers to.

    Literal addresses always pass, since no name was resolved; so do ``localhost`` and names below it.

    Args:
        names: others that pass; ``*`` lets every name pass.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(name.lower() for name in names)
        self._passed: set[bytes] = set()

    def allows(self, host: bytes | None) -> bool:
        """Whether the value of a ``Host`` header passes; an absent one (HTTP/1.0) does."""
        if host is None or host in self._passed:
            return True
        name = _name_in(host)
        passes = name is not None and ("*" in self._names or name in self._names or _is_local_or_literal(name))
        if passes and len(self._passed) < _REMEMBERED:
            self._passed.add(host)
        return passes


class AllowedOrigins:
    """The web pages whose requests a server answers: its own, and those listed.

    Args:
        origins: such as ``https://lab.example:8080``; ``*`` for all.

    Raises:
        InvalidValue: one is not an origin.
    """

    def __init__(self, origins: Sequence[str] | str | None = None) -> None:
        listed = [origins] if isinstance(origins, str) else list(origins or ())
        for origin in listed:
            scheme, found, rest = origin.partition("://")
            if origin != "*" and not (found and scheme in ("http", "https") and rest and "/" not in rest):
                raise InvalidValue(
                    f"{origin!r} is not an origin; give scheme, host and port ('https://lab.example:8080'), or '*'"
                )
        self._all = "*" in listed
        self._listed = frozenset(origin.lower().encode() for origin in listed)

    @property
    def any_listed(self) -> bool:
        """Whether pages of other origins are to be answered at all (CORS)."""
        return bool(self._listed)

    def allows(self, origin: bytes, host: bytes | None) -> bool:
        """Whether a request with this ``Origin``, sent to this ``Host``, is answered."""
        if self._all or origin.lower() in self._listed:
            return True
        _, found, rest = origin.partition(b"://")
        return bool(found) and host is not None and rest.lower() == host.lower()

    def shown_to(self, origin: bytes) -> bytes | None:
        """The value of ``Access-Control-Allow-Origin`` for a page, None if it may not read replies."""
        if self._all:
            return b"*"
        return origin if origin.lower() in self._listed else None


def _name_in(host: bytes) -> str | None:
    """The name in the value of a ``Host`` header, without its port."""
    try:
        text = host.decode("ascii").lower()
    except UnicodeDecodeError:
        return None
    if text.startswith("["):
        name, closed, port = text[1:].partition("]")
        port = port.removeprefix(":")
        return name if closed and (not port or port.isdigit()) else None
    name, _, port = text.partition(":")
    return name.rstrip(".") if not port or port.isdigit() else None


def _is_local_or_literal(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""Which host names a server answers to, and requests of which web pages.

A web page that a user opens can make the browser send requests to any address, also to servers on the user's own
machine. Two headers that a page cannot forge reveal this. ``Host``: a page whose name was made to resolve to 127.0.0.1
(DNS rebinding) still sends its own name there. ``Origin``: the browser states which page has sent the request.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence

from agentlightning.errors import InvalidValue

_MAX_REMEMBERED = 256
"""How many values of ``Host`` are remembered; a bound, because clients choose them."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``, a name or an address."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def require_key(host: str, has_key: bool, remedy: str, argument: str = "host") -> None:
    """Check, before a server begins to listen, that it does not answer other machines without a key.

    Args:
        host: where it is to listen.
        has_key: whether it asks for a key.
        remedy: how it is given one, for the message.
        argument: the one that has the host.

    Raises:
        InvalidValue: it would.
    """
    if not has_key and not is_loopback(host):
        raise InvalidValue(
            f"other machines can reach {host!r}, and there is no API key: anybody who finds the port could use it. "
            f"{remedy} (this command makes a key: python -c 'import secrets; print(secrets.token_urlsafe(32))'), "
            f"or serve this machine only, with {argument}='localhost'"
        )


def url_of(host: str, port: int, scheme: str = "http") -> str:
    """The URL of a server by its host, a name or an address, and its port."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


# --- Which machine an address belongs to -------------------------------------------------------------

EVERY_ADDRESS = ("", "0.0.0.0", "::")
"""Hosts that mean: listen on every address of this machine."""


def is_this_machine(address: str) -> bool:
    """Whether an address, of the other side of a connection, belongs to this machine."""
    plain = address.removeprefix("::ffff:")
    family = socket.AF_INET6 if ":" in plain else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((plain, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def outward_address(target: str = "192.0.2.1") -> str | None:
    """The address of this machine by which others reach it; None if it has none but loopback.

    Args:
        target: an address of the network in question; default: one reserved for documentation (RFC 5737), by which
            the route to other networks is found.
    """
    # Connecting a datagram socket sends nothing; it only finds the route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
            found = str(probe.getsockname()[0])
        except OSError:  # there is no route
            found = ""
    return found if found and not is_loopback(found) else _first_address()


def _first_address() -> str | None:
    """The first address of an interface that is up, for a machine whose networks have no way out."""
    import psutil

    up = {name for name, told in psutil.net_if_stats().items() if told.isup}
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, addresses in psutil.net_if_addrs().items():
            for each in addresses:
                if name in up and each.family == family and not _is_near(each.address):
                    return each.address
    return None


def _is_near(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    return found.is_loopback or found.is_link_local


class AllowedHosts:
    """The values of ``Host`` that a server answers to.

    Addresses always pass, because DNS rebinding needs a name; so do ``localhost`` and names below it.

    Args:
        names: further names that pass; ``*`` lets every name pass.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(name.lower() for name in names)
        self._passed: set[bytes] = set()

    def allows(self, host: bytes | None) -> bool:
        """Whether the value of a ``Host`` header passes. An absent one passes: browsers always send it."""
        if host is None or host in self._passed:
            return True
        name = _name_in(host)
        passes = name is not None and ("*" in self._names or name in self._names or _is_local_or_literal(name))
        if passes and len(self._passed) < _MAX_REMEMBERED:
            self._passed.add(host)
        return passes


class AllowedOrigins:
    """The web pages whose requests a server answers: its own, and those that are listed.

    Args:
        origins: such as ``https://lab.example:8080``; ``*`` for all.

    Raises:
        InvalidValue: one of them is not an origin.
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
        """Whether pages of other origins may use the server at all (CORS)."""
        return bool(self._listed)

    def allows(self, origin: bytes, host: bytes | None) -> bool:
        """Whether a request with this ``Origin`` that was sent to this ``Host`` is answered."""
        if self._all or origin.lower() in self._listed:
            return True
        _, found, rest = origin.partition(b"://")
        return bool(found) and host is not None and rest.lower() == host.lower()

    def shown_to(self, origin: bytes) -> bytes | None:
        """The value of ``Access-Control-Allow-Origin`` for a page; None if the page may not read replies."""
        if self._all:
            return b"*"
        return origin if origin.lower() in self._listed else None


def _name_in(host: bytes) -> str | None:
    """The name in the value of a ``Host`` header, without the port; None if the value is not valid."""
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

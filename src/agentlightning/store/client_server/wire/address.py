"""The address of a server, as people write it."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from agentlightning.errors import InvalidValue
from agentlightning.store.client_server.wire.routes import CANONICAL, DIALECTS, Dialect

__all__ = ["ServerAddress", "parse_address"]


class ServerAddress(NamedTuple):
    """Where a server is, and who comes."""

    root: str
    """Scheme, host, port, and the path that a reverse proxy puts in front; no slash at the end."""
    dialect: Dialect
    """The prefix that was asked for; ours if none was."""
    api_key: str | None
    """The key in the address (``http://agl:KEY@host``)."""

    @property
    def name(self) -> str:
        """For the name of a folder."""
        return "".join(char if char.isalnum() else "-" for char in self.root.partition("://")[2])[:80]


def parse_address(text: str) -> ServerAddress:
    """Take ``http://host:port``, with or without a key, and with or without one of the prefixes.

    Raises:
        InvalidValue: it is no such address.
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"{text!r} is not the address of a server; give one like http://host:4747")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InvalidValue(
            f"{_masked(text)!r} is not the address of a server; give one like http://host:4747"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidValue(f"{_masked(text)!r} is not the address of a server; give one like http://host:4747")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/")
    dialect = CANONICAL
    for each in DIALECTS:
        if path.endswith(each.prefix):
            path, dialect = path.removesuffix(each.prefix), each
            break
    netloc = host if port is None else f"{host}:{port}"
    key = None if parts.password is None else unquote(parts.password)
    return ServerAddress(urlunsplit((parts.scheme, netloc, path, "", "")), dialect, key)


def _masked(text: str) -> str:
    """The text without what may be a password."""
    return text if "@" not in text else f"…@{text.rpartition('@')[2]}"

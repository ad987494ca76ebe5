"""Which store a command is about, and opening it.

A URL is a server; anything else is the path of a database file. Commands that only look read a file beside
its owner, whoever that is; commands that change something must become the owner, or go through its server.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from agentlightning.errors import InvalidValue, StoreOwned
from agentlightning.settings import LightningEnvVar, resolve_int_env_var, resolve_str_env_var

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore


T = TypeVar("T")

DEFAULT_PORT = 4747
_ANY_ADDRESS = ("", "0.0.0.0", "::", "[::]")
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d{1,5}/?")
_SERVER_SCHEMES = ("http", "https")
_PATIENCE_SECONDS = 10.0
"""For how long a command tries, once the server has been seen to answer."""


class Server(NamedTuple):
    """A store behind HTTP."""

    url: str
    """Its root, without a key."""
    api_key: str | None

    def __str__(self) -> str:
        return self.url


class Database(NamedTuple):
    """A store in a file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


def locate(url: str | None, api_key: str | None = None) -> Server | Database:
    """What ``--url`` and ``--api-key`` say.

    Args:
        url: a server's URL, in which a key may stand as the password, or the path of a file. None: the server at
            ``AGL_SERVER_HOST`` and ``AGL_SERVER_PORT``, by default on this machine.
        api_key: goes before a key in the URL, which goes before ``AGL_API_KEY``.

    Raises:
        InvalidValue: it is neither of the two.
    """
    if url is None:
        host = resolve_str_env_var(LightningEnvVar.AGL_SERVER_HOST, fallback="")
        port = resolve_int_env_var(LightningEnvVar.AGL_SERVER_PORT, fallback=DEFAULT_PORT)
        url = f"http://{'127.0.0.1' if host in _ANY_ADDRESS else host}:{port}"
    scheme, separator, _ = url.partition("://")
    if separator and scheme.lower() in _SERVER_SCHEMES:
        return _server(url, api_key)
    if separator:
        raise InvalidValue(f"--url {url!r} is neither a server (http://…, https://…) nor the path of a file")
    if _HOST_AND_PORT.fullmatch(url) and not Path(url).exists():
        raise InvalidValue(f"--url {url!r} has no scheme; if a server is meant, write http://{url}")
    return Database(Path(url))


def _server(url: str, api_key: str | None) -> Server:
    from agentlightning.http.routes import parse_address

    address = parse_address(url)
    key = api_key or address.api_key or resolve_str_env_var(LightningEnvVar.AGL_API_KEY, fallback="") or None
    return Server(address.root, key)


@asynccontextmanager
async def open_store(url: str | None, api_key: str | None = None) -> AsyncGenerator[LightningStore]:
    """The store that ``--url`` names, for a program that goes on: it rides out a server that is away for a while.

    Raises:
        InvalidValue: there is no such file, or the URL is none.
        StoreOwned: another process has the file open; the message names it, and the URL of its server.
        StoreUnavailable: the server cannot be used; the message says why and what to do.
        NotAuthenticated, NotAllowed, BadRequest: the server does not want us.
    """
    from agentlightning.http.client.client import LightningStoreClient

    target = locate(url, api_key)
    if isinstance(target, Server):
        _check_answers(target)
        async with LightningStoreClient(target.url, api_key=target.api_key) as client:
            yield client
    else:
        async with _owner(target.path) as store:
            yield store


@asynccontextmanager
async def open_view(url: str | None, api_key: str | None = None) -> AsyncGenerator[LightningStore]:
    """The store that ``--url`` names, for reading only; a file may be in use. Raises as ``open_store``."""
    target = locate(url, api_key)
    if isinstance(target, Server):
        async with _served(target) as store:
            yield store
    else:
        from agentlightning.store.sqlite.store import ReadOnlySqliteStore

        _check_exists(target.path)
        async with ReadOnlySqliteStore(target.path) as store:
            yield store


def look(url: str | None, api_key: str | None, question: Callable[[LightningStore], Awaitable[T]]) -> T:
    """Put a question to the store that ``--url`` names, and wait for the answer. Raises as ``open_store``."""

    async def run() -> T:
        async with open_view(url, api_key) as store:
            return await question(store)

    return asyncio.run(run())


def act(url: str | None, api_key: str | None, action: Callable[[LightningStore], Awaitable[T]]) -> T:
    """Do something to the store that ``--url`` names, and wait for the result. Raises as ``open_store``."""

    async def run() -> T:
        target = locate(url, api_key)
        async with _served(target) if isinstance(target, Server) else _owner(target.path) as store:
            return await action(store)

    return asyncio.run(run())


@asynccontextmanager
async def _served(server: Server) -> AsyncGenerator[LightningStore]:
    """For somebody who waits at a keyboard: with little patience, and nothing kept on this machine."""
    from agentlightning.http.client.client import LightningStoreClient
    from agentlightning.http.client.resilience import Resilience

    _check_answers(server)
    async with LightningStoreClient(
        server.url,
        api_key=server.api_key,
        spool_dir=None,
        resilience=Resilience(patience_seconds=_PATIENCE_SECONDS),
    ) as client:
        yield client


def _check_answers(server: Server) -> None:
    """One request that is not tried again, so that a wrong address is told at once."""
    from agentlightning.cli.probe import ask

    ask(server)


@asynccontextmanager
async def _owner(path: Path) -> AsyncGenerator[LightningStore]:
    from agentlightning.store.sqlite.store import SqliteLightningStore

    _check_exists(path)
    store = SqliteLightningStore(path)
    try:
        await store.__aenter__()
    except StoreOwned as error:
        raise _owned_elsewhere(path) or error from error
    try:
        yield store
    finally:
        await store.close()


def _owned_elsewhere(path: Path) -> StoreOwned | None:
    from agentlightning.cli.owner import find_owner

    owner = find_owner(path)
    if owner is None:
        return None
    way = (
        f"use --url {' or '.join(owner.server_urls)} instead"
        if owner.server_urls
        else "stop it first, or serve the file with `agl store` and use its URL"
    )
    return StoreOwned(f"process {owner.pid} ({owner.command}) has {str(path)!r} open, and only one may write; {way}")


def _check_exists(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise InvalidValue(f"--url {str(path)!r} is a folder; give the database file in it")
    nearby = sorted(each.name for each in path.parent.glob("*.db")) if path.parent.is_dir() else []
    hint = f"; there are {', '.join(nearby[:5])}" if nearby else ""
    raise InvalidValue(f"there is no database {os.fspath(path)!r}{hint}. Give the path of one, or a server's URL")

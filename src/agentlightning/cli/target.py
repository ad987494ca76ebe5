"""Which store a command is about, and opening it.

A URL is a server; anything else is the path of a database file. Commands that only look read a file beside
its owner, whoever that is; commands that change something must become the owner, or go through its server.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import psutil

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    InvalidValue,
    NotAllowed,
    NotAuthenticated,
    StoreOwned,
    StoreUnavailable,
    StoreUnreachable,
)
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
    from agentlightning.cli.target import ask

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
    from agentlightning.cli.target import find_owner

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


# --- One question to a server, asked without patience, and what the answer or the silence means ---

_SECONDS = 5.0
_STATISTICS = "/agl/v1/statistics"
_OLD_HEALTH = "/v1/agl/health"


class Answer(NamedTuple):
    """What a server said."""

    statistics: dict[str, Any]
    round_trip_seconds: float
    asked_at: float
    """This machine's wall clock half-way between question and answer."""


class _Reply(NamedTuple):
    status: int
    body: bytes


def ask(server: Server) -> Answer:
    """Ask a server for its statistics, once.

    Raises:
        StoreUnreachable: nobody answers there.
        StoreUnavailable: it answers that it cannot be used now.
        NotAuthenticated, NotAllowed: it wants a key, another key, or another host name.
        BadRequest: what answers is not a store's server, or one of another version.
    """
    before, started = time.time(), time.monotonic()
    reply = _get(server, _STATISTICS)
    seconds = time.monotonic() - started
    if reply.status != 200:
        raise _refusal(server, reply)
    try:
        statistics = json.loads(reply.body)
    except ValueError:
        statistics = None
    if not isinstance(statistics, dict) or "rollouts_by_status" not in statistics:
        raise _foreign(server)
    return Answer(cast("dict[str, Any]", statistics), seconds, before + seconds / 2)


def _refusal(server: Server, reply: _Reply) -> AgentLightningError:
    match reply.status:
        case 401 if server.api_key is None:
            return NotAuthenticated(f"{server} asks for an API key; give --api-key, or set AGL_API_KEY")
        case 401:
            return NotAuthenticated(
                f"{server} does not take this API key; give the one that `agl store` was started with "
                "(--api-key goes before one in the URL, and that before AGL_API_KEY)"
            )
        case 403:
            return NotAllowed(f"{server} refuses requests that come this way: {_detail(reply)}")
        case 404 if _get(server, _OLD_HEALTH).status == 200:
            return BadRequest(
                f"{server} is the server of another version (it has no {_STATISTICS}); "
                "install the same version of agentlightning on both sides"
            )
        case 429 | 503 | 507:
            return StoreUnavailable(f"{server} cannot be used now: {_detail(reply)}")
        case status if status >= 500:
            return StoreUnavailable(f"{server} answers with an error ({status}: {_detail(reply)}); its log says why")
        case _:
            return _foreign(server)


def _foreign(server: Server) -> BadRequest:
    return BadRequest(f"what answers at {server} is not the server of a store; check host and port")


def _detail(reply: _Reply) -> str:
    try:
        problem = json.loads(reply.body)
    except ValueError:
        problem = None
    detail = cast("dict[str, Any]", problem).get("detail") if isinstance(problem, dict) else None
    return str(detail) if detail else f"status {reply.status}"


def _get(server: Server, path: str) -> _Reply:
    parts = urlsplit(server.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_SECONDS)
    headers = {"Accept": "application/json"}
    if server.api_key is not None:
        headers["Authorization"] = f"Bearer {server.api_key}"
    try:
        connection.request("GET", parts.path + path, headers=headers)
        reply = connection.getresponse()
        return _Reply(reply.status, reply.read())
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        raise StoreUnreachable(_silence(server, error)) from error
    finally:
        connection.close()


def _silence(server: Server, error: Exception) -> str:
    match error:
        case socket.gaierror():
            return f"the host of {server} is not known here ({error.strerror}); check its name"
        case UnicodeError():  # what the encoding of names raises: an empty part, or one of more than 63 characters
            return f"the host of {server} has a name that no host can have; check it"
        case ConnectionRefusedError():
            return (
                f"nothing listens at {server}. Start a server there with `agl store`, "
                f"or name another with --url (http://host:{DEFAULT_PORT}, or the path of a database file)"
            )
        case TimeoutError():
            return (
                f"nothing answers at {server} within {_SECONDS:g} s: the host is down, a firewall drops packets, "
                "or the server is stuck"
            )
        case ssl.SSLCertVerificationError():
            return (
                f"the certificate of {server} is not trusted here ({error.verify_message}); "
                "set SSL_CERT_FILE to that of its authority"
            )
        case ssl.SSLError():
            return f"what answers at {server} speaks no TLS; try http:// instead of https://"
        case http.client.HTTPException() | ConnectionError():
            return f"what answers at {server} speaks no HTTP, or TLS; try https:// instead of http://"
        case _:
            return f"{server} cannot be reached: {error}"


# --- Who has a database file open, and where that process can be reached ---

_PROBE_SECONDS = 1.0


class Owner(NamedTuple):
    """A process that owns a database file."""

    pid: int
    command: str
    """How it was called, cut short."""
    server_urls: tuple[str, ...]
    """Where it serves stores; if it serves several, which is which is not known."""


def find_owner(path: Path) -> Owner | None:
    """The process whose id the owner's lock file has, if it lives.

    The lock itself is not touched: to try it would refuse a store that is opened at that moment.
    """
    real = Path(os.path.realpath(path))
    try:
        pid = int(real.with_name(real.name + "-owner").read_text(encoding="ascii"))
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
    except (OSError, ValueError, psutil.Error):
        return None
    if not _has_open(process, real.with_name(real.name + "-owner")):
        return None
    return Owner(pid, command if len(command) <= 60 else command[:59] + "…", _servers_of(process))


def _has_open(process: psutil.Process, lock: Path) -> bool:
    """Whether it holds the lock file: the id of a dead owner may have gone to somebody else."""
    try:
        return any(each.path == str(lock) for each in process.open_files())
    except psutil.AccessDenied:  # another user's process: what the file says is all that is known
        return True
    except psutil.Error:
        return False


def _servers_of(process: psutil.Process) -> tuple[str, ...]:
    try:
        listening = [each.laddr for each in process.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return ()
    places = sorted({("127.0.0.1" if each.ip in ("0.0.0.0", "::") else each.ip, each.port) for each in listening})
    return tuple(
        f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        for host, port in places
        if _serves_a_store(host, port)
    )


def _serves_a_store(host: str, port: int) -> bool:
    connection = HTTPConnection(host, port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/agl/v1/health/live")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()

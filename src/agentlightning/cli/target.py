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
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import psutil
import typer

from agentlightning.cli.terminal import Column, Format, plain, print_json, print_table
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
from agentlightning.security.credentials import Credentials, credentials_for
from agentlightning.security.local_servers import find_serving
from agentlightning.settings import LightningEnvVar, resolve_int_env_var, resolve_str_env_var

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore, LightningStoreStatistics
    from agentlightning.types import PaginatedResult

T = TypeVar("T")
Purpose = Literal["look", "act", "serve"]

DEFAULT_PORT = 4747
_ANY_ADDRESS = ("", "0.0.0.0", "::", "[::]")
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d{1,5}/?")
_PATIENCE_SECONDS = 10.0
"""For how long a command tries, once the server has been seen to answer."""


Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        "-u",
        envvar="AGL_SERVER_URL",
        metavar="URL|FILE",
        show_default=False,
        help="The store: a server (http://host:4747), or a database file. "
        "[dim]\\[default: http://127.0.0.1:4747][/dim]",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="The server's key, if it has one. [dim]\\[env var: AGL_API_KEY][/dim]"),
]


class Target(ABC):
    """A store that a command is about."""

    @abstractmethod
    def open(self, purpose: Purpose = "serve") -> AbstractAsyncContextManager[LightningStore]:
        """Open it.

        Args:
            purpose: ``look``: for reading only; a file may be in use. ``act``: for a change. Both are for somebody who
                waits at a keyboard: with little patience, and nothing kept on this machine. ``serve``: for a program
                that goes on, and rides out a server that is away for a while.

        Raises:
            InvalidValue: there is no such file.
            StoreOwned: another process has the file open; the message names it, and the URL of its server.
            StoreUnavailable: the server cannot be used; the message says why and what to do.
            NotAuthenticated, NotAllowed, BadRequest: the server does not want us.
        """

    def is_unowned(self) -> bool:
        """Whether it is a file that no process has open."""
        return False

    def look(self, question: Callable[[LightningStore], Awaitable[T]], purpose: Purpose = "look") -> T:
        """Put a question to it, and wait for the answer. Raises as ``open``."""

        async def run() -> T:
            async with self.open(purpose) as store:
                return await question(store)

        return asyncio.run(run())

    def act(self, action: Callable[[LightningStore], Awaitable[T]]) -> T:
        """Do something to it, and wait for the result. Raises as ``open``."""
        return self.look(action, "act")

    def print_page(
        self,
        output: Format,
        query: Callable[[LightningStore], Awaitable[PaginatedResult[T]]],
        columns: Callable[[float], Sequence[Column[T]]],
        *,
        empty: str,
        record: Callable[[T], Any] | None = None,
    ) -> None:
        """Print a page of its records. Raises as ``open``.

        Args:
            output: option of the command.
            query: reads the page.
            columns: of the table, by the time on the store's clock.
            empty: what is said instead of a table without rows.
            record: what JSON has of a record; default: all.
        """

        async def question(store: LightningStore) -> tuple[PaginatedResult[T], float]:
            return await query(store), clock_of(await store.statistics())

        page, now = self.look(question)
        if output == "json":
            print_json({**plain(page), "items": [record(each) for each in page]} if record else page)
            return
        print_table(columns(now), page, empty=empty)
        if page.offset + len(page) < page.total:
            typer.echo(f"{len(page):,} of {page.total:,}; more with --limit and --offset", err=True)


def clock_of(statistics: LightningStoreStatistics) -> float:
    """The store's wall clock, which ages of its records are counted by; this machine's if it does not tell."""
    return statistics.get("host", {}).get("time", time.time())


@dataclass(frozen=True)
class Server(Target):
    """A store behind HTTP."""

    url: str
    """Its root, without a key."""
    api_key: str | None
    """The key that was given for it; None: it is found by ``credentials_for``."""

    def __str__(self) -> str:
        return self.url

    @property
    def credentials(self) -> Credentials:
        """What it is shown, and which certificates are accepted."""
        return credentials_for(self.url, self.api_key)

    @asynccontextmanager
    async def open(self, purpose: Purpose = "serve") -> AsyncGenerator[LightningStore]:
        from agentlightning.http.client.client import LightningStoreClient
        from agentlightning.http.client.retry import Resilience

        ask(self)  # is not tried again, so that a wrong address is told at once
        options: dict[str, Any] = {}
        if purpose != "serve":
            options = {"spool_dir": None, "resilience": Resilience(patience_seconds=_PATIENCE_SECONDS)}
        async with LightningStoreClient(self.url, api_key=self.api_key, **options) as client:
            yield client


@dataclass(frozen=True)
class Database(Target):
    """A store in a file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def is_unowned(self) -> bool:
        return find_owner(self.path) is None

    @asynccontextmanager
    async def open(self, purpose: Purpose = "serve") -> AsyncGenerator[LightningStore]:
        from agentlightning.store.sqlite.store import ReadOnlySqliteStore, SqliteLightningStore

        if self.path.is_dir():
            raise InvalidValue(f"--url {str(self)!r} is a folder; give the database file in it")
        if not self.path.is_file():
            nearby = sorted(each.name for each in self.path.parent.glob("*.db"))
            hint = f"; there are {', '.join(nearby[:5])}" if nearby else ""
            raise InvalidValue(f"there is no database {str(self)!r}{hint}. Give the path of one, or a server's URL")
        serving = find_serving(self.path) if purpose == "act" else None
        if serving is not None:  # only the owner may write, and it takes requests
            async with Server(serving.url, serving.api_key).open(purpose) as store:
                yield store
            return
        try:
            async with (ReadOnlySqliteStore if purpose == "look" else SqliteLightningStore)(self.path) as store:
                yield store
        except StoreOwned as error:
            owner = find_owner(self.path)
            if owner is None:
                raise
            way = (
                f"use --url {' or '.join(owner.server_urls)} instead"
                if owner.server_urls
                else "stop it first, or serve the file with `agl store` and use its URL"
            )
            who = f"process {owner.pid} ({owner.command})"
            raise StoreOwned(f"{who} has {str(self)!r} open, and only one may write; {way}") from error


def locate(url: Url = None, api_key: ApiKey = None) -> Target:
    """What ``--url`` and ``--api-key`` say.

    Args:
        url: a server's URL, in which a key may stand as the password, or the path of a file. None: the server at
            ``AGL_SERVER_HOST`` and ``AGL_SERVER_PORT``, by default on this machine.
        api_key: goes before a key in the URL, which goes before the key that a run of this user on this machine has
            made, and that before ``AGL_API_KEY``.

    Raises:
        InvalidValue: it is neither of the two.
    """
    if url is None:
        host = resolve_str_env_var(LightningEnvVar.AGL_SERVER_HOST, fallback="")
        port = resolve_int_env_var(LightningEnvVar.AGL_SERVER_PORT, fallback=DEFAULT_PORT)
        url = f"http://{'127.0.0.1' if host in _ANY_ADDRESS else host}:{port}"
    scheme, separator, _ = url.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        from agentlightning.http.routes import parse_address

        address = parse_address(url)
        return Server(address.root, api_key or address.api_key)
    if separator:
        raise InvalidValue(f"--url {url!r} is neither a server (http://…, https://…) nor the path of a file")
    if _HOST_AND_PORT.fullmatch(url) and not Path(url).exists():
        raise InvalidValue(f"--url {url!r} has no scheme; if a server is meant, write http://{url}")
    return Database(Path(url))


# --- One question to a server, asked without patience, and what the answer or the silence means ---

_SECONDS = 5.0
_STATISTICS = "/agl/v1/statistics"


class Answer(NamedTuple):
    """What a server said."""

    statistics: dict[str, Any]
    round_trip_seconds: float
    asked_at: float
    """This machine's wall clock half-way between question and answer."""


def ask(server: Server) -> Answer:
    """Ask a server for its statistics, once.

    Raises:
        StoreUnreachable: nobody answers there.
        StoreUnavailable: it answers that it cannot be used now.
        NotAuthenticated, NotAllowed: it wants a key, another key, or another host name.
        BadRequest: what answers is not a store's server, or one of another version.
    """
    before, started = time.time(), time.monotonic()
    status, reply = _get(server, _STATISTICS, _SECONDS)
    seconds = time.monotonic() - started
    if status != 200 or "rollouts_by_status" not in reply:
        raise _refusal(server, status, str(reply.get("detail") or f"status {status}"))
    return Answer(reply, seconds, before + seconds / 2)


def _refusal(server: Server, status: int, detail: str) -> AgentLightningError:
    match status:
        case 401 if server.credentials.api_key is None:
            return NotAuthenticated(
                f"{server} asks for an API key; give --api-key, or set AGL_API_KEY. (Of a run that made its key by "
                "itself, only the user who runs it has the key)"
            )
        case 401:
            return NotAuthenticated(
                f"{server} does not take this API key; give the one that `agl store` was started with "
                "(--api-key goes before one in the URL, and that before AGL_API_KEY)"
            )
        case 403:
            return NotAllowed(f"{server} refuses requests that come this way: {detail}")
        case 404 if _get(server, "/v1/agl/health", _SECONDS)[0] == 200:
            return BadRequest(
                f"{server} is the server of another version (it has no {_STATISTICS}); "
                "install the same version of agentlightning on both sides"
            )
        case 429 | 503 | 507:
            return StoreUnavailable(f"{server} cannot be used now: {detail}")
        case _ if status >= 500:
            return StoreUnavailable(f"{server} answers with an error ({status}: {detail}); its log says why")
        case _:
            return BadRequest(f"what answers at {server} is not the server of a store; check host and port")


def _get(server: Server, path: str, timeout: float) -> tuple[int, dict[str, Any]]:
    """The status of a reply, and its JSON object; an empty one if it has none."""
    parts = urlsplit(server.url)
    credentials = server.credentials
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    if parts.scheme == "https":
        context = credentials.trust.context()
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=timeout, context=context)
    try:
        connection.request("GET", parts.path + path, headers={"Accept": "application/json", **credentials.headers})
        reply = connection.getresponse()
        body = reply.read()
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        raise StoreUnreachable(_silence(server, error)) from error
    finally:
        connection.close()
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    return reply.status, cast("dict[str, Any]", told) if isinstance(told, dict) else {}


def _silence(server: Server, error: Exception) -> str:
    match error:
        case socket.gaierror():
            return f"the host of {server} is not known here ({error.strerror}); check its name"
        case UnicodeError():  # what the encoding of names raises: an empty part, or one of more than 63 characters
            return f"the host of {server} has a name that no host can have; check it"
        case ConnectionRefusedError():
            return (
                f"nothing listens at {server}. Start a server there with `agl store`, "
                f"or name another with --url (http://host:{DEFAULT_PORT}, or the path of a database file); "
                "a Trainer shows the URL of its run"
            )
        case TimeoutError():
            return (
                f"nothing answers at {server} within {_SECONDS:g} s: the host is down, a firewall drops packets, "
                "or the server is stuck"
            )
        case ssl.SSLCertVerificationError():
            return (
                f"the certificate of {server} is not trusted here ({error.verify_message}); "
                "set AGL_TLS_CA_FILE, or SSL_CERT_FILE, to the file with that of its authority"
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
    lock = Path(f"{os.path.realpath(path)}-owner")
    try:
        process = psutil.Process(int(lock.read_text(encoding="ascii")))
        command = " ".join(process.cmdline()) or process.name()
    except (OSError, ValueError, psutil.Error):
        return None
    try:  # the id of a dead owner may have gone to a process that does not hold the lock
        if all(each.path != str(lock) for each in process.open_files()):
            return None
    except psutil.AccessDenied:  # another user's process: what the file says is all that is known
        pass
    except psutil.Error:
        return None
    serving = find_serving(path)
    urls = _servers_of(process) if serving is None else (serving.url,)
    return Owner(process.pid, command if len(command) <= 60 else command[:59] + "…", urls)


def _servers_of(process: psutil.Process) -> tuple[str, ...]:
    try:
        listening = [each.laddr for each in process.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return ()
    places = sorted({("127.0.0.1" if each.ip in ("0.0.0.0", "::") else each.ip, each.port) for each in listening})
    urls = [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in places]
    return tuple(url for url in urls if _serves_a_store(url))


def _serves_a_store(url: str) -> bool:
    try:
        return _get(Server(url, None), "/agl/v1/health/live", _PROBE_SECONDS)[0] == 200
    except StoreUnreachable:
        return False

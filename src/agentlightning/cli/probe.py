"""One question to a server, asked without patience, and what the answer or the silence means."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from agentlightning.cli.target import DEFAULT_PORT, Server
from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    NotAllowed,
    NotAuthenticated,
    StoreUnavailable,
    StoreUnreachable,
)

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

"""A runner joins a server: waits until it is up, and makes sure that it is the one that was meant."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import aiohttp

from agentlightning.errors import ExecutionFailed, WrongServer
from agentlightning.store.client_server.wire.address import parse_address
from agentlightning.store.client_server.wire.routes import CANONICAL

__all__ = ["Joined", "anybody_may", "join_server"]

_log = logging.getLogger(__name__)
_ASK_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_TELL_SECONDS = (1.0, 5.0, 10.0, 20.0, 30.0)
"""When the first countdowns are shown, in seconds since the beginning; then every 30."""


class Joined(NamedTuple):
    """A server, as it says of itself. Two that are equal are one, which was up all the time."""

    run_id: str | None
    """The run that it serves; None: it serves none, or several."""
    instance: str | None
    """Another one for each start of a server."""


async def anybody_may(_: Joined) -> None:
    """Holds nobody back."""


async def join_server(
    url: str,
    *,
    api_key: str | None,
    run_id: str | None,
    limit_seconds: float,
    stopped: Callable[[], bool] = lambda: False,
    held_back: Callable[[Joined], Awaitable[str | None]] = anybody_may,
) -> Joined | None:
    """Wait until the server answers and is ready; a countdown is logged, as a warning.

    Args:
        url: where it is: ``http://host:port``, or with ``https``; maybe with the key.
        api_key: the key; None: that of the URL, if it has one.
        run_id: the run that the server must serve; None: any.
        limit_seconds: how long to wait; may be infinite.
        stopped: whether to give up quietly.
        held_back: why a server that could be joined shall not be, for now; None: it shall.

    Returns:
        The server that has been joined; None: ``stopped``.

    Raises:
        WrongServer: it serves another run, does not take the key, or has a certificate that is not trusted.
        ExecutionFailed: nothing that could be joined has answered in time.
    """
    address = parse_address(url)
    key = api_key or address.api_key
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    began, pause, told = time.monotonic(), _FIRST_PAUSE, 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS), headers=headers) as session:
        while not stopped():
            answer = await _ask(session, address.root, run_id, key)
            problem = await held_back(answer) if isinstance(answer, Joined) else answer
            if isinstance(answer, Joined) and problem is None:
                return answer
            waited = time.monotonic() - began
            if waited >= limit_seconds:
                raise ExecutionFailed(
                    f"no server to join at {address.root} within {limit_seconds:g} s: {problem}. Start the algorithm "
                    "there, or mend server_host and server_port (AGL_SERVER_HOST, AGL_SERVER_PORT)"
                )
            if waited >= _when_to_tell(told):
                told += 1
                left = "no limit" if limit_seconds == math.inf else f"{limit_seconds - waited:.0f} s left"
                _log.warning("waiting for %s: %s; %s", address.root, problem, left)
            await asyncio.sleep(min(pause, max(limit_seconds - waited, 0.0)))
            pause = min(pause * 1.5, _LONGEST_PAUSE)
    return None


async def _ask(session: aiohttp.ClientSession, root: str, run_id: str | None, key: str | None) -> Joined | str:
    """The server, if it can be joined now; else what is in the way."""
    try:
        async with session.get(f"{root}{CANONICAL.prefix}/health/detail") as reply:
            if reply.status in (401, 403):
                given = "the API key that was given" if key else "a client without an API key"
                raise WrongServer(f"the server at {root} refuses {given}; set AGL_API_KEY to the key of the server")
            if reply.status == 404:
                raise WrongServer(f"what answers at {root} is not an Agent Lightning server")
            if reply.status != 200:
                return f"it answers {reply.status}"
            detail: Any = await reply.json()
    except aiohttp.ClientConnectorCertificateError as error:
        why = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
        raise WrongServer(
            f"the certificate of the server at {root} is not trusted here ({why}); "
            "set SSL_CERT_FILE to that of its authority"
        ) from error
    except aiohttp.ClientConnectorError as error:
        reason = error.os_error
        return os.strerror(reason.errno) if reason.errno and reason.errno > 0 else str(reason.strerror or reason)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except ValueError as error:
        raise WrongServer(f"what answers at {root} is not an Agent Lightning server: {error}") from error
    if run_id is not None and detail.get("run_id") != run_id:
        raise WrongServer(
            f"the server at {root} serves run {detail.get('run_id')!r}, and this runner belongs to run {run_id!r}; "
            "give it the address of its own, or the AGL_RUN_ID of that run"
        )
    status = detail.get("status", {}).get("status")
    return Joined(detail.get("run_id"), detail.get("instance")) if status == "ready" else f"it is {status}"


def _when_to_tell(told: int) -> float:
    return _TELL_SECONDS[told] if told < len(_TELL_SECONDS) else 30.0 * (told - len(_TELL_SECONDS) + 2)

"""A runner joins a server: waits until it is up, and makes sure that it is the one that was meant."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from agentlightning.errors import ExecutionFailed, WrongServer
from agentlightning.store.client_server.wire.address import parse_address
from agentlightning.store.client_server.wire.routes import CANONICAL

__all__ = ["join_server"]

_log = logging.getLogger(__name__)
_ASK_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_TELL_SECONDS = (1.0, 5.0, 10.0, 20.0, 30.0)
"""When the first countdowns are shown, in seconds since the beginning; then every 30."""


async def join_server(
    url: str,
    *,
    api_key: str | None,
    run_id: str | None,
    limit_seconds: float,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Wait until the server answers and is ready; a countdown is logged, as a warning.

    Args:
        url: where it is: ``http://host:port``, maybe with the key.
        api_key: the key; None: that of the URL, if it has one.
        run_id: the run that the server must serve; None: any.
        limit_seconds: how long to wait; may be infinite.
        stopped: whether to give up quietly.

    Returns:
        Whether it has been joined; else ``stopped``.

    Raises:
        WrongServer: it serves another run, or does not take the key.
        ExecutionFailed: nothing that could be joined has answered in time.
    """
    address = parse_address(url)
    key = api_key or address.api_key
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    began, pause, told = time.monotonic(), _FIRST_PAUSE, 0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS), headers=headers) as session:
        while not stopped():
            problem = await _ask(session, address.root, run_id, key)
            if problem is None:
                return True
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
    return False


async def _ask(session: aiohttp.ClientSession, root: str, run_id: str | None, key: str | None) -> str | None:
    """What keeps the server from being joined now; None: nothing."""
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
    return None if status == "ready" else f"it is {status}"


def _when_to_tell(told: int) -> float:
    return _TELL_SECONDS[told] if told < len(_TELL_SECONDS) else 30.0 * (told - len(_TELL_SECONDS) + 2)

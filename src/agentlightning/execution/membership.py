"""A runner joins a server: waits until it is up, and makes sure that it is the one that was meant."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, NamedTuple

import aiohttp

from agentlightning.errors import AgentLightningError, ExecutionFailed, NotFound, WrongServer
from agentlightning.execution.supervisor import Slot
from agentlightning.http.routes import CANONICAL, parse_address
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker, WorkerDirective

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


# --- The end of a run, for those who work elsewhere: they are told through the store, and waite ---

_LOOK_SECONDS = 0.05
_MOST_LOOK_SECONDS = 0.5
_GOODBYE_SECONDS = 2.0


async def dismiss(store: LightningStore, directive: WorkerDirective, seconds: float) -> list[str]:
    """Ask all workers to drain or to stop, and wait until they have left.

    A worker has left when it has said goodbye, or its lease has run out. Workers without a lease (of 0.3)
    neither hear nor leave, and are not waited for. Those that come meanwhile are sent away, too.

    Returns:
        The names of those that are still there after ``seconds``.
    """
    await store.direct_workers(directive)
    until, pause = time.monotonic() + seconds, _LOOK_SECONDS
    while True:
        left = await _present(store)
        late = [worker.worker_id for worker in left if worker.directive != directive]
        if late:
            await store.direct_workers(directive, worker_ids=late)
        remaining = until - time.monotonic()
        if not left or remaining <= 0:
            return [worker.worker_id for worker in left]
        await asyncio.sleep(min(pause, remaining))
        pause = min(pause * 1.5, _MOST_LOOK_SECONDS)


async def say_goodbye(store: LightningStore, worker_id: str, error: BaseException | None = None) -> None:
    """A worker's runner has ended: whatever it still holds is lost, and nobody need wait for its lease.

    A store that cannot be told learns it from the lease.

    Args:
        error: what the runner ended with, if it failed.
    """
    message = "its runner has ended" if error is None else f"its runner failed: {type(error).__name__}: {error}"
    reason_code = "resource_exhausted" if isinstance(error, MemoryError) else None
    try:
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await store.report_worker_lost(worker_id, message=_plain(message), reason_code=reason_code)
    except NotFound:
        return  # it never came to introduce itself
    except (TimeoutError, AgentLightningError, NotImplementedError) as error:
        _log.debug("%s could not say goodbye: %s", worker_id, error)


def _plain(text: str) -> str:
    """Without what a store would not take: NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


async def stranded(store: LightningStore) -> int:
    """How many rollouts wait while no worker is there to take them; 0 if one is."""
    statistics = await store.statistics()
    by_status = statistics.get("rollouts_by_status", {})
    waiting = by_status.get("queuing", 0) + by_status.get("requeuing", 0)
    if not waiting or (await store.query_workers(status_in=["idle", "busy"], limit=1)).items:
        return 0
    return waiting


async def _present(store: LightningStore) -> Collection[Worker]:
    workers = await store.query_workers(status_in=["idle", "busy"])
    return [worker for worker in workers if worker.lease_seconds is not None]


# --- Workers that have left, on a machine that stays: which of them may come back to the run th ---

_RETURNING_ASK_SECONDS = 2.0

_LEAVES = frozenset({"drain", "stop", "gone"})
"""The outcomes of a runner that did not leave because it had done its share."""


def away(slots: Sequence[Slot]) -> list[Slot]:
    """Those whose runner has left, and would work on if it could."""
    return [slot for slot in slots if slot.state == "ended" and slot.outcome and slot.outcome.word in _LEAVES]


async def welcome(store: LightningStore, slots: Sequence[Slot]) -> list[str]:
    """Names of those that are not, or not any more, asked to leave; none, if the store cannot be asked.

    A run that comes to its end never takes back what it has asked; an operator may.
    """
    try:
        async with asyncio.timeout(_RETURNING_ASK_SECONDS):
            workers = await asyncio.gather(*(store.get_worker_by_id(slot.name) for slot in slots))
    except (TimeoutError, AgentLightningError, NotImplementedError) as error:
        _log.debug("cannot tell who is asked to leave: %s", error)
        return []
    return [
        slot.name for slot, worker in zip(slots, workers, strict=True) if worker is None or worker.directive is None
    ]

"""How runners join a server, leave it when they are asked to, and come back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import aiohttp

from agentlightning.errors import AgentLightningError, ExecutionFailed, NotFound, WrongServer
from agentlightning.execution.slots import Slot
from agentlightning.http.routes import CANONICAL
from agentlightning.lifecycle import reasons
from agentlightning.security.credentials import Credentials
from agentlightning.store.base import LightningStore
from agentlightning.types import Attempt, Worker, WorkerDirective

_log = logging.getLogger(__name__)

# --- Joining ---------------------------------------------------------------------------------------------------------

_REQUEST_SECONDS = 5.0
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.1, 2.0
_LOG_SECONDS = (1.0, 5.0, 10.0, 20.0)
"""When the first countdowns are logged, in seconds since the beginning; then every 30 seconds."""


class JoinedServer(NamedTuple):
    """A server, as it describes itself. Two that are equal are the same server, which has not restarted between."""

    run_id: str | None  # the run that it serves; None: it serves none, or several
    instance: str | None  # a different one for each start of a server


async def join_server(
    url: str,
    credentials: Callable[[], Credentials],
    *,
    run_id: str | None,
    limit_seconds: float,
    reason_to_wait: Callable[[JoinedServer], Awaitable[str | None]] | None = None,
) -> JoinedServer:
    """Wait until the server answers and is ready; a countdown is logged as a warning.

    Args:
        url: of the server, without a key: ``http://host:port``, or with ``https``.
        credentials: finds what to show to it. It is asked for each try: the key of a server on this machine may be
            known only when that has begun.
        run_id: the run that the server must serve; None: any.
        limit_seconds: how long to wait; may be infinite.
        reason_to_wait: returns why a server that is ready shall not be joined yet; None: it may be joined.

    Returns:
        The server that has been joined.

    Raises:
        WrongServer: it serves another run, does not take the key, refuses runners of this machine, or has a
            certificate that is not trusted.
        ExecutionFailed: no server that could be joined has answered in time.
    """
    began, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    log_at = itertools.chain(_LOG_SECONDS, itertools.count(30.0, 30.0))
    next_log = next(log_at)
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    trust = credentials().trust.context() or True
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(ssl=trust)) as session:
        while True:
            answer = await _probe(session, url, run_id, credentials)
            if isinstance(answer, JoinedServer):
                problem = None if reason_to_wait is None else await reason_to_wait(answer)
                if problem is None:
                    return answer
            else:
                problem = answer
            waited = time.monotonic() - began
            if waited >= limit_seconds:
                raise ExecutionFailed(
                    f"no server to join at {url} within {limit_seconds:g} s: {problem}. Start the algorithm "
                    "there, or correct server_host and server_port (AGL_SERVER_HOST, AGL_SERVER_PORT)"
                )
            if waited >= next_log:
                next_log = next(log_at)
                left = "no limit" if limit_seconds == math.inf else f"{limit_seconds - waited:.0f} s left"
                _log.warning("waiting for %s: %s; %s", url, problem, left)
            await asyncio.sleep(min(pause, max(limit_seconds - waited, 0.0)))
            pause = min(pause * 1.5, _MAX_PAUSE_SECONDS)


async def _probe(
    session: aiohttp.ClientSession, root: str, run_id: str | None, credentials: Callable[[], Credentials]
) -> JoinedServer | str:
    """The server if it is ready; else why it is not. Raises ``WrongServer`` if waiting would not help."""
    shown = credentials()
    try:
        async with session.get(f"{root}{CANONICAL.prefix}/health/detail", headers=shown.headers) as reply:
            if reply.status == 401 and credentials() != shown:
                return "it has begun just now"  # after the question for its key, and before this request
            if reply.status in (401, 403):
                given = "the API key that was given" if shown.api_key else "a client without an API key"
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
            "set AGL_TLS_CA_FILE, or SSL_CERT_FILE, to the file with that of its authority"
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
    if "refusal" in detail:
        raise WrongServer(f"the server at {root} refuses runners of this machine: {detail['refusal']}")
    status = detail.get("status", {}).get("status")
    return JoinedServer(detail.get("run_id"), detail.get("instance")) if status == "ready" else f"it is {status}"


# --- Leaving: workers on other machines are asked through the store, and waited for -----------------------------------

_FIRST_POLL_SECONDS, _MAX_POLL_SECONDS = 0.05, 0.5
_DEREGISTER_SECONDS = 2.0
_UNSERVED_POLL_SECONDS = 1.0
_UNSERVED_POLLS = 3
"""How often in a row rollouts must be found waiting without a worker before the run fails: a worker on another machine
may just be about to register."""


async def ask_workers_to_leave(store: LightningStore, directive: WorkerDirective, seconds: float) -> list[str]:
    """Ask all workers to drain or to stop, and wait until they have left.

    A worker has left when it has deregistered, or when its lease has expired. Workers without a lease (clients of 0.3)
    do not see the request and are not waited for. Workers that register meanwhile are asked too.

    Returns:
        The names of the workers that are still there after ``seconds``.
    """
    await store.direct_workers(directive)
    until, pause = time.monotonic() + seconds, _FIRST_POLL_SECONDS
    while True:
        workers = await store.query_workers(status_in=["idle", "busy"])
        present = [worker for worker in workers if worker.lease_seconds is not None]
        late = [worker.worker_id for worker in present if worker.directive != directive]
        if late:
            await store.direct_workers(directive, worker_ids=late)
        remaining = until - time.monotonic()
        if not present or remaining <= 0:
            return [worker.worker_id for worker in present]
        await asyncio.sleep(min(pause, remaining))
        pause = min(pause * 1.5, _MAX_POLL_SECONDS)


async def deregister_worker(store: LightningStore, worker_id: str, error: BaseException | None = None) -> None:
    """Report that a worker's runner has ended, so that what it still holds is handed on before its lease expires.

    If the store cannot be told, the lease expires instead. ``error``: why the runner failed, if it did; one that was
    cancelled or interrupted has ended as it was asked to.
    """
    error = None if isinstance(error, asyncio.CancelledError | KeyboardInterrupt) else error
    message = "its runner has ended" if error is None else f"its runner failed: {type(error).__name__}: {error}"
    message = message.replace("\0", "").encode("utf-8", "replace").decode()  # a store refuses NUL and lone surrogates
    reason_code = reasons.WORKER_LEFT if error is None else None
    reason_code = reasons.RESOURCE_EXHAUSTED if isinstance(error, MemoryError) else reason_code
    loss = await report_lost(store, worker_id, message, reason_code, _DEREGISTER_SECONDS)
    if loss.problem is not None:
        _log.debug("%s could not deregister: %s", worker_id, loss.problem)


class Loss(NamedTuple):
    """What the store made of the report that a worker is gone."""

    attempts: Sequence[Attempt] = ()  # that were ended by it
    problem: Exception | None = None  # why the store could not be told


async def report_lost(
    store: LightningStore,
    worker_id: str,
    message: str,
    reason_code: str | None,
    seconds: float,
    at_work: Sequence[str] | None = None,
) -> Loss:
    """Report that a worker is gone, within so many seconds. ``at_work``: the attempts that it worked on, if known."""
    known: dict[str, Any] = {} if at_work is None else {"attempt_ids": at_work}
    try:
        async with asyncio.timeout(seconds):
            lost = await store.report_worker_lost(worker_id, message=message, reason_code=reason_code, **known)
    except NotFound:
        return Loss()  # it had not registered, so it held nothing
    except (TimeoutError, AgentLightningError, NotImplementedError) as error:
        return Loss(problem=error)
    return Loss(lost)


async def find_worker(store: LightningStore, worker_id: str, seconds: float) -> Worker | None:
    """A worker, if the store knows it. Raises ``TimeoutError``, and what the store raises."""
    async with asyncio.timeout(seconds):
        return await store.get_worker_by_id(worker_id)


async def find_directive(store: LightningStore, worker_id: str, seconds: float) -> WorkerDirective | None:
    """What a worker is asked to do, if anything. Raises as ``find_worker``."""
    worker = await find_worker(store, worker_id, seconds)
    return None if worker is None else worker.directive


async def unserved_rollouts(store: LightningStore) -> int:
    """How many rollouts wait while no worker is there to claim them; 0 if there is one."""
    waiting = await waiting_rollouts(store)
    return 0 if waiting and (await store.query_workers(status_in=["idle", "busy"], limit=1)).items else waiting


async def waiting_rollouts(store: LightningStore) -> int:
    """How many rollouts wait to be claimed."""
    by_status = (await store.statistics()).get("rollouts_by_status", {})
    return by_status.get("queuing", 0) + by_status.get("requeuing", 0)


async def failure_when_unserved(count: Callable[[], Awaitable[int]]) -> ExecutionFailed:
    """Wait until rollouts wait that nobody will run: ``count`` returns how many, and never changes.

    It is called after the last runner of this run has ended.
    """
    polls, waiting = 0, 0
    while polls < _UNSERVED_POLLS or not waiting:
        await asyncio.sleep(_UNSERVED_POLL_SECONDS)
        try:
            before, waiting = waiting, await count()
        except AgentLightningError as error:
            _log.debug("cannot tell whether rollouts wait: %s", error)
            continue
        polls = polls + 1 if waiting == before else 1
    return ExecutionFailed(
        f"all runners of this run have ended, and {waiting} rollouts wait without a worker; "
        "increase max_rollouts, or leave it out, or use more runners"
    )


# --- Coming back, on a machine that stays for the next run ------------------------------------------------------------

_REJOIN_REQUEST_SECONDS = 2.0


async def may_rejoin(store: LightningStore, slots: Sequence[Slot]) -> list[str]:
    """Names of the workers that are not asked to leave, or not any more; none if the store cannot be asked.

    A run that ends never takes its request back; an operator may, by ``agl resume``.
    """
    names = [slot.name for slot in slots]
    try:
        found = await asyncio.gather(*(find_directive(store, name, _REJOIN_REQUEST_SECONDS) for name in names))
    except (TimeoutError, AgentLightningError, NotImplementedError) as error:
        _log.debug("cannot tell which workers are asked to leave: %s", error)
        return []
    return [name for name, directive in zip(names, found, strict=True) if directive is None]

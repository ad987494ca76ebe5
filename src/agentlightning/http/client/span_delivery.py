"""How spans get from a client to the server: at once, or by way of this machine's disk.

While anything waits on the disk, what comes after it goes there too, so that the spans of an attempt arrive
in their order. A span is accepted when the server has it, or the disk. A thread takes spans from the disk to the
server. It has an event loop of its own, so that spans go on being delivered whatever becomes of the loops of the
client's callers, and lives only as long as there is something to deliver.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from agentlightning.errors import (
    AgentLightningError,
    Conflict,
    InvalidValue,
    NotFound,
    SpoolFull,
    StoreClosed,
    StoreUnavailable,
    StoreUnreachable,
)
from agentlightning.http.client.calls import Caller, plan_of
from agentlightning.http.client.health import SpoolReport
from agentlightning.http.client.spool import Batch, Spool, SpoolFolder
from agentlightning.store.refusals import is_refusal, send_apart
from agentlightning.types.plain_spans import SpanOrPlain

_logger = logging.getLogger(__name__)

_CHUNK_BYTES = 16 * 1024 * 1024
"""A request is full when it has this many bytes; a server takes four times as many."""
_CHUNK_SPANS = 2048
_SPOOLED_SPANS = 512
_SPOOLED_BYTES = 2 * 1024 * 1024
_LOOK_AGAIN_SECONDS = 1.0
_PAUSES = (0.5, 1.0, 2.0, 5.0)
"""Seconds between rounds in which the server could not be reached, and before a span that alone made it fail is sent
again. Each round has its own retries."""
_INTERNAL_ERRORS = 3
"""A span that alone makes the server fail so often counts as refused."""

_Attempt = tuple[str, str | None]
"""Ids of a rollout and its attempt; None: all of them."""


class SpanDelivery:
    """Sends spans, and keeps those that cannot be sent.

    Args:
        caller: makes the calls.
        folder: where the spools of this server are; None: spans are never put on the disk.
        spool_after_seconds: how long spans are tried to be sent first.
    """

    def __init__(self, caller: Caller, folder: SpoolFolder | None, spool_after_seconds: float) -> None:
        self._caller = caller
        self._folder = folder
        self._limits = {} if folder is None else {"patience_seconds": spool_after_seconds, "waits_while_shed": False}
        self._lock = threading.Lock()
        self._own: Spool | None = None
        self._adopted: list[Spool] = []
        self._waiting: deque[_Attempt] = deque()
        self._by_attempt: Counter[_Attempt] = Counter()
        self._progress: list[Future[None]] = []
        self.orphans_unknown = folder is not None
        self._counts = Counter[str]()
        self._thread: threading.Thread | None = None
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._stopping = False

    async def add(self, encoded: Sequence[bytes], spans: Sequence[SpanOrPlain]) -> list[int | None]:
        """Hand over spans.

        Args:
            encoded: each as JSON.
            spans: the same spans.

        Returns:
            The sequence id of each, 0 for one that the server had before, None for one that waits on the disk.

        Raises:
            SpoolFull: neither the server nor the disk took them in all the caller's patience.
            AgentLightningError: the server refused them.
        """
        plan = plan_of("add_many_spans")
        issued: list[int | None] = []
        if self.orphans_unknown:
            self.look_for_orphans()
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._caller.patience_seconds
        pushed_back = False
        while len(issued) < len(encoded):
            if not self._waiting:
                try:
                    while len(issued) < len(encoded):
                        chunk = encoded[len(issued) : _end_of_chunk(encoded, len(issued))]
                        request = self._caller.with_body(plan, _body(chunk))._replace(**self._limits)
                        issued += plan.result(await self._caller.send(request))
                    break
                except (InvalidValue, NotFound, Conflict) as error:
                    sent = len(issued)
                    error.refused_spans = [each._replace(place=sent + each.place) for each in error.refused_spans]
                    raise
                except StoreUnavailable as error:
                    if self._folder is None:
                        raise
                    _logger.debug("spans go to the disk: %s", error.message)
            rest = encoded[len(issued) :]
            try:
                await asyncio.to_thread(self._write, rest, spans[len(issued) :])
                issued += [None] * len(rest)
            except SpoolFull:
                with self._lock:
                    self._counts["pushed_back"] += not pushed_back
                pushed_back = True
                await self._wait_for_progress(deadline)
                if clock() >= deadline:
                    raise
        return issued

    async def send_with(self, method: str, arguments: Mapping[str, Any], encoded: Sequence[bytes]) -> Any | None:
        """Make a call that carries spans. None: it was not made, because the spans have to be added first.

        That is so when other spans wait on the disk, when these are too large for one request, or when the server is
        out of reach: spans in memory would be lost with the process while the call is tried again and again.
        """
        if self._waiting or _end_of_chunk(encoded, 0) < len(encoded):
            return None
        try:
            spans = list(map(msgspec.Raw, encoded))
            return await self._caller.call(method, {**arguments, "spans": spans}, **self._limits)
        except StoreUnavailable as error:
            if self._folder is None or isinstance(error, StoreClosed):
                raise
            _logger.debug("spans go apart from %s: %s", method, error.message)
            return None

    async def settle(self, rollout_id: str, attempt_id: str | None) -> None:
        """Wait until the server has all spans of an attempt, or of a rollout, that wait on the disk.

        Raises:
            StoreUnreachable: it still has not got them when the caller's patience has run out.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._caller.patience_seconds
        while self._waiting:
            with self._lock:
                waiting = self._by_attempt[rollout_id, attempt_id]
            if not waiting:
                return
            if clock() >= deadline:
                raise StoreUnreachable(
                    f"{waiting} spans of rollout {rollout_id} still wait on this machine's disk for the server, and "
                    "must arrive before their attempt ends. Try again when the server is back"
                )
            await self._wait_for_progress(deadline)

    def look_for_orphans(self) -> None:
        """Take over the spools of dead processes on this machine. To be called once, when ``orphans_unknown``."""
        self.orphans_unknown = False
        if self._folder is not None and any(self._folder.root.glob("*.spool")):
            with self._lock:
                self._start()

    def report(self) -> SpoolReport | None:
        """What waits, and what became of what had to wait; None if nothing ever had to."""
        with self._lock:
            if self._own is None and not self._counts:
                return None
            waiting_bytes = 0 if self._own is None else self._own.waiting_bytes
            return SpoolReport(waiting_spans=len(self._waiting), waiting_bytes=waiting_bytes, **self._counts)

    async def close(self, grace_seconds: float) -> None:
        """Deliver what can be delivered in so many seconds; the rest stays on the disk. Idempotent."""
        thread = self._thread
        if thread is not None:
            await asyncio.to_thread(thread.join, grace_seconds if self._waiting else 0.0)
            with self._lock:
                self._stopping = True
                running = self._running
            if running is not None:
                loop, task = running
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
            await asyncio.to_thread(thread.join)
        with self._lock:
            if self._waiting and self._own is not None:
                left, folder = len(self._waiting), self._own.folder
                _logger.warning("%d spans stay in %s; the next client on this machine delivers them", left, folder)
            for each in [*self._adopted, *filter(None, [self._own])]:
                each.close()
            self._own, self._adopted = None, []
            self._waiting.clear()
            self._by_attempt.clear()
            self.orphans_unknown = self._folder is not None
            self._stopping = False

    def abandon(self) -> None:
        """In a forked child: what waits is the parent's. Close the descriptors and touch nothing else."""
        for each in [*self._adopted, *filter(None, [self._own])]:
            each.abandon()

    def _write(self, encoded: Sequence[bytes], spans: Sequence[SpanOrPlain]) -> None:
        """Put spans on the disk, behind all that wait there."""
        assert self._folder is not None
        attempts = [(span.rollout_id, span.attempt_id) for span in spans]
        with self._lock:
            own = self._own = self._own or self._folder.create()
            self._folder.check_room(own, sum(map(len, encoded)))
            own.append(encoded)
            if not self._waiting:
                _logger.warning("the server is out of reach: spans go to %s", own.folder)
            self._waiting.extend(attempts)
            self._by_attempt.update(attempts)
            self._by_attempt.update((rollout_id, None) for rollout_id, _ in attempts)
            self._counts["spooled"] += len(attempts)
            self._start()

    async def _wait_for_progress(self, deadline: float) -> None:
        woken = Future[None]()
        with self._lock:
            self._progress.append(woken)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(deadline - asyncio.get_running_loop().time(), _LOOK_AGAIN_SECONDS)):
                await asyncio.wrap_future(woken)

    # --- In the thread ---------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="agl-spool", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._deliver_all())
        except asyncio.CancelledError:
            pass
        except Exception:
            _logger.exception("delivering spans has ended; they stay on the disk")
        finally:
            with self._lock:
                self._running = None
                if self._thread is threading.current_thread():
                    self._thread = None

    async def _deliver_all(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        assert self._folder is not None
        with self._lock:
            if self._stopping:
                return
            self._running = (asyncio.get_running_loop(), task)
        found = self._folder.adopt()
        if found:
            with self._lock:
                self._adopted += found
                self._counts["adopted"] += len(found)
            _logger.info("%d spools of dead processes were taken over", len(found))
        while (spool := self._next()) is not None:
            await self._deliver(spool, self._folder)

    def _next(self) -> Spool | None:
        """A spool with something in it; if there is none, the thread ends, and nobody believes it to be there."""
        with self._lock:
            for each in [each for each in self._adopted if each.empty]:
                each.close()
                self._adopted.remove(each)
            if self._own is not None and not self._own.empty:
                return self._own
            if not self._adopted:
                self._thread = None
                return None
            return self._adopted[0]

    async def _deliver(self, spool: Spool, folder: SpoolFolder) -> None:
        """Send what the spool holds now, and put away what the server refuses for good."""
        failed_rounds = 0
        refused: list[tuple[bytes, AgentLightningError]] = []
        suspects = Counter[bytes]()
        """How often each span alone made the server fail."""

        async def put_away(spans: Sequence[bytes], error: AgentLightningError) -> Sequence[bytes]:
            if is_refusal(error):
                refused.extend((span, error) for span in spans)
                return ()
            [span] = spans
            while not is_refusal(error):  # it may have been the server: try it here, before what comes behind it
                suspects[span] += 1
                if suspects[span] >= _INTERNAL_ERRORS:
                    break
                await asyncio.sleep(_PAUSES[min(suspects[span], len(_PAUSES)) - 1])
                try:
                    await self._send_waiting(spans)
                    return ()
                except AgentLightningError as again:
                    if not _may_be_refusal(again):
                        raise
                    error = again
            refused.append((span, error))
            return ()

        while True:
            refused.clear()
            try:
                batch = spool.next_batch(_SPOOLED_SPANS, _SPOOLED_BYTES)
                if batch is None:
                    return
                await send_apart(
                    batch.spans, self._send_waiting, put_away, attempt_of=_attempt_of, is_refusal=_may_be_refusal
                )
            except (AgentLightningError, OSError) as error:
                _logger.debug("spans wait in %s: %s", spool.folder, error)
                await asyncio.sleep(_PAUSES[min(failed_rounds, len(_PAUSES) - 1)])
                failed_rounds += 1
                continue
            failed_rounds = 0
            suspects.clear()
            discarded = _put_into_quarantine(folder, refused)
            spool.acknowledge(batch)
            self._delivered(spool, batch, len(refused), discarded)

    async def _send_waiting(self, spans: Sequence[bytes]) -> object:
        plan = plan_of("add_many_spans")
        request = self._caller.with_body(plan, _body(spans))._replace(patience_seconds=self._caller.timeout_seconds)
        return plan.result(await self._caller.send(request))

    def _delivered(self, spool: Spool, batch: Batch, refused: int, discarded: int) -> None:
        with self._lock:
            self._counts["delivered"] += len(batch.spans) - refused
            self._counts["refused"] += refused
            self._counts["discarded"] += discarded
            if spool is self._own:
                for _ in range(min(len(batch.spans), len(self._waiting))):
                    rollout_id, attempt_id = self._waiting.popleft()
                    for key in ((rollout_id, attempt_id), (rollout_id, None)):
                        self._by_attempt[key] -= 1
                        if not self._by_attempt[key]:
                            del self._by_attempt[key]
                if spool.empty:
                    self._waiting.clear()
                    self._by_attempt.clear()
                    _logger.info("all spans that had to wait are with the server")
            woken, self._progress = self._progress, []
        for each in woken:
            if each.set_running_or_notify_cancel():
                each.set_result(None)


def _may_be_refusal(error: AgentLightningError) -> bool:
    """Also an internal error may be about one of the spans."""
    return is_refusal(error) or type(error) is AgentLightningError


class _Ids(msgspec.Struct):
    """What interests here of a span's JSON."""

    rollout_id: str
    attempt_id: str


_ids_of = msgspec.json.Decoder(_Ids).decode


def _attempt_of(span: bytes) -> tuple[str, str]:
    ids = _ids_of(span)
    return ids.rollout_id, ids.attempt_id


def _put_into_quarantine(folder: SpoolFolder, refused: Sequence[tuple[bytes, AgentLightningError]]) -> int:
    """Put away what was refused for good; returns for how many there was no room."""
    if not refused:
        return 0
    try:
        kept = folder.quarantine(refused)
    except OSError as error:  # they must not hold up what can be delivered
        _logger.error("%s cannot be written: %s", folder.quarantine_file, error)
        kept = 0
    _logger.error(
        "%d spans were refused for good; %d of them found room in %s. The first: %s",
        *(len(refused), kept, folder.quarantine_file, refused[0][1]),
    )
    return len(refused) - kept


def _end_of_chunk(encoded: Sequence[bytes], start: int) -> int:
    """Behind the last of the spans that go into one request; at least one does."""
    end, size = start, 0
    most = min(len(encoded), start + _CHUNK_SPANS)
    while end < most and (size == 0 or size + len(encoded[end]) <= _CHUNK_BYTES):
        size += len(encoded[end])
        end += 1
    return end


def _body(spans: Sequence[bytes]) -> bytes:
    return b'{"spans":[' + b",".join(spans) + b"]}"

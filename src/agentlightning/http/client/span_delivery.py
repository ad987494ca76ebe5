"""How spans get from a client to the server: at once, or by way of this machine's disk.

While anything waits on the disk, what comes after it goes there too, so that the spans of an attempt arrive
in their order. A span is accepted when the server has it, or the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from agentlightning.errors import SpoolFull, StoreClosed, StoreUnavailable, StoreUnreachable
from agentlightning.http.client.calls import Caller
from agentlightning.http.client.health import SpoolReport
from agentlightning.http.client.spool import Batch, Spool, SpoolFolder
from agentlightning.http.client.spool_sender import SpoolSender

_logger = logging.getLogger(__name__)

_CHUNK_BYTES = 16 * 1024 * 1024
"""A request is full when it has this many bytes; a server takes four times as many."""
_CHUNK_SPANS = 2048
_LOOK_AGAIN_SECONDS = 1.0

_Attempt = tuple[str, str]


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
        self._spool_after_seconds = spool_after_seconds
        self._sender = None if folder is None else SpoolSender(folder, self._send_waiting, self._delivered)
        self._lock = threading.Lock()
        self._own: Spool | None = None
        self._waiting: deque[_Attempt] = deque()
        self._by_attempt: Counter[_Attempt] = Counter()
        self._progress: list[Future[None]] = []
        self._looked_for_orphans = False
        self._counts = Counter[str]()

    async def add(self, encoded: Sequence[bytes], attempts: Sequence[_Attempt]) -> list[int | None]:
        """Hand over spans.

        Args:
            encoded: each as JSON.
            attempts: the rollout id and attempt id of each.

        Returns:
            The sequence id of each, 0 for one that the server had before, None for one that waits on the disk.

        Raises:
            SpoolFull: neither the server nor the disk took them in all the caller's patience.
            AgentLightningError: the server refused them.
        """
        issued: list[int | None] = []
        self.look_for_orphans()
        deadline = time.monotonic() + self._caller.patience_seconds
        pushed_back = False
        while len(issued) < len(encoded):
            if not self._waiting:
                try:
                    await self._send_chunks(encoded, issued)
                    break
                except StoreUnavailable as error:
                    if self._folder is None:
                        raise
                    _logger.debug("spans go to the disk: %s", error.message)
            rest = encoded[len(issued) :]
            try:
                await asyncio.to_thread(self._write, rest, attempts[len(issued) :])
                issued += [None] * len(rest)
            except SpoolFull:
                if not pushed_back:
                    pushed_back = True
                    self._count("pushed_back")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                await self._wait_for_progress(min(left, _LOOK_AGAIN_SECONDS))
        return issued

    async def send_with(self, method: str, arguments: Mapping[str, Any], encoded: Sequence[bytes]) -> Any | None:
        """Make a call that carries spans. None: it was not made, because the spans have to be added first.

        That is so when other spans wait on the disk, when these are too large for one request, or when the server is
        out of reach: spans in memory would be lost with the process while the call is tried again and again.
        """
        if self._waiting or len(encoded) > _CHUNK_SPANS or sum(map(len, encoded)) > _CHUNK_BYTES:
            return None
        patience = self._caller.patience_seconds if self._folder is None else self._spool_after_seconds
        try:
            return await self._caller.call(
                method,
                {**arguments, "spans": list(map(msgspec.Raw, encoded))},
                patience_seconds=patience,
                waits_while_shed=self._folder is None,
            )
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
        deadline = time.monotonic() + self._caller.patience_seconds
        while waiting := self._count_waiting(rollout_id, attempt_id):
            left = deadline - time.monotonic()
            if left <= 0:
                raise StoreUnreachable(
                    f"{waiting} spans of rollout {rollout_id} still wait on this machine's disk for the server, and "
                    "must arrive before their attempt ends. Try again when the server is back"
                )
            await self._wait_for_progress(min(left, _LOOK_AGAIN_SECONDS))

    def look_for_orphans(self) -> None:
        """The first time it is called: take over the spools of dead processes on this machine."""
        if self._looked_for_orphans or self._folder is None or self._sender is None:
            return
        self._looked_for_orphans = True
        if self._folder.orphans_exist():
            self._sender.watch(self._own)

    def report(self) -> SpoolReport | None:
        """What waits, and what became of what had to wait; None if nothing ever had to."""
        with self._lock:
            own = self._own
            adopted = 0 if self._sender is None else self._sender.adopted
            if own is None and not adopted and not self._counts:
                return None
            return SpoolReport(
                waiting_spans=len(self._waiting),
                waiting_bytes=0 if own is None else own.waiting_bytes,
                spooled=self._counts["spooled"],
                delivered=self._counts["delivered"],
                refused=self._counts["refused"],
                pushed_back=self._counts["pushed_back"],
                adopted=adopted,
            )

    async def close(self, grace_seconds: float) -> None:
        """Deliver what can be delivered in so many seconds; the rest stays on the disk. Idempotent."""
        if self._sender is None:
            return
        await self._sender.stop(grace_seconds if self._waiting else 0.0)
        with self._lock:
            own, self._own = self._own, None
            left = len(self._waiting)
            self._waiting.clear()
            self._by_attempt.clear()
            self._looked_for_orphans = False
        if own is not None:
            if left:
                _logger.warning("%d spans stay in %s; the next client on this machine delivers them", left, own.folder)
            own.close()

    async def _send_chunks(self, encoded: Sequence[bytes], issued: list[int | None]) -> None:
        """Send spans in as few requests as their size allows; ``issued`` grows with each."""
        patience = self._caller.patience_seconds if self._folder is None else self._spool_after_seconds
        while len(issued) < len(encoded):
            end, size = len(issued), 0
            most = min(len(encoded), end + _CHUNK_SPANS)
            while end < most and (size == 0 or size + len(encoded[end]) <= _CHUNK_BYTES):
                size += len(encoded[end])
                end += 1
            issued += await self._caller.post(
                "add_many_spans",
                _body(encoded[len(issued) : end]),
                patience_seconds=patience,
                waits_while_shed=self._folder is None,
            )

    async def _send_waiting(self, spans: Sequence[bytes]) -> object:
        return await self._caller.post("add_many_spans", _body(spans), patience_seconds=self._caller.timeout_seconds)

    def _write(self, encoded: Sequence[bytes], attempts: Sequence[_Attempt]) -> None:
        """Put spans on the disk, behind all that wait there."""
        assert self._folder is not None
        assert self._sender is not None
        with self._lock:
            own = self._own = self._own or self._folder.create()
            self._folder.check_room(own, sum(map(len, encoded)))
            own.append(encoded)
            if not self._waiting:
                _logger.warning("the server is out of reach: spans go to %s", own.folder)
            self._waiting.extend(attempts)
            self._by_attempt.update(attempts)
            self._counts["spooled"] += len(attempts)
        self._sender.watch(own)

    def _delivered(self, spool: Spool, batch: Batch, refused: int) -> None:
        with self._lock:
            self._counts["delivered"] += len(batch.spans) - refused
            self._counts["refused"] += refused
            if spool is self._own:
                for _ in range(min(len(batch.spans), len(self._waiting))):
                    self._by_attempt[self._waiting.popleft()] -= 1
                if spool.empty:
                    self._waiting.clear()
                    self._by_attempt.clear()
                    _logger.info("all spans that had to wait are with the server")
            woken, self._progress = self._progress, []
        for each in woken:
            if each.set_running_or_notify_cancel():
                each.set_result(None)

    def _count_waiting(self, rollout_id: str, attempt_id: str | None) -> int:
        if not self._waiting:
            return 0
        with self._lock:
            if attempt_id is not None:
                return self._by_attempt[rollout_id, attempt_id]
            return sum(number for (rollout, _), number in self._by_attempt.items() if rollout == rollout_id)

    async def _wait_for_progress(self, seconds: float) -> None:
        woken = Future[None]()
        with self._lock:
            self._progress.append(woken)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.wrap_future(woken)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def abandon(self) -> None:
        """In a forked child: what waits is the parent's. Close the descriptors and touch nothing else."""
        if self._own is not None:
            self._own.abandon()
        if self._sender is not None:
            self._sender.abandon()


def _body(spans: Sequence[bytes]) -> bytes:
    return b'{"spans":[' + b",".join(spans) + b"]}"

"""The thread that takes spans from the disk to the server.

It has an event loop of its own, so that spans go on being delivered whatever becomes of the loops of the client's
callers, and lives only as long as there is something to deliver.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence

from agentlightning.errors import AgentLightningError, Conflict, InvalidValue, NotFound
from agentlightning.http.client.spool import Batch, Spool, SpoolFolder

_logger = logging.getLogger(__name__)

_MAX_SPANS = 512
_MAX_BYTES = 2 * 1024 * 1024
_PAUSES = (0.5, 1.0, 2.0, 5.0)
"""Seconds between rounds in which the server could not be reached; each round has its own retries."""
_REFUSED = (InvalidValue, NotFound, Conflict)
"""What no repeat will change."""
_INTERNAL_ERROR_ROUNDS = 3
"""After so many rounds in which one span alone makes the server fail, it counts as refused."""


class SpoolSender:
    """Delivers spools, each in its order, and puts away what is refused.

    Args:
        folder: where the spools are.
        send: sends spans in one request; tries for a while, then raises ``StoreUnavailable``.
        on_delivered: hears, in the sender's thread, of each batch that is done with, and how many spans of it were
            refused.
    """

    def __init__(
        self,
        folder: SpoolFolder,
        send: Callable[[Sequence[bytes]], Awaitable[object]],
        on_delivered: Callable[[Spool, Batch, int], None],
    ) -> None:
        self._folder = folder
        self._send = send
        self._on_delivered = on_delivered
        self._lock = threading.Lock()
        self._own: Spool | None = None
        self._adopted: list[Spool] = []
        self._adopted_count = 0
        self._thread: threading.Thread | None = None
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._stopping = False

    @property
    def adopted(self) -> int:
        """How many spools of dead processes were taken over."""
        return self._adopted_count

    def watch(self, own: Spool | None) -> None:
        """Deliver this spool, and those of dead processes; returns at once.

        Args:
            own: this process's spool; None if it has none yet.
        """
        with self._lock:
            self._own = own if own is not None else self._own
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="agl-spool", daemon=True)
                self._thread.start()

    async def stop(self, grace_seconds: float) -> None:
        """Stop delivering, at the latest after so many seconds; what is left stays on the disk. Idempotent."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            await asyncio.to_thread(thread.join, grace_seconds)
            with self._lock:
                self._stopping = True
                running = self._running
            if running is not None:
                loop, task = running
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
            await asyncio.to_thread(thread.join)
        with self._lock:
            self._stopping = False
            self._thread = None
            for each in self._adopted:
                each.close()
            self._adopted = []
            self._own = None

    def abandon(self) -> None:
        """In a forked child: thread and spools are the parent's."""
        for each in self._adopted:
            each.abandon()

    def _run(self) -> None:
        try:
            asyncio.run(self._deliver_all())
        except asyncio.CancelledError:
            pass
        except Exception:
            _logger.exception("delivering spans from %s has ended; they stay on the disk", self._folder.root)
        finally:
            with self._lock:
                self._running = None
                if self._thread is threading.current_thread():
                    self._thread = None

    async def _deliver_all(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        with self._lock:
            if self._stopping:
                return
            self._running = (asyncio.get_running_loop(), task)
        found = self._folder.adopt()
        with self._lock:
            self._adopted += found
            self._adopted_count += len(found)
        if found:
            _logger.info("%d spools of dead processes were taken over", len(found))
        while (spool := self._next()) is not None:
            await self._deliver(spool)

    def _next(self) -> Spool | None:
        """A spool with something in it; if there is none, the thread ends, and nobody believes it to be there."""
        with self._lock:
            for each in [each for each in self._adopted if each.empty]:
                each.close()
                self._adopted.remove(each)
            if self._own is not None and not self._own.empty:
                return self._own
            if self._adopted:
                return self._adopted[0]
            self._thread = None
            return None

    async def _deliver(self, spool: Spool) -> None:
        """Send what the spool holds now."""
        most = _MAX_SPANS
        failed_rounds = 0
        while True:
            try:
                batch = spool.next_batch(most, _MAX_BYTES)
                if batch is None:
                    return
                refused = await self._send_or_put_away(batch, failed_rounds)
            except (AgentLightningError, OSError) as error:
                _logger.debug("spans wait in %s: %s", spool.folder, error)
                await asyncio.sleep(_PAUSES[min(failed_rounds, len(_PAUSES) - 1)])
                failed_rounds += 1
                continue
            failed_rounds = 0
            if refused is None:
                most = (len(batch.spans) + 1) // 2
                continue
            most = min(_MAX_SPANS, most * 2)
            spool.acknowledge(batch)
            self._on_delivered(spool, batch, refused)

    async def _send_or_put_away(self, batch: Batch, failed_rounds: int) -> int | None:
        """How many spans were refused: 0 or the only one. None: one of many is to blame, so they must go apart.

        Raises:
            AgentLightningError: the server does not take them now.
            OSError: what was refused could not be put away.
        """
        try:
            await self._send(batch.spans)
        except AgentLightningError as error:
            internal = type(error) is AgentLightningError and failed_rounds + 1 >= _INTERNAL_ERROR_ROUNDS
            if not (internal or isinstance(error, _REFUSED)):
                raise
            if len(batch.spans) > 1:
                return None
            self._folder.quarantine(batch.spans[0], error)
            _logger.error("a span was refused for good, and put into %s: %s", self._folder.quarantine_file, error)
            return 1
        return 0

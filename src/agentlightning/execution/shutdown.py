"""The end of a run that has other processes and other machines: begun once, from anywhere, and waited for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from agentlightning.errors import AgentLightningError
from agentlightning.execution.abort import Ending, abort_stages
from agentlightning.execution.leaving import dismiss
from agentlightning.execution.loop_thread import LoopThread
from agentlightning.execution.supervision import Supervision
from agentlightning.store.base import LightningStore
from agentlightning.types import WorkerDirective

__all__ = ["Shutdown"]

_log = logging.getLogger(__name__)


class Shutdown:
    """Ends the processes here in four stages, and meanwhile asks workers elsewhere to leave.

    Args:
        thread: where calls of the store run.
        graceful_timeout: seconds of the first stage, which workers elsewhere get to leave, too.
        terminate_timeout: seconds of each other stage; workers that were asked to drain get as long again to stop.
        hurry: whether to go on to the last stage at once, and wait for nobody elsewhere.
        supervision: of the processes here; None: there are none.
    """

    def __init__(
        self,
        thread: LoopThread,
        graceful_timeout: float,
        terminate_timeout: float,
        hurry: Callable[[], bool],
        supervision: Supervision | None = None,
    ) -> None:
        self._thread = thread
        self._graceful_timeout = graceful_timeout
        self._terminate_timeout = terminate_timeout
        self._hurry = hurry
        self._supervision = supervision
        self._lock = threading.Lock()
        self._work: threading.Thread | None = None
        self.store: LightningStore | None = None
        """By which workers elsewhere hear of the end; None: there are none that should."""
        self.endings: list[Ending] = []
        """How each process here has ended."""

    def begin(self, directive: WorkerDirective) -> None:
        """Let the end begin; from any thread, and at once. What is asked first holds.

        Args:
            directive: ``drain`` lets workers finish what they hold; ``stop`` does not.
        """
        with self._lock:
            if self._work is None:
                self._work = threading.Thread(target=self._run, args=(directive,), name="agl-shutdown", daemon=True)
                self._work.start()

    def finish(self) -> None:
        """Wait until it is over. It must have begun."""
        assert self._work is not None
        while self._work.is_alive():
            self._work.join(0.1)  # so that signals are attended to

    def _run(self, directive: WorkerDirective) -> None:
        leaving = self._dismiss(directive, self._graceful_timeout)
        if self._supervision is not None:
            stages = abort_stages(self._graceful_timeout, self._terminate_timeout)
            self.endings = self._supervision.abort(stages, self._hurry)
        left = self._left(leaving)
        if left and directive == "drain":
            left = self._left(self._dismiss("stop", self._terminate_timeout))
        if left:
            _log.warning("these workers have not left: %s; they will find the server gone", ", ".join(sorted(left)))

    def _dismiss(self, directive: WorkerDirective, seconds: float) -> Future[list[str]] | None:
        if self.store is None or self._hurry():
            return None
        return self._thread.begin(dismiss(self.store, directive, seconds))

    def _left(self, leaving: Future[list[str]] | None) -> list[str]:
        while leaving is not None and not self._hurry():
            try:
                return leaving.result(0.05)
            except TimeoutError:
                if leaving.done():
                    _log.warning("the store did not take in time that workers shall leave")
                    return []
            except (AgentLightningError, NotImplementedError) as error:
                _log.warning("workers elsewhere could not be asked to leave: %s", error)
                return []
        if leaving is not None:
            leaving.cancel()
        return []

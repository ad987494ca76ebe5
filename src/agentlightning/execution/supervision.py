"""A supervisor as other threads see it: it lives in a loop of its own."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from agentlightning.errors import AgentLightningError, ExecutionFailed
from agentlightning.execution.abort import Ending, Stage, abort, abort_stages, tell
from agentlightning.execution.launcher import NurseryLink, StartMethod, choose_start_method, open_nursery
from agentlightning.execution.membership import dismiss
from agentlightning.execution.messages import Job, Stop
from agentlightning.execution.process_tree import MARK, Cgroup, Kin, make_cgroup
from agentlightning.execution.supervisor import Slot, Supervisor
from agentlightning.store.base import LightningStore
from agentlightning.types import WorkerDirective

# --- An event loop in a thread of its own, for a process whose main thread has other things to  ---

T = TypeVar("T")


class LoopThread:
    """A loop that runs from the first use to ``close``.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; it is started if it does not run yet."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
            self._thread.start()
        return self._loop

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop; the future tells its result to other threads."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Run a coroutine in the loop, and wait for it. Raises what it raises, and ``TimeoutError``."""
        future = self.begin(work)
        try:
            return future.result(seconds)
        except BaseException:  # also an interrupt: the coroutine must not run on
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs, and end the thread. Idempotent."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self._loop = self._thread = None
        asyncio.run_coroutine_threadsafe(_wind_up(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _wind_up() -> None:
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


# ---

_log = logging.getLogger(__name__)
_START_SECONDS = 5.0
_COLLECT_SECONDS = 2.0


class Supervision:
    """Starts, watches and stops the processes of a run.

    ``open`` starts the nursery, which must happen before this process has threads, if it is to be forked;
    ``begin`` starts the processes; ``abort`` stops them; ``close`` leaves nothing behind.

    Args:
        jobs: what processes do, by name.
        start_method: how they are started; None: ``fork`` from a process with one thread, else ``forkserver``.
        thread: where the supervisor lives. It outlives this.
    """

    def __init__(self, jobs: Mapping[str, Job], start_method: StartMethod | None, thread: LoopThread) -> None:
        self._thread = thread
        self._jobs = jobs
        self._asked: StartMethod | None = start_method
        self._mark = secrets.token_hex(8)
        self._link: NurseryLink | None = None
        self._kin: Kin | None = None
        self._cgroup: Cgroup | None = None
        self._supervisor: Supervisor | None = None
        self._aborted = False

    def open(self) -> None:
        """Start the nursery.

        Raises:
            InvalidValue: a job cannot be sent to another process; named, with the ways out.
        """
        method = choose_start_method(self._asked, self._jobs)
        self._cgroup = make_cgroup(f"agl-{self._mark}")
        try:
            self._link = open_nursery(self._jobs, method, self._mark, self._cgroup)
        except BaseException:
            if self._cgroup is not None:
                self._cgroup.remove()
            raise
        enrolled = frozenset[int] if self._cgroup is None else self._cgroup.processes
        self._kin = Kin(self._mark, self._link.pid, enrolled)

    def begin(
        self,
        slots: Sequence[Slot],
        *,
        allowed_exit_codes: frozenset[int],
        store: LightningStore | None,
        on_over: Callable[[ExecutionFailed | None], None],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Start a process in every slot, and watch them from now on. See ``Supervisor``."""
        assert self._kin is not None
        for number, slot in enumerate(slots):
            slot.environment = {**slot.environment, MARK: self._mark}
            slot.cgroup = None if self._cgroup is None else self._cgroup.child(f"{slot.job}-{number}")

        async def begin() -> None:
            assert self._kin is not None
            self._supervisor = Supervisor(
                self._opened(),
                self._kin,
                slots,
                allowed_exit_codes=allowed_exit_codes,
                store=store,
                on_over=on_over,
                on_ready=on_ready,
            )
            self._supervisor.begin()

        self._thread.call(begin())

    @property
    def over(self) -> bool:
        """Whether no slot is filled any more, or will be unless ``begin_again`` is called."""
        return self._supervisor is not None and self._supervisor.over

    def begin_again(self, names: Collection[str]) -> None:
        """Start a process in each of these slots that has none."""
        supervisor = self._supervisor
        assert supervisor is not None

        async def begin_again() -> None:
            supervisor.begin_again(names)

        self._thread.call(begin_again())

    def abort(self, stages: tuple[Stage, ...], hurry: Callable[[], bool]) -> list[Ending]:
        """Stop all processes, stage by stage; blocks. One line in the log for each says what ended it. Idempotent.

        Args:
            stages: what is done.
            hurry: whether to go on to the last stage at once.
        """
        if self._supervisor is None or self._aborted:
            return []
        self._aborted = True
        assert self._kin is not None
        link = self._opened()
        try:
            self._thread.call(self._supervisor.stop_starting(), _START_SECONDS)
        except TimeoutError:
            _log.error("the nursery does not answer; what it has started is ended all the same")
        endings = abort(stages, self._kin.living, self._supervisor.names, lambda: link.send(Stop()), hurry=hurry)
        tell(endings)
        try:
            self._thread.call(self._supervisor.collected(), _COLLECT_SECONDS)
        except TimeoutError:
            _log.error("the nursery has not told the end of every process")
        return endings

    def close(self) -> None:
        """End the nursery, and with it whatever is left. Idempotent."""
        if self._link is None:
            return
        if self._supervisor is not None:
            self._thread.call(self._supervisor.close())
        self._link.close()
        if self._cgroup is not None:
            self._cgroup.remove()
        self._link = None

    def _opened(self) -> NurseryLink:
        assert self._link is not None, "open the supervision first"
        return self._link


# --- The end of a run that has other processes and other machines: begun once, from anywhere, a ---


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

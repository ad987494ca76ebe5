"""A supervisor as other threads see it: it lives in a loop of its own."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence

from agentlightning.errors import ExecutionFailed
from agentlightning.execution.abort import Ending, Stage, abort, tell
from agentlightning.execution.cgroups import Cgroup, make_cgroup
from agentlightning.execution.kin import MARK, Kin
from agentlightning.execution.loop_thread import LoopThread
from agentlightning.execution.messages import Job, Stop
from agentlightning.execution.nursery import NurseryLink, StartMethod, choose_start_method, open_nursery
from agentlightning.execution.slots import Slot
from agentlightning.execution.supervisor import Supervisor
from agentlightning.store.base import LightningStore

__all__ = ["Supervision"]

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

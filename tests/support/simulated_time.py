"""A world of processes in virtual time, in one thread: what happens next follows from the seed, and from nothing else.

A process is an event loop of its own. Its callbacks run in asyncio's order; which process has the next turn is drawn.
The clock moves only when nobody has anything to do, and then at once to the next timer or event. A process that is
stopped gets no turns, as after SIGSTOP; one that is killed never again, and nothing of it is cleaned up.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
from asyncio import events
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

__all__ = ["ProcessLoop", "World"]

_HANDS_OVER_SECONDS = 0.0005
"""How long a thread of a pool takes for what it is given."""


class ProcessLoop(asyncio.BaseEventLoop):
    """The event loop that is a process. Threads of pools are callbacks, too: they run a moment later.

    Args:
        world: whose clock it reads.
        name: of the process, in the trace.
    """

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self.name = name
        self.stopped_until = 0.0
        self.is_killed = False
        self._world = world
        parts = cast("Any", self)
        self._waiting: Any = parts._ready
        self._timers: list[Any] = parts._scheduled
        self._tasks = dict[asyncio.Task[Any], None]()

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None, **_: Any) -> Any:
        """Make a task, and remember it until it is done."""
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    def time(self) -> float:
        """The world's."""
        return self._world.now

    def _write_to_self(self) -> None: ...

    def _process_events(self, event_list: list[Any]) -> None: ...

    def in_thread(self, seconds: float, work: Callable[[], object]) -> None:
        """Call ``work`` after a time, outside of the loop, as another thread of the process would."""

        def run() -> None:
            if self.is_killed:
                return
            if self._world.now < self.stopped_until:  # all its threads stand still
                self._world.after(self.stopped_until - self._world.now, run)
            else:
                work()

        self._world.after(seconds, run)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Call ``func`` in a thread, a moment later."""
        future = self.create_future()

        def settle(set_it: Callable[[Any], None], result: Any) -> None:
            if not future.done():
                set_it(result)

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - the boundary of a thread: its caller gets the error
                self.call_soon(settle, future.set_exception, error)
            else:
                self.call_soon(settle, future.set_result, result)

        self.in_thread(_HANDS_OVER_SECONDS, run)
        return future

    def next_due(self) -> float:
        """When it has something to do; infinite: never."""
        if self._world.now < self.stopped_until:
            return math.inf
        if self._waiting:
            return self._world.now
        while self._timers and self._timers[0]._cancelled:
            heapq.heappop(self._timers)._scheduled = False
        return self._timers[0]._when if self._timers else math.inf

    def turn(self) -> None:
        """What one pass of an event loop does: run what is ready, with the timers that are due behind it."""
        ready, timers = self._waiting, self._timers
        now = self._world.now
        while timers and timers[0]._when <= now:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer._cancelled:
                ready.append(timer)
        events._set_running_loop(self)
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle._cancelled:
                    handle._run()
        finally:
            events._set_running_loop(None)

    def drop(self) -> None:
        """Forget all of it. Coroutines are closed, not cancelled: what they would still do does not happen any more."""
        for task in list(self._tasks):
            cast("Any", task)._log_destroy_pending = False
            with suppress(BaseException):  # one that awaits something while it is closed
                cast("Any", task.get_coro()).close()
        self._tasks.clear()
        if not self.is_closed():
            self.close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What nobody has handled is noted, and fails the run."""
        self._world.unhandled.append(f"{self.name}: {context.get('message')}: {context.get('exception')!r}")


class World:
    """All processes, what happens between them, and the trace of it.

    Args:
        seed: of everything that is left to chance.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        """Seconds since the beginning."""
        self.chance = random.Random(seed)
        self.trace: list[str] = []
        self.unhandled: list[str] = []
        """Exceptions that nobody caught."""
        self._loops: list[ProcessLoop] = []
        self._dropped: list[ProcessLoop] = []
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def note(self, who: str, what: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self.now:12.6f} {who}: {what}")

    def process(self, name: str) -> ProcessLoop:
        """Start a process."""
        loop = ProcessLoop(self, name)
        self._loops.append(loop)
        return loop

    def kill(self, loop: ProcessLoop) -> None:
        """It has no more turns. What it holds is let go of at the end only: nobody in the world notices."""
        loop.is_killed = True
        self._loops.remove(loop)
        self._dropped.append(loop)

    def stop(self, loop: ProcessLoop, seconds: float) -> None:
        """It gets no turns for some time."""
        loop.stopped_until = max(loop.stopped_until, self.now + seconds)
        self.after(seconds, lambda: None)  # so that the clock stops there

    def after(self, seconds: float, event: Callable[..., object], *arguments: Any) -> None:
        """Have something happen outside of all processes."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event, arguments))

    def run(self, *, until: Callable[[], bool], at_most: float) -> bool:
        """Let things happen until something is the case; returns whether it became so by this time."""
        while True:
            runnable, due = self._due()
            if runnable:
                loop = runnable[0] if len(runnable) == 1 else self.chance.choice(runnable)
                loop.turn()
                continue
            if until():
                return True
            if self._events:
                due = min(due, self._events[0][0])
            if due > at_most:
                self.now = at_most
                return False
            self.now = max(self.now, due)
            while self._events and self._events[0][0] <= self.now:
                _, _, event, arguments = heapq.heappop(self._events)
                event(*arguments)

    def _due(self) -> tuple[list[ProcessLoop], float]:
        """Who has something to do now, and when the next of the others has."""
        now, runnable, due = self.now, list[ProcessLoop](), math.inf
        for loop in self._loops:
            at = loop.next_due()
            if at <= now:
                runnable.append(loop)
            elif at < due:
                due = at
        return runnable, due

    def end(self) -> None:
        """Let go of all processes."""
        for loop in [*self._loops, *self._dropped]:
            loop.drop()


@contextmanager
def seeded_jitter(seed: int) -> Iterator[None]:
    """What the product draws from the module ``random`` in the block follows from the seed."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)

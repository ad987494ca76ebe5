"""A state machine that asks the same of a store and of the reference, and compares them: how a step is done."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hypothesis.stateful import RuleBasedStateMachine

from agentlightning.errors import AgentLightningError
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from clocks import ManualClock
from model_compare import Divergence, agree, plain, tell
from reference_model import ReferenceStore, Refused, shown

__all__ = ["Call", "ComparingMachine"]


class Issued:
    """An id source that keeps what it has issued."""

    def __init__(self) -> None:
        self._count = 0
        self.latest: deque[str] = deque()

    def mint(self, prefix: str) -> str:
        """The next id."""
        self._count += 1
        self.latest.append(f"{prefix}{self._count}")
        return self.latest[-1]

    def next(self) -> str:
        """The oldest id that the reference has not taken yet."""
        if not self.latest:
            raise Divergence("the reference made a record for which the store issued no id")
        return self.latest.popleft()


class Call(NamedTuple):
    """One thing that a caller asks of the store."""

    store: Callable[[], Awaitable[Any]]
    reference: Callable[[Any], Any]
    """Gets the store's reply; None if it refused."""
    rollout_ids: Sequence[str] = ()
    """Rollouts to look at closely after."""


class ComparingMachine(RuleBasedStateMachine):
    """A store and the reference, side by side. Rules are a subclass's business; each is one step."""

    steps_run: ClassVar[int] = 0
    """How many steps all machines of this class have run and found equal."""
    new_file: ClassVar[staticmethod[[], Path] | None] = None
    """Names a new database file; None: the store is in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.ids = Issued()
        self.loop = asyncio.new_event_loop()
        make = type(self).new_file
        self.file = None if make is None else make()
        self.store = self.open()
        self.reference = ReferenceStore(self.clock, self.ids.next)
        self.agreed = True

    def open(self) -> InMemoryLightningStore | SqliteLightningStore:
        """A store, which reads the machine's clock."""
        if self.file is None:
            return InMemoryLightningStore(clock=self.clock, ids=self.ids)
        return SqliteLightningStore(self.file, "process", clock=self.clock, ids=self.ids)

    def teardown(self) -> None:
        """The whole state is compared once more, unless they are known to differ."""
        try:
            if self.agreed:
                self.compare_everything()
        finally:
            self.run(self.store.close())
            self.run(self.loop.shutdown_default_executor())
            self.loop.close()
            if self.file is not None:
                for leftover in self.file.parent.glob(f"{self.file.name}*"):
                    leftover.unlink()

    # --- How a step is done ----------------------------------------------------------------------

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Wait for it in the machine's event loop."""
        return self.loop.run_until_complete(awaitable)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is done in the block is one step; at its end, what there is must be the same on both sides."""
        self.agreed = False
        try:
            yield
        except AgentLightningError as error:
            raise Divergence(f"the store fails where nothing is asked of it but to be read: {error!r}") from error
        self.agreed = True
        type(self).steps_run += 1

    def do(self, *calls: Call) -> None:
        """Ask the store and the reference the same, in this order, and compare replies and state.

        Many calls are one transaction, and what one of them brings to its end at once, expires after it.
        """
        with self.step():
            self.ids.latest.clear()
            self.reference.expire()
            for call, answer in zip(calls, self.run(self._ask_store(calls)), strict=True):
                self._compare_reply(call, *answer)
            self.look(each for call in calls for each in call.rollout_ids)

    def _compare_reply(self, call: Call, reply: Any, code: str | None) -> None:
        try:
            expected, expected_code = call.reference(reply), None
        except Refused as refusal:
            expected, expected_code = None, refusal.code
        if code != expected_code:
            raise Divergence(f"the store's error is {code}, the reference's {expected_code}; its reply {reply!r}")
        if (got := plain(reply)) != expected:
            raise Divergence(tell("the reply", got, expected))

    async def _ask_store(self, calls: Sequence[Call]) -> list[tuple[Any, str | None]]:
        async def ask(call: Call) -> tuple[Any, str | None]:
            try:
                return await call.store(), None
            except AgentLightningError as error:
                return None, error.code

        if len(calls) == 1:
            return [await ask(calls[0])]
        return await asyncio.gather(*map(ask, calls))

    # --- What is compared ------------------------------------------------------------------------

    def look(self, rollout_ids: Iterable[str] = ()) -> None:
        """Compare what there is: all rollouts with their latest attempts, all workers, and these rollouts closely."""
        self.reference.expire()
        self.run(self._look(dict.fromkeys(rollout_ids)))

    async def _look(self, rollout_ids: Iterable[str]) -> None:
        known = self.reference
        agree("rollouts", await self.store.query_rollouts(), [known.rollout_now(each) for each in known.rollouts])
        agree("workers", await self.store.query_workers(), [shown(each) for each in known.workers.values()])
        for rollout_id in rollout_ids:
            attempts = [shown(each) for each in known.attempts_of(rollout_id)]
            agree(f"attempts of {rollout_id}", await self.store.query_attempts(rollout_id), attempts)
            agree(f"spans of {rollout_id}", await self.store.query_spans(rollout_id), known.spans_of(rollout_id))

    def compare_everything(self) -> None:
        """Compare all that can be seen, and let the store check itself."""
        self.look(self.reference.rollouts)
        self.run(self._compare_rest())

    async def _compare_rest(self) -> None:
        for resources_id in dict.fromkeys(each["resources_id"] for each in self.reference.resources):
            versions = await self.store.query_resource_versions(resources_id)
            agree(f"versions of {resources_id}", versions, map(shown, self.reference.versions_of(resources_id)))
        newest = await self.store.get_latest_resources()
        agree("latest resources", [newest] if newest else [], map(shown, self.reference.resources[-1:]))
        statistics: dict[str, Any] = dict(await self.store.statistics())
        totals = self.reference.totals()
        agree("statistics", [{name: statistics[name] for name in totals}], [totals])
        report = await self.store.verify()
        if not report.ok:
            raise Divergence(f"the store's own check finds {report.violations}")

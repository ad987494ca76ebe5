"""The process that the kill -9 tests kill: writers on one store, and a journal of what it promised them.

As a program it is a nursery: it imports everything once, then forks a store process for each life that it is told
of on its standard input (see `main`). A store process writes a journal: before each call a line with the call (the
intent), and after the call has returned a line with what its result promises. Both are appended by one `os.write`,
which SIGKILL does not take back. The last line of a writer therefore says what was in flight when the process died,
and the next life begins by repeating exactly that, with the same ids.

What a record holds follows from its id (`input_of`, `span_of`, `text_of`), so that a promise need not repeat it.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from agentlightning.errors import Conflict, IdReused, NotFound, StaleAttempt
from agentlightning.store.base import LightningStore
from agentlightning.store.engine import EngineStore
from agentlightning.store.sources import TimeOrderedIds
from agentlightning.store.sqlite.backend import FileBackend
from agentlightning.types import (
    Attempt,
    EnqueueRolloutRequest,
    FinishedAttempt,
    NamedResources,
    OtelResource,
    PromptTemplate,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    Span,
    TraceStatus,
)

WRITERS = 8
HELD_LIMIT = 3
REPEATED = 0.1
"""How often a writer repeats a call although it was answered, as if the reply had been lost."""
CONFIG = RolloutConfig(
    timeout_seconds=30.0,
    unresponsive_seconds=6.0,
    max_attempts=3,
    retry_condition=["failed", "timeout", "unresponsive"],
)
WORKER_LEASE_SECONDS = 8.0


def input_of(rollout_id: str) -> dict[str, str]:
    return {"of": rollout_id}


def text_of(resources_id: str, change: str) -> str:
    return f"{resources_id} by {change}"


def resources_of(text: str) -> NamedResources:
    return {"prompt": PromptTemplate(template=text, engine="f-string")}


def span_of(rollout_id: str, attempt_id: str, span_id: str, sequence_id: int) -> Span:
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=sequence_id,
        trace_id="0" * 32,
        span_id=span_id,
        parent_id=None,
        name=f"span {span_id}",
        status=TraceStatus(status_code="OK"),
        attributes={"of": span_id, "padding": "x" * (hash_of(span_id) % 2000)},
        events=[],
        links=[],
        start_time=1.0,
        end_time=2.0,
        context=None,
        parent=None,
        resource=OtelResource(attributes={}, schema_url=""),
    )


def hash_of(text: str) -> int:
    """A number that, unlike `hash`, is the same in every process."""
    return sum(text.encode()) * 7919


# --- What is promised --------------------------------------------------------------------------------------


class Promise(msgspec.Struct, omit_defaults=True):
    """What a call's result says is stored from now on. What is not known has an empty value."""

    rollouts: list[tuple[str, str, str | None, int | None]] = []
    """(rollout_id, status, resources_id, resources_version)"""
    attempts: list[tuple[str, str, int, str, str | None]] = []
    """(rollout_id, attempt_id, sequence_id, status, worker_id)"""
    spans: list[tuple[str, str, int]] = []
    """(attempt_id, span_id, sequence_id)"""
    issued: list[tuple[str, int]] = []
    """(attempt_id, sequence id that no span and no other caller has)"""
    resources: list[tuple[str, int, str]] = []
    """(resources_id, version, text)"""
    stats: list[tuple[str, int]] = []
    """(worker_id, number of its newest statistics)"""
    notes: list[tuple[str, int]] = []
    """(rollout_id, number of its newest metadata)"""
    claimed_by: str | None = None
    """Of a claim that has no answer yet: attempts of this worker may be stored."""
    refused: str | None = None
    """The code of the error that the call got; then nothing is promised."""
    may_have_ended: list[str] = []
    """Rollouts that are gone, which an earlier try of the call may have ended."""


def told(*records: Rollout | Attempt) -> Promise:
    """What these records promise."""
    promise = Promise(rollouts=[], attempts=[])
    for record in records:
        if isinstance(record, Rollout):
            promise.rollouts.append((record.rollout_id, record.status, record.resources_id, record.resources_version))
            attempt: Attempt | None = getattr(record, "attempt", None)
        else:
            attempt = record
        if attempt is not None:
            promise.attempts.append(
                (attempt.rollout_id, attempt.attempt_id, attempt.sequence_id, attempt.status, attempt.worker_id)
            )
    return promise


def told_resources(update: ResourcesUpdate) -> Promise:
    prompt = update.resources["prompt"]
    assert isinstance(prompt, PromptTemplate)
    return Promise(resources=[(update.resources_id, update.version, prompt.template)])


# --- Calls, as values that survive in a journal ------------------------------------------------------------


class Held(msgspec.Struct, array_like=True):
    """An attempt that a writer works on."""

    rollout_id: str
    attempt_id: str
    spans: int = 0


class Memory(msgspec.Struct):
    """What a writer knows from one call to the next."""

    calls: int = 0
    held: list[Held] = []
    mine: list[str] = []
    """The rollouts that it enqueued last."""
    stats: int = 0
    version: int = 0
    """The newest version of its own resources."""

    def drop(self, attempt_id: str) -> None:
        self.held = [each for each in self.held if each.attempt_id != attempt_id]

    def take(self, promise: Promise) -> None:
        known = {each.attempt_id for each in self.held}
        for rollout_id, attempt_id, _, status, _ in promise.attempts:
            if status in ("preparing", "running") and attempt_id not in known:
                self.held.append(Held(rollout_id, attempt_id))


class Call(msgspec.Struct, tag=True):
    """One call of a store method. May be made any number of times; all but `IssueSequenceId` have the effect of one."""

    def at_most(self) -> Promise:
        """What may be stored while the call has no answer."""
        return Promise()

    async def make(self, store: LightningStore) -> Promise:
        raise NotImplementedError

    def learn(self, memory: Memory, promise: Promise) -> None:
        """Change what the writer knows, now that the call has returned."""


class AttemptCall(Call, tag=True):
    """A call about an attempt; when it is refused, the attempt is lost."""

    rollout_id: str
    attempt_id: str

    def learn(self, memory: Memory, promise: Promise) -> None:
        if promise.refused is not None:
            memory.drop(self.attempt_id)


class Enqueue(Call):
    rollout_ids: list[str]
    priority: int

    def at_most(self) -> Promise:
        return Promise(rollouts=[(each, "", None, None) for each in self.rollout_ids])

    async def make(self, store: LightningStore) -> Promise:
        return told(*await store.enqueue_many_rollouts(self.requests()))

    def requests(self) -> list[EnqueueRolloutRequest]:
        return [
            EnqueueRolloutRequest(input=input_of(each), config=CONFIG, priority=self.priority, rollout_id=each)
            for each in self.rollout_ids
        ]

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.mine = [*memory.mine, *self.rollout_ids][-4:]


class EnqueueWithReusedId(Call):
    """The last of them cannot be stored, so none may be: it must be undone after it was half done."""

    rollout_ids: list[str]
    reused_id: str

    async def make(self, store: LightningStore) -> Promise:
        requests = [
            *(EnqueueRolloutRequest(input=input_of(each), rollout_id=each) for each in self.rollout_ids),
            EnqueueRolloutRequest(input="something else", rollout_id=self.reused_id),
        ]
        try:
            return told(*await store.enqueue_many_rollouts(requests))
        except IdReused as error:
            return Promise(refused=error.code)


class Claim(Call):
    worker_id: str
    request_id: str
    limit: int
    wait_seconds: float

    def at_most(self) -> Promise:
        return Promise(claimed_by=self.worker_id)

    async def make(self, store: LightningStore) -> Promise:
        return told(
            *await store.dequeue_many_rollouts(
                limit=self.limit,
                worker_id=self.worker_id,
                request_id=self.request_id,
                wait_seconds=self.wait_seconds,
            )
        )

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.take(promise)


class StartRollout(Call):
    rollout_id: str
    attempt_id: str
    worker_id: str

    def at_most(self) -> Promise:
        return Promise(
            rollouts=[(self.rollout_id, "", None, None)], attempts=[(self.rollout_id, self.attempt_id, 0, "", None)]
        )

    async def make(self, store: LightningStore) -> Promise:
        return told(
            await store.start_rollout(
                input_of(self.rollout_id),
                config=CONFIG,
                worker_id=self.worker_id,
                rollout_id=self.rollout_id,
                attempt_id=self.attempt_id,
            )
        )

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.take(promise)


class StartAttempt(AttemptCall):
    """Begin again: `attempt_id` is replaced by `new_attempt_id`."""

    new_attempt_id: str
    worker_id: str

    def at_most(self) -> Promise:
        return Promise(attempts=[(self.rollout_id, self.new_attempt_id, 0, "", None)])

    async def make(self, store: LightningStore) -> Promise:
        return told(await store.start_attempt(self.rollout_id, self.worker_id, attempt_id=self.new_attempt_id))

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.drop(self.attempt_id)
        memory.take(promise)


class AddSpans(AttemptCall):
    span_ids: list[str]
    sequence_id: int
    """0: to be issued; else that of all of them."""

    def at_most(self) -> Promise:
        return Promise(spans=[(self.attempt_id, each, 0) for each in self.span_ids])

    async def make(self, store: LightningStore) -> Promise:
        stored = await store.add_many_spans(
            [span_of(self.rollout_id, self.attempt_id, each, self.sequence_id) for each in self.span_ids]
        )
        new = {each.span_id: each.sequence_id for each in stored}
        return Promise(spans=[(self.attempt_id, each, new.get(each, 0)) for each in self.span_ids])

    def learn(self, memory: Memory, promise: Promise) -> None:
        for each in memory.held:
            if each.attempt_id == self.attempt_id:
                each.spans += len(self.span_ids)
        super().learn(memory, promise)


class IssueSequenceId(AttemptCall):
    async def make(self, store: LightningStore) -> Promise:
        return Promise(
            issued=[(self.attempt_id, await store.get_next_span_sequence_id(self.rollout_id, self.attempt_id))]
        )


class Report(AttemptCall):
    status: Literal["running", "succeeded", "failed"]

    async def make(self, store: LightningStore) -> Promise:
        return told(
            await store.update_attempt(self.rollout_id, self.attempt_id, status=self.status, metadata={"by": "writer"})
        )

    def learn(self, memory: Memory, promise: Promise) -> None:
        super().learn(memory, promise)
        if self.status != "running":
            memory.drop(self.attempt_id)


class Finish(AttemptCall):
    """The last spans, the end, and the next claim, in one call."""

    status: Literal["succeeded", "failed"]
    span_ids: list[str]
    """New ones, of this call alone."""
    worker_id: str
    request_id: str
    limit: int
    """0: claim nothing."""

    def at_most(self) -> Promise:
        spans = [(self.attempt_id, each, 0) for each in self.span_ids]
        return Promise(spans=spans, claimed_by=self.worker_id if self.limit else None)

    async def make(self, store: LightningStore) -> Promise:
        return await self.make_by(store.finish_attempt, self.request_id)

    async def make_by(self, finish: Callable[..., Awaitable[FinishedAttempt]], request_id: str | None) -> Promise:
        """Make it by this method, with this id of the claim."""
        try:
            done = await finish(
                self.rollout_id,
                self.attempt_id,
                self.status,
                [span_of(self.rollout_id, self.attempt_id, each, 0) for each in self.span_ids],
                metadata={"by": "writer"},
                claim_limit=self.limit,
                worker_id=self.worker_id,
                request_id=request_id if self.limit else None,
            )
        except StaleAttempt as error:  # its spans are kept all the same
            return Promise(refused=error.code, spans=[(self.attempt_id, each, 0) for each in self.span_ids])
        promise = told(done.attempt, *done.claimed)
        promise.spans = [
            (self.attempt_id, span_id, number) for span_id, number in zip(self.span_ids, done.sequence_ids, strict=True)
        ]
        return promise

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.drop(self.attempt_id)
        memory.take(promise)


class Release(AttemptCall):
    async def make(self, store: LightningStore) -> Promise:
        return told(await store.release_attempt(self.rollout_id, self.attempt_id))

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.drop(self.attempt_id)


class Cancel(Call):
    rollout_id: str

    async def make(self, store: LightningStore) -> Promise:
        return told(await store.cancel_rollout(self.rollout_id, message="by its writer"))

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.mine = [each for each in memory.mine if each != self.rollout_id]


class Note(Call):
    rollout_id: str
    number: int

    def at_most(self) -> Promise:
        return Promise(notes=[(self.rollout_id, self.number)])

    async def make(self, store: LightningStore) -> Promise:
        promise = told(await store.update_rollout(self.rollout_id, metadata={"number": self.number}))
        promise.notes = [(self.rollout_id, self.number)]
        return promise


class ChangeResources(Call):
    resources_id: str
    request_id: str
    back_to: int
    """A version whose content is to come back; 0 for a new content."""

    def at_most(self) -> Promise:
        return Promise(resources=[(self.resources_id, 0, "")])

    async def make(self, store: LightningStore) -> Promise:
        if self.back_to:
            update = await store.rollback_resources(self.resources_id, self.back_to, request_id=self.request_id)
        else:
            resources = resources_of(text_of(self.resources_id, self.request_id))
            update = await store.update_resources(self.resources_id, resources, request_id=self.request_id)
        return told_resources(update)

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.version = promise.resources[0][1]


class AddResources(Call):
    resources_id: str

    def at_most(self) -> Promise:
        return Promise(resources=[(self.resources_id, 1, "")])

    async def make(self, store: LightningStore) -> Promise:
        resources = resources_of(text_of(self.resources_id, "add"))
        return told_resources(await store.add_resources(resources, resources_id=self.resources_id))


class Beat(Call):
    worker_id: str
    number: int
    attempt_ids: list[str]

    def at_most(self) -> Promise:
        return Promise(stats=[(self.worker_id, self.number)])

    async def make(self, store: LightningStore) -> Promise:
        await store.update_worker(
            self.worker_id,
            {"number": self.number},
            attempt_ids=self.attempt_ids,
            lease_seconds=WORKER_LEASE_SECONDS,
        )
        return self.at_most()

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.stats = self.number


class LoseWorker(Call):
    worker_id: str

    async def make(self, store: LightningStore) -> Promise:
        return told(*await store.report_worker_lost(self.worker_id, message="as a test"))

    def learn(self, memory: Memory, promise: Promise) -> None:
        memory.held = []


class DeleteFinished(Call):
    """Delete every rollout that has ended; of all writers."""

    async def make(self, store: LightningStore) -> Promise:
        await store.delete_finished_rollouts(older_than_seconds=0.0)
        return Promise()


AnyCall = (
    Enqueue
    | EnqueueWithReusedId
    | Claim
    | StartRollout
    | StartAttempt
    | AddSpans
    | IssueSequenceId
    | Report
    | Finish
    | Release
    | Cancel
    | Note
    | ChangeResources
    | AddResources
    | Beat
    | LoseWorker
    | DeleteFinished
)


def next_call(writer: int, memory: Memory, rng: random.Random, *, deletes: bool) -> AnyCall:
    """What a writer does next."""
    if deletes and rng.random() < 0.02:
        return DeleteFinished()
    number = memory.calls
    worker_id = f"worker-{writer}"
    name = f"{writer}-{number}"
    if memory.stats == 0:
        return Beat(worker_id, 1, [])
    draw = rng.random()
    if memory.held and draw < 0.6:
        held = rng.choice(memory.held)
        ids = (held.rollout_id, held.attempt_id)
        match rng.random():
            case x if x < 0.5:
                first = max(0, held.spans - rng.choice((0, 0, 2)))  # some were sent before
                span_ids = [f"{held.attempt_id}-{first + i}" for i in range(rng.choice((1, 1, 3, 12)))]
                return AddSpans(*ids, span_ids, rng.choice((0, 0, 0, 7)))
            case x if x < 0.6:
                return IssueSequenceId(*ids)
            case x if x < 0.67:
                return Report(*ids, "running")
            case x if x < 0.72:
                return StartAttempt(*ids, f"at-{name}", worker_id)
            case x if x < 0.76 and not held.spans:
                return Release(*ids)
            case x if x < 0.92:
                span_ids = [f"{held.attempt_id}-end-{number}-{i}" for i in range(rng.choice((0, 1, 3)))]
                limit = rng.randint(0, max(0, 1 + HELD_LIMIT - len(memory.held)))
                status = "failed" if rng.random() < 0.2 else "succeeded"
                return Finish(*ids, status, span_ids, worker_id, f"rq-{name}", limit)
            case _:
                return Report(*ids, "failed" if rng.random() < 0.2 else "succeeded")
    if draw < 0.75:
        limit = HELD_LIMIT - len(memory.held)
        if limit > 0:
            return Claim(worker_id, f"rq-{name}", rng.randint(1, limit), rng.choice((0.0, 0.0, 0.01)))
    if draw < 0.88:
        rollout_ids = [f"ro-{name}-{i}" for i in range(rng.choice((1, 2, 5)))]
        return Enqueue(rollout_ids, rng.choice((0, 0, 3)))
    match rng.random():
        case x if x < 0.2:
            return StartRollout(f"ro-{name}", f"at-{name}", worker_id)
        case x if x < 0.35 and memory.mine:
            return Cancel(memory.mine[0])
        case x if x < 0.5 and memory.mine:
            return Note(memory.mine[-1], number)
        case x if x < 0.7:
            back_to = rng.randint(1, memory.version) if memory.version and rng.random() < 0.3 else 0
            return ChangeResources(f"rs-{writer}", f"rq-{name}", back_to)
        case x if x < 0.76:
            return AddResources(f"rs-{name}")
        case x if x < 0.8:
            return LoseWorker(worker_id)
        case x if x < 0.85 and memory.mine:
            return EnqueueWithReusedId([f"ro-{name}-{i}" for i in range(2)], memory.mine[-1])
        case _:
            return Beat(worker_id, number + 2, [each.attempt_id for each in memory.held])


# --- The journal -------------------------------------------------------------------------------------------


class Line(msgspec.Struct, omit_defaults=True):
    """One line: a writer is about to make `call`, or (with a promise) `call` has returned."""

    writer: int
    memory: Memory
    call: AnyCall
    promise: Promise | None = None


class Life(msgspec.Struct):
    """What a store process is to do. It ends when it is killed, unless told to close the store."""

    database: str
    journal: str
    seed: int
    memories: dict[int, Memory] = {}
    """What each writer knew when the last process died."""
    in_flight: dict[int, AnyCall] = {}
    """The calls that had no answer then: to be repeated first."""
    clock_speed: float = 0.001
    """How fast time passes for the store: slow, and no lease ever ends; fast, and many do."""
    deletes: bool = False
    """Whether writers delete what has ended."""
    checkpoint_pages: int = 4000
    close_after_calls: int | None = None
    """Close the store when the writers have made so many calls."""
    acknowledge: Literal["after", "before"] = "after"
    """When a promise is noted first; `before` the call returns is a lie, which the harness must notice."""
    repeat_with: Literal["same ids", "no ids", "no claim ids"] = "same ids"
    """How calls are repeated. With `no ids` rollouts are enqueued twice, with `no claim ids` a finish claims twice,
    which the harness must notice."""
    finish: Literal["in one", "in parts"] = "in one"
    """How an attempt is finished; with `in parts` a kill may leave half of it, which the harness must notice."""


class ScaledClock:
    """A clock that is slower or faster than the machine's."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._wall = time.time()
        self._start = time.monotonic()

    def wall(self) -> float:
        return self._wall + self.monotonic()

    def monotonic(self) -> float:
        return (time.monotonic() - self._start) * self._speed

    boot = staticmethod(time.monotonic)


class StoreProcess:
    """One life."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._journal = os.open(life.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._calls_left = sys.maxsize if life.close_after_calls is None else life.close_after_calls

    async def run(self) -> None:
        clock = ScaledClock(self._life.clock_speed)
        pages = self._life.checkpoint_pages
        backend = FileBackend(Path(self._life.database), "full", clock, checkpoint_pages=pages)
        store = EngineStore(backend, TimeOrderedIds(clock.wall))
        async with store:
            await asyncio.gather(*(self._write(store, writer) for writer in range(WRITERS)))
            say({"closing": True})

    async def _write(self, store: EngineStore, writer: int) -> None:
        life = self._life
        memory = life.memories.get(writer, Memory())
        rng = random.Random(f"{life.seed} {writer}")
        call = life.in_flight.get(writer)
        while call is not None or self._calls_left > 0:
            if call is None:
                call = next_call(writer, memory, rng, deletes=life.deletes)
            self._calls_left -= 1
            memory = await self._perform(store, writer, memory, call, rng)
            call = None

    async def _perform(
        self, store: EngineStore, writer: int, memory: Memory, call: AnyCall, rng: random.Random
    ) -> Memory:
        early = self._life.acknowledge == "before"
        after = msgspec.convert(msgspec.to_builtins(memory), Memory)
        after.calls += 1
        self._note(Line(writer, after, call, call.at_most()) if early else Line(writer, memory, call))
        promise = await self._make(store, call)
        call.learn(after, promise)
        self._note(Line(writer, after, call, promise))
        if rng.random() < REPEATED:
            await self._repeat(store, Line(writer, after, call, promise))
        return after

    async def _repeat(self, store: EngineStore, answered: Line) -> None:
        call = answered.call
        if self._life.repeat_with == "no ids" and isinstance(call, Enqueue):
            anew = [request.model_copy(update={"rollout_id": None}) for request in call.requests()]
            await store.enqueue_many_rollouts(anew)
        elif self._life.repeat_with == "no claim ids" and isinstance(call, Finish):
            if call.limit:
                await store.dequeue_many_rollouts(limit=call.limit, worker_id=call.worker_id)
        elif not isinstance(call, IssueSequenceId):
            self._note(Line(answered.writer, answered.memory, call))
            promise = await self._make(store, call)
            if isinstance(call, (Claim, Finish)):
                answered.memory.take(promise)
            self._note(Line(answered.writer, answered.memory, call, promise))

    async def _make(self, store: EngineStore, call: AnyCall) -> Promise:
        try:
            if self._life.finish == "in parts" and isinstance(call, Finish):
                return await call.make_by(partial(LightningStore.finish_attempt, store), call.request_id)
            return await call.make(store)
        except IdReused:
            raise
        except Conflict as error:
            return Promise(refused=error.code)
        except NotFound as error:
            if not self._life.deletes:
                raise
            # A finish that is repeated after its rollout was deleted does not say what it claimed the first time; those
            # attempts are handed out again when they are not confirmed.
            ended = [call.rollout_id] if isinstance(call, (Report, Finish, Cancel)) else []
            return Promise(refused=error.code, claimed_by=call.at_most().claimed_by, may_have_ended=ended)

    def _note(self, line: Line) -> None:
        os.write(self._journal, msgspec.json.encode(line) + b"\n")


# --- The nursery -------------------------------------------------------------------------------------------


class Order(msgspec.Struct):
    """What the nursery is told: begin a life, or collect what is left of one."""

    life: Life | None = None
    reap: int | None = None


def say(answer: dict[str, Any]) -> None:
    os.write(1, msgspec.json.encode(answer) + b"\n")


def live(life: Life) -> int:
    try:
        asyncio.run(StoreProcess(life).run())
    except BaseException:  # noqa: BLE001 - the boundary of the process: whoever reads the answers is told
        say({"failed": traceback.format_exc()})
        return 1
    return 0


def main(lines: Sequence[bytes] | Any) -> None:
    """Serve orders, one JSON object a line: `{"life": …}` is answered by `{"pid": …}`, `{"reap": pid}` by
    `{"status": …}` (as of `os.waitpid`). A pid stays the dead process's own until it is reaped."""
    for line in lines:
        order = msgspec.json.decode(line, type=Order)
        if order.life is not None:
            pid = os.fork()
            if pid == 0:
                os._exit(live(order.life))
            say({"pid": pid})
        if order.reap is not None:
            _, status = os.waitpid(order.reap, 0)
            say({"status": status})


if __name__ == "__main__":
    main(sys.stdin.buffer)

"""The steps of the model test: everything that callers and time can do to a store.

What a step does is told by small numbers, which pick among what there is, so that a run that fails
shrinks to a short story.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from agentlightning.errors import StaleAttempt
from agentlightning.types import UNSET, EnqueueRolloutRequest, FinishedAttempt, RolloutConfig, Span
from model_draws import (
    ATTEMPT_END,
    ATTEMPT_STATUS,
    CONFIGS,
    EDITS,
    FATE,
    PICK,
    REASON_CODE,
    REQUEST,
    ROLLOUT_STATUS,
    SECONDS,
    SIMPLE_CALL,
    SPANS,
    WORKER,
    prompts,
    resources_of,
    some,
    span_of,
    typed,
)
from model_machine import Call, ComparingMachine
from model_questions import AskingMachine
from reference_model import CONFIRM_SECONDS, REDELIVERIES

__all__ = ["StoreMachine"]


def has_attempts(machine: ComparingMachine) -> bool:
    """Whether there is an attempt that could be reported about."""
    return bool(machine.reference.attempts)


class StoreMachine(AskingMachine):
    """All steps."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, tuple[int, str | None]] = {}
        self.bumps: list[str] = []
        self.names = 0

    # --- Rollouts --------------------------------------------------------------------------------

    def _request(self, drawn: tuple[str, dict[str, Any], int, int]) -> dict[str, Any]:
        kind, config, priority, pick = drawn
        again = self.reference.rollouts.get(some(self.reference.rollouts, pick))
        if again is not None and kind in ("same", "other"):
            request = {name: value for name, value in again["_request"].items() if name != "started"}
            return request if kind == "same" else {**request, "priority": request["priority"] + 1}
        return {
            "input": {"task": pick},
            "mode": (None, "train", "val")[pick % 3],
            "resources_id": {3: "prompts", 15: "unheard-of"}.get(pick),
            "config": config,
            "metadata": {"n": pick} if pick % 2 else None,
            "priority": priority,
            "rollout_id": None if kind == "issued" else self._name("mine"),
        }

    def _name(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}-{self.names}"

    def _enqueue(self, requests: Sequence[dict[str, Any]]) -> Call:
        return Call(
            lambda: self.store.enqueue_many_rollouts([EnqueueRolloutRequest(**typed(each)) for each in requests]),
            lambda _: self.reference.enqueue(requests),
        )

    @initialize(drawn=st.lists(REQUEST, min_size=1, max_size=4))
    def begin(self, drawn: list[Any]) -> None:
        self.do(self._enqueue([self._request(each) for each in drawn]))

    @rule(drawn=st.lists(REQUEST, min_size=1, max_size=3))
    def enqueue(self, drawn: list[Any]) -> None:
        self.do(self._enqueue([self._request(each) for each in drawn]))

    @rule(config=st.sampled_from(CONFIGS[3:]), pick=PICK)
    def enqueue_to_be_retried(self, config: dict[str, Any], pick: int) -> None:
        self.do(self._enqueue([self._request(("own", config, each % 2, pick + each)) for each in range(3)]))

    @rule(drawn=REQUEST, worker_id=WORKER, attempt=st.sampled_from(["issued", "own", "known"]))
    def start_rollout(self, drawn: Any, worker_id: str | None, attempt: str) -> None:
        request = self._request(drawn)
        attempt_id = {"own": self._name("at-mine"), "known": some(self.reference.attempts, drawn[3])}.get(attempt)
        self.do(
            Call(
                lambda: self.store.start_rollout(**typed(request), worker_id=worker_id, attempt_id=attempt_id),
                lambda _: self.reference.start_rollout(request, worker_id, attempt_id),
            )
        )

    def _claim(self, limit: int, worker_id: str | None, request_id: str | None) -> Call:
        return Call(
            lambda: self.store.dequeue_many_rollouts(limit=limit, worker_id=worker_id, request_id=request_id),
            lambda _: self.reference.dequeue(limit, worker_id, request_id),
        )

    @rule(limit=st.sampled_from([1, 1, 2, 5]), worker_id=WORKER, confirmed=st.booleans())
    def claim(self, limit: int, worker_id: str | None, confirmed: bool) -> None:
        request_id = self._name("request") if confirmed else None
        if request_id is not None:
            self.requests[request_id] = limit, worker_id
        self.do(self._claim(limit, worker_id, request_id))

    @rule(pick=PICK, limit=st.sampled_from([None, None, None, 1]))
    def repeat_claim(self, pick: int, limit: int | None) -> None:
        request_id = some(self.requests, pick)
        before = self.requests.setdefault(request_id, (1, "w1"))
        self.do(self._claim(limit or before[0], before[1], request_id))

    @rule(limit=st.sampled_from([1, 5]), worker_id=WORKER, seconds=st.sampled_from([CONFIRM_SECONDS, 64.0]))
    def claim_and_vanish(self, limit: int, worker_id: str | None, seconds: float) -> None:
        self.do(self._claim(limit, worker_id, self._name("request")))
        self.clock.advance(seconds)
        self.look()

    @rule(limit=st.sampled_from([1, 1, 3]), fates=st.lists(FATE, min_size=1, max_size=5))
    def claim_in_vain(self, limit: int, fates: list[tuple[str | None, str]]) -> None:
        """Workers get rollouts, one after another, and never confirm them."""
        for worker_id, fate in fates:
            self.do(self._claim(limit, worker_id, self._name("request")))
            self.clock.advance(1.0)
            if worker_id is None or fate == "vanishes":
                self.clock.advance(CONFIRM_SECONDS)
                self.look()
            elif fate == "lives on":
                self.do(self._beat(worker_id, None, [], None))
                self.clock.advance(CONFIRM_SECONDS)
                self.look()
            else:
                self.do(self._lose(worker_id, None))

    @rule(worker_id=WORKER, lives_on=st.booleans())
    def claim_in_vain_for_ever(self, worker_id: str | None, lives_on: bool) -> None:
        """One worker, whatever becomes of it, gets the first rollout of the queue until that is over."""
        fate = "lives on" if lives_on else "vanishes"
        self.claim_in_vain(1, [(worker_id, fate)] * (REDELIVERIES + 1))

    def _start_attempt(self, rollout_id: str, worker_id: str | None, attempt_id: str | None) -> Call:
        return Call(
            lambda: self.store.start_attempt(rollout_id, worker_id, attempt_id=attempt_id),
            lambda _: self.reference.start_attempt(rollout_id, worker_id, attempt_id),
            [rollout_id],
        )

    @rule(pick=PICK, worker_id=WORKER, attempt=st.sampled_from(["issued", "own", "known", "repeated"]))
    def start_attempt(self, pick: int, worker_id: str | None, attempt: str) -> None:
        rollout_id, known = self._attempt(pick)
        if attempt == "repeated":
            worker_id = self.reference.attempts.get(known, {}).get("worker_id")
        else:
            rollout_id = some(self.reference.rollouts, pick)
        attempt_id = {"issued": None, "own": self._name("at-mine")}.get(attempt, known)
        self.do(self._start_attempt(rollout_id, worker_id, attempt_id))

    @rule(pick=PICK, status=ROLLOUT_STATUS, code=REASON_CODE, message=st.sampled_from([None, "since it must be"]))
    def set_status(self, pick: int, status: Any, code: str | None, message: str | None) -> None:
        self.do(self._update_rollout(some(self.reference.rollouts, pick), {}, status, code, message))

    @rule(pick=PICK, edit=st.sampled_from(EDITS), status=st.sampled_from([None, None, None, "requeuing", "failed"]))
    def edit_rollout(self, pick: int, edit: dict[str, Any], status: Any) -> None:
        self.do(self._update_rollout(some(self.reference.rollouts, pick), edit, status, None, None))

    def _update_rollout(
        self, rollout_id: str, edit: dict[str, Any], status: Any, code: str | None, message: str | None
    ) -> Call:
        config = {"config": RolloutConfig(**edit["config"])} if "config" in edit else {}
        whole_config = {name: each.model_dump() for name, each in config.items()}
        return Call(
            lambda: self.store.update_rollout(
                rollout_id, **{**edit, **config}, status=status or UNSET, reason_code=code, reason_message=message
            ),
            lambda _: self.reference.update_rollout(rollout_id, {**edit, **whole_config}, status, code),
            [rollout_id],
        )

    def _cancel(self, rollout_id: str) -> Call:
        return Call(
            lambda: self.store.cancel_rollout(rollout_id), lambda _: self.reference.cancel(rollout_id), [rollout_id]
        )

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        self.do(self._cancel(some(self.reference.rollouts, pick)))

    @rule(age=st.sampled_from([30.0, 1000.0]))
    def delete_finished(self, age: float) -> None:
        self.do(
            Call(
                lambda: self.store.delete_finished_rollouts(older_than_seconds=age),
                lambda _: self.reference.delete_finished(age),
            )
        )

    # --- Attempts and spans ----------------------------------------------------------------------

    def _report(self, rollout_id: str, attempt_id: str, code: str | None = None, **said: Any) -> Call:
        given = {name: value for name, value in said.items() if value is not None}
        known = {**given, "metadata": given["metadata"]} if "metadata" in given else given
        if "metadata" in given:
            given = {**given, "metadata": given["metadata"][0]}
        return Call(
            lambda: self.store.update_attempt(rollout_id, attempt_id, **given, reason_code=code),
            lambda _: self.reference.update_attempt(rollout_id, attempt_id, **known, reason_code=code),
            [rollout_id],
        )

    @precondition(has_attempts)
    @rule(pick=PICK, status=ATTEMPT_STATUS, code=REASON_CODE)
    def report(self, pick: int, status: Any, code: str | None) -> None:
        self.do(self._report(*self._attempt(pick), code, status=status))

    @precondition(has_attempts)
    @rule(pick=st.integers(0, 9), status=st.sampled_from(["succeeded", "failed"]))
    def finish(self, pick: int, status: str) -> None:
        self.do(self._report(*self._attempt(pick), status=status))

    def _finish(
        self,
        status: Any,
        spans: Sequence[dict[str, Any]],
        attempt: tuple[str, str],
        claim: tuple[int, str | None, str | None],
        *,
        code: str | None = None,
        metadata: tuple[dict[str, Any] | None] | None = None,
    ) -> Call:
        limit, worker_id, request_id = claim
        numbers: dict[tuple[str, str], int] = {}

        async def finish() -> FinishedAttempt:
            try:
                done = await self.store.finish_attempt(
                    *attempt,
                    status,
                    [span_of(each) for each in spans],
                    metadata=UNSET if metadata is None else metadata[0],
                    reason_code=code,
                    claim_limit=limit,
                    worker_id=worker_id,
                    request_id=request_id,
                )
            except StaleAttempt:  # the spans are there all the same, and the reply does not say under which numbers
                found = await self.store.query_spans(*attempt)
                numbers.update({(each.attempt_id, each.span_id): each.sequence_id for each in found})
                raise
            for each, number in zip(spans, done.sequence_ids, strict=True):
                numbers.setdefault((each["attempt_id"], each["span_id"]), number)
            return done

        return Call(
            finish,
            lambda _: self.reference.finish(
                *attempt, status, spans, numbers, metadata=metadata, reason_code=code, claim=claim
            ),
            [attempt[0]],
        )

    @precondition(has_attempts)
    @rule(
        pick=PICK,
        status=ATTEMPT_END,
        drawn=st.just([]) | SPANS,
        limit=st.sampled_from([0, 1, 1, 2]),
        worker_id=WORKER,
        request=st.sampled_from(["none", "new", "new", "again"]),
        code=REASON_CODE,
        metadata=st.sampled_from([None, None, ({"step": 2},)]),
    )
    def finish_and_claim(
        self,
        pick: int,
        status: Any,
        drawn: list[tuple[int, int]],
        limit: int,
        worker_id: str | None,
        request: str,
        code: str | None,
        metadata: Any,
    ) -> None:
        request_id = None
        if request == "new" and limit:
            request_id = self._name("request")
            self.requests[request_id] = limit, worker_id
        elif request == "again":
            request_id = some(self.requests, pick)
        spans = self._spans(pick, drawn)
        claim = (limit, worker_id, request_id)
        self.do(self._finish(status, spans, self._attempt(pick), claim, code=code, metadata=metadata))

    @precondition(has_attempts)
    @rule(pick=st.integers(0, 9), status=ATTEMPT_END, drawn=SPANS, limit=st.sampled_from([0, 1, 2]), worker_id=WORKER)
    def finish_twice(
        self, pick: int, status: Any, drawn: list[tuple[int, int]], limit: int, worker_id: str | None
    ) -> None:
        """The reply to the first call was lost."""
        request_id = self._name("request")
        if limit:
            self.requests[request_id] = limit, worker_id
        spans, attempt = self._spans(pick, drawn), self._attempt(pick)
        for _ in range(2):
            self.do(self._finish(status, spans, attempt, (limit, worker_id, request_id)))

    def _release(self, rollout_id: str, attempt_id: str) -> Call:
        return Call(
            lambda: self.store.release_attempt(rollout_id, attempt_id),
            lambda _: self.reference.release(rollout_id, attempt_id),
            [rollout_id],
        )

    @precondition(has_attempts)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        self.do(self._release(*self._attempt(pick)))

    @rule(worker_id=st.sampled_from(["w1", "w2"]), release=st.booleans(), found=st.sampled_from(["reported", "lease"]))
    def claim_ahead_and_die(self, worker_id: str, release: bool, found: str) -> None:
        """A runner works on one rollout, has claimed another, gives that back or not, and dies."""
        self.do(self._claim(1, worker_id, self._name("request")))
        working = self.reference.workers[worker_id]["current_attempt_id"]
        self.do(self._beat(worker_id, None, [] if working is None else [working], 6.0))
        self.do(self._claim(1, worker_id, self._name("request")))
        ahead = self.reference.workers[worker_id]["current_attempt_id"]
        if release and ahead not in (None, working):
            self.do(self._release(self.reference.attempts[ahead]["rollout_id"], ahead))
        if found == "reported":
            self.do(self._lose(worker_id, None))
        else:
            self.clock.advance(CONFIRM_SECONDS)
            self.look()

    @precondition(has_attempts)
    @rule(
        pick=PICK,
        status=st.none() | ATTEMPT_STATUS,
        worker_id=WORKER,
        time=st.sampled_from([None, 5.0]),
        metadata=st.sampled_from([None, (None,), ({"step": 1},)]),
        latest=st.booleans(),
    )
    def report_more(
        self, pick: int, status: Any, worker_id: str | None, time: Any, metadata: Any, latest: bool
    ) -> None:
        rollout_id, attempt_id = self._attempt(pick)
        if pick == 14:
            rollout_id = some(self.reference.rollouts, 0)  # maybe not its own
        attempt_id = "latest" if latest else attempt_id
        said = {"status": status, "worker_id": worker_id, "last_heartbeat_time": time, "metadata": metadata}
        self.do(self._report(rollout_id, attempt_id, **said))

    def _add_spans(self, spans: Sequence[dict[str, Any]]) -> Call:
        def numbers(reply: Sequence[Span] | None) -> dict[tuple[str, str], int]:
            return {(each.attempt_id, each.span_id): each.sequence_id for each in reply or ()}

        return Call(
            lambda: self.store.add_many_spans([span_of(each) for each in spans]),
            lambda reply: self.reference.add_spans(spans, numbers(reply)),
            [each["rollout_id"] for each in spans],
        )

    def _spans(self, pick: int, drawn: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        rollout_id, attempt_id = self._attempt(pick)
        return [
            {
                "rollout_id": rollout_id,
                "attempt_id": attempt_id,
                "sequence_id": number,
                "span_id": f"{each:016x}",
                # Mostly a known id comes with the known content, as repeats do.
                "name": f"span {each}" if each != number else "another span",
            }
            for each, number in drawn
        ]

    @precondition(has_attempts)
    @rule(pick=PICK, drawn=SPANS)
    def add_spans(self, pick: int, drawn: list[tuple[int, int]]) -> None:
        self.do(self._add_spans(self._spans(pick, drawn)))

    @precondition(has_attempts)
    @rule(picks=st.tuples(PICK, PICK), drawn=SPANS)
    def add_spans_of_two(self, picks: tuple[int, int], drawn: list[tuple[int, int]]) -> None:
        pairs = zip(self._spans(picks[0], drawn), self._spans(picks[1], drawn), strict=True)
        self.do(self._add_spans([each for pair in pairs for each in pair]))

    @precondition(has_attempts)
    @rule(picks=st.lists(PICK, min_size=1, max_size=2))
    def issue_sequence_ids(self, picks: list[int]) -> None:
        wanted = [self._attempt(pick) for pick in picks]
        self.do(
            Call(
                lambda: self.store.get_many_span_sequence_ids(wanted),
                lambda reply: self.reference.issue_sequence_ids(wanted, reply or ()),
            )
        )

    # --- Resources -------------------------------------------------------------------------------

    @rule(
        change=st.sampled_from(["add", "update", "update", "roll back"]),
        resources_id=st.sampled_from(["prompts", "prompts", "others"]),
        number=st.integers(0, 2),
        request=st.sampled_from([None, "new", "again"]),
        pick=PICK,
    )
    def change_resources(self, change: str, resources_id: str, number: int, request: str | None, pick: int) -> None:
        if request == "new":
            self.bumps.append(self._name("bump"))
        request_id = {"new": self.bumps[-1:], "again": [some(self.bumps, pick)]}.get(request or "", [None])[0]
        calls = {
            "add": self._add_resources(None if pick == 0 else resources_id, number),
            "update": self._update_resources(resources_id, number, request_id),
            "roll back": self._roll_back(resources_id, number + 1, request_id),
        }
        self.do(calls[change])

    def _add_resources(self, resources_id: str | None, number: int) -> Call:
        return Call(
            lambda: self.store.add_resources(resources_of(number), resources_id=resources_id),
            lambda _: self.reference.add_resources(resources_id, prompts(number)),
        )

    def _update_resources(self, resources_id: str, number: int, request_id: str | None) -> Call:
        return Call(
            lambda: self.store.update_resources(resources_id, resources_of(number), request_id=request_id),
            lambda _: self.reference.update_resources(resources_id, prompts(number), request_id),
        )

    def _roll_back(self, resources_id: str, version: int, request_id: str | None) -> Call:
        return Call(
            lambda: self.store.rollback_resources(resources_id, version, request_id=request_id),
            lambda _: self.reference.rollback_resources(resources_id, version, request_id),
        )

    # --- Workers ---------------------------------------------------------------------------------

    def _beat(
        self,
        worker_id: str,
        stats: Any,
        attempt_ids: Sequence[str] | None,
        lease: float | None,
        registration: dict[str, Any] | None = None,
    ) -> Call:
        return Call(
            lambda: self.store.update_worker(
                worker_id,
                UNSET if stats is None else stats,
                attempt_ids=UNSET if attempt_ids is None else attempt_ids,
                lease_seconds=lease or UNSET,
                registration=UNSET if registration is None else registration,
            ),
            lambda _: self.reference.update_worker(worker_id, stats, attempt_ids, lease, registration),
            [
                self.reference.attempts[each]["rollout_id"]
                for each in attempt_ids or ()
                if each in self.reference.attempts
            ],
        )

    @rule(
        worker_id=st.sampled_from(["w1", "w2", "w3"]),
        stats=st.sampled_from([None, None, {}, {"load": 0.5}]),
        picks=st.none() | st.lists(PICK, max_size=3),
        lease=st.sampled_from([None, None, 3.0, 6.0]),
    )
    def beat(self, worker_id: str, stats: Any, picks: list[int] | None, lease: float | None) -> None:
        listed = None if picks is None else [self._attempt(pick)[1] for pick in picks]
        self.do(self._beat(worker_id, stats, listed, lease))

    @rule(worker_id=st.sampled_from(["w1", "w2", "w3"]))
    def beat_with_all_it_was_given(self, worker_id: str) -> None:
        given = [each["attempt_id"] for each in self.reference.attempts.values() if each["worker_id"] == worker_id]
        self.do(self._beat(worker_id, None, given[-6:], None))

    @rule(worker_id=st.sampled_from(["w1", "w2", "w3"]), number=st.integers(0, 2))
    def register(self, worker_id: str, number: int) -> None:
        self.do(self._beat(worker_id, None, None, None, {"pid": number, "host": "here"}))

    @rule(worker_id=st.sampled_from(["w1", "w2", "w3"]), code=REASON_CODE)
    def report_worker_lost(self, worker_id: str, code: str | None) -> None:
        self.do(self._lose(worker_id, code))

    @rule(worker_id=st.sampled_from(["w1", "w2", "w3"]), picks=st.lists(PICK, max_size=3))
    def report_worker_lost_with_what_it_had_begun(self, worker_id: str, picks: list[int]) -> None:
        self.do(self._lose(worker_id, None, [self._attempt(pick)[1] for pick in picks]))

    def _lose(self, worker_id: str, code: str | None, begun: list[str] | None = None) -> Call:
        ids = UNSET if begun is None else begun
        return Call(
            lambda: self.store.report_worker_lost(
                worker_id, message="its process died", reason_code=code, attempt_ids=ids
            ),
            lambda _: self.reference.lose_worker(worker_id, code, begun),
        )

    def _direct(self, directive: Any, worker_ids: list[str] | None) -> Call:
        return Call(
            lambda: self.store.direct_workers(directive, worker_ids=worker_ids),
            lambda _: self.reference.direct_workers(directive, worker_ids),
        )

    @rule(
        directive=st.sampled_from(["drain", "stop", None, None]),
        worker_ids=st.none() | st.lists(st.sampled_from(["w1", "w2", "w3"]), max_size=2),
    )
    def direct_workers(self, directive: Any, worker_ids: list[str] | None) -> None:
        self.do(self._direct(directive, worker_ids))

    def _delete_workers(self, worker_ids: list[str]) -> Call:
        return Call(lambda: self.store.delete_workers(worker_ids), lambda _: self.reference.delete_workers(worker_ids))

    @rule(worker_ids=st.lists(st.sampled_from(["w1", "w2", "w3", "nobody"]), max_size=3))
    def delete_workers(self, worker_ids: list[str]) -> None:
        self.do(self._delete_workers(worker_ids))

    # --- Many at once ----------------------------------------------------------------------------

    @rule(drawn=st.lists(st.tuples(SIMPLE_CALL, PICK), min_size=2, max_size=4))
    def at_once(self, drawn: list[tuple[str, int]]) -> None:
        """Calls that share one transaction: those that fail must not touch the others."""
        self.do(*(self._simple(*each) for each in drawn))

    def _simple(self, kind: str, pick: int) -> Call:
        rollout_id, attempt_id = self._attempt(pick)
        worker_id = ("w1", "w2", None)[pick % 3]
        match kind:
            case "enqueue":
                return self._enqueue([self._request(("own", CONFIGS[pick % len(CONFIGS)], 0, pick))])
            case "claim":
                return self._claim(1 + pick % 2, worker_id, self._name("request") if pick % 4 else None)
            case "start":
                return self._start_attempt(rollout_id, worker_id, self._name("at-mine"))
            case "report":
                return self._report(rollout_id, attempt_id, status=("succeeded", "running", "failed")[pick % 3])
            case "finish":
                claim = (pick % 3, worker_id, self._name("request") if pick % 4 else None)
                spans = self._spans(pick, [(pick, 0), (pick + 1, 0)])
                return self._finish(("succeeded", "failed")[pick % 2], spans, (rollout_id, attempt_id), claim)
            case "release":
                return self._release(rollout_id, attempt_id)
            case "spans":
                return self._add_spans(self._spans(pick, [(pick, 0), (pick + 1, 0)]))
            case "cancel":
                return self._cancel(rollout_id)
            case "forget":
                return self._delete_workers([worker_id or "w3"])
            case "direct":
                return self._direct(("drain", None)[pick % 2], None if worker_id is None else [worker_id])
            case _:
                return self._beat(worker_id or "w3", None, [attempt_id], None)

    # --- Time ------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from(SECONDS))
    def time_passes(self, seconds: float) -> None:
        with self.step():
            self.clock.advance(seconds)
            self.look()

    @rule(late=st.sampled_from([0.0, -0.125, 0.125]))
    def time_passes_to_the_next_deadline(self, late: float) -> None:
        with self.step():
            self._advance_to_deadline(late)
            self.look()

    @rule(late=st.sampled_from([0.0, -0.125, 0.125, 2.0]), kind=SIMPLE_CALL, pick=PICK)
    def call_at_the_next_deadline(self, late: float, kind: str, pick: int) -> None:
        """A call is the first to notice that a deadline has passed, or just not yet."""
        call = self._simple(kind, pick)
        self._advance_to_deadline(late)
        self.do(call)

    def _advance_to_deadline(self, late: float) -> None:
        due = self.reference.next_due()
        if due != float("inf"):
            self.clock.advance(max(due + late - self.clock.monotonic(), 0.0))

    @rule(seconds=st.sampled_from([11.0, 64.0, 1_000_000.0]))
    def much_time_passes(self, seconds: float) -> None:
        with self.step():
            self.clock.advance(seconds)
            self.look()

    @rule(seconds=st.sampled_from([-1_000_000.0, -7.0, 0.5, 7.0, 1_000_000.0]))
    def wall_clock_jumps(self, seconds: float) -> None:
        with self.step():
            self.clock.jump_wall(seconds)
            self.look()

    @precondition(lambda self: self.file is not None)
    @rule(downtime=st.sampled_from([0.0, 0.5, 100.0]))
    def restart(self, downtime: float) -> None:
        with self.step():
            self.run(self.store.close())
            self.clock.advance(downtime)
            self.reference.restart()
            self.store = self.open()
            self.look()

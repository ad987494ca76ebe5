"""The steps of the model test: everything that callers and time can do to a store.

What a step does is told by small numbers, which pick among what there is, so that a run that fails
shrinks to a short story.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from agentlightning.types import UNSET, EnqueueRolloutRequest, PromptTemplate, RolloutConfig, Span
from model_compare import agree, in_order
from model_machine import Call, ComparingMachine
from reference_model import CONFIRM_SECONDS, live, shown

__all__ = ["StoreMachine"]

PICK = st.integers(0, 15)
WORKER = st.sampled_from(["w1", "w2", "w3", None])
SECONDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"unresponsive_seconds": 2.0},
    {"timeout_seconds": 4.0},
    {"max_attempts": 2, "retry_condition": ["failed"]},
    {"unresponsive_seconds": 2.0, "max_attempts": 3, "retry_condition": ["unresponsive", "failed"]},
    {"unresponsive_seconds": 2.0, "timeout_seconds": 5.0, "max_attempts": 3, "retry_condition": ["timeout"]},
    {"unresponsive_seconds": 1.0, "max_attempts": 100, "retry_condition": ["failed", "timeout", "unresponsive"]},
    {"timeout_seconds": 40.0, "max_attempts": 2, "retry_condition": ["timeout", "unresponsive"]},
    {"timeout_seconds": 3.0, "unresponsive_seconds": 3.0, "max_attempts": 2, "retry_condition": ["unresponsive"]},
)
CONFIG = st.sampled_from(CONFIGS)
REQUEST = st.tuples(
    st.sampled_from(["issued", "issued", "own", "same", "other"]), CONFIG, st.sampled_from([0, 0, 0, 1, 5, -1]), PICK
)
ATTEMPT_STATUS = st.sampled_from(["running", "succeeded", "failed", "timeout", "unresponsive", "preparing", None])
ROLLOUT_STATUS = st.sampled_from(
    [None, "running", "requeuing", "succeeded", "failed", "cancelled", "queuing", "preparing"]
)
REASON_CODE = st.sampled_from([None, None, "out_of_memory"])
SPANS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 0, 1, 4, 30])), min_size=1, max_size=4)
EDITS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"metadata": {"edited": True}},
    {"metadata": None},
    {"input": {"another": "input"}},
    {"mode": "test"},
    {"mode": None, "metadata": {"edited": 2}},
    {"resources_id": "prompts"},
    {"resources_id": "unheard-of"},
    {"resources_id": None},
    *({"config": config} for config in CONFIGS),
)
SIMPLE_CALL = st.sampled_from(["enqueue", "claim", "start", "report", "spans", "cancel", "beat"])
SORTABLE = {
    "rollouts": ("rollout_id", "start_time", "end_time", "mode", "resources_version", "priority", "status"),
    "attempts": ("sequence_id", "attempt_id", "end_time", "last_heartbeat_time", "worker_id", "status", "reason_code"),
    "spans": ("sequence_id", "span_id", "attempt_id", "name"),
    "workers": ("worker_id", "status", "last_heartbeat_time", "last_idle_time", "current_attempt_id", "lease_seconds"),
    "resources": ("resources_id", "version", "create_time", "update_time"),
    "versions": ("version",),
}


def some(ids: Iterable[str], pick: int, *, otherwise: str = "nobody") -> str:
    """One of these: a recent one, or an older one, or at times one that is not among them."""
    among = list(ids)
    if not among or pick == 15:
        return otherwise
    return among[-1 - pick % len(among)] if pick < 10 else among[(pick * 7) % len(among)]


def prompts(number: int) -> dict[str, Any]:
    """Resources of which there are a few."""
    return {"prompt": {"resource_type": "prompt_template", "template": f"version {number}", "engine": "f-string"}}


def resources_of(number: int) -> dict[str, Any]:
    """The same as the store takes them."""
    return {"prompt": PromptTemplate(template=f"version {number}", engine="f-string")}


def typed(request: dict[str, Any]) -> dict[str, Any]:
    """A request as the store takes it."""
    return {**request, "config": RolloutConfig(**request["config"]) if request["config"] else None}


def span_of(facts: dict[str, Any]) -> Span:
    """A span with these ids."""
    return Span.from_attributes(attributes={}, trace_id="0" * 32, start_time=1.0, end_time=2.0, **facts)


def has_attempts(machine: ComparingMachine) -> bool:
    """Whether there is an attempt that could be reported about."""
    return bool(machine.reference.attempts)


class StoreMachine(ComparingMachine):
    """All rules."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
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
        if confirmed:
            self.requests.append(self._name("request"))
        self.do(self._claim(limit, worker_id, self.requests[-1] if confirmed else None))

    @rule(pick=PICK, worker_id=WORKER)
    def repeat_claim(self, pick: int, worker_id: str | None) -> None:
        self.do(self._claim(1, worker_id, some(self.requests, pick)))

    @rule(limit=st.sampled_from([1, 5]), worker_id=WORKER, seconds=st.sampled_from([CONFIRM_SECONDS, 64.0]))
    def claim_and_vanish(self, limit: int, worker_id: str | None, seconds: float) -> None:
        self.do(self._claim(limit, worker_id, self._name("request")))
        self.clock.advance(seconds)
        self.look()

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

    @rule(
        pick=PICK,
        edit=st.sampled_from(EDITS),
        status=ROLLOUT_STATUS,
        code=REASON_CODE,
        message=st.sampled_from([None, "since it must be"]),
    )
    def update_rollout(
        self, pick: int, edit: dict[str, Any], status: Any, code: str | None, message: str | None
    ) -> None:
        rollout_id = some(self.reference.rollouts, pick)
        fields = dict(edit)
        if "config" in fields:
            fields["config"] = RolloutConfig(**fields["config"]).model_dump()
        given = {**edit, "config": RolloutConfig(**edit["config"])} if "config" in edit else edit
        self.do(
            Call(
                lambda: self.store.update_rollout(
                    rollout_id, **given, status=status or UNSET, reason_code=code, reason_message=message
                ),
                lambda _: self.reference.update_rollout(rollout_id, fields, status, code),
                [rollout_id],
            )
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

    @rule(picks=st.lists(PICK, max_size=3))
    def wait_for_rollouts(self, picks: list[int]) -> None:
        ids = [some(self.reference.rollouts, pick) for pick in picks]

        def ended(_: Any) -> list[dict[str, Any]]:
            known = [each for each in dict.fromkeys(ids) if each in self.reference.rollouts]
            return [self.reference.rollout_now(each) for each in known if self.reference.rollouts[each]["end_time"]]

        self.do(Call(lambda: self.store.wait_for_rollouts(rollout_ids=ids, timeout=0), ended))

    # --- Attempts and spans ----------------------------------------------------------------------

    def _attempt(self, pick: int) -> tuple[str, str]:
        """An attempt, with its rollout: mostly one that is live or may return, at times any, or none."""
        attempts = self.reference.attempts.values()
        wanted = [each for each in attempts if live(each)] if pick < 7 else []
        if 7 <= pick < 10:
            wanted = [each for each in attempts if self.reference.standing(each) == "returning"]
        attempt_id = some((each["attempt_id"] for each in wanted or attempts), pick)
        found = self.reference.attempts.get(attempt_id)
        return ("nowhere" if found is None else found["rollout_id"]), attempt_id

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

    @precondition(has_attempts)
    @rule(
        pick=PICK,
        status=ATTEMPT_STATUS,
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
                "name": self._name("span"),
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

    def _beat(self, worker_id: str, stats: Any, attempt_ids: Sequence[str] | None, lease: float | None) -> Call:
        return Call(
            lambda: self.store.update_worker(
                worker_id,
                UNSET if stats is None else stats,
                attempt_ids=UNSET if attempt_ids is None else attempt_ids,
                lease_seconds=lease or UNSET,
            ),
            lambda _: self.reference.update_worker(worker_id, stats, attempt_ids, lease),
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

    @rule(worker_id=st.sampled_from(["w1", "w2", "w3"]))
    def report_worker_lost(self, worker_id: str) -> None:
        self.do(
            Call(
                lambda: self.store.report_worker_lost(worker_id, message="its process died"),
                lambda _: self.reference.lose_worker(worker_id),
            )
        )

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
            case "spans":
                return self._add_spans(self._spans(pick, [(pick, 0), (pick + 1, 0)]))
            case "cancel":
                return self._cancel(rollout_id)
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

    # --- Questions -------------------------------------------------------------------------------

    @rule(pick=PICK, version=st.sampled_from([None, 1, 2]))
    def look_up(self, pick: int, version: int | None) -> None:
        known, store = self.reference, self.store
        rollout_id, worker_id = some(known.rollouts, pick), some(known.workers, pick)
        latest = known.latest(rollout_id)
        versions = [shown(each) for each in known.versions_of("prompts") if version in (None, each["version"])]
        with self.step():
            rollout = known.rollout_now(rollout_id) if rollout_id in known.rollouts else None
            agree("rollout", [self.run(store.get_rollout_by_id(rollout_id))], [rollout])
            agree("latest attempt", [self.run(store.get_latest_attempt(rollout_id))], [latest and shown(latest)])
            worker = shown(known.workers[worker_id]) if worker_id in known.workers else None
            agree("worker", [self.run(store.get_worker_by_id(worker_id))], [worker])
            resources = self.run(store.get_resources_by_id("prompts", version=version))
            agree("resources", [resources], versions[-1:] or [None])

    @rule()
    def look_at_everything(self) -> None:
        with self.step():
            self.compare_everything()

    @rule(
        table=st.sampled_from(list(SORTABLE)),
        column=st.integers(0, 7),
        descending=st.booleans(),
        limit=st.sampled_from([-1, 1, 2, 5]),
        offset=st.sampled_from([0, 0, 1, 3]),
        pick=PICK,
    )
    def page(self, table: str, column: int, descending: bool, limit: int, offset: int, pick: int) -> None:
        sort_by = (None, *SORTABLE[table])[column % (len(SORTABLE[table]) + 1)]
        asked, rows = self._asked(table, pick)
        if table == "spans" and sort_by == "sequence_id":
            rows = in_order(self.reference.by_number(rows), None, descending=descending)
        else:
            rows = in_order(rows, sort_by, descending=descending)
        end = None if limit == -1 else offset + limit
        query = {**asked, "sort_by": sort_by, "sort_order": "desc" if descending else "asc"}
        if table == "versions":
            del query["sort_by"]
        with self.step():
            found = self.run(self._ask_for(table)(**query, limit=limit, offset=offset))
            agree(f"{table} {query} from {offset} to {end}", found, rows[offset:end])
            agree(f"{table} {query}", [[found.total, found.limit, found.offset]], [[len(rows), limit, offset]])

    def _ask_for(self, table: str) -> Any:
        store = self.store
        return {
            "rollouts": store.query_rollouts,
            "attempts": store.query_attempts,
            "spans": store.query_spans,
            "workers": store.query_workers,
            "resources": store.query_resources,
            "versions": store.query_resource_versions,
        }[table]

    def _asked(self, table: str, pick: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What a query is restricted to, and the rows that are left, in the order of insertion."""
        known = self.reference
        rollout_id, attempt_id = self._attempt(pick)
        match table:
            case "rollouts":
                return self._asked_rollouts(pick)
            case "attempts":
                return {"rollout_id": rollout_id}, list(map(shown, known.attempts_of(rollout_id)))
            case "spans":
                return self._asked_spans(rollout_id, (None, attempt_id, "latest")[pick % 3])
            case "workers":
                states = (["idle"], ["busy", "unknown"], ["idle", "busy", "unknown"])[pick % 3]
                rows = [shown(each) for each in known.workers.values() if each["status"] in states]
                return {"status_in": states}, rows
            case "versions":
                return {"resources_id": "prompts"}, list(map(shown, known.versions_of("prompts")))
            case _:
                newest = {each["resources_id"]: each for each in known.resources}
                rows = [each for each in known.resources if each is newest[each["resources_id"]]]
                wanted = None if pick % 2 else "prompts"
                return {"resources_id": wanted}, [
                    shown(each) for each in rows if wanted in (None, each["resources_id"])
                ]

    def _asked_rollouts(self, pick: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        known = self.reference.rollouts
        ids = [some(known, each % 16) for each in (pick, pick + 3, 15)]
        states = (["queuing", "requeuing"], ["preparing", "running"], ["failed"], [])[pick % 4]
        query = [
            {},
            {"status_in": states},
            {"rollout_id_in": ids},
            {"status": states, "rollout_ids": ids},
            {"status_in": states, "rollout_id_in": ids, "filter_logic": "or"},
            {"rollout_id_contains": "mine"},
            {"rollout_id_contains": "ro-1", "status_in": states},
        ][pick % 7]

        def matches(row: dict[str, Any]) -> bool:
            tests = [
                row["status"] in states if {"status_in", "status"} & query.keys() else None,
                row["rollout_id"] in ids if {"rollout_id_in", "rollout_ids"} & query.keys() else None,
                query["rollout_id_contains"] in row["rollout_id"] if "rollout_id_contains" in query else None,
            ]
            given = [each for each in tests if each is not None]
            return any(given) if query.get("filter_logic") == "or" else all(given)

        return query, [self.reference.rollout_now(each) for each, row in known.items() if matches(row)]

    def _asked_spans(self, rollout_id: str, attempt_id: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        query = {"rollout_id": rollout_id, "attempt_id": attempt_id}
        if attempt_id == "latest":
            newest = self.reference.latest(rollout_id)
            attempt_id = "none" if newest is None else newest["attempt_id"]
        found = [each for each in self.reference.spans if each["rollout_id"] == rollout_id]
        return query, [each for each in found if attempt_id in (None, each["attempt_id"])]

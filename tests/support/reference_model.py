"""What a store must do, said once more: plain dicts, linear scans, no index, no I/O.

The rules are those of the design and of the contract (``agentlightning.store.base``). Nothing here imports
the state machine or the engine; what the store keeps in counters, links and deadlines is computed here from
the facts, each time it is asked for.

Each method does what the store's method of that name does, at the time its clock shows. It returns
what the store's reply should hold, as plain values, or raises ``Refused``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from reference_records import ENDS_OF_ROLLOUTS, Facts, ReferenceRecords, Refused, live, shown, waiting

__all__ = ["CONFIRM_SECONDS", "REDELIVERIES", "ReferenceStore", "Refused", "live", "shown"]

CONFIRM_SECONDS = 10.0
"""How long a claim with a request id may stay without a sign of life."""
PROOFS = 4
"""So many workers that had a rollout, and never confirmed it, prove that it is poison."""
REDELIVERIES = 20
"""How often a rollout is handed out again because nobody confirmed that they had received it, whoever had it."""
IDLE_NOTED_SECONDS = 60.0
"""How long a worker that asks in vain again is not noted anew."""


def check_code(reason_code: str | None) -> None:
    """Only the store knows what was never confirmed, or given back; it counts attempts by that."""
    if reason_code in ("unconfirmed", "released"):
        raise Refused("invalid_value")


class ReferenceStore(ReferenceRecords):
    """What happens to the records."""

    # --- Enqueue and claim -----------------------------------------------------------------------

    def enqueue(self, requests: Sequence[Facts]) -> list[Facts]:
        """All or none; one that is there already, by an equal request, stays as it is."""
        asked: dict[str, Facts] = {}
        for request in requests:
            known = self._same_request(request, asked)
            if not known:
                self._pinned(request["resources_id"])
            if request["rollout_id"] is not None:
                asked[request["rollout_id"]] = {"_request": request}
        return [self.rollout_now(self._make_rollout(request, "queuing")) for request in requests]

    def start_rollout(self, request: Facts, worker_id: str | None, attempt_id: str | None) -> Facts:
        """A rollout together with its first attempt."""
        request = {**request, "started": True}
        asked = ("start_rollout", {**request, "rollout_id": None}, worker_id, attempt_id)
        same = self.attempts.get(attempt_id or "")
        if same is not None and same["_asked"] != asked:
            raise Refused("id_reused")
        if self._same_request(request, {}):
            of_rollout = [each for each in self.attempts.values() if each["rollout_id"] == request["rollout_id"]]
            first = same or of_rollout[0]
            if first is not of_rollout[0] or first["_asked"] != asked:
                raise Refused("id_reused")
            return {**shown(self.rollouts[first["rollout_id"]]), "attempt": shown(first)}
        if same is not None:
            if request["rollout_id"] is not None:
                raise Refused("id_reused")
            return {**shown(self.rollouts[same["rollout_id"]]), "attempt": shown(same)}
        self._pinned(request["resources_id"])
        rollout_id = self._make_rollout(request, "preparing")
        told = asked if request["rollout_id"] or attempt_id else None
        self._make_attempt(rollout_id, attempt_id or self.next_id(), worker_id, asked=told)
        self._hold(worker_id, self.latest(rollout_id))
        return self.rollout_now(rollout_id)

    def dequeue(self, limit: int, worker_id: str | None, request_id: str | None) -> list[Facts]:
        """Higher priority first, then in the order of enqueuing. A repeat gets what it still has."""
        same = self._same_claim(limit, worker_id, request_id)
        if same:
            held = [each for each in same if self.standing(each) != "lost"]
            for attempt in held:
                if not live(attempt):
                    self._hear(attempt)
                    attempt["_unconfirmed"] = True  # that reply may be lost as well
            return [self.rollout_now(each["rollout_id"]) for each in held]
        if worker_id is not None and self._worker(worker_id)["directive"] is not None:
            self._heard_a_claim(worker_id, [])
            return []
        queue = sorted(filter(waiting, self.rollouts.values()), key=lambda rollout: -rollout["priority"])
        claimed: list[Facts] = []
        for rollout in queue[:limit]:
            asked = (worker_id, limit)
            self._make_attempt(rollout["rollout_id"], self.next_id(), worker_id, request_id, asked=asked)
            claimed.append(self.rollout_now(rollout["rollout_id"]))
        if worker_id is not None:
            self._heard_a_claim(worker_id, claimed)
        return claimed

    def _same_claim(self, limit: int, worker_id: str | None, request_id: str | None) -> list[Facts]:
        """The attempts that an earlier claim under this id got."""
        same = [each for each in self.attempts.values() if request_id and each["_request_id"] == request_id]
        if same and same[0]["_asked"] != (worker_id, limit):
            raise Refused("id_reused")
        return same

    def _heard_a_claim(self, worker_id: str, claimed: Sequence[Facts]) -> None:
        worker = self._worker(worker_id)
        now = self.clock.monotonic()
        worker["_called"] = now
        if worker["lease_seconds"] is not None:
            worker.update(_heard=now, _leased=True)
        if claimed:
            self._hold(worker_id, self.attempts[claimed[-1]["attempt"]["attempt_id"]])
            worker["last_dequeue_time"] = self.clock.wall()
        elif worker["current_attempt_id"] is None:
            since = self.clock.wall() - (worker["last_idle_time"] or -IDLE_NOTED_SECONDS)
            if worker["status"] != "idle" or not 0 <= since < IDLE_NOTED_SECONDS:
                self._idle(worker)

    def start_attempt(self, rollout_id: str, worker_id: str | None, attempt_id: str | None) -> Facts:
        """A live attempt makes way."""
        rollout = self._known_rollout(rollout_id)
        same = self.attempts.get(attempt_id or "")
        if same is not None:
            if same["_asked"] != ("start_attempt", rollout_id, worker_id):
                raise Refused("id_reused")
            return {**shown(rollout), "attempt": shown(same)}
        if rollout["status"] in ENDS_OF_ROLLOUTS:
            raise Refused("illegal_move")
        latest = self.latest(rollout_id)
        if latest is not None and live(latest):
            self._end_attempt(latest, "failed", "superseded")
        asked = attempt_id and ("start_attempt", rollout_id, worker_id)
        self._make_attempt(rollout_id, attempt_id or self.next_id(), worker_id, asked=asked)
        self._hold(worker_id, self.latest(rollout_id))
        return self.rollout_now(rollout_id)

    # --- Attempts --------------------------------------------------------------------------------

    def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        *,
        status: str | None = None,
        worker_id: str | None = None,
        last_heartbeat_time: float | None = None,
        metadata: tuple[Facts | None] | None = None,
        reason_code: str | None = None,
    ) -> Facts:
        """A report, which is a sign of life; of a lost attempt only what changes nothing, and metadata."""
        check_code(reason_code)
        attempt = self._known_attempt(rollout_id, attempt_id)
        standing = self.standing(attempt)
        repeat = not live(attempt) and attempt["status"] == status
        if standing == "lost" and not repeat:
            new_worker = worker_id not in (None, attempt["worker_id"])
            new_time = last_heartbeat_time not in (None, attempt["last_heartbeat_time"])
            if status is not None or new_worker or new_time:
                raise Refused("stale_attempt")
        elif not repeat:
            if status == "preparing" and attempt["status"] != "preparing":
                raise Refused("illegal_move")
            if status in (None, "preparing", "running"):
                self._report_alive(attempt, status, worker_id or attempt["worker_id"])
            else:
                self._report_end(attempt, status, reason_code)
                attempt["worker_id"] = worker_id or attempt["worker_id"]
            if last_heartbeat_time is not None:
                attempt["last_heartbeat_time"] = last_heartbeat_time
        if metadata is not None:
            attempt["metadata"] = metadata[0]
        return shown(attempt)

    def finish(
        self,
        rollout_id: str,
        attempt_id: str,
        status: str,
        spans: Sequence[Facts],
        numbers: Mapping[tuple[str, str], int],
        *,
        metadata: tuple[Facts | None] | None,
        reason_code: str | None,
        claim: tuple[int, str | None, str | None],
    ) -> Facts:
        """The last spans, the end and the next claim: all or nothing, but that a lost attempt keeps its spans.

        Args:
            numbers: as for ``add_spans``.
            claim: limit, worker and request.
        """
        check_code(reason_code)
        attempt = self._known_attempt(rollout_id, attempt_id)
        repeat = not live(attempt) and attempt["status"] == status
        lost = self.standing(attempt) == "lost" and not repeat
        self._same_as_known(spans)
        if claim[0] and not lost:
            self._same_claim(*claim)
        new = self._keep_spans(attempt, spans, numbers)
        if lost:
            raise Refused("stale_attempt")
        ended = self.update_attempt(rollout_id, attempt_id, status=status, metadata=metadata, reason_code=reason_code)
        return {
            "attempt": ended,
            "sequence_ids": [
                new.pop((attempt_id, each["span_id"]), {"sequence_id": 0})["sequence_id"] for each in spans
            ],
            "claimed": self.dequeue(*claim) if claim[0] and (not repeat or self._same_claim(*claim)) else [],
        }

    def release(self, rollout_id: str, attempt_id: str) -> Facts:
        """The rollout waits again, as if the attempt had not been; a repeat changes nothing."""
        attempt = self._known_attempt(rollout_id, attempt_id)
        if attempt["_released"]:
            return shown(attempt)
        if not live(attempt):
            raise Refused("stale_attempt")
        if attempt["status"] != "preparing":
            raise Refused("illegal_move")
        self._give_back(attempt)
        return shown(attempt)

    def _give_back(self, attempt: Facts) -> None:
        attempt["_released"] = True
        self._end_attempt(attempt, "unresponsive", "released")
        self.rollouts[attempt["rollout_id"]]["status"] = "requeuing"

    def standing(self, attempt: Facts) -> Literal["live", "returning", "lost"]:
        """An attempt that fell silent may return while its rollout waits and nobody else was given it."""
        if live(attempt):
            return "live"
        rollout = self.rollouts[attempt["rollout_id"]]
        newest = self.latest(attempt["rollout_id"]) is attempt
        silent = attempt["status"] == "unresponsive" and not attempt["_released"]
        may = newest and silent and rollout["status"] == "requeuing"
        return "returning" if may else "lost"

    def _report_alive(self, attempt: Facts, status: str | None, worker_id: str | None) -> None:
        before = attempt["worker_id"]
        held = live(attempt)
        attempt["worker_id"] = worker_id
        self._hear(attempt)
        if status == "running":
            self._begin(attempt)
        if held and worker_id != before:
            self._let_go(before, attempt, attempt["status"])
            self._hold(worker_id, attempt)

    def _report_end(self, attempt: Facts, status: str, reason_code: str | None) -> None:
        code = reason_code or ("completed" if status == "succeeded" else "reported")
        held = live(attempt)
        self._hear(attempt, ends=True)
        self._end_attempt(attempt, status, code, held=held)
        self._settle_rollout(attempt)

    def _hear(self, attempt: Facts, *, ends: bool = False) -> None:
        """A sign of life. A lost attempt is past hearing; one that returns is held by its worker again."""
        standing = self.standing(attempt)
        if standing == "lost":
            return
        attempt.update(last_heartbeat_time=self.clock.wall(), _heard=self.clock.monotonic(), _unconfirmed=False)
        if standing == "returning":
            attempt.update(status="running", end_time=None, reason_code=None, _redelivered=False)
            for each in self.attempts_of(attempt["rollout_id"]):
                if each["_proof"] == attempt["_lost_by"]:
                    each["_proof"] = None
            self.rollouts[attempt["rollout_id"]]["status"] = "running"
            if not ends:
                self._hold(attempt["worker_id"], attempt)

    def _begin(self, attempt: Facts) -> None:
        if attempt["status"] == "preparing":
            attempt["status"] = self.rollouts[attempt["rollout_id"]]["status"] = "running"

    def _end_attempt(self, attempt: Facts, status: str, code: str, *, held: bool = True) -> None:
        attempt.update(status=status, end_time=self.clock.wall(), reason_code=code, _unconfirmed=False)
        attempt["_lost_by"] = attempt["worker_id"]
        if held:
            self._let_go(attempt["worker_id"], attempt, "given back" if attempt["_released"] else status)

    def _settle_rollout(self, attempt: Facts) -> None:
        """What the end of its attempt means for the rollout."""
        rollout = self.rollouts[attempt["rollout_id"]]
        config = rollout["config"]
        of_rollout = self.attempts_of(rollout["rollout_id"])
        used = [each for each in of_rollout if not each["_redelivered"] and not each["_released"]]
        if attempt["status"] == "succeeded":
            self._close(rollout, "succeeded", attempt["reason_code"])
        elif attempt["status"] in config["retry_condition"] and len(used) < config["max_attempts"]:
            rollout["status"] = "requeuing"
        else:
            self._close(rollout, "failed", attempt["reason_code"])

    def _redeliver(self, attempt: Facts, *, died: bool = False) -> None:
        """Nobody confirmed it: it goes back to the queue, without using up an attempt; after too often, it fails.

        Too often is when its workers died of it, or lived on with it, or after very often.
        """
        rollout = self.rollouts[attempt["rollout_id"]]
        of_rollout = self.attempts_of(rollout["rollout_id"])
        before = sum(each["_redelivered"] for each in of_rollout)
        worker_id = attempt["worker_id"]
        known = [each["_proof"] for each in of_rollout if each["_proof"] is not None]
        if worker_id is not None and (died or (self._lived_on(worker_id, attempt) and worker_id not in known)):
            attempt["_proof"] = worker_id
            known.append(worker_id)
        self._end_attempt(attempt, "unresponsive", "unconfirmed")
        if before < REDELIVERIES and len(known) < PROOFS:
            attempt["_redelivered"] = True
            rollout["status"] = "requeuing"
        else:
            self._close(rollout, "failed", "poison")

    def _lived_on(self, worker_id: str, attempt: Facts) -> bool:
        """Whether a worker, or what it holds or held, gave a sign of life after it was handed this attempt."""
        held = [each["_heard"] for each in self._held_by(worker_id) if each["last_heartbeat_time"] is not None]
        return max([self._worker(worker_id)["_called"], *held]) > attempt["_heard"]

    def _close(self, rollout: Facts, status: str, code: str) -> None:
        rollout.update(status=status, end_time=self.clock.wall(), reason_code=code)

    # --- Rollouts --------------------------------------------------------------------------------

    def update_rollout(
        self,
        rollout_id: str,
        fields: Mapping[str, Any],
        status: str | None = None,
        reason_code: str | None = None,
    ) -> Facts:
        """Fields of an ended rollout stay as they are, but for its metadata; so does its status."""
        check_code(reason_code)
        rollout = self._known_rollout(rollout_id)
        changed = {name: value for name, value in fields.items() if value != rollout[name]}
        if rollout["status"] in ENDS_OF_ROLLOUTS and changed.keys() - {"metadata"}:
            raise Refused("illegal_move")
        if "resources_id" in changed:
            named = changed["resources_id"]
            changed |= {"resources_version": None} if named is None else self._pinned(named)
        self._check_move(rollout, status)
        rollout.update(changed)
        if status not in (None, rollout["status"]):
            latest = self.latest(rollout_id)
            if status == "running":
                assert latest is not None
                self._hear(latest)
                self._begin(latest)
            else:
                defaults = {"succeeded": "completed", "cancelled": "cancelled", "requeuing": "requeued"}
                code = reason_code or defaults.get(status, "reported")
                if latest is not None and live(latest):
                    self._end_attempt(latest, "succeeded" if status == "succeeded" else "failed", code)
                if status == "requeuing":
                    rollout["status"] = status
                else:
                    self._close(rollout, status, code)
        return self.rollout_now(rollout_id)

    def cancel(self, rollout_id: str) -> Facts:
        """Nobody wants it any more."""
        return self.update_rollout(rollout_id, {}, "cancelled", "cancelled")

    def delete_finished(self, older_than_seconds: float) -> int:
        """Rollouts that ended earlier go, with their attempts and spans."""
        before = self.clock.wall() - older_than_seconds
        old = {
            rollout["rollout_id"]
            for rollout in self.rollouts.values()
            if rollout["end_time"] is not None and rollout["end_time"] < before
        }
        self.rollouts = {key: value for key, value in self.rollouts.items() if key not in old}
        self.attempts = {key: value for key, value in self.attempts.items() if value["rollout_id"] not in old}
        self.spans = [span for span in self.spans if span["rollout_id"] not in old]
        return len(old)

    def _check_move(self, rollout: Facts, to: str | None) -> None:
        now = rollout["status"]
        if to in (None, now):
            return
        latest = self.latest(rollout["rollout_id"])
        held = latest is not None and live(latest)
        allowed = to in ENDS_OF_ROLLOUTS or (to in ("running", "requeuing") and held)
        if now in ENDS_OF_ROLLOUTS or not allowed:
            raise Refused("illegal_move")

    # --- Spans -----------------------------------------------------------------------------------

    def add_spans(self, spans: Sequence[Facts], numbers: Mapping[tuple[str, str], int]) -> list[Facts]:
        """New spans are kept, and all are signs of life.

        Args:
            spans: each with its ids and ``sequence_id``, 0 where the store is to issue one.
            numbers: those that the store has given, by attempt and span; see ``_issue``.
        """
        known: list[Facts] = []
        for span in spans:  # the first that is refused decides
            self._known_attempt(span["rollout_id"], span["attempt_id"])
            known.append(span)
            self._same_as_known(known)
        new: dict[tuple[str, str], Facts] = {}
        for attempt_id in dict.fromkeys(span["attempt_id"] for span in spans):
            attempt = self.attempts[attempt_id]
            new |= self._keep_spans(attempt, [each for each in spans if each["attempt_id"] == attempt_id], numbers)
            self._hear(attempt)
            self._begin(attempt)
        keys = dict.fromkeys((span["attempt_id"], span["span_id"]) for span in spans)
        return [new[key] for key in keys if key in new]

    def _same_as_known(self, spans: Sequence[Facts]) -> None:
        """A known span id comes with its content."""
        contents = {(each["attempt_id"], each["span_id"]): each["name"] for each in self.spans}
        for span in spans:
            if contents.setdefault((span["attempt_id"], span["span_id"]), span["name"]) != span["name"]:
                raise Refused("id_reused")

    def _keep_spans(
        self, attempt: Facts, spans: Sequence[Facts], numbers: Mapping[tuple[str, str], int]
    ) -> dict[tuple[str, str], Facts]:
        """Keep those spans of one attempt that are new; returns them. Changes nothing else."""
        known = {(each["attempt_id"], each["span_id"]) for each in self.spans}
        new: dict[tuple[str, str], Facts] = {}
        before = attempt["_ceiling"]
        for span in spans:
            key, given = (attempt["attempt_id"], span["span_id"]), span["sequence_id"]
            if key in known:  # a number may have been set aside for it
                attempt["_ceiling"] = max(attempt["_ceiling"], given or attempt["_ceiling"] + 1)
                continue
            number = given or self._issue(attempt, numbers.get(key, 0))
            attempt.update({name: max(attempt[name], number) for name in ("_sequence", "_ceiling")})
            new[key] = {**span, "sequence_id": number}
            known.add(key)
        if not new:
            attempt["_ceiling"] = before
        self.spans += new.values()
        return new

    def issue_sequence_ids(self, wanted: Sequence[tuple[str, str]], numbers: Sequence[int]) -> list[int]:
        """The next number of each attempt. Asking is no sign of life. For ``numbers`` see ``_issue``."""
        found = [self._known_attempt(*each) for each in wanted]
        given = [*numbers, *[0] * len(found)]
        return [self._issue(attempt, number) for attempt, number in zip(found, given, strict=False)]

    def _issue(self, attempt: Facts, number: int) -> int:
        """The next number of an attempt.

        The contract says that numbers increase, not that none is left out: where a repeated span stood
        among new ones, the store may have passed over some. Then the one that it gave is taken, if it fits.
        """
        fits = attempt["_sequence"] < number <= attempt["_ceiling"] + 1
        issued = number if fits else attempt["_sequence"] + 1
        attempt.update(_sequence=issued, _ceiling=issued)
        return issued

    # --- Workers ---------------------------------------------------------------------------------

    def update_worker(
        self,
        worker_id: str,
        stats: Facts | None = None,
        attempt_ids: Sequence[str] | None = None,
        lease_seconds: float | None = None,
        registration: Facts | None = None,
    ) -> Facts:
        """A heartbeat of a worker, and of the attempts that it lists; it is told which of them it has lost."""
        lost: list[str] = []
        for attempt_id in attempt_ids or ():
            attempt = self.attempts.get(attempt_id)
            if attempt is None or attempt["worker_id"] not in (None, worker_id) or self.standing(attempt) == "lost":
                lost.append(attempt_id)
            else:
                self._hear(attempt)
        worker = self._worker(worker_id)
        now = self.clock.monotonic()
        worker.update(last_heartbeat_time=self.clock.wall(), _heard=now, _called=now)
        worker["heartbeat_stats"] = worker["heartbeat_stats"] if stats is None else stats
        worker["lease_seconds"] = lease_seconds or worker["lease_seconds"]
        worker["_leased"] = worker["lease_seconds"] is not None
        if registration not in (None, worker["registration"]):
            if worker["registration"] is not None:  # of another process, which has died
                self._lose_held(worker_id, attempt_ids or ())
            worker.update(registration=registration, directive=None)
        if worker["status"] == "unknown":
            if worker["current_attempt_id"] is None:
                self._idle(worker)
            else:
                worker.update(status="busy", reason_code=None)
        return shown(worker) | ({} if attempt_ids is None else {"stale_attempt_ids": lost})

    def direct_workers(self, directive: str | None, worker_ids: Sequence[str] | None) -> list[Facts]:
        """All that are named, or none; nobody named: all."""
        chosen = list(self.workers if worker_ids is None else dict.fromkeys(worker_ids))
        if any(each not in self.workers for each in chosen):
            raise Refused("not_found")
        for each in chosen:
            self.workers[each]["directive"] = directive
        return [shown(self.workers[each]) for each in chosen]

    def lose_worker(
        self, worker_id: str, reason_code: str | None = None, begun: Sequence[str] | None = None, *, died: bool = True
    ) -> list[Facts]:
        """It died, or is gone. What it was at work on is lost, and all else given back; if nobody knows, what it had
        confirmed is lost, and the rest handed out again."""
        check_code(reason_code)
        if worker_id not in self.workers:
            raise Refused("not_found")
        held = self._lose_held(worker_id, (), reason_code, begun, died=died)
        worker = self._worker(worker_id)
        if worker["status"] != "unknown" or worker["reason_code"] is None:
            worker["reason_code"] = reason_code or "worker_lost"
        worker.update(status="unknown", current_rollout_id=None, current_attempt_id=None, _leased=False)
        return [shown(attempt) for attempt in held]

    def _lose_held(
        self,
        worker_id: str,
        but: Sequence[str],
        reason_code: str | None = None,
        begun: Sequence[str] | None = None,
        *,
        died: bool = True,
    ) -> list[Facts]:
        held = [each for each in self._held_by(worker_id) if each["attempt_id"] not in but]
        for attempt in held:
            if begun is not None and attempt["attempt_id"] not in begun:
                self._give_back(attempt)
            elif begun is None and attempt["_unconfirmed"]:
                self._redeliver(attempt, died=died)
            else:
                self._end_attempt(attempt, "unresponsive", reason_code or "worker_lost")
                self._settle_rollout(attempt)
        return held

    def delete_workers(self, worker_ids: Sequence[str]) -> list[str]:
        """Those that are gone, or of whom nobody could tell, are forgotten."""
        doomed = [
            each
            for each in dict.fromkeys(worker_ids)
            if (known := self.workers.get(each)) is not None
            and known["current_attempt_id"] is None
            and (known["status"] == "unknown" or known["lease_seconds"] is None)
        ]
        for each in doomed:
            del self.workers[each]
        return doomed

    def _worker(self, worker_id: str) -> Facts:
        """The worker; a new one is registered."""
        unheard: Facts = {
            "worker_id": worker_id,
            "status": "unknown",
            "heartbeat_stats": None,
            "last_heartbeat_time": None,
            "last_dequeue_time": None,
            "last_busy_time": None,
            "last_idle_time": None,
            "current_rollout_id": None,
            "current_attempt_id": None,
            "lease_seconds": None,
            "registration": None,
            "directive": None,
            "reason_code": None,
            "_heard": 0.0,
            "_called": float("-inf"),
            "_leased": False,
        }
        return self.workers.setdefault(worker_id, unheard)

    def _held_by(self, worker_id: str) -> list[Facts]:
        return [each for each in self.attempts.values() if each["worker_id"] == worker_id and live(each)]

    def _hold(self, worker_id: str | None, attempt: Facts | None) -> None:
        if worker_id is not None and attempt is not None:
            worker = self._worker(worker_id)
            worker.update(status="busy", last_busy_time=self.clock.wall(), reason_code=None)
            worker.update({f"current_{name}": attempt[name] for name in ("rollout_id", "attempt_id")})
            if worker["lease_seconds"] is not None and not worker["_leased"]:
                worker.update(_heard=self.clock.monotonic(), _leased=True)

    def _let_go(self, worker_id: str | None, attempt: Facts, status: str) -> None:
        """A worker does not hold an attempt any more, which has this status now."""
        if worker_id is None:
            return
        worker = self._worker(worker_id)
        if attempt["last_heartbeat_time"] is not None:
            worker["_called"] = max(worker["_called"], attempt["_heard"])
        others = self._held_by(worker_id)
        if others:
            worker.update({f"current_{name}": others[-1][name] for name in ("rollout_id", "attempt_id")})
            worker["status"] = "busy"
            return
        worker.update(current_rollout_id=None, current_attempt_id=None)
        if status in ("timeout", "unresponsive"):
            worker["status"] = "unknown"
        else:
            self._idle(worker)

    def _idle(self, worker: Facts) -> None:
        worker.update(status="idle", last_idle_time=self.clock.wall(), reason_code=None)

    # --- Time ------------------------------------------------------------------------------------

    def expire(self) -> None:
        """End what has expired by now. Attempts are judged by their own limits first, then by their workers'."""
        now = self.clock.monotonic()
        for attempt in list(self.attempts.values()):
            due, cause = self._due(attempt)
            if due > now:
                continue
            if cause == "unconfirmed":
                self._redeliver(attempt)
            else:
                self._end_attempt(attempt, cause, cause)
                self._settle_rollout(attempt)
        for worker_id, worker in list(self.workers.items()):
            if self._lease_end(worker) <= now:
                self.lose_worker(worker_id, died=False)

    def next_due(self) -> float:
        """The monotonic time at which something will expire if nothing happens; infinite if nothing will."""
        dues = [self._due(attempt)[0] for attempt in self.attempts.values()]
        return min(dues + [self._lease_end(worker) for worker in self.workers.values()], default=float("inf"))

    def restart(self) -> None:
        """The store was closed and opened: leases begin anew, and time-outs go on from the last sign of life.

        The time-out of an attempt that was not live then, and returns later, went on meanwhile by the wall clock.
        """
        now = self.clock.monotonic()
        before, self.opened = self.opened, self.clock.wall() - now
        for attempt in self.attempts.values():
            attempt["_started"] -= 0.0 if live(attempt) else self.opened - before
        holding = [attempt for attempt in self.attempts.values() if live(attempt)]
        last = max((attempt["_heard"] for attempt in holding), default=now)
        for attempt in holding:
            attempt.update(_heard=now, _started=now - (last - attempt["_started"]))
        for worker in self.workers.values():
            worker["_heard"] = now

    def _due(self, attempt: Facts) -> tuple[float, str]:
        """When an attempt ends by itself, and why. At the same moment, a time-out counts first."""
        never = (float("inf"), "")
        if not live(attempt):
            return never
        config = self.rollouts[attempt["rollout_id"]]["config"]
        dues: list[tuple[float, str]] = [never]
        if config["timeout_seconds"] is not None:
            dues.append((attempt["_started"] + config["timeout_seconds"], "timeout"))
        if attempt["_unconfirmed"]:
            dues.append((attempt["_heard"] + CONFIRM_SECONDS, "unconfirmed"))
        elif config["unresponsive_seconds"] is not None:
            dues.append((attempt["_heard"] + config["unresponsive_seconds"], "unresponsive"))
        return min(dues)

    def _lease_end(self, worker: Facts) -> float:
        return worker["_heard"] + worker["lease_seconds"] if worker["_leased"] else float("inf")

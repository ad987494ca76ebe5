"""What the reference model knows: its tables as plain dicts, how records get there and how readers see them.

See ``reference_model``, which says what happens to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

__all__ = ["ENDS_OF_ROLLOUTS", "Facts", "ReferenceRecords", "Refused", "live", "shown", "waiting"]

Facts = dict[str, Any]
"""A record. A key that begins with an underscore is a fact that no reader sees."""

ENDS_OF_ROLLOUTS = ("succeeded", "failed", "cancelled")
ROLLOUT_STATUSES = ("queuing", "preparing", "running", "requeuing", *ENDS_OF_ROLLOUTS)
DEFAULT_CONFIG = {"timeout_seconds": None, "unresponsive_seconds": None, "max_attempts": 1, "retry_condition": []}


class Refused(Exception):
    """The store must refuse, with an error of this code, and change nothing."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Clock(Protocol):
    def wall(self) -> float: ...
    def monotonic(self) -> float: ...


def shown(facts: Mapping[str, Any]) -> Facts:
    """What a record shows of these facts."""
    return {name: value for name, value in facts.items() if not name.startswith("_")}


def live(attempt: Facts) -> bool:
    return attempt["status"] in ("preparing", "running")


def waiting(rollout: Facts) -> bool:
    return rollout["status"] in ("queuing", "requeuing")


class ReferenceRecords:
    """The tables, and what needs no other.

    Args:
        clock: the store's own clock.
        next_id: the id that the store has issued for the record which is made now.
    """

    def __init__(self, clock: Clock, next_id: Callable[[], str]) -> None:
        self.clock = clock
        self.next_id = next_id
        self.opened = clock.wall() - clock.monotonic()
        # Each in the order of insertion.
        self.rollouts: dict[str, Facts] = {}
        self.attempts: dict[str, Facts] = {}
        self.spans: list[Facts] = []
        self.resources: list[Facts] = []
        self.workers: dict[str, Facts] = {}

    # --- What is there ---------------------------------------------------------------------------

    def rollout_now(self, rollout_id: str) -> Facts:
        """A rollout as readers see it: with its latest attempt, if it has any."""
        latest = self.latest(rollout_id)
        return shown(self.rollouts[rollout_id]) | ({} if latest is None else {"attempt": shown(latest)})

    def attempts_of(self, rollout_id: str) -> list[Facts]:
        """All attempts of a rollout, oldest first."""
        return [each for each in self.attempts.values() if each["rollout_id"] == rollout_id]

    def latest(self, rollout_id: str) -> Facts | None:
        """The newest attempt of a rollout, if it has any."""
        return next(iter(reversed(self.attempts_of(rollout_id))), None)

    def spans_of(self, rollout_id: str) -> list[Facts]:
        """All spans of a rollout, by number."""
        return self.by_number(span for span in self.spans if span["rollout_id"] == rollout_id)

    def by_number(self, spans: Iterable[Facts]) -> list[Facts]:
        """Spans by attempt, then by number, then as they came."""
        return sorted(spans, key=lambda span: (self.attempts[span["attempt_id"]]["sequence_id"], span["sequence_id"]))

    def totals(self) -> Facts:
        """How many records there are of each kind."""
        statuses = [each["status"] for each in self.rollouts.values()]
        return {
            "total_rollouts": len(self.rollouts),
            "total_attempts": len(self.attempts),
            "total_spans": len(self.spans),
            "total_resources": len({each["resources_id"] for each in self.resources}),
            "total_workers": len(self.workers),
            "rollouts_by_status": {each: statuses.count(each) for each in ROLLOUT_STATUSES},
        }

    # --- Making and finding ----------------------------------------------------------------------

    def _same_request(self, request: Facts, earlier: Mapping[str, Facts]) -> bool:
        """Whether this was asked for before; refused if its id was, but the rest differs."""
        rollout_id = request["rollout_id"]
        known = earlier.get(rollout_id) or self.rollouts.get(rollout_id)
        if known is not None and known["_request"] != request:
            raise Refused("id_reused")
        return known is not None

    def _make_rollout(self, request: Facts, status: str) -> str:
        rollout_id = request["rollout_id"] or self.next_id()
        if rollout_id not in self.rollouts:
            self.rollouts[rollout_id] = {
                "rollout_id": rollout_id,
                "input": request["input"],
                "start_time": self.clock.wall(),
                "end_time": None,
                "mode": request["mode"],
                **self._pinned(request["resources_id"]),
                "priority": request["priority"],
                "status": status,
                "config": DEFAULT_CONFIG | request["config"],
                "metadata": request["metadata"],
                "reason_code": None,
                "_request": request,
            }
        return rollout_id

    def _make_attempt(
        self, rollout_id: str, attempt_id: str, worker_id: str | None, request_id: str | None = None, *, asked: Any
    ) -> None:
        number = len(self.attempts_of(rollout_id)) + 1
        self.rollouts[rollout_id]["status"] = "preparing"
        self.attempts[attempt_id] = {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "sequence_id": number,
            "start_time": self.clock.wall(),
            "end_time": None,
            "status": "preparing",
            "worker_id": worker_id,
            "last_heartbeat_time": None,
            "metadata": None,
            "reason_code": None,
            "_request_id": request_id,
            "_asked": asked,
            "_unconfirmed": request_id is not None,
            "_redelivered": False,
            "_proof": None,
            "_lost_by": None,
            "_released": False,
            "_started": self.clock.monotonic(),
            "_heard": self.clock.monotonic(),
            "_sequence": 0,
            "_ceiling": 0,
        }

    def _known_rollout(self, rollout_id: str) -> Facts:
        if rollout_id not in self.rollouts:
            raise Refused("not_found")
        return self.rollouts[rollout_id]

    def _known_attempt(self, rollout_id: str, attempt_id: str) -> Facts:
        self._known_rollout(rollout_id)
        attempt = self.latest(rollout_id) if attempt_id == "latest" else self.attempts.get(attempt_id)
        if attempt is None or attempt["rollout_id"] != rollout_id:
            raise Refused("not_found")
        return attempt

    # --- Resources -------------------------------------------------------------------------------

    def add_resources(self, resources_id: str | None, content: Facts) -> Facts:
        """Version 1 of a new id."""
        versions = self.versions_of(resources_id or "")
        if not versions:
            return self._make_version(resources_id or self.next_id(), content, None)
        if versions[0]["resources"] != content:
            raise Refused("id_reused")
        return shown(versions[0])

    def update_resources(self, resources_id: str, content: Facts, request_id: str | None) -> Facts:
        """The next version of an id."""
        same = [each for each in self.resources if request_id is not None and each["_request_id"] == request_id]
        if not same:
            return self._make_version(resources_id, content, request_id)
        if (same[0]["resources_id"], same[0]["resources"]) != (resources_id, content):
            raise Refused("id_reused")
        return shown(same[0])

    def rollback_resources(self, resources_id: str, version: int, request_id: str | None) -> Facts:
        """A new version with an old content."""
        old = [each for each in self.versions_of(resources_id) if each["version"] == version]
        if not old:
            raise Refused("not_found")
        return self.update_resources(resources_id, old[0]["resources"], request_id)

    def versions_of(self, resources_id: str) -> list[Facts]:
        """All versions of an id, oldest first."""
        return [each for each in self.resources if each["resources_id"] == resources_id]

    def _make_version(self, resources_id: str, content: Facts, request_id: str | None) -> Facts:
        before = self.versions_of(resources_id)
        row = {
            "resources_id": resources_id,
            "version": len(before) + 1,
            "create_time": before[0]["create_time"] if before else self.clock.wall(),
            "update_time": self.clock.wall(),
            "resources": content,
            "_request_id": request_id,
        }
        self.resources.append(row)
        return shown(row)

    def _pinned(self, resources_id: str | None) -> dict[str, Any]:
        """The newest version, of this id or of all."""
        named = self.resources if resources_id is None else self.versions_of(resources_id)
        if named:
            return {"resources_id": named[-1]["resources_id"], "resources_version": named[-1]["version"]}
        if resources_id is not None:
            raise Refused("not_found")
        return {"resources_id": None, "resources_version": None}

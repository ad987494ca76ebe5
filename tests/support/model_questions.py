"""The steps of the model test that only ask."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from model_compare import agree, in_order
from model_draws import PICK, SORTABLE, some
from model_machine import Call, ComparingMachine
from reference_records import live, shown

__all__ = ["AskingMachine"]


class AskingMachine(ComparingMachine):
    """Questions of all kinds."""

    def _attempt(self, pick: int) -> tuple[str, str]:
        """An attempt, with its rollout: mostly one that is live or may return, at times any, or none."""
        attempts = self.reference.attempts.values()
        wanted = [each for each in attempts if live(each)] if pick < 7 else []
        if 7 <= pick < 10:
            wanted = [each for each in attempts if self.reference.standing(each) == "returning"]
        attempt_id = some((each["attempt_id"] for each in wanted or attempts), pick)
        found = self.reference.attempts.get(attempt_id)
        return ("nowhere" if found is None else found["rollout_id"]), attempt_id

    @rule(picks=st.lists(PICK, max_size=3))
    def wait_for_rollouts(self, picks: list[int]) -> None:
        ids = [some(self.reference.rollouts, pick) for pick in picks]

        def ended(_: Any) -> list[dict[str, Any]]:
            known = [each for each in dict.fromkeys(ids) if each in self.reference.rollouts]
            return [self.reference.rollout_now(each) for each in known if self.reference.rollouts[each]["end_time"]]

        self.do(Call(lambda: self.store.wait_for_rollouts(rollout_ids=ids, timeout=0), ended))

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

"""A call of every method of a store that goes to its data, for tests of what all of them do alike."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agentlightning.store.base import LightningStore
from agentlightning.types import EnqueueRolloutRequest, PromptTemplate, Span

__all__ = ["READS", "SQLITE_ONLY", "WRITES", "without_a_call"]

Call = Callable[[Any], Awaitable[object]]

_RESOURCES = {"prompt": PromptTemplate(template="Guess.", engine="f-string")}


def _span() -> Span:
    return Span.from_attributes(attributes={}, rollout_id="ro-1", attempt_id="at-1")


WRITES: dict[str, Call] = {
    "enqueue_rollout": lambda store: store.enqueue_rollout("input"),
    "enqueue_many_rollouts": lambda store: store.enqueue_many_rollouts([EnqueueRolloutRequest(input="input")]),
    "start_rollout": lambda store: store.start_rollout("input"),
    "dequeue_rollout": lambda store: store.dequeue_rollout("worker-1", wait_seconds=0.01),
    "dequeue_many_rollouts": lambda store: store.dequeue_many_rollouts(limit=2, worker_id="worker-1"),
    "start_attempt": lambda store: store.start_attempt("ro-1"),
    "update_rollout": lambda store: store.update_rollout("ro-1", metadata={}),
    "cancel_rollout": lambda store: store.cancel_rollout("ro-1"),
    "update_attempt": lambda store: store.update_attempt("ro-1", "latest", "running"),
    "finish_attempt": lambda store: store.finish_attempt("ro-1", "at-1", "succeeded", [_span()], claim_limit=1),
    "release_attempt": lambda store: store.release_attempt("ro-1", "at-1"),
    "delete_finished_rollouts": lambda store: store.delete_finished_rollouts(older_than_seconds=1.0),
    "add_span": lambda store: store.add_span(_span()),
    "add_many_spans": lambda store: store.add_many_spans([_span()]),
    "get_next_span_sequence_id": lambda store: store.get_next_span_sequence_id("ro-1", "at-1"),
    "get_many_span_sequence_ids": lambda store: store.get_many_span_sequence_ids([("ro-1", "at-1")]),
    "add_resources": lambda store: store.add_resources(_RESOURCES),
    "update_resources": lambda store: store.update_resources("rs-1", _RESOURCES),
    "rollback_resources": lambda store: store.rollback_resources("rs-1", 1),
    "update_worker": lambda store: store.update_worker("worker-1"),
    "direct_workers": lambda store: store.direct_workers("drain"),
    "delete_workers": lambda store: store.delete_workers(["worker-1"]),
    "report_worker_lost": lambda store: store.report_worker_lost("worker-1", message="gone"),
}
"""Methods that write. Rollout ``ro-1`` with attempt ``at-1``, resources ``rs-1`` and worker ``worker-1`` must be there
where a call is to succeed."""

READS: dict[str, Call] = {
    "statistics": lambda store: store.statistics(),
    "get_rollout_by_id": lambda store: store.get_rollout_by_id("ro-1"),
    "get_latest_attempt": lambda store: store.get_latest_attempt("ro-1"),
    "query_rollouts": lambda store: store.query_rollouts(),
    "query_attempts": lambda store: store.query_attempts("ro-1"),
    "wait_for_rollouts": lambda store: store.wait_for_rollouts(rollout_ids=["ro-1"], timeout=0),
    "query_spans": lambda store: store.query_spans("ro-1"),
    "get_resources_by_id": lambda store: store.get_resources_by_id("rs-1"),
    "get_latest_resources": lambda store: store.get_latest_resources(),
    "query_resources": lambda store: store.query_resources(),
    "query_resource_versions": lambda store: store.query_resource_versions("rs-1"),
    "get_worker_by_id": lambda store: store.get_worker_by_id("worker-1"),
    "query_workers": lambda store: store.query_workers(),
    "verify": lambda store: store.verify(),
}
"""Methods that only read."""

SQLITE_ONLY: dict[str, Call] = {
    "backup": lambda store: store.backup(Path(store.path).with_name("backup-of-every-method.db")),
}
"""Methods that only `SqliteLightningStore` has."""


def without_a_call() -> set[str]:
    """Methods of the contract that are missing here. `add_otel_span` only converts its span, then calls `add_span`."""
    methods = {
        name
        for name in dir(LightningStore)
        if inspect.iscoroutinefunction(getattr(LightningStore, name)) and name != "add_otel_span"
    }
    return methods - WRITES.keys() - READS.keys()

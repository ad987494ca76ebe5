"""What the steps of the model test are drawn from, and how it becomes what the store takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from agentlightning.types import PromptTemplate, RolloutConfig, Span

__all__ = [
    "ATTEMPT_END",
    "ATTEMPT_STATUS",
    "CONFIGS",
    "EDITS",
    "FATE",
    "PICK",
    "REASON_CODE",
    "REQUEST",
    "ROLLOUT_STATUS",
    "SECONDS",
    "SIMPLE_CALL",
    "SORTABLE",
    "SPANS",
    "WORKER",
    "prompts",
    "resources_of",
    "some",
    "span_of",
    "typed",
]

PICK = st.integers(0, 15)
WORKER = st.sampled_from(["w1", "w2", "w3", None])
FATE = st.tuples(
    st.sampled_from(["w1", "w2", "w3", "w4", "w5", None]), st.sampled_from(["vanishes", "lives on", "lives on", "dies"])
)
"""A worker, and what becomes of it."""
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
ATTEMPT_STATUS = st.sampled_from(["running", "succeeded", "failed", "timeout", "unresponsive", "preparing"])
ATTEMPT_END = st.sampled_from(["succeeded", "succeeded", "failed", "failed", "timeout", "unresponsive"])
ROLLOUT_STATUS = st.sampled_from(["running", "requeuing", "succeeded", "failed", "cancelled", "queuing", "preparing"])
REASON_CODE = st.sampled_from([None, None, None, "out_of_memory", "out_of_memory", "unconfirmed", "released"])
SPANS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 0, 1, 4, 30])), min_size=1, max_size=4)
EDITS: tuple[dict[str, Any], ...] = (
    {"metadata": {"edited": True}},
    {"metadata": None},
    {"input": {"another": "input"}},
    {"mode": "test"},
    {"mode": None, "metadata": {"edited": 2}},
    {"resources_id": "prompts"},
    {"resources_id": "unheard-of"},
    {"resources_id": None},
    {"config": CONFIGS[0], "input": 7},
    *({"config": config} for config in CONFIGS[1:7:2]),
)
SIMPLE_CALL = st.sampled_from(
    ["enqueue", "claim", "start", "report", "finish", "release", "spans", "cancel", "beat", "direct", "forget"]
)
SORTABLE = {
    "rollouts": ("rollout_id", "start_time", "end_time", "mode", "resources_version", "priority", "status"),
    "attempts": ("sequence_id", "attempt_id", "end_time", "last_heartbeat_time", "worker_id", "status", "reason_code"),
    "spans": ("sequence_id", "span_id", "attempt_id", "name"),
    "workers": ("worker_id", "status", "last_heartbeat_time", "last_idle_time", "current_attempt_id", "directive"),
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

"""What forked children of a runner emit gets to their rollout, or the loss is told."""

from __future__ import annotations

from fresh_process import run_fresh
from tracing_programs import run_in_a_fork, run_pools


def test_spans_of_pools_of_processes() -> None:
    """Programs that fork have no other threads, so this is a process of its own."""
    assert run_fresh(run_pools) == [
        # A span of a library, an operation and a reward of a child; then the reward that the runner emitted.
        "tool.call, agentlightning.operation, agentlightning.annotation, agentlightning.annotation: 0.9, 4 ids",
        # Two children write at once.
        "40 spans, 40 ids, rewards 0 to 39",
        # A large span, and one with a number that JSON does not have.
        "3000000 characters, NaN",
        # The pool of the rollout before is used again: what its child emits is nobody's.
        "0 spans, 1 lost",
    ]


def test_a_fork_that_has_a_trace_of_its_own_may_fork_as_well() -> None:
    assert run_fresh(run_in_a_fork) == ["[0.5, 1.0]", "[0.5, 1.0]", "0"]

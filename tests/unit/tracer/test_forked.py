"""What forked children of a runner emit gets to their rollout, or the loss is told."""

from __future__ import annotations

import logging
import os

import pytest
from opentelemetry import trace

from agentlightning.tracer.forked import ForkedSpans
from agentlightning.tracer.otel import OtelTracer
from agentlightning.tracer.recording import Recording, current
from fresh_process import run_fresh
from tracing_programs import run_in_a_fork, run_pools


def test_spans_of_pools_of_processes() -> None:
    """Programs that fork have no other threads, so this is a process of its own."""
    assert run_fresh(run_pools) == [
        # A span of a library, an operation and a reward of a child; then the reward that the runner emitted.
        "tool.call, agentlightning.operation, agentlightning.annotation, agentlightning.annotation: 0.9, 4 ids",
        # Two children write at once; the spans are in the order in which they ended.
        "40 ids, 0 to 39, True",
        # A large span, and one with a number that JSON does not have.
        "3000000 characters, NaN",
        # The pool of the rollout before is used again: what its child emits is nobody's.
        "0 spans, 1 lost",
        # All children have ended.
        "0 files",
    ]


def test_a_fork_that_has_a_trace_of_its_own_may_fork_as_well() -> None:
    assert run_fresh(run_in_a_fork) == ["[0.5, 1.0]", "[0.5, 1.0]", "0"]


def test_no_open_trace_is_forgotten_however_many_there_are() -> None:
    recordings = [Recording(lambda *_: None, None, "", "") for _ in range(400)]  # type: ignore[arg-type, return-value]
    forked = ForkedSpans(lambda: recordings)
    for each in recordings[:200]:
        each.closed_at = 1.0
    forked.before_fork()
    known = forked._known.values()
    assert len(known) == 300
    assert set(recordings[200:]) <= set(known)
    assert forked.folder is not None
    os.rmdir(forked.folder)


def test_where_no_file_can_be_written_only_emitters_raise(caplog: pytest.LogCaptureFixture) -> None:
    """A process that was forked by other means than Python's has no folder; a library must not fail for that."""
    tracer = OtelTracer()

    def work() -> None:
        recording = current.get()
        assert recording is not None
        recording._pid = -1
        trace.get_tracer("library").start_span("call").end()
        with pytest.raises(RuntimeError, match="was forked"):
            tracer.create_span("emitted")

    with caplog.at_level(logging.ERROR):
        tracer.trace_run(work)
    assert "the span 'call' of a forked child is lost" in caplog.text

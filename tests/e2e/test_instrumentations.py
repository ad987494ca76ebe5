"""The real tracing libraries, each in a process of its own, because they patch the SDK that they trace.

Run with logfire 5.4.0, openinference-instrumentation-openai 0.1.66, opentelemetry-instrumentation-openai 0.62.4
(traceloop), opentelemetry-instrumentation-openai-v2 2.4b0 with opentelemetry-util-genai 1.1b0, and pydantic-ai-slim
2.68.0, with openai 3.57.0: the dependency group ``instrumentations``. Nothing is installed here; what is missing is
skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentlightning import TracerTraceToTriplet, TraceToMessages
from instrumented_calls import INSTRUMENTATIONS
from recorded_spans import FINISH_REASONS, read, recorded

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", INSTRUMENTATIONS)
def test_what_the_library_writes_is_what_the_recorded_spans_say(name: str) -> None:
    module = INSTRUMENTATIONS[name][0]
    ran = subprocess.run(
        [sys.executable, str(SUPPORT / "instrumented_calls.py"), name],
        env=os.environ | {"PYTHONPATH": str(SUPPORT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "ModuleNotFoundError" in ran.stderr:
        pytest.skip(f"{module} is not installed: {ran.stderr.splitlines()[-1]}")
    assert ran.returncode == 0, ran.stderr
    spans, before = read(json.loads(ran.stdout)).spans, recorded(name).spans
    assert TraceToMessages(call_filter=None).adapt(spans) == TraceToMessages().adapt(before)
    triplets = TracerTraceToTriplet(call_filter=None).examine(spans)
    assert [each.metadata["finish_reason"] for each in triplets.made] == FINISH_REASONS
    assert triplets.unusable == []

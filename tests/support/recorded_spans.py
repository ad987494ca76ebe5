"""Spans that tracing libraries wrote of one small agent, kept as files in ``tests/unit/adapter/recorded``.

``instrumented_calls`` runs the agent with the real libraries: `instrumented_calls.py NAME > recorded/NAME.json`.
The files whose versions are empty are written by hand, after what the libraries document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from agentlightning.types import Event, Span, TraceStatus

FOLDER = Path(__file__).resolve().parents[1] / "unit" / "adapter" / "recorded"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA},
}
SYSTEM, QUESTION, RESULT, AGAIN = "Be brief.", "Weather in Paris?", "rain", "And tomorrow?"
ANSWER = "word0 word1 word2 word3 "

_CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
_ASKED = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
_CALLED = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "tool_call_id": "call-1", "content": RESULT}
_ANSWERED = {"role": "assistant", "content": ANSWER}
_AGAIN = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": AGAIN}]

CONVERSATIONS = [
    {"messages": [*_ASKED, _CALLED], "tools": [TOOL]},
    {"messages": [*_ASKED, _CALLED, _RESULT, _ANSWERED], "tools": [TOOL]},
    {"messages": [*_AGAIN, _ANSWERED], "tools": None},
]
"""What the agent and the model said to each other: a call of a tool, an answer, and an answer in a stream."""
FINISH_REASONS = ["tool_calls", "stop", "stop"]


class Recorded(NamedTuple):
    """What one library wrote."""

    versions: dict[str, str]
    spans: list[Span]


def names() -> list[str]:
    """The libraries of which there are spans."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def recorded(name: str) -> Recorded:
    """The spans that one library wrote, as the store would give them: with sequence ids, in the order of their ends."""
    return read(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def read(content: dict[str, Any]) -> Recorded:
    """The same from what ``instrumented_calls`` printed."""
    return Recorded(
        content["versions"], [_span(given, number) for number, given in enumerate(content["spans"], start=1)]
    )


def _span(given: dict[str, Any], number: int) -> Span:
    known = {key: given[key] for key in given.keys() - {"events", "status"}}
    status = TraceStatus(**given.get("status", {"status_code": "UNSET"}))
    ids = {"rollout_id": "ro-1", "attempt_id": "at-1", "sequence_id": number}
    span = Span.from_attributes(**{"span_id": f"{number:016x}", "trace_id": "1" * 32, **ids, **known}, status=status)
    span.events.extend(Event(**event) for event in given.get("events", []))
    return span


def written(asked: str, said: str | None, response_id: str | None = None) -> dict[str, Any]:
    """The attributes of a call that a library writes which follows the present conventions."""
    found = {
        "gen_ai.operation.name": "chat",
        "gen_ai.input.messages": json.dumps([{"role": "user", "parts": [{"type": "text", "content": asked}]}]),
    }
    if said is not None:
        parts = [{"type": "text", "content": said}]
        found["gen_ai.output.messages"] = json.dumps([{"role": "assistant", "parts": parts}])
    return found | ({} if response_id is None else {"gen_ai.response.id": response_id})

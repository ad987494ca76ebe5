"""Spans that tracing libraries wrote of one small agent, kept as files in ``tests/unit/adapter/recorded``.

``instrumented_calls`` runs the agent with the real libraries: `instrumented_calls.py NAME > recorded/NAME.json`, and
`instrumented_calls.py NAME SCENE > recorded/SCENE/NAME.json` for other scenes; ``instrumented_programs`` does so for
programs of Node.js. A file whose versions are empty is written by hand, after what the library documents.
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
WORDS = ("word0 ", "word1 ", "word2 ", "word3 ")
ANSWER = "".join(WORDS)
LISTED_FOLDER = "FOLDER"

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


def conversations(name: str) -> list[dict[str, Any]]:
    """The conversations of the agent of one library: Gemini CLI lists a folder, and begins with what it knows of it."""
    if name != "gemini-cli":
        return CONVERSATIONS
    listing = json.dumps({"output": f"Directory listing for {LISTED_FOLDER}:\nrain (0 bytes)"})
    known = {
        QUESTION: f"<session_context></session_context>{QUESTION}",
        AGAIN: f"<session_context></session_context>{AGAIN}",
        RESULT: listing,
    }
    text = json.dumps(CONVERSATIONS).replace('{\\"city\\": \\"Paris\\"}', '{\\"dir_path\\": \\".\\"}')
    found = json.loads(text.replace('"weather"', '"list_directory"'))
    for conversation in found:
        for message in conversation["messages"]:
            message["content"] = known.get(message["content"], message["content"])
    return found


CHOICES = [("a0 b0 ", "stop"), ("a1 b1 ", "length")]
"""The texts of a reply with two choices, and why each ended."""


def choices_body() -> dict[str, Any]:
    """A reply with two choices."""
    messages = [{"role": "assistant", "content": text} for text, _ in CHOICES]
    choices = [
        {"index": number, "message": message, "finish_reason": CHOICES[number][1]}
        for number, message in enumerate(messages)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    head = {"id": "cmpl-2", "created": 1, "model": "policy", "object": "chat.completion"}
    return {**head, "choices": choices, "usage": usage}


def choices_chunks() -> list[dict[str, Any]]:
    """The same in a stream, whose chunks take turns."""
    pieces = [text.split(" ")[:2] for text, _ in CHOICES]
    deltas = [(number, {"content": f"{pieces[number][place]} "}) for place in range(2) for number in range(2)]
    choices = [{"index": number, "delta": delta, "finish_reason": None} for number, delta in deltas]
    choices += [{"index": number, "delta": {}, "finish_reason": reason} for number, (_, reason) in enumerate(CHOICES)]
    head = {"id": "cmpl-3", "created": 1, "model": "policy", "object": "chat.completion.chunk"}
    return [{**head, "choices": [choice]} for choice in choices]


ITEMS = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [
        {"id": f"call-{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for number, arguments in enumerate(('{"city": "Paris"}', '{"city": "Rome"}'))
    ],
}
"""What ``items_body`` says as one message."""


def items_body() -> dict[str, Any]:
    """A reply of the Responses API: a thought, a text and two calls of a tool, each an item."""
    text = {"type": "output_text", "text": ITEMS["content"], "annotations": []}
    output: list[dict[str, Any]] = [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Which city?"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]},
    ]
    for number, call in enumerate(ITEMS["tool_calls"]):
        item = {"type": "function_call", "id": f"fc_{number}", "call_id": call["id"], "status": "completed"}
        output.append({**item, **call["function"]})
    head = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "policy"}
    return {**head, "output": output, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}


class Recorded(NamedTuple):
    """What one library wrote."""

    versions: dict[str, str]
    spans: list[Span]


def names(scene: str = "talk") -> list[str]:
    """The libraries of which there are spans of a scene."""
    return sorted(path.stem for path in _folder(scene).glob("*.json"))


def recorded(name: str, scene: str = "talk") -> Recorded:
    """The spans that one library wrote, as the store would give them: with sequence ids, in the order of their ends."""
    return read(json.loads((_folder(scene) / f"{name}.json").read_text(encoding="utf-8")))


def _folder(scene: str) -> Path:
    return FOLDER if scene == "talk" else FOLDER / scene


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

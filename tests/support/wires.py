"""Each translated wire as a careful client sees it: what a stream of it says, and how a conversation is said in it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["READERS", "Said", "Turn", "chat_of", "google_of", "messages_of", "random_turns", "responses_of"]


@dataclass
class Said:
    """What a reply says."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    """Id, name and arguments of each."""
    reason: str | None = None
    usage: tuple[int, int] | None = None


def _events(data: bytes) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for event in data.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in event.split("\n") if line)
        if "data" in lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


def read_messages(data: bytes) -> Said:
    """A stream of Anthropic's wire, of which each block must be whole before the next begins."""
    said, blocks = Said(), list[dict[str, Any]]()
    open_block: int | None = None
    (first, _), *rest = _events(data)
    assert first == "message_start"
    for kind, event in rest:
        assert kind == event["type"]
        if kind == "content_block_start":
            assert (open_block, event["index"]) == (None, len(blocks))
            open_block = event["index"]
            blocks.append({**event["content_block"], "pieces": []})
        elif kind == "content_block_delta":
            assert event["index"] == open_block
            blocks[-1]["pieces"] += [value for name, value in event["delta"].items() if name != "type"]
        elif kind == "content_block_stop":
            assert event["index"] == open_block
            open_block = None
        elif kind == "message_delta":
            said.reason = event["delta"]["stop_reason"]
            said.usage = (event["usage"]["input_tokens"], event["usage"]["output_tokens"])
    assert (open_block, rest[-1][0]) == (None, "message_stop")
    for block in blocks:
        _add(said, block["type"], "".join(block["pieces"]), block)
    return said


def _add(said: Said, kind: str, text: str, block: dict[str, Any]) -> None:
    if kind == "text":
        said.text += text
    elif kind == "thinking":
        said.reasoning += text
    else:
        said.calls.append((block["id"], block["name"], json.loads(text)))


def read_responses(data: bytes) -> Said:
    """A stream of the Responses API, whose pieces must add up to its items, and these to the reply at its end."""
    said = Said()
    events = _events(data)
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    pieces: dict[str, str] = {}
    items: list[Any] = []
    for kind, event in events:
        assert kind == event["type"]
        if kind.endswith(".delta"):
            pieces[event["item_id"]] = pieces.get(event["item_id"], "") + event["delta"]
        elif kind == "response.output_item.done":
            items.append(event["item"])
    response = events[-1][1]["response"]
    assert response["output"] == items
    for item in items:
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert _joined(pieces.get(item["id"], "")) == _joined(whole)
        if item["type"] == "function_call":
            said.calls.append((item["call_id"], item["name"], json.loads(whole)))
        elif item["type"] == "reasoning":
            said.reasoning += whole
        else:
            said.text += whole
    said.reason = (response["incomplete_details"] or {}).get("reason", response["status"])
    said.usage = (response["usage"]["input_tokens"], response["usage"]["output_tokens"])
    return said


def read_google(data: bytes) -> Said:
    """A stream of Google's wire."""
    said = Said()
    chunks = [event for _, event in _events(data)]
    for chunk in chunks:
        for part in chunk["candidates"][0]["content"]["parts"]:
            if call := part.get("functionCall"):
                said.calls.append((call["id"], call["name"], call["args"]))
            elif part.get("thought"):
                said.reasoning += part["text"]
            else:
                said.text += part["text"]
    said.reason = chunks[-1]["candidates"][0]["finishReason"]
    usage = chunks[-1]["usageMetadata"]
    said.usage = (usage["promptTokenCount"], usage["candidatesTokenCount"])
    return said


def _joined(text: str) -> str:
    """A text whose halves of surrogate pairs have met."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


READERS: dict[str, Callable[[bytes], Said]] = {
    "messages": read_messages,
    "responses": read_responses,
    "generate_content": read_google,
}


# --- Conversations ---------------------------------------------------------------------------------------


@dataclass
class Turn:
    """What the user says, or what tools say, or what the model says."""

    role: str
    text: str = ""
    reasoning: str = ""
    image: str | None = None
    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    results: list[tuple[str, str, str]] = field(default_factory=list)
    """Id of the call, name of the tool, what it says."""


def random_turns(rng: random.Random) -> list[Turn]:
    """A conversation that begins with the user and ends with the user or with results."""
    words = ("a", "b c", "é", '"', "{}", "line\nline")
    turns = [Turn("user", rng.choice(words), image=rng.choice((None, None, "aGk=")))]
    for number in range(rng.randrange(4)):
        calls = [
            (f"call-{number}-{place}", f"tool{rng.randrange(3)}", {"x": rng.choice(words), "n": rng.randrange(9)})
            for place in range(rng.randrange(4))
        ]
        text = rng.choice(("", *words)) if calls else rng.choice(words)
        turns.append(Turn("assistant", text, rng.choice(("", "hm")), calls=calls))
        if calls:
            turns.append(Turn("tool", results=[(call_id, name, rng.choice(words)) for call_id, name, _ in calls]))
        else:
            turns.append(Turn("user", rng.choice(words)))
    return turns


def chat_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A conversation as messages of a chat completion, as a backend is to get it."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        if turn.role == "tool":
            found += [{"role": "tool", "tool_call_id": each[0], "content": each[2]} for each in turn.results]
        elif turn.role == "user":
            text = {"type": "text", "text": turn.text}
            image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{turn.image}"}}
            found.append({"role": "user", "content": [text, image] if turn.image else turn.text})
        else:
            message: dict[str, Any] = {"role": "assistant", "content": turn.text or None}
            if turn.reasoning:
                message["reasoning_content"] = turn.reasoning
            if turn.calls:
                message["tool_calls"] = [
                    {"id": each[0], "type": "function", "function": {"name": each[1], "arguments": _json(each[2])}}
                    for each in turn.calls
                ]
            found.append(message)
    return found


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def messages_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """A conversation as Anthropic's clients send it."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        blocks: list[dict[str, Any]] = []
        if turn.reasoning:
            blocks.append({"type": "thinking", "thinking": turn.reasoning, "signature": ""})
        if turn.text:
            blocks.append({"type": "text", "text": turn.text})
        if turn.image:
            source = {"type": "base64", "media_type": "image/png", "data": turn.image}
            blocks.append({"type": "image", "source": source})
        blocks += [{"type": "tool_use", "id": each[0], "name": each[1], "input": each[2]} for each in turn.calls]
        blocks += [{"type": "tool_result", "tool_use_id": each[0], "content": each[2]} for each in turn.results]
        found.append({"role": "assistant" if turn.role == "assistant" else "user", "content": blocks})
    return {"model": "policy", "max_tokens": 9, "messages": found}


def responses_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """A conversation as OpenAI's Responses clients send it."""
    items: list[dict[str, Any]] = []
    for turn in turns:
        if turn.reasoning:
            content = [{"type": "reasoning_text", "text": turn.reasoning}]
            items.append({"type": "reasoning", "id": "r", "summary": [], "content": content})
        if turn.role == "user":
            parts = [{"type": "input_text", "text": turn.text}]
            if turn.image:
                parts.append({"type": "input_image", "image_url": f"data:image/png;base64,{turn.image}"})
            items.append({"type": "message", "role": "user", "content": parts})
        elif turn.text:
            parts = [{"type": "output_text", "text": turn.text, "annotations": []}]
            items.append({"type": "message", "role": "assistant", "id": "m", "content": parts})
        items += [
            {"type": "function_call", "call_id": each[0], "name": each[1], "arguments": _json(each[2])}
            for each in turn.calls
        ]
        items += [{"type": "function_call_output", "call_id": each[0], "output": each[2]} for each in turn.results]
    return {"model": "policy", "max_output_tokens": 9, "input": items}


def google_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """A conversation as Google's clients send it. What a tool says is an object there."""
    contents: list[dict[str, Any]] = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        if turn.reasoning:
            parts.append({"text": turn.reasoning, "thought": True})
        if turn.text:
            parts.append({"text": turn.text})
        if turn.image:
            parts.append({"inlineData": {"mimeType": "image/png", "data": turn.image}})
        parts += [{"functionCall": {"id": each[0], "name": each[1], "args": each[2]}} for each in turn.calls]
        parts += [
            {"functionResponse": {"id": each[0], "name": each[1], "response": {"output": each[2]}}}
            for each in turn.results
        ]
        contents.append({"role": "model" if turn.role == "assistant" else "user", "parts": parts})
    return {"contents": contents, "generationConfig": {"maxOutputTokens": 9}}

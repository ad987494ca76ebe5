"""Random streams of chat and text completions, and what they say: the reply is made first, then cut into chunks.

So what a stream means is known without putting it together. ``put_together`` does that too, as simply as it can be
done, for what an agent gets to see.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Choice", "Stream", "events_of", "put_together", "random_stream"]

_WORDS = [
    "a", "be", "see ", '"', "\\", "\n", "é", "漢", "\N{GRINNING FACE}", "\N{GRINNING FACE}\N{FAMILY}", "{", "}",
]  # fmt: skip
_ENCODERS = (json.JSONEncoder(separators=(",", ":")), json.JSONEncoder())
_TEXTS = ("content", "reasoning_content", "refusal")


@dataclass
class Choice:
    """What one choice of the reply says."""

    message: dict[str, Any]
    finish_reason: str
    token_ids: list[int]
    logprobs: list[float]
    others: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further fields of the choice."""


@dataclass
class Stream:
    """A reply, and its stream."""

    choices: list[Choice]
    prompt_token_ids: list[int]
    head: dict[str, Any]
    chunks: list[dict[str, Any]]
    data: bytes


def random_stream(rng: random.Random) -> Stream:
    """Make a reply of one to three choices, and cut it."""
    choices = [_choice(rng) for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 2, 3)))]
    prompt = [rng.randrange(200_000) for _ in range(rng.randrange(1, 6))]
    head = {"id": f"c-{rng.randrange(99)}", "created": rng.randrange(2**31), "model": "m"}
    chunks = [{**head, "object": "chat.completion.chunk", "choices": each} for each in _interleaved(rng, choices)]
    place = rng.choice(("reply", "choice", "extension"))
    if place == "reply":
        chunks[0]["prompt_token_ids"] = prompt
    elif place == "choice":
        firsts = {piece["index"]: piece for chunk in reversed(chunks) for piece in chunk["choices"]}
        for piece in firsts.values():
            piece["prompt_token_ids"] = prompt
    written = sum(len(choice.token_ids) for choice in choices)
    usage = {"prompt_tokens": len(prompt), "completion_tokens": written, "total_tokens": len(prompt) + written}
    chunks.append({**head, "choices": [], "usage": usage})
    if place == "extension":
        chunks.insert(rng.randrange(1, len(chunks) + 1), {**head, "choices": [], "sglext": {"input_ids": prompt}})
    return Stream(choices, prompt, head, chunks, _bytes(rng, chunks))


def _choice(rng: random.Random) -> Choice:
    message: dict[str, Any] = {"role": "assistant"}
    for name in _TEXTS:
        if name == "content" or rng.random() < 0.2:
            message[name] = "".join(rng.choices(_WORDS, k=rng.randrange(5)))
    if rng.random() < 0.3:
        message["tool_calls"] = [
            {
                "id": f"call-{number}",
                "type": "function",
                "function": {"name": f"f{rng.randrange(3)}", "arguments": json.dumps({"x": rng.choice(_WORDS)})},
            }
            for number in range(rng.choice((1, 2, 2, 3)))
        ]
    if rng.random() < 0.1:
        message["annotations"] = [{"url": rng.choice(_WORDS)} for _ in range(rng.randrange(1, 3))]
    tokens = [rng.randrange(200_000) for _ in range(rng.randrange(1, 9))]
    logprobs = [-round(rng.expovariate(1), rng.randrange(1, 15)) for _ in tokens]
    others = {"stop_reason": rng.choice((7, "x", [1]))} if rng.random() < 0.2 else {}
    return Choice(message, rng.choice(("stop", "length", "tool_calls")), tokens, logprobs, others)


def _cut(rng: random.Random, text: str) -> list[str]:
    """A text in pieces, also in the middle of the surrogate pairs that it has in UTF-16."""
    units = text.encode("utf-16-le")
    edges = sorted({0, len(units), *(2 * rng.randrange(len(units) // 2 + 1) for _ in range(rng.randrange(3)))})
    pairs = itertools.pairwise(edges)
    return [units[start:end].decode("utf-16-le", "surrogatepass") for start, end in pairs] or [""]


def _deltas(rng: random.Random, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pieces of a message, in an order that says the same."""
    repeats = rng.random() < 0.2
    yield {"role": "assistant"}
    for name in _TEXTS:
        for piece in _cut(rng, message[name]) if name in message else ():
            yield {name: piece, **({"role": "assistant"} if repeats else {})}
    if "tool_calls" in message:
        yield from _tool_deltas(rng, message["tool_calls"])
    for each in message.get("annotations", ()):
        yield {"annotations": [each]}


def _tool_deltas(rng: random.Random, calls: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    all_zero, repeats = rng.random() < 0.2, rng.random() < 0.2
    queues: list[list[dict[str, Any]]] = []
    for number, call in enumerate(calls):
        pieces: list[dict[str, Any]] = []
        for place, arguments in enumerate(_cut(rng, call["function"]["arguments"])):
            piece: dict[str, Any] = {"function": {"arguments": arguments}} | ({} if all_zero else {"index": number})
            if all_zero and rng.random() < 0.5:
                piece["index"] = 0
            if place == 0 or repeats:
                piece |= {"id": call["id"], "type": "function"}
                piece["function"]["name"] = call["function"]["name"]
            elif rng.random() < 0.3:
                piece |= {"id": rng.choice((None, "")), "type": "function"}
            pieces.append(piece)
        queues.append(pieces)
    if all_zero:  # then only their order says which piece belongs to which call
        yield from ({"tool_calls": [piece]} for pieces in queues for piece in pieces)
        return
    while any(queues):
        picked = rng.sample(
            [queue for queue in queues if queue], k=1 if rng.random() < 0.8 else len([q for q in queues if q])
        )
        yield {"tool_calls": [queue.pop(0) for queue in picked]}


def _pieces(rng: random.Random, index: int, choice: Choice) -> list[dict[str, Any]]:
    """The chunks of one choice; each may carry some of its tokens."""
    found: list[dict[str, Any]] = []
    for delta in _deltas(rng, choice.message):
        found.append({"index": index, "delta": delta, "finish_reason": None})
        if rng.random() < 0.1:
            found.append({"index": index, "delta": {}, "finish_reason": None})
    found.append({"index": index, "delta": {}, "finish_reason": choice.finish_reason, **choice.others})
    edges = sorted(rng.randrange(len(choice.token_ids) + 1) for _ in found[1:])
    starts, ends = [0, *edges], [*edges, len(choice.token_ids)]
    name = rng.choice(("token_ids", "response_token_ids"))
    for piece, start, end in zip(found, starts, ends, strict=True):
        if start == end and rng.random() < 0.5:
            continue
        piece[name] = choice.token_ids[start:end]
        entries = [{"token": "t", "logprob": number, "bytes": None} for number in choice.logprobs[start:end]]
        piece["logprobs"] = {"content": entries}
    return found


def _interleaved(rng: random.Random, choices: Sequence[Choice]) -> Iterator[list[dict[str, Any]]]:
    queues = [_pieces(rng, index, choice) for index, choice in enumerate(choices)]
    while waiting := [queue for queue in queues if queue]:
        picked = rng.sample(waiting, k=1 if rng.random() < 0.8 else len(waiting))
        yield [queue.pop(0) for queue in picked]


def _bytes(rng: random.Random, chunks: Sequence[dict[str, Any]]) -> bytes:
    """The events of a stream, with what servers put between and into them."""
    end = rng.choice(("\n", "\r\n"))
    encoder = rng.choice(_ENCODERS)
    lines: list[str] = []
    for chunk in chunks:
        if rng.random() < 0.05:
            lines.append(f": ping{end}{end}")
        before = f"event: message{end}" if rng.random() < 0.05 else ""
        vendor = {"x_vendor": rng.choice(({"a": [1, None]}, "NaN", 1.5))} if rng.random() < 0.1 else {}
        lines.append(f"{before}data: {encoder.encode({**chunk, **vendor})}{end}{end}")
    lines.append(f"data: [DONE]{end}{end}")
    return "".join(lines).encode()


# --- What an agent makes of it ---------------------------------------------------------------------------


def events_of(data: bytes) -> list[str]:
    """The data of the events of a stream."""
    found: list[str] = []
    for event in data.decode().replace("\r\n", "\n").split("\n\n"):
        found += ["\n".join(line[5:].strip() for line in event.split("\n") if line.startswith("data:"))]
    return [each for each in found if each]


def put_together(chunks: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The message of each choice, with its finish reason and further fields, as a careful client makes it."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = found.setdefault(piece["index"], {"message": {}, "finish_reason": None})
            delta = piece["delta"]
            message = choice["message"]
            for name in _TEXTS:
                if name in delta:
                    message[name] = message.get(name, "") + delta[name]
            message |= {name: delta[name] for name in ("role",) if name in delta}
            if "annotations" in delta:
                message["annotations"] = message.get("annotations", []) + delta["annotations"]
            for call in delta.get("tool_calls", ()):
                _add_call(message.setdefault("tool_calls", []), call)
            others = {name: value for name, value in piece.items() if name not in ("index", "delta")}
            choice |= {name: value for name, value in others.items() if value is not None}
    for choice in found.values():
        for call in choice["message"].get("tool_calls", ()):
            del call["place"]
        # Halves of surrogate pairs that stand together in JSON are read as one character.
        choice["message"] = json.loads(json.dumps(choice["message"]))
    return found


def _add_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    index, call_id = piece.get("index", 0), piece.get("id")
    same = [call for call in calls if (call["id"] == call_id if call_id else call["place"] == index)]
    if not same:
        call = {"id": call_id, "type": "function", "function": {"name": piece["function"]["name"], "arguments": ""}}
        calls.append({**call, "place": index})
        calls.sort(key=lambda each: each["place"])
        same = [next(each for each in calls if each["id"] == call_id)]
    same[-1]["function"]["arguments"] += piece["function"]["arguments"]

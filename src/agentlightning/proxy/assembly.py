"""Puts the chunks of a streamed reply together to what the same call would have answered without streaming.

Thousands of streams are open at once and each brings thousands of chunks, so nothing of a chunk is kept but its
text (as bytes) and its numbers (as arrays).
"""

from __future__ import annotations

import math
from array import array
from typing import Any, cast

import msgspec

from agentlightning.proxy.capture import CallKind
from agentlightning.proxy.models import Ask
from agentlightning.proxy.replies import Answer, choices_of, integers, logprobs_of, read_head, read_usage

_encode = msgspec.json.encode
_NUMBER_BYTES = 8
_ITEM_BYTES = 100
"""Of a list, where it is no text."""
_HEAD_FIELDS = ("id", "created", "model", "service_tier", "system_fingerprint")
_OBJECTS: dict[CallKind, str] = {"chat": "chat.completion", "text_completion": "text_completion"}


class ReplyAssembly:
    """One reply in the making.

    Args:
        kind: of the call.
        hidden: what only the proxy asked for: recorded, but no part of the body.
    """

    def __init__(self, kind: CallKind, hidden: frozenset[Ask]) -> None:
        self._kind: CallKind = kind
        self._hidden = hidden
        self._head: dict[str, Any] = {}
        self._usage: object = None
        self._prompt_token_ids: list[int] | None = None
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        """Take in one chunk, as the backend sent it."""
        for name in _HEAD_FIELDS:
            value = chunk.get(name)
            if value is not None:
                self._head[name] = value
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        if self._prompt_token_ids is None:
            self._prompt_token_ids = cast("list[int] | None", integers(chunk.get("prompt_token_ids")))
        for given in choices_of(chunk):
            self._add_choice(given)

    def _add_choice(self, given: dict[str, Any]) -> None:
        index = given.get("index")
        index = index if type(index) is int else 0
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(keeps_logprobs="logprobs" not in self._hidden)
        choice.add(given)
        if self._prompt_token_ids is None:
            self._prompt_token_ids = cast("list[int] | None", integers(given.get("prompt_token_ids")))

    @property
    def is_finished(self) -> bool:
        """Whether every choice said why it ended."""
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices.values())

    @property
    def kept_bytes(self) -> int:
        """About how much the reply takes up."""
        return sum(choice.kept_bytes for choice in self._choices.values())

    def answer(self) -> Answer:
        """The facts of the reply as far as it came."""
        answer = Answer()
        read_head(self._head, answer)
        read_usage(self._usage, answer)
        answer.prompt_token_ids = self._prompt_token_ids
        choices = [self._choices[index] for index in sorted(self._choices)]
        answer.finish_reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
        if choices:
            answer.token_ids = choices[0].token_ids
            answer.logprobs = choices[0].logprobs()
        if self._head or choices:
            answer.body = self._body()
        return answer

    def _body(self) -> bytes:
        shows_tokens = "token_ids" not in self._hidden
        body: dict[str, Any] = {"id": None, "object": _OBJECTS[self._kind], **self._head}
        body["choices"] = [
            self._choices[index].body(index, self._kind, shows_tokens=shows_tokens) for index in sorted(self._choices)
        ]
        if self._usage is not None:  # shown or not: without streaming it always is
            body["usage"] = self._usage
        if self._prompt_token_ids is not None and shows_tokens:
            body["prompt_token_ids"] = self._prompt_token_ids
        return _encode(body)


class _Choice:
    """One choice in the making."""

    def __init__(self, *, keeps_logprobs: bool) -> None:
        self._keeps_logprobs = keeps_logprobs
        self._message = _Merged()
        self._text = bytearray()
        self._others: dict[str, Any] = {}
        self._logprob_entries = bytearray()
        self._text_logprobs = _Merged()
        self._logprobs = array("d")
        self._has_logprobs = False
        self.finish_reason: str | None = None
        self.token_ids: array[int] | None = None

    def add(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if value is None or name in ("index", "prompt_token_ids"):
                continue
            if name == "delta":
                if isinstance(value, dict):
                    self._message.add(cast("dict[str, Any]", value))
            elif name == "text" and isinstance(value, str):
                self._text += _bytes_of(value)
            elif name == "finish_reason" and isinstance(value, str):
                self.finish_reason = value
            elif name == "token_ids":
                self._add_tokens(value)
            elif name == "logprobs":
                self._add_logprobs(value)
            else:
                self._others[name] = value

    def _add_tokens(self, value: object) -> None:
        ids = integers(value)
        if ids is not None:
            if self.token_ids is None:
                self.token_ids = array("q")
            self.token_ids.extend(ids)

    def _add_logprobs(self, value: object) -> None:
        numbers = logprobs_of(value)
        self._has_logprobs = True
        # One that is no number makes all of them unusable, because they no longer stand beside their tokens.
        self._logprobs.extend(numbers if numbers is not None else (math.nan,))
        if not self._keeps_logprobs or not isinstance(value, dict):
            return
        facts = cast("dict[str, Any]", value)
        content = facts.get("content")
        if isinstance(content, list):
            for entry in cast("list[Any]", content):
                if self._logprob_entries:
                    self._logprob_entries += b","
                self._logprob_entries += _encode(entry)
        self._text_logprobs.add({name: each for name, each in facts.items() if name != "content"})

    @property
    def kept_bytes(self) -> int:
        numbers = _NUMBER_BYTES * (len(self._logprobs) + len(self.token_ids or ()))
        texts = len(self._text) + len(self._logprob_entries)
        return numbers + texts + self._message.kept_bytes + self._text_logprobs.kept_bytes

    def logprobs(self) -> array[float] | None:
        if not self._has_logprobs or any(map(math.isnan, self._logprobs)):
            return None
        return self._logprobs

    def body(self, index: int, kind: CallKind, *, shows_tokens: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"index": index}
        if kind == "chat":
            body["message"] = {"role": "assistant", "content": None, **self._message.whole()}
        else:
            body["text"] = self._text.decode("utf-8", "replace")
        body["logprobs"] = self._logprobs_body() if self._has_logprobs and self._keeps_logprobs else None
        body["finish_reason"] = self.finish_reason
        body.update(self._others)
        if shows_tokens and self.token_ids is not None:
            body["token_ids"] = list(self.token_ids)
        return body

    def _logprobs_body(self) -> dict[str, Any]:
        body = self._text_logprobs.whole()
        if self._logprob_entries:
            body = {"content": msgspec.Raw(b"[" + bytes(self._logprob_entries) + b"]"), **body}
        return body


class _Merged:
    """An object that comes in pieces: texts are joined, lists of parts are joined by their ``index``.

    OpenAI sends the text of a message and the arguments of its tool calls in pieces and everything else once; some
    backends repeat what does not change (role, id, type, name) in every chunk.
    """

    _ONCE = frozenset({"role", "id", "type", "name", "index"})

    def __init__(self) -> None:
        self._texts: dict[str, bytearray] = {}
        self._objects: dict[str, _Merged] = {}
        self._lists: dict[str, dict[int, _Merged] | list[Any]] = {}
        self._values: dict[str, Any] = {}

    def add(self, piece: dict[str, Any]) -> None:
        for name, value in piece.items():
            if value is None:
                continue
            if isinstance(value, str) and name not in self._ONCE:
                self._texts.setdefault(name, bytearray()).extend(_bytes_of(value))
            elif isinstance(value, dict):
                self._objects.setdefault(name, _Merged()).add(cast("dict[str, Any]", value))
            elif isinstance(value, list):
                self._add_list(name, cast("list[Any]", value))
            elif value != "" or name not in self._values:
                self._values[name] = value

    def _add_list(self, name: str, items: list[Any]) -> None:
        if not all(isinstance(item, dict) and type(cast("dict[str, Any]", item).get("index")) is int for item in items):
            plain = self._lists.setdefault(name, [])
            if isinstance(plain, list):
                plain.extend(items)
            return
        parts = self._lists.setdefault(name, {})
        if isinstance(parts, dict):
            for item in cast("list[dict[str, Any]]", items):
                parts.setdefault(item["index"], _Merged()).add(item)

    @property
    def kept_bytes(self) -> int:
        """About how much it takes up."""
        size = sum(map(len, self._texts.values())) + sum(each.kept_bytes for each in self._objects.values())
        for parts in self._lists.values():
            if isinstance(parts, dict):
                size += sum(each.kept_bytes for each in parts.values())
            else:
                size += sum(len(each) if isinstance(each, str) else _ITEM_BYTES for each in parts)
        return size

    def whole(self) -> dict[str, Any]:
        """Everything that came, put together. Parts of a list lose their ``index``, as in a whole reply."""
        body = dict(self._values)
        body.update({name: text.decode("utf-8", "replace") for name, text in self._texts.items()})
        body.update({name: merged.whole() for name, merged in self._objects.items()})
        for name, parts in self._lists.items():
            if isinstance(parts, list):
                body[name] = parts
                continue
            body[name] = [parts[index].whole() for index in sorted(parts)]
            for part in body[name]:
                part.pop("index", None)
        return body


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "replace")

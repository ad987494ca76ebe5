"""Reads OpenAI's replies, whole or in chunks, into what is recorded of them.

Backends differ in details, so what has another shape than OpenAI's is passed over; nothing here raises.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from agentlightning.proxy.capture import CaptureField
from agentlightning.proxy.dialects.base import RecordedReply

_encode = msgspec.json.encode
_NUMBER_BYTES = 8
_ITEM_BYTES = 100
"""About the size of a list's item that is no text."""
_HEAD_FIELDS = ("id", "created", "model", "service_tier", "system_fingerprint")


def read_whole_reply(reply: dict[str, Any]) -> RecordedReply:
    """Read a reply that came in one piece. Its ``body`` is left to the caller."""
    record = RecordedReply()
    _read_head(reply, record)
    _read_usage(reply.get("usage"), record)
    record.prompt_token_ids = _integers(reply.get("prompt_token_ids"))
    for number, choice in enumerate(choices_of(reply)):
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            record.finish_reasons.append(reason)
        if number == 0:
            record.token_ids = _integers(choice.get("token_ids"))
            record.logprobs = _logprobs_of(choice.get("logprobs"))
            if record.prompt_token_ids is None:  # vLLM puts them here in text completions
                record.prompt_token_ids = _integers(choice.get("prompt_token_ids"))
    return record


def choices_of(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of a reply, or of a chunk of one, that are objects."""
    choices = reply.get("choices")
    if not isinstance(choices, list):
        return []
    return [cast("dict[str, Any]", choice) for choice in cast("list[Any]", choices) if isinstance(choice, dict)]


class ReplyAssembly:
    """Puts the chunks of a streamed reply together to what the same call would have answered without streaming.

    Thousands of streams are open at once and each brings thousands of chunks. Therefore nothing of a chunk is kept
    but its text (as bytes) and its numbers (as arrays).

    Args:
        reply_object: the ``object`` of a whole reply.
        content: returns what the model wrote in a choice, as a whole reply has it.
        hidden: the fields that only the proxy asked for: recorded, but no part of the body.
    """

    def __init__(
        self, reply_object: str, content: Callable[[PartialChoice], dict[str, Any]], hidden: frozenset[CaptureField]
    ) -> None:
        self._reply_object = reply_object
        self._content = content
        self._shows_tokens = "token_ids" not in hidden
        self._keeps_logprobs = "logprobs" not in hidden
        self._head: dict[str, Any] = {}
        self._usage: object = None
        self._prompt_token_ids: Sequence[int] | None = None
        self._choices: dict[int, PartialChoice] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        """Read one chunk, as the backend sent it."""
        for name in _HEAD_FIELDS:
            value = chunk.get(name)
            if value is not None:
                self._head[name] = value
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        if self._prompt_token_ids is None:
            self._prompt_token_ids = _integers(chunk.get("prompt_token_ids"))
        for given in choices_of(chunk):
            index = given.get("index")
            index = index if type(index) is int else 0
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = PartialChoice(keeps_logprobs=self._keeps_logprobs)
            choice.add(given)
            if self._prompt_token_ids is None:
                self._prompt_token_ids = _integers(given.get("prompt_token_ids"))

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices.values())

    @property
    def kept_bytes(self) -> int:
        """About how many bytes of the reply are kept."""
        return sum(choice.kept_bytes for choice in self._choices.values())

    def recorded(self) -> RecordedReply:
        """Return what is recorded of the reply as far as it came."""
        record = RecordedReply(prompt_token_ids=self._prompt_token_ids)
        _read_head(self._head, record)
        _read_usage(self._usage, record)
        choices = [self._choices[index] for index in sorted(self._choices)]
        record.finish_reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
        if choices:
            record.token_ids = choices[0].token_ids
            record.logprobs = choices[0].logprobs()
        if self._head or choices:
            record.body = self._body()
        return record

    def _body(self) -> bytes:
        body: dict[str, Any] = {"id": None, "object": self._reply_object, **self._head}
        body["choices"] = [
            {"index": index, **self._content(choice), **choice.body(shows_tokens=self._shows_tokens)}
            for index, choice in sorted(self._choices.items())
        ]
        if self._usage is not None:  # also if it is hidden from the stream: a whole reply always has it
            body["usage"] = self._usage
        if self._prompt_token_ids is not None and self._shows_tokens:
            body["prompt_token_ids"] = self._prompt_token_ids
        return _encode(body)


class PartialChoice:
    """One choice of a streamed reply, as far as it came.

    Args:
        keeps_logprobs: whether the agent gets log-probabilities, so that the body needs their entries as well as
            the numbers.
    """

    def __init__(self, *, keeps_logprobs: bool) -> None:
        self._keeps_logprobs = keeps_logprobs
        self._message = _MergedObject()
        self._text = bytearray()
        self._others: dict[str, Any] = {}
        self._logprob_entries = bytearray()
        self._text_logprobs = _MergedObject()
        self._logprobs = array("d")
        self._has_logprobs = False
        self.finish_reason: str | None = None
        self.token_ids: array[int] | None = None

    def add(self, given: dict[str, Any]) -> None:
        """Read the choice's part of one chunk."""
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
        ids = _integers(value)
        if ids is not None:
            if self.token_ids is None:
                self.token_ids = array("q")
            self.token_ids.extend(ids)

    def _add_logprobs(self, value: object) -> None:
        numbers = _logprobs_of(value)
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
        """About how many bytes of the choice are kept."""
        numbers = _NUMBER_BYTES * (len(self._logprobs) + len(self.token_ids or ()))
        texts = len(self._text) + len(self._logprob_entries)
        return numbers + texts + self._message.kept_bytes + self._text_logprobs.kept_bytes

    def logprobs(self) -> Sequence[float] | None:
        """Return the log-probability of each token; None if there are none, or one was no number."""
        if not self._has_logprobs or any(map(math.isnan, self._logprobs)):
            return None
        return self._logprobs

    def message(self) -> dict[str, Any]:
        """Return the message of a chat's choice."""
        return {"role": "assistant", "content": None, **self._message.whole()}

    def text(self) -> str:
        """Return the text of a text completion's choice."""
        return self._text.decode("utf-8", "replace")

    def body(self, *, shows_tokens: bool) -> dict[str, Any]:
        """Return the choice as a whole reply has it, without its index and what the model wrote."""
        body: dict[str, Any] = {"logprobs": None, "finish_reason": self.finish_reason, **self._others}
        if self._has_logprobs and self._keeps_logprobs:
            entries = msgspec.Raw(b"[" + bytes(self._logprob_entries) + b"]") if self._logprob_entries else None
            body["logprobs"] = ({} if entries is None else {"content": entries}) | self._text_logprobs.whole()
        if shows_tokens and self.token_ids is not None:
            body["token_ids"] = list(self.token_ids)
        return body


class _MergedObject:
    """A JSON object that comes in pieces: texts are joined, lists of parts are joined by their ``index``.

    OpenAI sends the text of a message and the arguments of its tool calls in pieces and everything else once; some
    backends repeat what does not change (role, id, type, name) in every chunk.
    """

    _UNCHANGING = frozenset({"role", "id", "type", "name", "index"})

    def __init__(self) -> None:
        self._texts: dict[str, bytearray] = {}
        self._objects: dict[str, _MergedObject] = {}
        self._lists: dict[str, dict[int, _MergedObject] | list[Any]] = {}
        self._values: dict[str, Any] = {}

    def add(self, piece: dict[str, Any]) -> None:
        for name, value in piece.items():
            if value is None:
                continue
            if isinstance(value, str) and name not in self._UNCHANGING:
                self._texts.setdefault(name, bytearray()).extend(_bytes_of(value))
            elif isinstance(value, dict):
                self._objects.setdefault(name, _MergedObject()).add(cast("dict[str, Any]", value))
            elif isinstance(value, list):
                self._add_list(name, cast("list[Any]", value))
            elif value != "" or name not in self._values:  # later chunks may repeat an id as an empty text
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
                parts.setdefault(item["index"], _MergedObject()).add(item)

    @property
    def kept_bytes(self) -> int:
        size = sum(map(len, self._texts.values())) + sum(each.kept_bytes for each in self._objects.values())
        for parts in self._lists.values():
            if isinstance(parts, dict):
                size += sum(each.kept_bytes for each in parts.values())
            else:
                size += sum(len(each) if isinstance(each, str) else _ITEM_BYTES for each in parts)
        return size

    def whole(self) -> dict[str, Any]:
        """Return everything that came, put together. Parts of a list lose their ``index``, as in a whole reply."""
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


def _read_head(reply: dict[str, Any], record: RecordedReply) -> None:
    record.response_id = _text(reply.get("id"))
    record.model = _text(reply.get("model"))
    record.fingerprint = _text(reply.get("system_fingerprint"))


def _read_usage(usage: object, record: RecordedReply) -> None:
    if isinstance(usage, dict):
        counts = cast("dict[str, Any]", usage)
        record.input_tokens = _count(counts.get("prompt_tokens"))
        record.output_tokens = _count(counts.get("completion_tokens"))


def _integers(value: object) -> Sequence[int] | None:
    """Return ``value`` if it is a list of integers."""
    if isinstance(value, list) and all(type(each) is int for each in cast("list[Any]", value)):
        return cast("list[int]", value)
    return None


def _logprobs_of(value: object) -> Sequence[float] | None:
    """Return the log-probability of each token from the ``logprobs`` of a choice: a chat's or a text completion's."""
    if not isinstance(value, dict):
        return None
    facts = cast("dict[str, Any]", value)
    content = facts.get("content")
    if isinstance(content, list):
        numbers: object = [
            cast("dict[str, Any]", each).get("logprob") if isinstance(each, dict) else None
            for each in cast("list[Any]", content)
        ]
    else:
        numbers = facts.get("token_logprobs")
    if not isinstance(numbers, list) or not all(type(each) in (float, int) for each in cast("list[Any]", numbers)):
        return None
    return [float(each) for each in cast("list[float]", numbers)]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _bytes_of(text: str) -> bytes:
    # JSON may hold lone surrogates, which UTF-8 cannot.
    return text.encode("utf-8", "replace")

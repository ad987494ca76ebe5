"""Reads OpenAI's replies, whole or in chunks, into what is recorded of them.

Backends differ in details, so what has another shape than OpenAI's is passed over; nothing here raises.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any, Literal, cast

import msgspec
from typing_extensions import TypeIs

from agentlightning.proxy.dialects.base import BackendError, CaptureField, RecordedReply, data_of, event_of

_encode = msgspec.json.encode
_DONE = b"[DONE]"
"""The data of the event with which streams end."""
_NUMBER_BYTES = 8
_ITEM_BYTES = 100
"""About the size of a value that is no text."""
_HEAD_FIELDS = ("id", "created", "model", "service_tier", "system_fingerprint")
_UNCHANGING = frozenset({"role", "id", "type", "name", "index"})
"""Texts of a message that come once, or are repeated in every chunk; others come in pieces."""


def read_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that ``body`` is; None if it is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def read_whole_reply(reply: dict[str, Any]) -> RecordedReply:
    """Read a reply that came in one piece. Its ``body`` is left to the caller."""
    record = RecordedReply(prompt_token_ids=_integers(reply.get("prompt_token_ids")))
    _read_head_and_usage(reply, reply.get("usage"), record)
    choices = _choices_of(reply)
    record.finish_reasons = [each["finish_reason"] for each in choices if isinstance(each.get("finish_reason"), str)]
    if choices:
        record.token_ids = _integers(choices[0].get("token_ids"))
        record.logprobs = _logprobs_of(choices[0].get("logprobs"))
        if record.prompt_token_ids is None:  # vLLM puts them here in text completions
            record.prompt_token_ids = _integers(choices[0].get("prompt_token_ids"))
    return record


def read_error_in(reply: dict[str, Any], status: int) -> BackendError:
    """Read the error in a backend's reply, or in a chunk of one."""
    error = reply.get("error")
    known = cast("dict[str, Any]", error) if isinstance(error, dict) else {"message": error}
    code = known.get("code") or known.get("type")
    message = known.get("message") or reply.get("message")
    return BackendError(
        code if isinstance(code, str) else str(status),
        message if isinstance(message, str) else f"the backend answered with HTTP status {status}",
    )


def remove_hidden(reply: dict[str, Any], hidden: frozenset[CaptureField]) -> bool:
    """Remove from a reply, or from a chunk of one, what only the proxy asked for.

    Returns:
        Whether anything is left for the agent. A chunk that carries only the usage would not have been sent.
    """
    choices = _choices_of(reply)
    if "token_ids" in hidden:
        reply.pop("prompt_token_ids", None)
        for choice in choices:
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
    if "logprobs" in hidden:
        for choice in choices:
            if "logprobs" in choice:
                choice["logprobs"] = None
    if "usage" in hidden and "usage" in reply:
        usage = reply.pop("usage")
        return bool(choices) or usage is None or "error" in reply
    return True


class OpenAIStream:
    """A streamed reply of either wire; a ``ReplyStream``.

    It puts the chunks together to what the same call would have answered without streaming. Thousands of streams are
    open at once and each brings thousands of chunks. Therefore nothing of a chunk is kept but its text (as bytes) and
    its numbers (as arrays).

    Args:
        reply_object: the ``object`` of a whole reply.
        content: the field of a choice that holds what the model wrote, in a whole reply.
        hidden: the fields that only the proxy asked for: recorded, but no part of the body.
    """

    def __init__(self, reply_object: str, content: Literal["message", "text"], hidden: frozenset[CaptureField]) -> None:
        self._reply_object = reply_object
        self._content: Literal["message", "text"] = content
        self._hidden = hidden
        self._head: dict[str, Any] = {}
        self._usage: object = None
        self._prompt_token_ids: Sequence[int] | None = None
        self._choices: dict[int, _PartialChoice] = {}
        self.error: BackendError | None = None
        self.is_done = False

    @property
    def is_complete(self) -> bool:
        """Whether ``[DONE]`` came, or every choice has its finish reason: some backends send no ``[DONE]``."""
        finished = bool(self._choices) and all(choice.finish_reason for choice in self._choices.values())
        return self.is_done or finished

    @property
    def kept_bytes(self) -> int:
        """About how many bytes of the reply are kept for the record."""
        return sum(choice.kept_bytes for choice in self._choices.values())

    def feed(self, event: bytes) -> bytes:
        """Read one event; returns it without the hidden fields, or nothing if nothing else was in it."""
        data = data_of(event)
        if data == _DONE:
            self.is_done = True
        if not data or self.is_done:
            return event
        chunk = read_object(data)
        if chunk is None:  # no chunk of this wire: the agent's client has to judge it
            return event
        if chunk.get("error"):
            self.error = read_error_in(chunk, 200)
            self.is_done = True
            return event
        self._add(chunk)
        if not self._hidden:
            return event
        return event_of(_encode(chunk)) if remove_hidden(chunk, self._hidden) else b""

    def _add(self, chunk: dict[str, Any]) -> None:
        for name in _HEAD_FIELDS:
            value = chunk.get(name)
            if value is not None:
                self._head[name] = value
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        if self._prompt_token_ids is None:
            self._prompt_token_ids = _integers(chunk.get("prompt_token_ids"))
        for given in _choices_of(chunk):
            index = given.get("index")
            index = index if type(index) is int else 0
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = _PartialChoice(keeps_logprobs="logprobs" not in self._hidden)
            choice.add(given)
            if self._prompt_token_ids is None:
                self._prompt_token_ids = _integers(given.get("prompt_token_ids"))

    def recorded(self) -> RecordedReply:
        """Return what is recorded of the reply as far as it came."""
        record = RecordedReply(prompt_token_ids=self._prompt_token_ids)
        _read_head_and_usage(self._head, self._usage, record)
        choices = [self._choices[index] for index in sorted(self._choices)]
        record.finish_reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
        if choices:
            record.token_ids = choices[0].token_ids
            record.logprobs = choices[0].logprobs()
        if self._head or choices:
            record.body = self._body()
        return record

    def _body(self) -> bytes:
        shows_tokens = "token_ids" not in self._hidden
        body: dict[str, Any] = {"id": None, "object": self._reply_object, **self._head}
        body["choices"] = [
            {"index": index, **choice.body(self._content, shows_tokens=shows_tokens)}
            for index, choice in sorted(self._choices.items())
        ]
        if self._usage is not None:  # also if it is hidden from the stream: a whole reply always has it
            body["usage"] = self._usage
        if self._prompt_token_ids is not None and shows_tokens:
            body["prompt_token_ids"] = self._prompt_token_ids
        return _encode(body)


class _PartialChoice:
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
        self._lacks_token_ids = False

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
                self._add_token_ids(value)
            elif name == "logprobs":
                self._add_logprobs(value)
            else:
                self._others[name] = value

    def _add_token_ids(self, value: object) -> None:
        ids = _integers(value)
        if ids is None:  # from here on ids would no longer stand for the whole text
            self._lacks_token_ids, self.token_ids = True, None
        elif not self._lacks_token_ids:
            self.token_ids = array("q") if self.token_ids is None else self.token_ids
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
        numbers = _NUMBER_BYTES * (len(self._logprobs) + len(self.token_ids or ()))
        texts = len(self._text) + len(self._logprob_entries)
        return numbers + texts + _size_of(self._message) + _size_of(self._text_logprobs)

    def logprobs(self) -> Sequence[float] | None:
        """Return the log-probability of each token; None if there are none, or one was no number."""
        if not self._has_logprobs or any(map(math.isnan, self._logprobs)):
            return None
        return self._logprobs

    def body(self, content: Literal["message", "text"], *, shows_tokens: bool) -> dict[str, Any]:
        """Return the choice as a whole reply has it, without its index."""
        body: dict[str, Any] = {content: self._text.decode("utf-8", "replace")}
        if content == "message":
            body = {content: {"role": "assistant", "content": None, **self._message.whole()}}
        body |= {"logprobs": None, "finish_reason": self.finish_reason, **self._others}
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

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        """By name: a ``bytearray`` for a text, a ``_MergedObject`` for an object, a dict for a list whose parts have an
        ``index``; everything else is as it came."""

    def add(self, piece: dict[str, Any]) -> None:
        for name, value in piece.items():
            kept = self.parts.get(name)
            if isinstance(value, str) and name not in _UNCHANGING:
                kept = self.parts[name] = kept if isinstance(kept, bytearray) else bytearray()
                kept += _bytes_of(value)
            elif isinstance(value, dict):
                kept = self.parts[name] = kept if isinstance(kept, _MergedObject) else _MergedObject()
                kept.add(cast("dict[str, Any]", value))
            elif isinstance(value, list):
                self._add_list(name, cast("list[Any]", value))
            elif value is not None and (value != "" or kept is None):  # later chunks may repeat an id as an empty text
                self.parts[name] = value

    def _add_list(self, name: str, items: list[Any]) -> None:
        kept: Any = self.parts.get(name)
        if not items:  # says nothing of the kind of list that follows
            self.parts.setdefault(name, [])
        elif isinstance(kept, list) and kept:
            cast("list[Any]", kept).extend(items)
        elif all(isinstance(item, dict) and type(cast("dict[str, Any]", item).get("index")) is int for item in items):
            merged = cast("dict[int, _MergedObject]", kept) if isinstance(kept, dict) else {}
            self.parts[name] = merged
            for item in items:
                merged.setdefault(item["index"], _MergedObject()).add(item)
        elif not isinstance(kept, dict):
            self.parts[name] = [*items]

    def whole(self) -> dict[str, Any]:
        """Return everything that came, put together. Parts of a list lose their ``index``, as in a whole reply."""
        return {name: _whole(part) for name, part in self.parts.items()}


def _whole(part: Any) -> Any:
    if isinstance(part, bytearray):
        return part.decode("utf-8", "replace")
    if isinstance(part, _MergedObject):
        return part.whole()
    if isinstance(part, dict):
        merged = [each.whole() for _, each in sorted(cast("dict[int, _MergedObject]", part).items())]
        return [{name: value for name, value in each.items() if name != "index"} for each in merged]
    return part


def _size_of(part: Any) -> int:
    """Return about how many bytes a part of a ``_MergedObject`` takes."""
    if isinstance(part, _MergedObject):
        part = part.parts
    if isinstance(part, dict):
        return sum(map(_size_of, cast("dict[Any, Any]", part).values()))
    if isinstance(part, list):
        return sum(map(_size_of, cast("list[Any]", part)))
    return len(part) if isinstance(part, str | bytearray) else _ITEM_BYTES


def _choices_of(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of a reply, or of a chunk of one, that are objects."""
    choices = reply.get("choices")
    if not isinstance(choices, list):
        return []
    return [cast("dict[str, Any]", choice) for choice in cast("list[Any]", choices) if isinstance(choice, dict)]


def _read_head_and_usage(head: dict[str, Any], usage: object, record: RecordedReply) -> None:
    record.response_id, record.model, record.fingerprint = (
        value if isinstance(value := head.get(name), str) and value else None
        for name in ("id", "model", "system_fingerprint")
    )
    if isinstance(usage, dict):
        record.input_tokens, record.output_tokens = (
            value if _is_int64(value := cast("dict[str, Any]", usage).get(name)) else None
            for name in ("prompt_tokens", "completion_tokens")
        )


def _is_int64(value: object) -> TypeIs[int]:
    """Whether it is an integer that a span can hold. JSON has larger ones."""
    return type(value) is int and -(2**63) <= value < 2**63


def _integers(value: object) -> Sequence[int] | None:
    """Return ``value`` if it is a list of integers that a span can hold."""
    if isinstance(value, list) and all(map(_is_int64, cast("list[Any]", value))):
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
    try:
        return [float(each) for each in cast("list[float]", numbers)]
    except OverflowError:
        return None


def _bytes_of(text: str) -> bytes:
    # JSON may hold lone surrogates, which UTF-8 cannot.
    return text.encode("utf-8", "replace")

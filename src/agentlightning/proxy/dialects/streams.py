"""A streamed reply of OpenAI's wires: its chunks go in, what the agent may see comes out, the record is at the end."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any, Literal, cast

import msgspec

from agentlightning.proxy.dialects.base import (
    BackendError,
    CaptureField,
    RecordedChoice,
    RecordedReply,
    data_of,
    with_data,
)
from agentlightning.proxy.dialects.lenient import bytes_of, read_object, text_of, write_json
from agentlightning.proxy.dialects.merging import MergedObject
from agentlightning.proxy.dialects.replies import (
    RESPONSE_IDS,
    choices_of,
    complete,
    entry_ids_of,
    extension_of,
    has_content,
    integers_of,
    is_error,
    logprobs_of,
    object_of,
    output_ids_of,
    read_error_in,
    read_head_and_usage,
    remove_hidden,
)
from agentlightning.semconv import UnusableReason

_DONE = b"[DONE]"
"""The data of the event with which streams end."""
_NUMBER_BYTES = 8
_HEAD_FIELDS = ("id", "created", "model", "service_tier", "system_fingerprint")


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
        self._extension: dict[str, Any] = {}
        self._choices: dict[int, _PartialChoice] = {}
        self._is_readable = True
        self.error: BackendError | None = None
        self.is_done = False

    @property
    def is_complete(self) -> bool:
        """Whether ``[DONE]`` came, or every choice has its finish reason: some backends send no ``[DONE]``."""
        return self.is_done or self.is_finished

    @property
    def is_finished(self) -> bool:
        """Whether every choice has its finish reason: the agent has all that the model wrote."""
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices.values())

    @property
    def kept_bytes(self) -> int:
        """About how many bytes of the reply are kept for the record."""
        return sum(choice.kept_bytes for choice in self._choices.values())

    def feed(self, event: bytes) -> bytes:
        """Read one event; returns it without the hidden fields, or nothing if nothing else was in it."""
        chunk = self.read(event)
        if chunk is None or not self._hidden:
            return event
        return with_data(event, write_json(chunk)) if remove_hidden(chunk, self._hidden) else b""

    def read(self, event: bytes) -> dict[str, Any] | None:
        """Read one event for the record; returns the chunk that it is, and None if it is another event."""
        data = data_of(event)
        if data == _DONE:
            self.is_done = True
        if not data or self.is_done:
            return None
        chunk = read_object(data)
        if chunk is None:  # no chunk of this wire: the agent's client has to judge it
            self._is_readable = False
            return None
        if is_error(chunk):
            self.error = read_error_in(chunk, 200)
            self.is_done = True
            return None
        self._add(chunk)
        return chunk

    def end(self) -> bytes:
        """Return nothing: the backend has said all that the agent gets."""
        return b""

    def _add(self, chunk: dict[str, Any]) -> None:
        for name in _HEAD_FIELDS:
            value = chunk.get(name)
            if value is not None:
                self._head[name] = value
        if chunk.get("usage") is not None:
            self._usage = chunk["usage"]
        if self._prompt_token_ids is None:
            self._prompt_token_ids = integers_of(chunk.get("prompt_token_ids"))
        if "sglext" in chunk:
            self._extension |= extension_of(chunk)
        for place, given in enumerate(choices_of(chunk)):
            index = given.get("index")
            index = index if type(index) is int else 0
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = _PartialChoice(keeps_logprobs="logprobs" not in self._hidden)
            choice.add(given)
            if place == 0 and "__verbose" in chunk:
                choice.add_ids("__verbose", object_of(chunk["__verbose"]).get("tokens", []))

    def recorded(self) -> RecordedReply:
        """Return what is recorded of the reply as far as it came."""
        prompt = self._prompt_token_ids
        record = RecordedReply(
            prompt_token_ids=integers_of(self._extension.get("input_ids")) if prompt is None else prompt
        )
        read_head_and_usage(self._head, self._usage, record)
        for place, index in enumerate(sorted(self._choices)):
            choice = self._choices[index].recorded()
            if choice.token_ids is None:
                choice.token_ids = output_ids_of(self._extension, place) or self._choices[index].entry_ids
            record.choices.append(choice)
        if not self._is_readable:
            record.unusable = UnusableReason.UNREADABLE_CHUNK
        elif record.output_tokens is None and any(choice.lacks_ids for choice in self._choices.values()):
            record.unusable = UnusableReason.TOKEN_IDS_INCOMPLETE  # no usage would tell
        complete(record)
        if self._head or record.choices:
            record.body = self._body(record)
        return record

    def _body(self, record: RecordedReply) -> bytes:
        shows_tokens = "token_ids" not in self._hidden
        body: dict[str, Any] = {"id": None, "object": self._reply_object, **self._head}
        body["choices"] = [
            {"index": index, **choice.body(self._content, shows_tokens=shows_tokens)}
            for index, choice in sorted(self._choices.items())
        ]
        if self._usage is not None:  # also if it is hidden from the stream: a whole reply always has it
            body["usage"] = self._usage
        if record.prompt_token_ids is not None and shows_tokens:
            body["prompt_token_ids"] = record.prompt_token_ids
        return write_json(body)


class _PartialChoice:
    """One choice of a streamed reply, as far as it came.

    Args:
        keeps_logprobs: whether the agent gets log-probabilities, so that the body needs their entries as well as
            the numbers.
    """

    def __init__(self, *, keeps_logprobs: bool) -> None:
        self._keeps_logprobs = keeps_logprobs
        self._message = MergedObject()
        self._text = bytearray()
        self._others: dict[str, Any] = {}
        self._logprob_entries = bytearray()
        self._text_logprobs = MergedObject()
        self._logprobs = array("d")
        self._has_logprobs = False
        self._prompt_token_ids: Sequence[int] | None = None
        self._ids: dict[str, array[int] | None] = {}
        """By the field that they came in; None: one piece was unusable, so they do not stand for the whole text."""
        self._has_bare_content = False
        """Whether a piece had content, and said no ids."""
        self.finish_reason: str | None = None

    def add(self, given: dict[str, Any]) -> None:
        if not any(given.get(name) is not None for name in RESPONSE_IDS) and has_content(given):
            self._has_bare_content = True
        for name, value in given.items():
            if value is None or name == "index":
                continue
            if name == "delta":
                if isinstance(value, dict):
                    self._message.add(cast("dict[str, Any]", value))
            elif name == "text" and isinstance(value, str):
                self._text += bytes_of(value)
            elif name == "finish_reason" and isinstance(value, str):
                self.finish_reason = value
            elif name in RESPONSE_IDS:
                self.add_ids(name, value)
            elif name == "prompt_token_ids":
                self._prompt_token_ids = self._prompt_token_ids or integers_of(value)
            elif name == "logprobs":
                self._add_logprobs(value)
            else:
                self._others[name] = value

    def add_ids(self, source: str, value: object) -> None:
        ids = integers_of(value)
        kept = self._ids.setdefault(source, array("q"))
        if ids is None:
            self._ids[source] = None
        elif kept is not None:
            kept.extend(ids)

    def _add_logprobs(self, value: object) -> None:
        numbers = logprobs_of(value)
        self._has_logprobs = True
        # One that is no number makes all of them unusable, because they no longer stand beside their tokens.
        self._logprobs.extend(numbers if numbers is not None else (math.nan,))
        facts = object_of(value)
        content = facts.get("content")
        if content:
            self.add_ids("logprobs", entry_ids_of(facts))
        if not self._keeps_logprobs or not facts:
            return
        if isinstance(content, list):
            for entry in cast("list[Any]", content):
                if self._logprob_entries:
                    self._logprob_entries += b","
                self._logprob_entries += write_json(entry)
        self._text_logprobs.add({name: each for name, each in facts.items() if name != "content"})

    @property
    def kept_bytes(self) -> int:
        numbers = _NUMBER_BYTES * (len(self._logprobs) + sum(len(ids or ()) for ids in self._ids.values()))
        texts = len(self._text) + len(self._logprob_entries)
        return numbers + texts + self._message.kept_bytes + self._text_logprobs.kept_bytes

    @property
    def entry_ids(self) -> Sequence[int] | None:
        """The ids that came beside the log-probabilities, which are used if there are no others."""
        return self._ids.get("__verbose") or self._ids.get("logprobs")

    @property
    def lacks_ids(self) -> bool:
        """Whether some pieces said their ids, and others with content did not."""
        return self._has_bare_content and self.token_ids is not None

    @property
    def token_ids(self) -> Sequence[int] | None:
        """The ids that came in a field of their own."""
        return next((self._ids[name] for name in RESPONSE_IDS if name in self._ids), None)

    def recorded(self) -> RecordedChoice:
        """Return what is recorded of the choice. Log-probabilities are None if one of them was no number."""
        is_whole = self._has_logprobs and not any(map(math.isnan, self._logprobs))
        return RecordedChoice(
            finish_reason=self.finish_reason,
            token_ids=self.token_ids,
            logprobs=self._logprobs if is_whole else None,
            prompt_token_ids=self._prompt_token_ids,
        )

    def body(self, content: Literal["message", "text"], *, shows_tokens: bool) -> dict[str, Any]:
        """Return the choice as a whole reply has it, without its index."""
        body: dict[str, Any] = {content: text_of(self._text)}
        if content == "message":
            body = {content: {"role": "assistant", "content": None, **self._message.whole()}}
        body |= {"logprobs": None, "finish_reason": self.finish_reason, **self._others}
        if self._has_logprobs and self._keeps_logprobs:
            entries = msgspec.Raw(b"[" + bytes(self._logprob_entries) + b"]") if self._logprob_entries else None
            body["logprobs"] = ({} if entries is None else {"content": entries}) | self._text_logprobs.whole()
        if shows_tokens and self.token_ids is not None:
            body["token_ids"] = list(self.token_ids)
        return body

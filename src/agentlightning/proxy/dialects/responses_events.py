"""The events of a streamed reply of ``/v1/responses``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from agentlightning.proxy.dialects.base import ModelRequest
from agentlightning.proxy.dialects.pieces import Piece, PieceReader
from agentlightning.proxy.dialects.responses_output import (
    AskedResponse,
    begin_response,
    call_item,
    end_response,
    item_id_of,
    message_item,
    new_response_id,
    reasoning_item,
)
from agentlightning.proxy.dialects.translated import ToolCall, sse

_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


class ResponseWriter:
    """Writes the events of one reply.

    Args:
        request: what it replies to.
        keep: is given the whole reply at its end.
    """

    def __init__(self, request: ModelRequest, keep: Callable[[dict[str, Any]], None]) -> None:
        self._request = request
        self._table = cast("AskedResponse", request.context).table
        self._keep = keep
        self._pieces = PieceReader()
        self._events: list[bytes] = []
        self._number = 0
        self._begun: dict[str, Any] | None = None
        self._output: list[dict[str, Any]] = []
        self._open: Piece | None = None
        """The first piece of the item that is open."""
        self._texts: list[str] = []
        """What came of that item."""

    def write(self, chunk: dict[str, Any]) -> bytes:
        """Return the events that a chunk means."""
        if self._begun is None:
            self._begin(chunk)
        self._add(self._pieces.read(chunk))
        return self._taken()

    def end(self) -> bytes:
        """Return the events that end the reply."""
        if self._begun is None:
            self._begin({})
        self._add(self._pieces.rest())
        self._close()
        pieces = self._pieces
        response = end_response(cast("dict[str, Any]", self._begun), self._output, pieces.finish_reason, pieces.usage)
        self._keep(response)
        self._event(f"response.{response['status']}", response=response)
        return self._taken()

    def _taken(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append(sse(kind, {"type": kind, "sequence_number": self._number, **fields}))
        self._number += 1

    def _begin(self, chunk: dict[str, Any]) -> None:
        self._begun = begin_response(new_response_id(), self._request, chunk.get("created"))
        self._event("response.created", response=self._begun)
        self._event("response.in_progress", response=self._begun)

    def _add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self._open is None or piece.place != self._open.place:
                self._close()
                self._start(piece)
            if piece.text:
                self._texts.append(piece.text)
                self._delta(piece)

    @property
    def _place(self) -> dict[str, Any]:
        """Where the open item is."""
        return {"item_id": self._item_id(), "output_index": len(self._output)}

    def _item_id(self) -> str:
        assert self._open is not None
        assert self._begun is not None
        return item_id_of(_PREFIXES[self._open.kind], str(self._begun["id"]), len(self._output))

    def _item(self, text: str, status: str) -> dict[str, Any]:
        """Return the open item, with this text."""
        assert self._open is not None
        if self._open.kind == "text":
            return message_item(self._item_id(), text, status)
        if self._open.kind == "reasoning":
            return reasoning_item(self._item_id(), text)
        call = ToolCall(self._open.call_id, self._open.name, text)
        return call_item(self._item_id(), call, self._table, status)

    def _start(self, piece: Piece) -> None:
        self._open, self._texts = piece, []
        item = self._item("", "in_progress")
        if "content" in item:
            item["content"] = []
        self._event("response.output_item.added", output_index=len(self._output), item=item)
        if piece.kind != "call":
            self._event("response.content_part.added", **self._place, content_index=0, part=self._part(""))

    def _part(self, text: str) -> dict[str, Any]:
        return self._item(text, "completed")["content"][0]

    @property
    def _is_custom(self) -> bool:
        return self._open is not None and self._open.kind == "call" and self._table.find(self._open.name).is_custom

    def _delta(self, piece: Piece) -> None:
        if self._is_custom:
            return  # its text is inside of the arguments, which are read when they are whole
        if piece.kind == "text":
            self._event("response.output_text.delta", **self._place, content_index=0, delta=piece.text, logprobs=[])
        elif piece.kind == "reasoning":
            self._event("response.reasoning_text.delta", **self._place, content_index=0, delta=piece.text)
        else:
            self._event("response.function_call_arguments.delta", **self._place, delta=piece.text)

    def _close(self) -> None:
        """End the item that is open."""
        if self._open is None:
            return
        text = "".join(self._texts)
        item = self._item(text, "completed")
        place = self._place
        if self._open.kind == "text":
            self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
        elif self._open.kind == "reasoning":
            self._event("response.reasoning_text.done", **place, content_index=0, text=text)
        elif self._is_custom:
            self._event("response.custom_tool_call_input.delta", **place, delta=item["input"])
            self._event("response.custom_tool_call_input.done", **place, input=item["input"])
        else:
            self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        if self._open.kind != "call":
            self._event("response.content_part.done", **place, content_index=0, part=self._part(text))
        self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._open = None

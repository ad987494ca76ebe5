"""The chunks of a streamed chat completion as pieces of blocks, one block after the other.

A chat stream may mix the pieces of several tool calls. Other wires have one block open at a time, and never come back
to one that has ended. So the pieces of a tool call that is not the open one wait until that one is whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import msgspec

from agentlightning.proxy.dialects.replies import object_of
from agentlightning.proxy.dialects.translated import Usage, first_choice, reasoning_of, text_in, usage_of

BlockKind: TypeAlias = Literal["text", "reasoning", "call"]


class Piece(NamedTuple):
    """A piece of one block."""

    place: int
    """Of its block among all: the first piece with a new place begins a block, and ends the one before."""
    kind: BlockKind
    text: str
    """Of a call: arguments."""
    call_id: str = ""
    name: str = ""


@dataclass
class _Call:
    """A tool call, as far as it came."""

    index: int
    id: str
    name: str
    arguments: list[str] = field(default_factory=list[str])
    told: int = 0
    """So many of the pieces of its arguments are passed on."""
    is_told: bool = False
    """Whether its block has begun."""

    @property
    def is_whole(self) -> bool:
        try:
            msgspec.json.decode("".join(self.arguments))
        except (msgspec.MsgspecError, UnicodeEncodeError):
            return False
        return True


class PieceReader:
    """Reads the chunks of one stream. Only the first choice counts: the wires that need this have no others."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.stop_text: str | None = None
        """The stop text that ended the reply, if the backend says it (vLLM's ``stop_reason``)."""
        self.usage = Usage()
        self.has_calls = False
        self._place = -1
        self._kind: BlockKind | None = None
        self._calls: list[_Call] = []
        self._open: _Call | None = None
        """The call whose block is open."""
        self._waiting: list[_Call] = []
        """Those that come after it, in the order of their index."""
        self._next_index = 0
        self._by_index: dict[int, _Call] = {}
        self._last_index = 0
        self._late: list[tuple[BlockKind, str]] = []
        """Text that came after calls had begun."""

    def read(self, chunk: dict[str, Any]) -> list[Piece]:
        """Return the pieces that a chunk brings, or sets free."""
        if chunk.get("usage") is not None:
            self.usage = usage_of(chunk)
        choice = first_choice(chunk)
        reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
        self.finish_reason = reason if isinstance(reason, str) else self.finish_reason
        self.stop_text = stop if isinstance(stop, str) else self.stop_text
        delta = object_of(choice.get("delta"))
        pieces: list[Piece] = []
        kinds: tuple[tuple[BlockKind, str], ...] = (("reasoning", reasoning_of(delta)), ("text", text_in(delta)))
        for kind, text in kinds:
            if text and self._calls:
                self._late.append((kind, text))
            elif text:
                pieces.append(self._piece(kind, text))
        calls = delta.get("tool_calls")
        for given in cast("list[Any]", calls) if isinstance(calls, list) else ():
            pieces += self._add_call(object_of(given))
        return pieces

    def rest(self) -> list[Piece]:
        """Return the pieces that wait, at the end of the stream."""
        pieces = self._tell(is_last=True)
        for kind, text in self._late:
            pieces.append(self._piece(kind, text))
        self._late = []
        return pieces

    def _piece(self, kind: BlockKind, text: str) -> Piece:
        if kind != self._kind:
            self._kind, self._place = kind, self._place + 1
        return Piece(self._place, kind, text)

    def _add_call(self, given: dict[str, Any]) -> list[Piece]:
        self.has_calls = True
        function = object_of(given.get("function"))
        call = self._call_of(given, str(function.get("name") or ""))
        if arguments := function.get("arguments"):
            call.arguments.append(str(arguments))
        return self._tell()

    def _call_of(self, given: dict[str, Any], name: str) -> _Call:
        """Return the call that a piece belongs to: one index may stand for several calls with ids of their own."""
        index = given.get("index")
        self._last_index = index if type(index) is int else self._last_index
        call_id = str(given.get("id") or "")
        known = self._by_index.get(self._last_index)
        if known is None or (name and call_id and known.id != call_id):
            known = next((call for call in self._calls if call_id and call.id == call_id), None)
            if known is None:
                known = _Call(self._last_index, call_id or f"call_{len(self._calls)}", name)
                self._calls.append(known)
                self._waiting.append(known)
                self._waiting.sort(key=lambda call: call.index)
            self._by_index[self._last_index] = known
        return known

    def _tell(self, *, is_last: bool = False) -> list[Piece]:
        """Return the pieces that can be passed on: those of the open call, and of the next ones if it is whole."""
        pieces: list[Piece] = []
        while self._open is not None or self._waiting:
            if self._open is None:
                if self._waiting[0].index > self._next_index and not is_last:
                    break  # one that comes before it is still to come
                self._open = self._waiting.pop(0)
                self._kind, self._place = "call", self._place + 1
            call = self._open
            text = "".join(call.arguments[call.told :])
            if text or not call.is_told:
                pieces.append(Piece(self._place, "call", text, call.id, call.name))
            call.told, call.is_told = len(call.arguments), True
            self._next_index = call.index + 1
            if not is_last and not (self._waiting and self._waiting[0].index <= self._next_index and call.is_whole):
                break
            self._open = None
        return pieces

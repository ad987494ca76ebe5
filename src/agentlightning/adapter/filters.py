"""Which calls of an agent are to be learned from: programs also make side calls, for titles, summaries and such."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from agentlightning.adapter.calls import ModelCall

Predicate: TypeAlias = Callable[[ModelCall], bool]
"""Whether a call is to be used."""

Filter: TypeAlias = Predicate | Literal["main"] | None
"""``main``: all calls but those on the side, see ``side_calls``; None: all calls."""

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class CallFilter:
    """Takes the calls for which all that is given holds.

    Args:
        models: the models that the agent may have asked for, by name; None: any.
        has_tools: whether the model could call tools; None: either.
        agent: regular expression that is searched for in the agents around the call, joined by "/", the outermost
            first, such as ``planner/coder``; None: any.
        system: regular expression that is searched for in the first message, if it is a system message; None: any.
            A call without one is not taken.
    """

    models: Collection[str] | None = None
    has_tools: bool | None = None
    agent: str | None = None
    system: str | None = None

    def __call__(self, call: ModelCall) -> bool:
        """Whether the call is to be used."""
        if self.models is not None and call.model not in self.models:
            return False
        if self.has_tools is not None and call.has_tools != self.has_tools:
            return False
        if self.agent is not None and re.search(self.agent, "/".join(call.agent_path)) is None:
            return False
        return self.system is None or re.search(self.system, _system_text(call)) is not None


def side_calls(calls: Sequence[ModelCall]) -> set[str]:
    """The ids of the spans of calls on the side, as programs make them for a title or a summary.

    Where a model works with tools, a call without tools is on the side, unless it is part of a conversation that has
    some: its messages begin with all messages of a call with tools, as those of a last answer do, or the other way
    round, as those of a first plan do.

    Args:
        calls: those of one attempt.
    """
    working = [call for call in calls if call.has_tools]
    if not working or len(working) == len(calls):
        return set()
    conversations = [call.prefix_keys for call in working if call.conversation.messages]
    whole = {keys[-1] for keys in conversations}
    begun = {key for keys in conversations for key in keys}
    return {
        call.span.span_id
        for call in calls
        if not call.has_tools
        and call.conversation.messages
        and call.prefix_keys[-1] not in begun
        and whole.isdisjoint(call.prefix_keys)
    }


def _system_text(call: ModelCall) -> str:
    texts = [message.get("content") for message in call.conversation.messages[:1] if message.get("role") in _SYSTEM]
    return "".join(map(str, texts))

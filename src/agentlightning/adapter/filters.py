"""Which calls of an agent are to be learned from: programs also make side calls, for titles, summaries and such."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from agentlightning.adapter.calls import ModelCall

Predicate: TypeAlias = Callable[[ModelCall], bool]
"""Whether a call is to be used."""

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


def _system_text(call: ModelCall) -> str:
    texts = [message.get("content") for message in call.conversation.messages[:1] if message.get("role") in _SYSTEM]
    return "".join(map(str, texts))

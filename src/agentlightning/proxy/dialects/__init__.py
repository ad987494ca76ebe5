"""The wires that the proxy speaks with agents, one object each.

A further wire is one more class that implements ``WireDialect``, and one more entry in ``DIALECTS``. Each proxy has its
own objects.
"""

from agentlightning.proxy.dialects.base import WireDialect
from agentlightning.proxy.dialects.generate_content import GenerateContent
from agentlightning.proxy.dialects.messages import Messages
from agentlightning.proxy.dialects.openai import ChatCompletions, Completions
from agentlightning.proxy.dialects.responses import Responses

DIALECTS: tuple[type[WireDialect], ...] = (ChatCompletions, Completions, Responses, Messages, GenerateContent)
"""Every wire that the proxy serves, in the order in which error messages list them."""

DEFAULT_DIALECT = ChatCompletions()
"""Answers what belongs to no wire in particular: unknown URLs, the model list, the control routes."""

__all__ = [
    "DEFAULT_DIALECT",
    "DIALECTS",
    "ChatCompletions",
    "Completions",
    "GenerateContent",
    "Messages",
    "Responses",
    "WireDialect",
]

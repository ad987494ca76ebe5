"""Adapters: spans in, training data out."""

from agentlightning.adapter.base import Adapter, OtelTraceAdapter, TraceAdapter
from agentlightning.adapter.messages import OpenAIMessages, TraceToMessages
from agentlightning.adapter.tree import RewardMatchPolicy, TraceTree
from agentlightning.adapter.triplet import LlmProxyTraceToTriplet, TracerTraceToTriplet, TraceToTripletBase
from agentlightning.adapter.usable import Adapted, UnusableSpan

__all__ = [
    "Adapted",
    "Adapter",
    "LlmProxyTraceToTriplet",
    "OpenAIMessages",
    "OtelTraceAdapter",
    "RewardMatchPolicy",
    "TraceAdapter",
    "TraceToMessages",
    "TraceToTripletBase",
    "TraceTree",
    "TracerTraceToTriplet",
    "UnusableSpan",
]

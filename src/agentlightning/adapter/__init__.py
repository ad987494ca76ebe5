"""Adapters: spans in, training data out."""

from agentlightning.adapter.base import Adapted, Adapter, OtelTraceAdapter, TraceAdapter, UnusableSpan
from agentlightning.adapter.messages import OpenAIMessages, TraceToMessages
from agentlightning.adapter.tree import RewardMatchPolicy, TraceTree
from agentlightning.adapter.triplet import LlmProxyTraceToTriplet, TracerTraceToTriplet, TraceToTripletBase

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

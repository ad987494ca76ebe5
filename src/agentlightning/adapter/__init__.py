"""Adapters: spans in, training data out."""

from agentlightning.adapter.adapters import (
    Adapted,
    Adapter,
    LlmProxyTraceToTriplet,
    OpenAIMessages,
    OtelTraceAdapter,
    TraceAdapter,
    TracerTraceToTriplet,
    TraceToMessages,
    TraceToTripletBase,
    UnusableSpan,
)
from agentlightning.adapter.tree import RewardMatchPolicy, TraceTree

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

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
from agentlightning.adapter.calls import ModelCall
from agentlightning.adapter.filters import CallFilter
from agentlightning.adapter.tree import RewardMatchPolicy, TraceTree

__all__ = [
    "Adapted",
    "Adapter",
    "CallFilter",
    "LlmProxyTraceToTriplet",
    "ModelCall",
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

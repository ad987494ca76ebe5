"""The process's one OpenTelemetry provider, and our processor on it.

Libraries that are instrumented with OpenTelemetry ask for the global provider. If there is one already, because the
user or a library has set it up, our processor is added to it, and its other exporters go on as before. Otherwise
one is made, without the SDK's limits on attributes and events, which would drop some silently.
"""

from __future__ import annotations

import logging
import threading
from typing import TypeVar
from weakref import WeakKeyDictionary

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from agentlightning.tracer.processor import LightningSpanProcessor

__all__ = ["attach_processor", "get_span_processors", "get_tracer_provider"]

_P = TypeVar("_P", bound=SpanProcessor)
_UNLIMITED = SpanLimits(
    max_attributes=SpanLimits.UNSET,
    max_span_attributes=SpanLimits.UNSET,
    max_event_attributes=SpanLimits.UNSET,
    max_link_attributes=SpanLimits.UNSET,
    max_attribute_length=SpanLimits.UNSET,
    max_span_attribute_length=SpanLimits.UNSET,
    max_events=SpanLimits.UNSET,
    max_links=SpanLimits.UNSET,
)
_attached: WeakKeyDictionary[TracerProvider, LightningSpanProcessor] = WeakKeyDictionary()
_lock = threading.Lock()
_logger = logging.getLogger(__name__)


def get_tracer_provider() -> TracerProvider:
    """The global provider; made if there is none.

    If the global one is not of the OpenTelemetry SDK, no processor can be added to it: then a private one is made,
    which sees what agentlightning emits but not what libraries do, and a warning says so.
    """
    known = trace.get_tracer_provider()
    if isinstance(known, TracerProvider):
        return known
    made = TracerProvider(
        sampler=ALWAYS_ON,
        resource=Resource.create({"service.name": "agentlightning"}),
        span_limits=_UNLIMITED,
        shutdown_on_exit=False,
    )
    if isinstance(known, trace.ProxyTracerProvider):
        trace.set_tracer_provider(made)
        now = trace.get_tracer_provider()  # somebody else may have been first
        return now if isinstance(now, TracerProvider) else made
    _logger.warning(
        "the global OpenTelemetry provider is a %s, which takes no span processor: spans of instrumented libraries "
        "are not recorded, only those of agentlightning's emitters",
        type(known).__name__,
    )
    return made


def attach_processor(provider: TracerProvider) -> LightningSpanProcessor:
    """Our processor on this provider; added if it has none. It stays there: OpenTelemetry cannot take one off."""
    with _lock:
        processor = _attached.get(provider)
        if processor is None:
            processor = _attached[provider] = LightningSpanProcessor()
            provider.add_span_processor(processor)
        return processor


def get_span_processors(tracer_provider: TracerProvider, expected_type: type[_P]) -> list[_P]:
    """The processors of this class that ``attach_processor`` put on the provider."""
    with _lock:
        processor = _attached.get(tracer_provider)
    return [processor] if isinstance(processor, expected_type) else []

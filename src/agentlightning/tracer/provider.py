"""The OpenTelemetry provider of the process, and a tracer on it that the host program's settings do not silence.

The spans of instrumented libraries follow the program's provider: its sampler, its limits, ``OTEL_SDK_DISABLED``. Our
own spans carry rewards. They are recorded whatever these say, and their ids never repeat, also where the program
seeds Python's ``random``, from which the SDK draws its ids.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Sequence
from typing import Any, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.environment_variables import OTEL_SDK_DISABLED
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, Tracer as SdkTracer, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

OWN_SCOPE = "agentlightning"
"""The instrumentation scope of the spans that emitters make."""
_UNLIMITED = SpanLimits(*[SpanLimits.UNSET] * 8)
_COMPLETE = ("AlwaysOnSampler", "ParentBased{root:AlwaysOnSampler")
"""How the descriptions of samplers begin that keep every span of a rollout."""
_logger = logging.getLogger(__name__)
_random = random.Random()  # seeded by the system
os.register_at_fork(after_in_child=_random.seed)


class UnseededIds(IdGenerator):
    """Ids from a generator of their own, which ``random.seed`` does not reach; another one in every forked child."""

    def generate_span_id(self) -> int:
        """64 random bits, not all of them 0."""
        return _random.getrandbits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        """128 random bits, not all of them 0."""
        return _random.getrandbits(128) or self.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        """The ids are random in the sense of W3C's Trace Context, level 2."""
        return True


_ids = UnseededIds()


def get_tracer_provider() -> TracerProvider:
    """The global OpenTelemetry provider; made if there is none.

    A provider of another class is used if it takes span processors, as Logfire's does. If it does not, a private
    provider is made, which records the spans of our emitters but not those of libraries, and a warning says so.
    """
    known = trace.get_tracer_provider()
    if callable(getattr(known, "add_span_processor", None)):
        return cast("TracerProvider", known)
    made = _private_provider()
    if isinstance(known, trace.ProxyTracerProvider):
        trace.set_tracer_provider(made)
        current = trace.get_tracer_provider()  # another thread may have set one first
        return current if isinstance(current, TracerProvider) else made
    _logger.warning(
        "the global OpenTelemetry provider is a %s, which takes no span processor: spans of instrumented libraries "
        "are not recorded, only those of agentlightning's emitters",
        type(known).__name__,
    )
    return made


def own_tracer(provider: TracerProvider, processor: SpanProcessor) -> trace.Tracer:
    """A tracer of the provider that records every span, whole; one of a private provider where that has none.

    The provider's exporters get its spans as they get others: as the provider's sampler decides.

    Args:
        provider: the provider of the process. Its default id generator is replaced by ``UnseededIds``, also for
            tracers that exist; one of the program's own class is left as it is.
        processor: ours, which the provider has.
    """
    ids = getattr(provider, "id_generator", None)
    if type(ids) is RandomIdGenerator:
        vars(ids).update(generate_span_id=_ids.generate_span_id, generate_trace_id=_ids.generate_trace_id)
    tracer = provider.get_tracer(OWN_SCOPE)
    if isinstance(tracer, SdkTracer) and getattr(tracer, "_is_enabled", lambda: True)():
        _warn_of_sampler(tracer.sampler)
        own = copy.copy(tracer)
        own.sampler, own.id_generator = _RecordsAll(tracer.sampler), _ids
        vars(own)["_span_limits"] = _UNLIMITED
        return own
    if os.environ.get(OTEL_SDK_DISABLED, "").strip().lower() == "true":
        _logger.warning("OTEL_SDK_DISABLED is set: of a rollout, only rewards and other emitted spans are recorded")
    private = _private_provider()
    vars(private)["_disabled"] = False  # the SDK reads OTEL_SDK_DISABLED for every provider
    private.add_span_processor(processor)
    return private.get_tracer(OWN_SCOPE)


def _private_provider() -> TracerProvider:
    return TracerProvider(
        sampler=ALWAYS_ON,
        resource=Resource.create({"service.name": OWN_SCOPE}),
        span_limits=_UNLIMITED,
        id_generator=_ids,
        shutdown_on_exit=False,
    )


def _warn_of_sampler(sampler: Sampler) -> None:
    description = sampler.get_description()
    if not description.startswith(_COMPLETE):
        _logger.warning(
            "this program samples its OpenTelemetry spans (%s): spans of instrumented libraries are recorded only "
            "where the sampler keeps them; rewards and other emitted spans always are",
            description[:200],
        )


class _RecordsAll(Sampler):
    """Records also the spans that another sampler drops, without the flag that lets exporters take them."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """See ``Sampler``."""
        given: dict[str, Any] = {"kind": kind, "attributes": attributes, "links": links, "trace_state": trace_state}
        result = self._inner.should_sample(parent_context, trace_id, name, **given)
        if result.decision is Decision.DROP:
            return SamplingResult(Decision.RECORD_ONLY, attributes, result.trace_state)
        return result

    def get_description(self) -> str:
        """See ``Sampler``."""
        return f"RecordsAll{{{self._inner.get_description()}}}"

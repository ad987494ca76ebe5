"""A small agent whose model calls one real instrumentation records; run as a program, because they patch `openai`.

Usage: instrumented_calls.py INSTRUMENTATION prints what ``recorded_spans`` reads: the versions, and the spans as JSON.

The agent asks for the weather: the model calls a tool, then answers; then the agent asks once more with streaming.
What an instrumentation wants to be told, so that it records messages, is told to it here, as its manual says.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentlightning.types import Span
from openai_backend import OpenAIBackend
from recorded_spans import AGAIN, QUESTION, RESULT, SYSTEM, TOOL


def talk(url: str) -> None:
    """The agent, with the OpenAI SDK."""
    openai: Any = import_module("openai")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    tools: Any = [TOOL]
    asked = client.chat.completions.create(model="policy", messages=messages, tools=tools)
    message = asked.choices[0].message
    calls = message.tool_calls or []
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": calls[0].id, "content": RESULT},
    ]
    client.chat.completions.create(model="policy", messages=messages, tools=tools)
    again: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": AGAIN}]
    options: Any = {"include_usage": True}
    with client.chat.completions.create(model="policy", messages=again, stream=True, stream_options=options) as stream:
        for _ in stream:
            pass


def talk_by_pydantic_ai(url: str) -> None:
    """The same agent, with pydantic-ai."""
    agents: Any = import_module("pydantic_ai")
    provider = import_module("pydantic_ai.providers.openai").OpenAIProvider(base_url=url, api_key="none")
    model = import_module("pydantic_ai.models.openai").OpenAIChatModel("policy", provider=provider)
    agent = agents.Agent(model, system_prompt=SYSTEM, name="forecaster")
    talker = agents.Agent(model, system_prompt=SYSTEM, name="talker")

    def weather(city: str) -> str:
        """Tells the weather."""
        return RESULT

    agent.tool_plain(weather)

    async def stream() -> None:
        async with talker.run_stream(AGAIN) as result:
            async for _ in result.stream_text():
                pass

    agent.run_sync(QUESTION)
    asyncio.run(stream())


def instrument(name: str, exporter: InMemorySpanExporter) -> None:
    """Let an instrumentation export to ``exporter``."""
    processor = SimpleSpanProcessor(exporter)
    if name == "logfire":
        logfire = import_module("logfire")
        logfire.configure(send_to_logfire=False, console=False, additional_span_processors=[processor])
        logfire.instrument_openai()
        return
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    module = import_module(INSTRUMENTATIONS[name][0])
    if name == "pydantic-ai":
        import_module("pydantic_ai").Agent.instrument_all(module.InstrumentationSettings(tracer_provider=provider))
    else:
        module.OpenAIInstrumentor().instrument(tracer_provider=provider)


INSTRUMENTATIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "logfire": ("logfire", ("logfire", "openai")),
    "openai-v2": (
        "opentelemetry.instrumentation.openai_v2",
        ("opentelemetry-instrumentation-openai-v2", "opentelemetry-util-genai", "openai"),
    ),
    "openinference": (
        "openinference.instrumentation.openai",
        ("openinference-instrumentation-openai", "openai"),
    ),
    "pydantic-ai": ("pydantic_ai.models.instrumented", ("pydantic-ai-slim", "openai")),
    "traceloop": ("opentelemetry.instrumentation.openai", ("opentelemetry-instrumentation-openai", "openai")),
}
"""The module of each, and the packages whose versions matter."""


def run(name: str) -> dict[str, Any]:
    """The versions, and the spans of one run of the agent, in the order of their ends, as exporters get them."""
    exporter = InMemorySpanExporter()
    instrument(name, exporter)
    with OpenAIBackend() as backend:
        (talk_by_pydantic_ai if name == "pydantic-ai" else talk)(backend.url)
    spans = [Span.from_opentelemetry(span, "", "", 0) for span in exporter.get_finished_spans()]
    return {
        "versions": {package: version(package) for package in INSTRUMENTATIONS[name][1]},
        "spans": [span.model_dump(mode="json", include=KEPT) for span in spans],
    }


KEPT = {"name", "trace_id", "span_id", "parent_id", "status", "attributes", "events", "start_time", "end_time"}

if __name__ == "__main__":
    os.environ |= {
        "OTEL_SEMCONV_STABILITY_OPT_IN": "gen_ai_latest_experimental",
        "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY",
    }
    print(json.dumps(run(sys.argv[1]), indent=1))

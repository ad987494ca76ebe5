"""Small agents whose model calls one real instrumentation records; run as a program, because they patch `openai`.

Usage: instrumented_calls.py INSTRUMENTATION [SCENE] prints what ``recorded_spans`` reads: versions, and spans as JSON.

Scenes: ``talk`` asks for the weather: the model calls a tool, then answers; then it is asked once more with streaming.
``choices`` asks for two choices, whole and streamed. ``items`` asks OpenAI's Responses API: its reply is several items.
What an instrumentation wants to be told, so that it records messages, is told to it here, as its manual says.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentlightning.types import Span
from openai_backend import OpenAIBackend, Say, Write
from recorded_spans import AGAIN, QUESTION, RESULT, SYSTEM, TOOL, choices_body, choices_chunks, items_body

ASKED: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
AGAIN_ASKED: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": AGAIN}]


# --- What agents do --------------------------------------------------------------------------------


def talk(client: Any) -> None:
    """A call of a tool, an answer, and a streamed answer, with the OpenAI SDK."""
    tools: Any = [TOOL]
    message = client.chat.completions.create(model="policy", messages=ASKED, tools=tools).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": RESULT}
    messages = [*ASKED, message.model_dump(exclude_none=True), result]
    client.chat.completions.create(model="policy", messages=messages, tools=tools)
    options = {"include_usage": True}
    _drain(client.chat.completions.create(model="policy", messages=AGAIN_ASKED, stream=True, stream_options=options))


def choices(client: Any) -> None:
    """Two choices, whole and streamed."""
    client.chat.completions.create(model="policy", messages=AGAIN_ASKED, n=2)
    _drain(client.chat.completions.create(model="policy", messages=AGAIN_ASKED, n=2, stream=True))


def items(client: Any) -> None:
    """The Responses API."""
    tool = {"type": "function", **TOOL["function"]}
    client.responses.create(model="policy", instructions=SYSTEM, input=QUESTION, tools=[tool])


def _drain(stream: Any) -> None:
    with stream:
        for _ in stream:
            pass


SCENES: Mapping[str, Callable[[Any], None]] = {"talk": talk, "choices": choices, "items": items}


def by_openai(url: str, scene: str, client: Any = None) -> None:
    """A scene with the OpenAI SDK, or what takes its place."""
    make = import_module("openai").OpenAI if client is None else client
    SCENES[scene](make(base_url=url, api_key="none", max_retries=0))


def by_langfuse(url: str, scene: str) -> None:
    """The same, with Langfuse's client."""
    by_openai(url, scene, import_module("langfuse.openai").OpenAI)


def by_langsmith(url: str, scene: str) -> None:
    """The same, with LangSmith's wrapper. It writes spans from a thread of its own, after the calls."""
    wrap, make = import_module("langsmith.wrappers").wrap_openai, import_module("openai").OpenAI
    by_openai(url, scene, lambda **options: wrap(make(**options)))
    import_module("langsmith.run_trees").get_cached_client().flush()


def by_langchain(url: str, scene: str) -> None:
    """The same with LangChain, whose runs LangSmith writes."""
    messages: Any = import_module("langchain_core.messages")
    several = {"n": 2} if scene == "choices" else {}
    model = import_module("langchain_openai").ChatOpenAI(model="policy", base_url=url, api_key="none", **several)
    asked = [messages.SystemMessage(SYSTEM), messages.HumanMessage(QUESTION)]
    again = [messages.SystemMessage(SYSTEM), messages.HumanMessage(AGAIN)]
    if scene == "choices":
        model.generate([again])
    else:
        with_tools = model.bind_tools([TOOL])
        said = with_tools.invoke(asked)
        with_tools.invoke([*asked, said, messages.ToolMessage(RESULT, tool_call_id=said.tool_calls[0]["id"])])
    for _ in model.stream(again):
        pass
    import_module("langchain_core.tracers.langchain").wait_for_all_tracers()
    import_module("langsmith.run_trees").get_cached_client().flush()


def by_pydantic_ai(url: str, scene: str) -> None:
    """The same with pydantic-ai, which knows no choices."""
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


def by_strands(url: str, scene: str) -> None:
    """The same with Strands, which streams always, and knows no choices."""
    strands: Any = import_module("strands")
    make = import_module("strands.models.openai").OpenAIModel
    model = make(client_args={"base_url": url, "api_key": "none"}, model_id="policy")

    def weather(city: str) -> str:
        """Tells the weather."""
        return RESULT

    options = {"model": model, "system_prompt": SYSTEM, "callback_handler": None}
    strands.Agent(tools=[strands.tool(weather)], name="forecaster", **options)(QUESTION)
    strands.Agent(name="talker", **options)(AGAIN)


# --- How they are recorded -------------------------------------------------------------------------


def _of_openai(module: str) -> Callable[[TracerProvider, str], None]:
    def start(provider: TracerProvider, url: str) -> None:
        import_module(module).OpenAIInstrumentor().instrument(tracer_provider=provider)

    return start


def _pydantic_ai(provider: TracerProvider, url: str) -> None:
    settings = import_module("pydantic_ai.models.instrumented").InstrumentationSettings(tracer_provider=provider)
    import_module("pydantic_ai").Agent.instrument_all(settings)


def _langfuse(provider: TracerProvider, url: str) -> None:
    exporter = InMemorySpanExporter()  # instead of its server
    options = {"public_key": "pk", "secret_key": "sk", "base_url": url, "span_exporter": exporter}
    import_module("langfuse").Langfuse(tracer_provider=provider, **options)


def _mlflow(provider: TracerProvider, url: str) -> None:
    # It makes spans only if it can also send them somewhere: here, where nobody takes them.
    os.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = f"{url}/traces"
    import_module("mlflow.openai").autolog()


def _nothing(provider: TracerProvider, url: str) -> None:
    """It uses the provider of the process."""


class Instrumentation(NamedTuple):
    """One library."""

    packages: tuple[str, ...]
    """Whose versions matter."""
    start: Callable[[TracerProvider, str], None]
    scenes: tuple[str, ...] = ("talk", "choices")
    agent: Callable[[str, str], None] = by_openai
    settings: Mapping[str, str] = {}
    """Of the environment."""


_TRACELOOP = "opentelemetry-instrumentation-openai"
_LANGSMITH = {"LANGSMITH_TRACING": "true", "LANGSMITH_TRACING_MODE": "otel", "LANGSMITH_API_KEY": "none"}
_MLFLOW = {"MLFLOW_USE_DEFAULT_TRACER_PROVIDER": "false", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
_ALL = ("talk", "choices", "items")
INSTRUMENTATIONS: Mapping[str, Instrumentation] = {
    "langchain": Instrumentation(("langsmith", "langchain-openai"), _nothing, agent=by_langchain, settings=_LANGSMITH),
    "langfuse": Instrumentation(("langfuse", "openai"), _langfuse, _ALL, by_langfuse),
    "langsmith": Instrumentation(("langsmith", "openai"), _nothing, _ALL, by_langsmith, _LANGSMITH),
    "logfire": Instrumentation(("logfire", "openai"), _nothing, _ALL),
    "mlflow": Instrumentation(
        ("mlflow-tracing", "openai"),
        _mlflow,
        _ALL,
        settings=_MLFLOW,
    ),
    "openai-v2": Instrumentation(
        ("opentelemetry-instrumentation-openai-v2", "opentelemetry-util-genai", "openai"),
        _of_openai("opentelemetry.instrumentation.openai_v2"),
        settings={
            "OTEL_SEMCONV_STABILITY_OPT_IN": "gen_ai_latest_experimental",
            "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_ONLY",
        },
    ),
    "openinference": Instrumentation(
        ("openinference-instrumentation-openai", "openai"), _of_openai("openinference.instrumentation.openai"), _ALL
    ),
    "pydantic-ai": Instrumentation(("pydantic-ai-slim", "openai"), _pydantic_ai, ("talk",), by_pydantic_ai),
    "strands": Instrumentation(("strands-agents", "openai"), _nothing, ("talk",), by_strands),
    "strands-latest": Instrumentation(
        ("strands-agents", "openai"),
        _nothing,
        ("talk",),
        by_strands,
        {"OTEL_SEMCONV_STABILITY_OPT_IN": "gen_ai_latest_experimental,gen_ai_tool_definitions"},
    ),
    "traceloop": Instrumentation((_TRACELOOP, "openai"), _of_openai("opentelemetry.instrumentation.openai"), _ALL),
}


def run(name: str, scene: str) -> dict[str, Any]:
    """The versions, and the spans of one scene, in the order of their ends."""
    library = INSTRUMENTATIONS[name]
    os.environ.update(library.settings)
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    provider = TracerProvider(shutdown_on_exit=False)
    if name == "logfire":
        logfire = import_module("logfire")
        logfire.configure(send_to_logfire=False, console=False, additional_span_processors=[processor])
        logfire.instrument_openai()
    else:
        provider.add_span_processor(processor)
        trace.set_tracer_provider(provider)
    with OpenAIBackend() as backend:
        library.start(provider, backend.url)
        if scene == "choices":
            backend.plan(Write(json.dumps(choices_body()).encode()), Say(choices_chunks()))
        elif scene == "items":
            backend.plan(Write(json.dumps(items_body()).encode()))
        library.agent(backend.url, scene)
    spans = [Span.from_opentelemetry(span, "", "", 0) for span in exporter.get_finished_spans()]
    spans.sort(key=lambda span: (span.end_time or 0, span.start_time or 0))
    return {
        "versions": {package: version(package) for package in library.packages},
        "spans": [span.model_dump(mode="json", include=KEPT) for span in spans],
    }


KEPT = {"name", "trace_id", "span_id", "parent_id", "status", "attributes", "events", "start_time", "end_time"}

if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], (sys.argv[2:] or ["talk"])[0]), indent=1), flush=True)
    os._exit(0)  # some libraries go on trying to reach their server

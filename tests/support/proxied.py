"""A proxy that runs, with the backend behind it, an attempt before it, and a store that takes its spans."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, OpenAI

from agentlightning import LLM, InMemoryLightningStore, LLMProxy, Span
from agentlightning.store.base import LightningStore
from agentlightning.store.engine import EngineStore
from openai_backend import OpenAIBackend

__all__ = ["MESSAGES", "Proxied", "attribute", "body_of", "proxied"]

MESSAGES: Any = [{"role": "user", "content": "Say words."}]


@dataclass
class Proxied:
    """What a test works with."""

    proxy: LLMProxy
    store: LightningStore
    llm: LLM
    """The attempt's."""
    rollout_id: str

    async def spans(self) -> list[Span]:
        """The spans of the rollout that the store has now."""
        return list(await self.store.query_spans(self.rollout_id))

    async def only_span(self) -> Span:
        """The one span that there is."""
        (span,) = await self.spans()
        return span

    def client(self, **options: Any) -> AsyncOpenAI:
        """OpenAI's client as an agent of the attempt has it. It does not repeat calls, unless told."""
        return AsyncOpenAI(base_url=self.llm.endpoint, api_key=self.llm.api_key, **{"max_retries": 0, **options})

    def sync_client(self, **options: Any) -> OpenAI:
        """The same, blocking."""
        return OpenAI(base_url=self.llm.endpoint, api_key=self.llm.api_key, **{"max_retries": 0, **options})


@asynccontextmanager
async def proxied(
    *backends: OpenAIBackend, entries: list[Any] | None = None, into: EngineStore | None = None, **options: Any
) -> AsyncIterator[Proxied]:
    """Start the backends, and a proxy for them with these options; all are gone after.

    Args:
        entries: the model list; default: all backends as ``policy``.
        into: the store; default: one in memory.
    """
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(backend)
        async with into or InMemoryLightningStore() as store:
            rollout = await store.start_rollout({"question": "any"})
            model_list = [backend.entry() for backend in backends] if entries is None else entries
            proxy = LLMProxy(model_list=model_list, store=store, **options)
            await proxy.start()
            try:
                llm = proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id, model="policy")
                yield Proxied(proxy, store, llm, rollout.rollout_id)
            finally:
                await proxy.stop()


def attribute(span: Span, name: Any) -> Any:
    """An attribute by its name in ``semconv``; None if the span has none."""
    return span.attributes.get(name.value)


def body_of(span: Span, name: Any) -> Any:
    """A recorded body, read."""
    return json.loads(span.attributes[name.value])  # pyright: ignore[reportArgumentType]

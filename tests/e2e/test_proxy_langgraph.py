"""A LangGraph agent whose nodes call a model through the proxy: no change in its code, every call on record."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from openai import OpenAI

from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from openai_backend import OpenAIBackend, Seen
from proxied import Proxied, attribute, body_of, proxied


class State(TypedDict):
    """What the nodes pass on."""

    question: str
    notes: Annotated[list[Any], add_messages]
    answer: str


def graph_of(llm: OpenAI) -> Any:
    """A small graph: a draft, a review that sends it back once, and an answer."""

    def ask(prompt: str, *, stream: bool) -> str:
        messages: Any = [{"role": "user", "content": prompt}]
        if not stream:
            reply = llm.chat.completions.create(model="policy", messages=messages)
            return reply.choices[0].message.content or ""
        chunks = llm.chat.completions.create(model="policy", messages=messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def draft(state: State) -> dict[str, Any]:
        number = len(state["notes"]) + 1
        return {"notes": [("assistant", ask(f"Draft {number}: {state['question']}", stream=True))]}

    def review(state: State) -> str:
        return "draft" if len(state["notes"]) < 2 else "final"

    def final(state: State) -> dict[str, Any]:
        return {"answer": ask(f"Answer from: {state['notes'][-1].content}", stream=False)}

    graph = StateGraph(State)
    graph.add_node("draft", draft)
    graph.add_node("final", final)
    graph.add_edge(START, "draft")
    graph.add_conditional_edges("draft", review)
    graph.add_edge("final", END)
    return graph.compile()


def echo(seen: Seen) -> str:
    """Say what was asked."""
    return f"<{seen.body['messages'][-1]['content']}>"


async def run_graph(scene: Proxied) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        with scene.sync_client() as llm:
            return graph_of(llm).invoke({"question": "why?", "notes": [], "answer": ""})

    return await asyncio.to_thread(run)


async def test_every_model_call_of_a_graph_is_recorded_in_order() -> None:
    async with proxied(OpenAIBackend(says=echo)) as scene:
        result = await run_graph(scene)
        assert result["answer"] == "<Answer from: <Draft 2: why?>>"
        spans = await scene.spans()
        assert [body_of(span, Call.REQUEST)["messages"][0]["content"] for span in spans] == [
            "Draft 1: why?",
            "Draft 2: why?",
            "Answer from: <Draft 2: why?>",
        ]
        assert [body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"] for span in spans] == [
            "<Draft 1: why?>",
            "<Draft 2: why?>",
            "<Answer from: <Draft 2: why?>>",
        ]
        assert [attribute(span, Call.STREAMED) for span in spans] == [True, True, False]
        assert all(attribute(span, Call.RESPONSE_TOKEN_IDS) for span in spans)
        assert all(attribute(span, GenAI.USAGE_OUTPUT_TOKENS) == 1 for span in spans)


async def test_graphs_that_run_at_once_are_recorded_apart() -> None:
    async with proxied(OpenAIBackend(says=echo)) as scene:
        scenes = []
        for _ in range(4):
            rollout = await scene.store.start_rollout({})
            llm = scene.proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id)
            scenes.append(Proxied(scene.proxy, scene.store, llm, rollout.rollout_id))
        await asyncio.gather(*(run_graph(each) for each in scenes))
        for each in scenes:
            spans = await each.spans()
            assert [span.sequence_id for span in spans] == [1, 2, 3]
            assert attribute(spans[-1], GenAI.RESPONSE_FINISH_REASONS) == ["stop"]

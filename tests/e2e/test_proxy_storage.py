"""What a long attempt takes in the store, and what a large call leaves there: everything once, numbers never cut."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from agentlightning import LlmProxyTraceToTriplet, Span
from agentlightning.proxy import prefixes
from agentlightning.proxy.dialects import ChatCompletions
from agentlightning.proxy.recording import CallOrigin, CallRecord, spans_of
from agentlightning.proxy.sizes import split_numbers
from agentlightning.semconv import LLMCallAttributes as Call
from openai_backend import OpenAIBackend, Write
from proxied import Proxied, attribute, proxied

TOOLS: Any = [{"type": "function", "function": {"name": f"f{number}", "parameters": {}}} for number in range(50)]


def answer(number: int, prompt: list[int], reply: list[int]) -> Write:
    """A reply of vLLM's shape."""
    logprobs = {"content": [{"token": "t", "logprob": -0.123456789, "bytes": None, "top_logprobs": []} for _ in reply]}
    message = {"role": "assistant", "content": "word " * len(reply)}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": reply, "logprobs": logprobs}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply), "total_tokens": 0}
    body = {"id": f"c{number}", "choices": [choice], "prompt_token_ids": prompt, "usage": usage}
    return Write(json.dumps(body).encode())


async def talk(
    scene: Proxied, backend: OpenAIBackend, turns: int, observed: int, written: int, tools: Any = TOOLS
) -> list[list[Any]]:
    """Let an agent make so many turns; returns the prompts as the backend read them."""
    messages: list[Any] = []
    ids: list[int] = []
    prompts: list[list[Any]] = []
    async with aiohttp.ClientSession() as agent:
        for turn in range(turns):
            messages.append({"role": "user", "content": f"turn {turn} " + "abc " * observed})
            ids += [50_000 + turn] * observed
            reply = [60_000 + turn] * written
            backend.plan(answer(turn, ids, reply))
            question = {"model": "policy", "messages": messages, "tools": tools}
            async with agent.post(f"{scene.llm.endpoint}/chat/completions", json=question) as response:
                told = await response.json()
            prompts.append([[*ids], [*messages]])
            messages.append(told["choices"][0]["message"])
            ids += reply
    return prompts


def size_of(spans: list[Span]) -> int:
    return sum(len(span.model_dump_json()) for span in spans)


async def test_a_long_rollout_stores_at_most_three_times_its_merged_sequence() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        prompts = await talk(scene, backend, turns=100, observed=1_000, written=300)
        spans = await scene.spans()
        made = LlmProxyTraceToTriplet().adapt(spans)
        assert [[each.prompt["token_ids"], each.prompt["messages"]] for each in made] == prompts
        assert all(each.prompt["tools"] == TOOLS and len(each.metadata["logprobs"]) == 300 for each in made)
        merged = json.dumps([prompts[-1], [-0.123456789] * 30_000])
        assert len(prompts[-1][0]) + 300 == 130_000
        assert size_of(spans) <= 3 * len(merged), "stored each time it is fifty times as much"


async def test_a_conversation_that_forks_or_begins_anew_is_kept_exactly() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        prompts = await talk(scene, backend, turns=6, observed=300, written=90)
        prompts += await talk(scene, backend, turns=4, observed=300, written=90)  # the same beginning again
        prompts += await talk(scene, backend, turns=2, observed=299, written=90)
        made = LlmProxyTraceToTriplet().adapt(await scene.spans())
        assert [[each.prompt["token_ids"], each.prompt["messages"]] for each in made] == prompts


async def test_short_calls_are_stored_whole() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        await talk(scene, backend, turns=3, observed=10, written=5, tools=[])
        assert all(attribute(span, Call.PREFIX_SPAN_ID) is None for span in await scene.spans())


@pytest.mark.parametrize(("prompt", "written"), [(262_144, 1_000), (200_000, 64_000), (1_000_000, 100)])
async def test_numbers_of_a_call_are_never_cut(prompt: int, written: int) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent:
        ids, reply = [100_000 + number % 50_000 for number in range(prompt)], [7] * written
        backend.plan(answer(0, ids, reply))
        messages: Any = [{"role": "user", "content": '"\n' * 700_000}]
        await agent.chat.completions.create(model="policy", messages=messages)
        spans = await scene.spans()
        assert max(len(span.model_dump_json()) for span in spans) < 4 * 1024 * 1024
        (made,) = LlmProxyTraceToTriplet().adapt(spans)
        assert (made.prompt["token_ids"], made.response["token_ids"]) == (ids, reply)
        assert len(made.metadata["logprobs"]) == written
        assert attribute(spans[-1], Call.SHORTENED) == ["request"], "it is 2.8 MB of escapes"


def test_numbers_that_take_more_bytes_at_one_end_are_split_by_their_size() -> None:
    values: Any = [1] * 300_000 + [2**60] * 300_000
    kept, pieces = split_numbers({"a": values, "b": [1, 2]})
    assert kept == {"b": [1, 2]}
    assert max(len(json.dumps(piece, separators=(",", ":"))) for _, piece in pieces) <= 1_900_000
    assert [value for _, piece in pieces for value in piece] == values


def test_only_so_many_calls_and_attempts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_MAX_CALLS", 2)
    monkeypatch.setattr(prefixes, "_MAX_ATTEMPTS", 2)
    known = prefixes.KnownCalls()
    outlines: list[prefixes.Outline] = []
    for name in "abc":
        raw = json.dumps({"model": "m", "messages": [{"role": "user", "content": name * 3_000}]}).encode()
        outline = prefixes.outline_of(CallRecord(ChatCompletions(), CallOrigin("r", "a"), raw_request=raw))
        assert outline is not None
        outlines.append(outline)
        known.add(("r", "a"), outline, None)
    assert [known.find(("r", "a"), each) is not None for each in outlines] == [False, True, True]
    known.add(("r", "b"), outlines[0], None)
    known.add(("r", "c"), outlines[0], None)
    assert known.find(("r", "a"), outlines[2]) is None
    assert known.find(("r", "b"), outlines[0]) is not None


def test_what_is_shortened_in_an_earlier_span_is_not_whole_in_a_later_one() -> None:
    record = CallRecord(ChatCompletions(), CallOrigin("r", "a"))
    record.raw_request = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 3_000}] * 2}).encode()
    outline = prefixes.outline_of(record)
    assert outline is not None
    outline.is_shortened = True
    known = prefixes.KnownCalls()
    known.add(("r", "a"), outline, None)
    (span,) = spans_of(record, known.find(("r", "a"), outline))
    assert span.attributes[Call.SHORTENED.value] == ["request"]

"""The OpenAI SDK against the LLM proxy, streaming: every call is recorded, and the agent knows nothing of it.

The agent plays a guessing game with an unmodified ``openai.AsyncOpenAI``; the model behind the proxy is the small
policy of the demo. A few steps of training later we look at what was recorded of one game: the words, the tokens and
their log-probabilities, as they came through the stream.

Run it with: python examples/openai_streaming.py        (needs the extra: pip install "agentlightning[openai]")
"""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

import agentlightning as agl
from agentlightning.demo import game


@agl.rollout
async def play(task: dict[str, int], llm: agl.LLM) -> float:
    now = game.start(task["secret"])
    async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as client:
        while now.outcome == "playing":
            stream = await client.chat.completions.create(
                model=llm.model, messages=[{"role": "user", "content": game.prompt(now)}], stream=True
            )
            words = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            now = game.step(now, game.parse(now, "".join(words)))
    return now.reward


async def show_one_game(store: agl.LightningStore) -> None:
    """Print the model calls of the first game, as they were recorded."""
    (rollout,) = await store.query_rollouts(status_in=["succeeded"], limit=1)
    calls = [span for span in await store.query_spans(rollout.rollout_id, "latest") if span.name.startswith("chat ")]
    assert calls, "the proxy recorded nothing"
    print(f"secret {rollout.input['secret']}: {len(calls)} calls")
    for triplet in agl.LlmProxyTraceToTriplet().adapt(calls):
        assert triplet.prompt["token_ids"]
        assert triplet.response["token_ids"]
        print(f"  prompt tokens {triplet.prompt['token_ids']} -> response tokens {triplet.response['token_ids']}")


if __name__ == "__main__":
    trainer = agl.Trainer(
        algorithm=agl.GRPO(policy=agl.SoftmaxPolicy(game.VOCABULARY), n_steps=2, batch_size=4, group_size=4),
        llm_proxy=agl.LLMProxy(),
        strategy="shm",
        runner={"concurrency": 8},
    )
    trainer.fit(play, [{"secret": secret} for secret in range(game.LOWEST, game.HIGHEST + 1)])
    asyncio.run(show_one_game(trainer.store))

"""The agent of the demo: plays the guessing game by asking a language model for each guess."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from agentlightning.demo import game
from agentlightning.errors import StoreUnavailable
from agentlightning.litagent.litagent import llm_rollout
from agentlightning.types import LLM

_TIMEOUT = aiohttp.ClientTimeout(total=30.0)
_MAX_PAUSES = 100
"""Number of times that a paused endpoint is asked again before the game fails."""
_MAX_PAUSE_SECONDS = 2.0


@llm_rollout
async def play(task: dict[str, Any], llm: LLM) -> float:
    """Play one game against ``task["secret"]``. The reward is 1 for a game won and 0 for one lost.

    Nothing here knows of training: the model is behind a URL, and the LLM proxy there records what is said to it.
    """
    now = game.start(task["secret"])
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        while now.outcome == "playing":
            now = game.step(now, game.parse(now, await ask(session, llm, game.prompt(now))))
    return now.reward


async def ask(session: aiohttp.ClientSession, llm: LLM, prompt: str) -> str:
    """Return the model's answer to one message.

    While the weights are updated the endpoint answers 429 with ``Retry-After``, and is asked again.

    Raises:
        StoreUnavailable: the endpoint answers with an error, or not at all.
    """
    url = f"{llm.get_base_url().rstrip('/')}/chat/completions"
    headers = {} if llm.api_key is None else {"Authorization": f"Bearer {llm.api_key}"}
    body = {"model": llm.model, **llm.sampling_parameters, "messages": [{"role": "user", "content": prompt}]}
    for _ in range(_MAX_PAUSES):
        try:
            async with session.post(url, json=body, headers=headers) as reply:
                if reply.status == 200:
                    answer: dict[str, Any] = await reply.json()
                    return str(answer["choices"][0]["message"]["content"])
                if reply.status != 429:
                    raise StoreUnavailable(f"{url} answered {reply.status}: {(await reply.text())[:500]}")
                pause = float(reply.headers.get("Retry-After", "0.1"))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreUnavailable(f"{url} does not answer: {error!r}") from error
        await asyncio.sleep(min(pause, _MAX_PAUSE_SECONDS))
    raise StoreUnavailable(f"{url} was paused {_MAX_PAUSES} times in a row")

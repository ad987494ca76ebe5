"""The agent of the demo: plays the guessing game by asking a language model for each guess."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import aiohttp

from agentlightning.demo import game
from agentlightning.errors import StoreUnavailable
from agentlightning.litagent.decorator import llm_rollout
from agentlightning.types import LLM

# --- A client for an OpenAI-shaped endpoint, no larger than the demo needs: one question, one a ---

_PAUSES = 100
"""How often a pause of the endpoint is waited out before it counts as an error."""
_LONGEST_PAUSE_SECONDS = 2.0


class ChatClient:
    """Asks a model, through one connection that is kept; enter it with ``async with``.

    Args:
        llm: where the model is.
        timeout_seconds: how long one answer may take.
    """

    def __init__(self, llm: LLM, timeout_seconds: float = 30.0) -> None:
        self._url = f"{llm.get_base_url().rstrip('/')}/chat/completions"
        self._body = {"model": llm.model, **llm.sampling_parameters}
        self._headers = {} if llm.api_key is None else {"Authorization": f"Bearer {llm.api_key}"}
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, prompt: str) -> str:
        """The model's answer to one message. While weights are updated the endpoint says 429, and is asked again.

        Raises:
            StoreUnavailable: the endpoint answers with an error, or not at all.
        """
        assert self._session is not None  # entered
        body = {**self._body, "messages": [{"role": "user", "content": prompt}]}
        for _ in range(_PAUSES):
            try:
                async with self._session.post(self._url, json=body) as reply:
                    if reply.status == 429:
                        pause = float(reply.headers.get("Retry-After", "0.1"))
                    elif reply.status == 200:
                        answer: dict[str, Any] = await reply.json()
                        return str(answer["choices"][0]["message"]["content"])
                    else:
                        raise StoreUnavailable(f"{self._url} answered {reply.status}: {(await reply.text())[:500]}")
            except (aiohttp.ClientError, TimeoutError) as error:
                raise StoreUnavailable(f"{self._url} does not answer: {error!r}") from error
            await asyncio.sleep(min(pause, _LONGEST_PAUSE_SECONDS))
        raise StoreUnavailable(f"{self._url} has paused for too long")


# ---


@llm_rollout
async def play(task: dict[str, Any], llm: LLM) -> float:
    """Play one game against ``task["secret"]``. The reward is 1 for a game won and 0 for one lost.

    Nothing here knows of training: the model is behind a URL, and what is said to it is recorded there.
    """
    now = game.start(task["secret"])
    async with ChatClient(llm) as model:
        while now.outcome == "playing":
            now = game.step(now, game.parse(now, await model.ask(game.prompt(now))))
    return now.reward

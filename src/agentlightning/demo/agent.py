"""The agent of the demo: plays the guessing game by asking a language model for each guess."""

from __future__ import annotations

from typing import Any

from agentlightning.demo import game
from agentlightning.demo.chat import ChatClient
from agentlightning.litagent.decorator import llm_rollout
from agentlightning.types import LLM

__all__ = ["play"]


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

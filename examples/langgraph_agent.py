"""A LangGraph agent, traced through the LLM proxy and trained, offline.

The graph has two nodes: one asks the model for a guess, one checks it and decides whether to go on. It calls the
model with the OpenAI SDK, as LangGraph agents do, and needs no change to be traced or trained: its endpoint is the
proxy's. The model is the small policy of the demo.

Run it with: python examples/langgraph_agent.py        (needs the extra: pip install "agentlightning[langgraph]")
"""

from __future__ import annotations

from typing import TypedDict

from langgraph.graph import END, START, StateGraph
from openai import AsyncOpenAI

import agentlightning as agl
from agentlightning.demo import game


class State(TypedDict):
    now: game.Game
    reply: str


@agl.rollout
async def play(task: dict[str, int], llm: agl.LLM) -> float:
    async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as client:

        async def ask(state: State) -> dict[str, str]:
            answer = await client.chat.completions.create(
                model=llm.model, messages=[{"role": "user", "content": game.prompt(state["now"])}]
            )
            return {"reply": answer.choices[0].message.content or ""}

        def check(state: State) -> dict[str, game.Game]:
            return {"now": game.step(state["now"], game.parse(state["now"], state["reply"]))}

        graph = StateGraph(State)
        graph.add_node("ask", ask)
        graph.add_node("check", check)
        graph.add_edge(START, "ask")
        graph.add_edge("ask", "check")
        graph.add_conditional_edges("check", lambda state: "ask" if state["now"].outcome == "playing" else END)
        end = await graph.compile().ainvoke({"now": game.start(task["secret"]), "reply": ""})
    return end["now"].reward


if __name__ == "__main__":
    algorithm = agl.GRPO(policy=agl.SoftmaxPolicy(game.VOCABULARY), n_steps=2, batch_size=6, group_size=4)
    trainer = agl.Trainer(algorithm=algorithm, llm_proxy=agl.LLMProxy(), n_runners=2, runner={"concurrency": 8})
    trainer.fit(play, [{"secret": secret} for secret in range(game.LOWEST, game.HIGHEST + 1)])
    print(f"the policy knows {len(list(algorithm.policy.contexts()))} situations now")

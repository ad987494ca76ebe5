"""Train an agent on a file of tasks: which team should get a support ticket?

The tasks are the lines of a JSONL file, and yours can take its place: ``python examples/tickets.py my.jsonl``, with
one object per line that has "text" and "team". The model is the small softmax policy of the demo behind an
OpenAI-shaped endpoint; it knows a few words of each ticket and has no idea at first which team is meant. Every
fourth line is kept apart, never trained on, and asked about at the end.

Run it with: python examples/tickets.py
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

import agentlightning as agl

DATA = Path(__file__).with_name("data") / "tickets.jsonl"


@agl.rollout
async def route_ticket(task: dict[str, str], llm: agl.LLM) -> float:
    """The agent: asks the model for a team; 1 if it is the right one."""
    messages = [{"role": "user", "content": f"{task['text'].lower()} Which team?"}]
    question = {"model": llm.model, "messages": messages, **llm.sampling_parameters}
    async with aiohttp.ClientSession() as session, session.post(f"{llm.endpoint}/chat/completions", json=question) as r:
        r.raise_for_status()
        answer = (await r.json())["choices"][0]["message"]["content"]
    return 1.0 if answer == task["team"] else 0.0


def known_words(tickets: list[dict[str, str]], teams: list[str]) -> list[str]:
    """Words that several tickets share and that only one team's tickets have: what the model gets to see."""
    counts, owners = Counter[str](), dict[str, set[str]]()
    for ticket in tickets:
        for word in set(ticket["text"].lower().replace(".", " ").replace("?", " ").replace(",", " ").split()):
            counts[word] += 1
            owners.setdefault(word, set()).add(ticket["team"])
    return [word for word, count in counts.items() if count >= 3 and len(owners[word]) == 1 and word not in teams]


def accuracy(policy: agl.SoftmaxPolicy, tickets: list[dict[str, str]]) -> float:
    """How often the most probable answer is right."""

    def answer(ticket: dict[str, str]) -> str:
        context = tuple(policy.encode(f"{ticket['text'].lower()} Which team?"))
        return policy.decode([policy.choose(context, random.Random(0), temperature=0).token_id])

    return sum(answer(ticket) == ticket["team"] for ticket in tickets) / len(tickets)


def main(path: Path) -> int:
    tickets: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    train = [ticket for number, ticket in enumerate(tickets) if number % 4 != 3]
    held_out = [ticket for number, ticket in enumerate(tickets) if number % 4 == 3]
    teams = sorted({ticket["team"] for ticket in tickets})
    policy = agl.SoftmaxPolicy([*known_words(train, teams), *teams], actions=teams)
    print(f"{len(train)} tickets to learn from, {len(held_out)} kept apart, {len(teams)} teams")
    print(f"right before: {accuracy(policy, held_out):.0%}")

    algorithm = agl.GRPO(policy=policy, batch_size=len(train), group_size=8, n_steps=4)
    trainer = agl.Trainer(algorithm=algorithm, llm_proxy=agl.LLMProxy(), n_runners=2, runner={"concurrency": 16})
    trainer.fit(route_ticket, train)

    after = accuracy(policy, held_out)
    print(f"right after: {after:.0%}")
    return 0 if after >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA))

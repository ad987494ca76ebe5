"""One script for two machines: the algorithm and the store on one, runners on another.

On the machine of the algorithm:

    AGL_API_KEY=our-secret-key AGL_CURRENT_ROLE=algorithm AGL_SERVER_HOST=0.0.0.0 python examples/two_machines.py

On every machine that is to run agents, started before, after, or as often as you like:

    AGL_API_KEY=our-secret-key AGL_CURRENT_ROLE=runner AGL_SERVER_HOST=name.of.the.first python examples/two_machines.py

Without these variables both roles run here. When the algorithm has ended, the runners elsewhere are told, and end.
"""

from __future__ import annotations

import socket
from typing import Any

import agentlightning as agl

TEMPLATES = {"short": "Say {word}.", "polite": "Please say {word}.", "loud": "SAY {word}!"}


@agl.rollout
def speak(task: str, prompt_template: agl.PromptTemplate) -> float:
    """An agent that is better off with a polite prompt; stands for one that needs a machine of its own."""
    agl.emit_object({"host": socket.gethostname(), "said": task})
    return 1.0 if prompt_template.format(word=task).startswith("Please") else 0.0


@agl.algo
async def try_all(store: agl.LightningStore, train_dataset: Any) -> None:
    """Tries every template, and publishes the best one last."""
    scores: dict[str, float] = {}
    for name, text in TEMPLATES.items():
        prompt = agl.PromptTemplate(template=text, engine="f-string")
        resources = await store.add_resources({"prompt_template": prompt})
        enqueued = [
            await store.enqueue_rollout(word, mode="train", resources_id=resources.resources_id)
            for word in train_dataset
        ]
        ended = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in enqueued])
        found = [agl.find_final_reward(await store.query_spans(rollout.rollout_id, "latest")) for rollout in ended]
        rewards = [reward for reward in found if reward is not None]
        # A rollout without a reward has failed: that is no reward of 0, and the rest says nothing of the template.
        if len(rewards) < len(found):
            print(f"{name}: {len(found) - len(rewards)} of {len(found)} rollouts have no reward", flush=True)
            continue
        scores[name] = sum(rewards) / len(rewards)
        print(f"{name}: {scores[name]:.2f}", flush=True)
    if not scores:
        raise RuntimeError("no template has a reward for every rollout; `agl rollouts ls -s failed` says why")
    best = max(scores, key=scores.__getitem__)
    await store.add_resources({"prompt_template": agl.PromptTemplate(template=TEMPLATES[best], engine="f-string")})
    print(f"best: {best}", flush=True)


if __name__ == "__main__":
    agl.Trainer(algorithm=try_all, n_runners=2).fit(speak, ["yes", "no", "maybe"])

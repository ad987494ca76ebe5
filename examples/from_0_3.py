"""A script as it was written for agentlightning 0.3, which runs unchanged.

A decorated agent that emits its reward, an algorithm of one's own that enqueues, waits and reads spans, and a
trainer that runs both sides in processes. With AGL_SERVER_URL set, the same script uses an external store
(``agl store``) through a client, as 0.3 did with ``managed_store=False``.

Run it with: python examples/from_0_3.py
"""

from __future__ import annotations

import os
from typing import Any

import agentlightning as agl

TEMPLATES = ["Answer: {question}", "Answer with a number only: {question}", "Guess: {question}"]
QUESTIONS = ["6 times 7", "12 plus 30"]


def model(prompt: str) -> str:
    """Stands for a call to a language model."""
    return "42" if prompt.startswith("Answer with a number only") else "I think it is 42."


@agl.rollout
def answer(task: str, prompt_template: agl.PromptTemplate) -> None:
    reply = model(prompt_template.format(question=task))
    agl.emit_reward(1.0 if reply == "42" else 0.1)


class TryTemplates(agl.Algorithm):
    """Tries every template on every question, and keeps the best."""

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        scores: dict[str, float] = {}
        for text in TEMPLATES:
            template = agl.PromptTemplate(template=text, engine="f-string")
            resources = await store.add_resources({"prompt_template": template})
            rollouts = [
                await store.enqueue_rollout(input=task, mode="train", resources_id=resources.resources_id)
                for task in train_dataset
            ]
            ids = [rollout.rollout_id for rollout in rollouts]
            finished = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
            found = [
                agl.find_final_reward(await store.query_spans(rollout.rollout_id, attempt_id="latest"))
                for rollout in finished
            ]
            assert len(found) == len(ids), "a rollout did not end"
            rewards = [reward for reward in found if reward is not None]
            assert len(rewards) == len(found), "a rollout has no reward"
            scores[text] = sum(rewards) / len(rewards)
            print(f"{scores[text]:.2f}  {text}")
        best = max(scores, key=scores.__getitem__)
        assert scores[best] == 1.0
        print(f"best: {best}")


if __name__ == "__main__":
    url = os.environ.get("AGL_SERVER_URL")
    trainer = agl.Trainer(
        algorithm=TryTemplates(),
        store=agl.LightningStoreClient(url) if url else None,
        strategy={"type": "cs", "n_runners": 2, "managed_store": url is None, "server_port": 0},
    )
    trainer.fit(answer, train_dataset=QUESTIONS)

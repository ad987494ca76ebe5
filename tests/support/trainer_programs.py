"""Programs that train something, as users write them, for tests that need them in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["LEFT_BEHIND", "RESUMABLE", "RESUMABLE_GRPO", "end_programs", "start_program"]

_started: list[subprocess.Popen[str]] = []

RESUMABLE = """
import sys, time
import agentlightning as agl

@agl.rollout
def agent(task, prompt_template: agl.PromptTemplate) -> float:
    time.sleep(0.1)
    return 1.0 if task % 2 else 0.0

if __name__ == "__main__":
    trainer = agl.Trainer(
        algorithm=agl.Baseline(train_split=1.0, max_queue_length=8, polling_interval=0.05),
        n_runners=2,
        strategy={"type": "cs", "server_host": "127.0.0.1", "server_port": 0},
        run="survivor",
        runs_folder=sys.argv[1],
        initial_resources={"prompt": agl.PromptTemplate(template="x", engine="f-string")},
        progress="off",
    )
    trainer.fit(agent, list(range(int(sys.argv[2]))))
    print("FINISHED", flush=True)
"""
"""Arguments: the folder of runs, and how many inputs there are."""

RESUMABLE_GRPO = """
import sys
import agentlightning as agl
from agentlightning.demo.agent import play
from agentlightning.demo.game import VOCABULARY

if __name__ == "__main__":
    algorithm = agl.GRPO(policy=agl.SoftmaxPolicy(VOCABULARY), n_steps=int(sys.argv[2]), batch_size=4, group_size=4)
    trainer = agl.Trainer(
        algorithm=algorithm,
        llm_proxy=agl.LLMProxy(),
        n_runners=2,
        strategy={"type": "cs", "server_host": "127.0.0.1", "server_port": 0},
        runner={"concurrency": 8},
        run="survivor",
        runs_folder=sys.argv[1],
        progress="off",
    )
    trainer.fit(play, [{"secret": secret} for secret in range(1, 16)])
    print("FINISHED", flush=True)
"""
"""Arguments: the folder of runs, and how many steps there are."""


LEFT_BEHIND = """
import asyncio, sys, time
from pathlib import Path
import agentlightning as agl
from agentlightning.demo.agent import play as game
from agentlightning.demo.game import VOCABULARY

algorithm_name, folder, backend, role, port = sys.argv[1:]
FOLDER = Path(folder)

@agl.rollout
async def agent(task, llm: agl.LLM, rollout: agl.AttemptedRollout) -> float:
    (FOLDER / f"at work {rollout.attempt.attempt_id}").touch()
    while (FOLDER / "gate").exists():
        await asyncio.sleep(0.05)
    try:
        return await game(task, llm=llm)
    except BaseException:
        (FOLDER / "cut off").touch()
        raise

class SlowProxy(agl.LLMProxy):
    async def start(self):
        if (FOLDER / "slow").exists():  # runners are quicker than this
            await asyncio.sleep(1)
        await super().start()

@agl.algo
async def own(store, run, train_dataset, llm_proxy):
    await llm_proxy.start()
    ids = [run.rollout_id(0, index) for index in range(len(train_dataset))]
    if await store.get_rollout_by_id(ids[0]) is None:
        resources = await store.add_resources({"llm": llm_proxy.as_resource()})
        for rollout_id, task in zip(ids, train_dataset):
            await store.enqueue_rollout(task, resources_id=resources.resources_id, rollout_id=rollout_id)
    if algorithm_name == "waits":
        await store.wait_for_rollouts(rollout_ids=ids)
    while not all(each.status == "succeeded" for each in await store.query_rollouts(rollout_id_in=ids)):
        await asyncio.sleep(0.05)

def algorithm():
    match algorithm_name:
        case "grpo":
            return agl.GRPO(policy=agl.SoftmaxPolicy(VOCABULARY), n_steps=1, batch_size=4, group_size=2)
        case "baseline":
            return agl.Baseline(train_split=1.0, max_queue_length=8, polling_interval=0.05)
    return own

if __name__ == "__main__":
    parameters = {"model": "openai/policy", "api_base": backend, "api_key": "not-needed"}
    models = [{"model_name": "policy", "litellm_params": parameters}]
    trainer = agl.Trainer(
        algorithm=algorithm(),
        llm_proxy=SlowProxy(model_list=models),
        strategy={"type": "cs", "role": role, "server_host": "127.0.0.1", "server_port": int(port)},
        rollout_config=agl.RolloutConfig(max_attempts=2, retry_condition=["unresponsive"]),
        run="survivor",
        runs_folder=FOLDER / role,
        progress="off",
    )
    trainer.fit(agent, [{"secret": secret} for secret in range(1, 9)])
    print("FINISHED", flush=True)
"""
"""One runner, and eight rollouts: while the file ``gate`` is there, the first keeps the others waiting.

Arguments: ``grpo``, ``baseline``, ``waits`` or ``polls`` (algorithms of a user's own); a
folder; the URL of a model; the strategy's role and port. The agent touches the file ``cut off`` when its model fails
it; while the file ``slow`` is there, the proxy takes a second to start.
"""


def start_program(text: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a program in a session of its own, in ``folder``; its output comes through pipes."""
    script = folder / "program.py"
    script.write_text(text, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(script), *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


def end_programs() -> None:
    """Kill those that a test that failed has left; what they had started ends by itself."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()

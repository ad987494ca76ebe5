"""Programs that train something, as users write them, for tests that need them in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["RESUMABLE", "RESUMABLE_GRPO", "start_program"]

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


def start_program(text: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a program in a session of its own, in ``folder``; its output comes through pipes."""
    script = folder / "program.py"
    script.write_text(text, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

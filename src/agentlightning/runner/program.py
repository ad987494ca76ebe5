"""A program in any language as an agent.

It is started anew for each rollout, and finds in its environment

- ``AGL_TASK``: the input; a string as it is, everything else as JSON (left out when larger than an environment
  variable can be, 128 KiB), and ``AGL_TASK_FILE``: a file with the input as JSON, always;
- ``AGL_ROLLOUT_ID``, ``AGL_ATTEMPT_ID``, ``AGL_MODE`` (``train``, ``val``, ``test`` or empty);
- ``OPENAI_BASE_URL``, ``OPENAI_API_KEY``, ``AGL_MODEL``, if there is a model among the resources: an OpenAI client
  that is told nothing else then calls that model, through the proxy where there is one;
- ``AGL_PROMPT_TEMPLATE``, if there is a template; ``AGL_RESOURCES_FILE``: all resources as JSON, without keys;
- ``AGL_REWARD_URL`` and ``AGL_REWARD_FILE``: where to say the reward.

It says its reward by a POST to the URL (as often as it likes; the last one counts), or by writing it into the file,
or else in the last line of its standard output, if that is a number or JSON as `read_reward` takes it. None of these:
no reward. An exit code other than 0 fails the attempt.
"""

from __future__ import annotations

import contextvars
import json
import os
import shlex
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentlightning.emitter.annotation import operation
from agentlightning.emitter.message import emit_message
from agentlightning.emitter.reward import emit_reward
from agentlightning.errors import InvalidValue
from agentlightning.litagent.litagent import LitAgent
from agentlightning.runner.process_group import Output, run_group
from agentlightning.runner.reward_inbox import RewardInbox
from agentlightning.runner.reward_text import WrittenReward, read_reward
from agentlightning.types import LLM, AttemptedRollout, NamedResources, PromptTemplate, ProxyLLM, Rollout

__all__ = ["ProgramAgent", "ProgramFailed"]

_VARIABLE_BYTES = 120 * 1024
"""Linux takes 128 KiB in one variable (MAX_ARG_STRLEN), its name included."""
_PRIVATE = ("AGL_API_KEY", "AGL_PROXY_CONTROL_KEY", "AGL_WORKER_NAME")
"""Variables of the runner that are none of the program's business. Nor is a key inside of ``AGL_SERVER_URL``."""
_STDERR_SHOWN = 500


class ProgramFailed(RuntimeError):
    """The program ended with an exit code other than 0, or by a signal."""


class ProgramAgent(LitAgent[Any]):
    """Runs a program for each rollout.

    Args:
        command: a line for ``/bin/sh``, or a program and its arguments.
        env: variables to add to those of this process and to those above.
        cwd: its working directory; default: that of this process.
        stop_seconds: how long it may take to stop on SIGTERM, before SIGKILL.
        output_bytes: how much is kept of what it writes to each of its two outputs: the beginning and the end.

    Raises:
        InvalidValue: the command is empty.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stop_seconds: float = 3.0,
        output_bytes: int = 64 * 1024,
    ) -> None:
        super().__init__()
        self._command = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        self._shown = command if isinstance(command, str) else shlex.join(command)
        if not self._shown.strip():
            raise InvalidValue("the command is empty; give a program and its arguments")
        self._env = dict(env or {})
        self._cwd = cwd
        self._stop_seconds = stop_seconds
        self._output_bytes = output_bytes

    async def rollout_async(self, task: Any, resources: NamedResources, rollout: Rollout) -> None:
        """Run the program on one task. What it writes, its exit code and its rewards are spans after.

        Raises:
            ProgramFailed: its exit code is not 0.
            InvalidValue: what it wrote into the reward file is no reward.
            OSError: it cannot be started.
        """
        context = contextvars.copy_context()  # so that rewards that come by HTTP belong to this rollout
        with tempfile.TemporaryDirectory(prefix="agl-") as folder, operation(name="program", command=self._shown) as op:
            stdout, stderr = Output(self._output_bytes), Output(self._output_bytes)
            async with RewardInbox(lambda reward: context.run(_emit, reward)) as inbox:
                env = self._environment(task, resources, rollout, Path(folder)) | {"AGL_REWARD_URL": inbox.url}
                try:
                    code = await run_group(
                        self._command, env | self._env, self._cwd, stdout, stderr, stop_seconds=self._stop_seconds
                    )
                finally:  # also of a program that was stopped
                    _keep("stdout", stdout)
                    _keep("stderr", stderr)
            op.set_output({"exit_code": code})
            if code != 0:
                raise ProgramFailed(_failure(self._shown, code, stderr))
            reward = None if inbox.received else _written(Path(folder) / "reward", stdout)
            if reward is not None:
                _emit(reward)

    def _environment(self, task: Any, resources: NamedResources, rollout: Rollout, folder: Path) -> dict[str, str]:
        """The whole environment of the program; writes the files that it names."""
        as_json = json.dumps(task, ensure_ascii=False)
        (folder / "task.json").write_text(as_json, encoding="utf-8")
        public = {name: each.model_dump(mode="json", exclude={"api_key"}) for name, each in resources.items()}
        (folder / "resources.json").write_text(json.dumps(public, ensure_ascii=False), encoding="utf-8")
        attempt_id = rollout.attempt.attempt_id if isinstance(rollout, AttemptedRollout) else ""
        env = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
        if "@" in env.get("AGL_SERVER_URL", ""):
            del env["AGL_SERVER_URL"]
        env |= {
            "AGL_TASK_FILE": str(folder / "task.json"),
            "AGL_RESOURCES_FILE": str(folder / "resources.json"),
            "AGL_REWARD_FILE": str(folder / "reward"),
            "AGL_ROLLOUT_ID": rollout.rollout_id,
            "AGL_ATTEMPT_ID": attempt_id,
            "AGL_MODE": rollout.mode or "",
        }
        text = task if isinstance(task, str) else as_json
        if len(text.encode()) <= _VARIABLE_BYTES:
            env["AGL_TASK"] = text
        for each in resources.values():
            if isinstance(each, PromptTemplate):
                env.setdefault("AGL_PROMPT_TEMPLATE", each.template)
        return env | _model(resources, rollout, env)


def _model(resources: NamedResources, rollout: Rollout, env: Mapping[str, str]) -> dict[str, str]:
    """What an OpenAI client reads, for the first model among the resources."""
    llm = next((each for each in resources.values() if isinstance(each, LLM)), None)
    if llm is None:
        return {}
    if isinstance(llm, ProxyLLM) and isinstance(rollout, AttemptedRollout):
        llm = llm.with_attempted_rollout(rollout)
    key = llm.api_key or env.get("OPENAI_API_KEY") or "none"  # OpenAI's clients refuse to start without one
    return {"OPENAI_BASE_URL": llm.get_base_url(), "OPENAI_API_KEY": key, "AGL_MODEL": llm.model}


def _emit(reward: WrittenReward) -> None:
    emit_reward(reward.value, primary_key=reward.primary_key)


def _written(file: Path, stdout: Output) -> WrittenReward | None:
    """The reward in the file, or else in the last line."""
    if not file.exists():
        return read_reward(stdout.last_line())
    text = file.read_text(encoding="utf-8", errors="replace")
    reward = read_reward(text)
    if reward is None:
        raise InvalidValue(f"the program wrote {text[:200]!r} into AGL_REWARD_FILE, which is no reward; write a number")
    return reward


def _keep(stream: str, output: Output) -> None:
    if output.total:
        facts = {"program": {"stream": stream, "bytes": output.total, "bytes_left_out": output.missing}}
        emit_message(output.text(), facts)


def _failure(command: str, code: int, stderr: Output) -> str:
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    said = stderr.text().strip()[-_STDERR_SHOWN:] or "nothing"
    return f"{command!r} {how}; its standard error ends with: {said}"

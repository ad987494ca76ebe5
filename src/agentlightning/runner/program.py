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

import asyncio
import contextvars
import json
import os
import secrets
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

from aiohttp import web

from agentlightning.emitter.annotation import operation
from agentlightning.emitter.emit import emit_message
from agentlightning.emitter.reward import emit_reward
from agentlightning.errors import InvalidValue
from agentlightning.litagent.litagent import LitAgent
from agentlightning.types import LLM, AttemptedRollout, NamedResources, PromptTemplate, ProxyLLM, Rollout

# --- A program with all that it starts: run, listened to, and stopped as a whole ---

_CHUNK_BYTES = 64 * 1024
_LEFTOVER_SECONDS = 2.0
"""How long output may still come after the program has ended; only a child that left the group can send any."""


class Output:
    """The beginning and the end of what a program writes; what is between is counted.

    Args:
        limit_bytes: how much is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.total = 0
        """Bytes written."""
        self._half = limit_bytes // 2
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        """Take what was written."""
        self.total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]

    @property
    def missing(self) -> int:
        """Bytes that are not kept."""
        return self.total - len(self._head) - min(len(self._tail), self._half)

    def text(self) -> str:
        """What is kept, with a note of what is missing."""
        tail = self._tail[-self._half :] if self._half else b""
        gap = f"\n… {self.missing} bytes are left out …\n".encode() if self.missing else b""
        return (
            (bytes(self._head) + gap + bytes(tail))
            .decode("utf-8", "replace")
            .replace("\0", "\N{REPLACEMENT CHARACTER}")
        )

    def last_line(self) -> str:
        """The last line that is not empty."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


async def run_group(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: str | None,
    stdout: Output,
    stderr: Output,
    *,
    stop_seconds: float,
) -> int:
    """Run a program in a process group of its own, until it ends.

    When this is cancelled, the whole group gets SIGTERM and, ``stop_seconds`` later, SIGKILL. What the program
    leaves behind in its group when it ends by itself is killed.

    Args:
        command: the program and its arguments.
        env: its whole environment.
        cwd: its working directory; None: ours.
        stdout, stderr: take what it writes.
        stop_seconds: how long it may take to stop.

    Returns:
        Its exit code; if a signal ended it, minus the signal's number.

    Raises:
        OSError: it cannot be started.
    """
    process, readers = await _start(command, env, cwd, stdout, stderr)
    try:
        return await process.wait()
    except asyncio.CancelledError:
        await _stop(process, stop_seconds)
        raise
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        await asyncio.wait(readers, timeout=_LEFTOVER_SECONDS)
        for reader in readers:
            reader.cancel()


async def _start(
    command: Sequence[str], env: Mapping[str, str], cwd: str | None, stdout: Output, stderr: Output
) -> tuple[asyncio.subprocess.Process, list[asyncio.Task[None]]]:
    """The process, and the tasks that read what it writes.

    The pipes are ours: those that asyncio makes would keep ``wait`` waiting for children that hold on to them.
    """
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    readers = [asyncio.create_task(_read(out_read, stdout)), asyncio.create_task(_read(err_read, stderr))]
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out_write,
            stderr=err_write,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    except BaseException:
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        raise
    finally:
        os.close(out_write)
        os.close(err_write)
    return process, readers


async def _stop(process: asyncio.subprocess.Process, seconds: float) -> None:
    _signal_group(process.pid, signal.SIGTERM)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.wait()
            return
    _signal_group(process.pid, signal.SIGKILL)
    await process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone, or of another user by now
        os.killpg(group, number)


async def _read(descriptor: int, output: Output) -> None:
    """Read a pipe to its end, then close it."""
    reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        while data := await reader.read(_CHUNK_BYTES):
            output.add(data)
    finally:
        transport.close()


# --- Rewards that programs write as text: a number, or JSON ---


class WrittenReward(NamedTuple):
    """A reward as ``emit_reward`` takes it."""

    value: float | dict[str, Any]
    primary_key: str | None = None


def read_reward(text: str) -> WrittenReward | None:
    """The reward that a text says, or None if it says none.

    ``0.5``; or ``{"reward": 0.5}``; or, of several dimensions, ``{"reward": {"accuracy": 1, "speed": 0.2},
    "primary_key": "accuracy"}``.
    """
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    key: Any = None
    if isinstance(said, dict):
        fields = cast("dict[str, Any]", said)
        said, key = fields.get("reward"), fields.get("primary_key")
    if isinstance(said, float) or (isinstance(said, int) and abs(said) <= sys.float_info.max):
        return WrittenReward(float(said))
    if isinstance(said, dict) and (key is None or isinstance(key, str)):
        return WrittenReward(cast("dict[str, Any]", said), key)
    return None


# --- A letter box for one reward: an HTTP server on this machine, for as long as a program runs ---

_MAX_BYTES = 64 * 1024


class RewardInbox:
    """Takes rewards by POST at ``url``, which only who is told can know. Use as an async context manager.

    Args:
        take: called with each reward; what it raises as ``TypeError``, ``ValueError`` or
            ``OverflowError`` is the sender's mistake.
    """

    def __init__(self, take: Callable[[WrittenReward], None]) -> None:
        self.url = ""
        """Where to post; known inside of the block."""
        self.received = 0
        """How many rewards have come."""
        self._take = take
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> RewardInbox:
        path = f"/reward/{secrets.token_urlsafe(16)}"
        app = web.Application(client_max_size=_MAX_BYTES)
        app.router.add_post(path, self._receive)
        app.router.add_put(path, self._receive)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}{path}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _receive(self, request: web.Request) -> web.Response:
        text = (await request.read()).decode("utf-8", "replace")
        reward = read_reward(text)
        if reward is None:
            wanted = 'a number, or {"reward": number}, or {"reward": {name: number, …}, "primary_key": name}'
            return web.Response(status=422, text=f"{text[:200]!r} is no reward; send {wanted}\n")
        try:
            self._take(reward)
        except (TypeError, ValueError, OverflowError) as error:
            return web.Response(status=422, text=f"{error}\n")
        self.received += 1
        return web.Response(status=204)


# ---

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

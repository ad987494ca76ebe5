"""Agents by what a command line says: a program in any language (``ProgramAgent``), or the name of a Python object.

A program is started anew for each rollout, and finds in its environment

- ``AGL_TASK``: the input; a string as it is, everything else as JSON (left out when it is larger than an environment
  variable can be, 128 KiB), and ``AGL_TASK_FILE``: a file with the input as JSON, always;
- ``AGL_ROLLOUT_ID``, ``AGL_ATTEMPT_ID``, ``AGL_MODE`` (``train``, ``val``, ``test`` or empty);
- ``OPENAI_BASE_URL``, ``OPENAI_API_KEY``, ``AGL_MODEL``, if there is a model among the resources, so that an OpenAI
  client with default settings calls that model, through the proxy where there is one;
- ``AGL_PROMPT_TEMPLATE``, if there is a template; ``AGL_RESOURCES_FILE``: all resources as JSON, without keys;
- ``AGL_REWARD_URL`` and ``AGL_REWARD_FILE``: where to report the reward;
- ``OTEL_RESOURCE_ATTRIBUTES`` with the ids of rollout and attempt, by which a server finds the attempt of its spans;
- ``AGL_AGENT_FOLDER``: the folder in which it runs, or would if it had no fresh one.

It reports its reward by a POST to the URL (any number of times; the last one counts), or by writing it to the file, or
else in the last line of its standard output, if that is a number or JSON as in `read_reward`. Without any of these
there is no reward. An exit code other than 0 fails the attempt.
"""

from __future__ import annotations

import contextvars
import importlib
import importlib.util
import inspect
import json
import os
import re
import secrets
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

from aiohttp import web

from agentlightning.emitter.annotation import emit_reward, operation
from agentlightning.emitter.emit import emit_message
from agentlightning.errors import AgentLightningError, InvalidValue
from agentlightning.litagent.litagent import AttemptFailed, LitAgent, rollout as rollout_agent
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.runner.base import StopEvent
from agentlightning.runner.process_group import ProgramOutput, run_group
from agentlightning.semconv import LightningResourceAttributes
from agentlightning.store.base import LightningStore
from agentlightning.tracer.otel import OtelTracer
from agentlightning.types import LLM, AttemptedRollout, NamedResources, PromptTemplate, ProxyLLM, Rollout

T = TypeVar("T")

_PACKAGE = Path(__file__).parents[1]
_VARIABLE_BYTES = 120 * 1024
"""Linux limits one variable to 128 KiB (MAX_ARG_STRLEN), its name included."""
_PRIVATE = ("AGL_API_KEY", "AGL_PROXY_CONTROL_KEY", "AGL_WORKER_NAME")
"""Variables of the runner that the program must not see. It does not see a key inside ``AGL_SERVER_URL`` either."""
_BASIC = re.compile(r"PATH|HOME|USER|LOGNAME|SHELL|TMPDIR|TERM|TZ|LANG|LANGUAGE|LC_\w+|AGL_RUN_MARK")
"""Variables that a program needs to work at all, and that by which a run finds its processes."""
_XDG_HOMES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
_STDERR_SHOWN = 500
_REWARD_BYTES = 64 * 1024
_NOT_FINITE = re.compile(r"\A\s*[+-]?(nan|inf(inity)?)\s*\Z", re.IGNORECASE)


class ProgramFailed(RuntimeError):
    """The program ended with an exit code other than 0, or by a signal."""


class ProgramAgent(LitAgent[Any]):
    """Runs a program for each rollout.

    Args:
        command: a line for ``/bin/sh``, or a program and its arguments.
        env: variables added to those of this process and to those above.
        cwd: its working directory; default: that of this process.
        fresh_cwd: whether each attempt gets an empty working directory, which is removed after it.
        fresh_home: whether each attempt gets a ``HOME`` and a ``TMPDIR`` of its own, so that no cache of an earlier one
            is found. The variables ``XDG_*_HOME``, which lead elsewhere, are not passed on then.
        pass_env: which variables of this process it sees besides those above and the basic ones (``PATH``, ``HOME``,
            ``USER``, ``SHELL``, ``TMPDIR``, language and time zone); default: all of them.
        stop_seconds: how long it may take to stop on SIGTERM, before SIGKILL.
        output_bytes: how much to keep of what it writes to each of its two outputs: the beginning and the end.

    Raises:
        InvalidValue: the command is empty.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        fresh_cwd: bool = False,
        fresh_home: bool = False,
        pass_env: Sequence[str] | None = None,
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
        self._fresh_cwd, self._fresh_home = fresh_cwd, fresh_home
        self._pass_env = None if pass_env is None else frozenset(pass_env)
        self._stop_seconds = stop_seconds
        self._output_bytes = output_bytes

    async def rollout_async(self, task: Any, resources: NamedResources, rollout: Rollout) -> None:
        """Run the program on one task. Its output, exit code and rewards become spans.

        Raises:
            ProgramFailed: its exit code is not 0, or a signal ended it; the message has the end of its stderr.
            AttemptFailed: ``bad_result``: its reward is not finite, or the file has something else than one.
            OSError: it cannot be started.
        """
        context = contextvars.copy_context()  # the reward server's requests have no context that names the rollout
        rewards: list[dict[str, Any]] = []

        def take(reward: dict[str, Any]) -> None:
            context.run(emit_reward, **reward)
            rewards.append(reward)

        with (
            tempfile.TemporaryDirectory(prefix="agl-", ignore_cleanup_errors=True) as folder,
            operation(name="program", command=self._shown) as op,
        ):
            stdout, stderr = ProgramOutput(self._output_bytes), ProgramOutput(self._output_bytes)
            async with _reward_server(take) as url:
                places, cwd = self._places(Path(folder))
                env = _environment(task, resources, rollout, Path(folder), self._inherited())
                env |= places | {"AGL_REWARD_URL": url} | self._env
                try:
                    code = await run_group(self._command, env, cwd, stdout, stderr, stop_seconds=self._stop_seconds)
                finally:  # output is kept also when the attempt is given up
                    _emit_output("stdout", stdout)
                    _emit_output("stderr", stderr)
            op.set_output({"exit_code": code})
            if code != 0:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                end = stderr.text().strip()[-_STDERR_SHOWN:] or "nothing"
                raise ProgramFailed(f"{self._shown!r} {how}; its standard error ends with: {end}")
            try:
                reward = None if rewards else _written_reward(Path(folder) / "reward", stdout)
                if reward is not None:
                    emit_reward(**reward)
            except InvalidValue as error:  # as of a function that returns it
                raise AttemptFailed("bad_result", error.message) from error

    def _inherited(self) -> dict[str, str]:
        """What it sees of the environment of this process."""
        hidden = {*_PRIVATE, *(_XDG_HOMES if self._fresh_home else ())}
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        if "@" in env.get("AGL_SERVER_URL", ""):
            del env["AGL_SERVER_URL"]
        if self._pass_env is None:
            return env
        return {name: value for name, value in env.items() if name in self._pass_env or _BASIC.fullmatch(name)}

    def _places(self, folder: Path) -> tuple[dict[str, str], str | None]:
        """The variables that name its own folders, which are made below ``folder``, and its working directory."""
        places, cwd = {"AGL_AGENT_FOLDER": self._cwd or os.getcwd()}, self._cwd
        wanted = (("HOME", self._fresh_home), ("TMPDIR", self._fresh_home), ("PWD", self._fresh_cwd))
        for name in (each for each, wants in wanted if wants):
            places[name] = str(folder / name.lower())
            os.mkdir(places[name], 0o700)
        return places, places.get("PWD", cwd)


# --- The program's environment -----------------------------------------------------------------------


def _environment(
    task: Any, resources: NamedResources, rollout: Rollout, folder: Path, inherited: Mapping[str, str]
) -> dict[str, str]:
    """What is inherited, and the variables that tell the program of its task; writes the files that they name."""
    as_json = json.dumps(task, ensure_ascii=False)
    (folder / "task.json").write_text(as_json, encoding="utf-8")
    public = {name: each.model_dump(mode="json", exclude={"api_key"}) for name, each in resources.items()}
    (folder / "resources.json").write_text(json.dumps(public, ensure_ascii=False), encoding="utf-8")
    attempt_id = rollout.attempt.attempt_id if isinstance(rollout, AttemptedRollout) else ""
    names = LightningResourceAttributes.ROLLOUT_ID.value, LightningResourceAttributes.ATTEMPT_ID.value
    attributes = [f"{names[0]}={quote(rollout.rollout_id)}", f"{names[1]}={quote(attempt_id)}"]
    if known := inherited.get("OTEL_RESOURCE_ATTRIBUTES"):  # of the user's; ours come last and win
        attributes.insert(0, known)
    env = {
        **inherited,
        "OTEL_RESOURCE_ATTRIBUTES": ",".join(attributes),
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
    llm = next((each for each in resources.values() if isinstance(each, LLM)), None)
    if llm is not None:
        if isinstance(llm, ProxyLLM) and isinstance(rollout, AttemptedRollout):
            llm = llm.with_attempted_rollout(rollout)
        key = (
            llm.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        )  # OpenAI's clients refuse to start without a key
        env |= {"OPENAI_BASE_URL": llm.get_base_url(), "OPENAI_API_KEY": key, "AGL_MODEL": llm.model}
    return env


# --- Rewards -----------------------------------------------------------------------------------------


def read_reward(text: str) -> dict[str, Any] | None:
    """The reward in a text, in the form of ``emit_reward``'s arguments; None if the text is none.

    ``0.5``; or ``{"reward": 0.5}``; or, with several dimensions, ``{"reward": {"accuracy": 1, "speed": 0.2},
    "primary_key": "accuracy"}``. What programs print of a number that is not finite (``nan``, ``-inf``) is a number,
    too, which ``emit_reward`` refuses.
    """
    try:
        value: Any = json.loads(_NOT_FINITE.sub(lambda found: json.dumps(float(found[0])), text))
    except (ValueError, RecursionError):
        return None
    key: Any = None
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        value, key = fields.get("reward"), fields.get("primary_key")
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max):
        return {"reward": float(value)}
    if isinstance(value, dict) and (key is None or isinstance(key, str)):
        return {"reward": cast("dict[str, Any]", value), "primary_key": key}
    return None


@asynccontextmanager
async def _reward_server(take: Callable[[dict[str, Any]], None]) -> AsyncGenerator[str]:
    """An HTTP server on this machine that takes rewards by POST or PUT, while the block runs; yields its URL.

    The URL contains a secret, so that only the program can use it. What ``take`` raises as ``TypeError``,
    ``ValueError`` or ``OverflowError`` is answered as the sender's mistake.
    """

    async def receive(request: web.Request) -> web.Response:
        text = (await request.read()).decode("utf-8", "replace")
        reward = read_reward(text)
        if reward is None:
            expected = 'a number, or {"reward": number}, or {"reward": {name: number, …}, "primary_key": name}'
            return web.Response(status=422, text=f"{text[:200]!r} is no reward; send {expected}\n")
        try:
            take(reward)
        except (TypeError, ValueError, OverflowError) as error:
            return web.Response(status=422, text=f"{error}\n")
        return web.Response(status=204)

    path = f"/reward/{secrets.token_urlsafe(16)}"
    app = web.Application(client_max_size=_REWARD_BYTES)
    app.router.add_post(path, receive)
    app.router.add_put(path, receive)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}{path}"
    finally:
        await runner.cleanup()


def _written_reward(file: Path, stdout: ProgramOutput) -> dict[str, Any] | None:
    """The reward in the file, or else in the last line of the output."""
    if not file.exists():
        return read_reward(stdout.last_line())
    text = file.read_text(encoding="utf-8", errors="replace")
    reward = read_reward(text)
    if reward is None:
        raise InvalidValue(f"the program wrote {text[:200]!r} into AGL_REWARD_FILE, which is no reward; write a number")
    return reward


def _emit_output(stream: str, output: ProgramOutput) -> None:
    if output.total:
        facts = {"program": {"stream": stream, "bytes": output.total, "bytes_left_out": output.missing}}
        emit_message(output.text(), facts)


# --- Agents by name: what `agl runner` sends to its processes --------------------------------------------


@dataclass
class RunAgent:
    """Makes an agent in the process that runs it, and runs it.

    Args:
        agent: ``module:name`` or ``file.py:name``, see ``load_agent``; None where there is a ``program``.
        program: a line for ``/bin/sh``, see ``ProgramAgent``.
        folder: where modules and files are looked up, and where programs run.
        runner: arguments of ``LitAgentRunner``.
        isolation: arguments of ``ProgramAgent`` besides the command and its folder.
    """

    agent: str | None
    program: str | None
    folder: str
    runner: dict[str, Any] = field(default_factory=dict[str, Any])
    isolation: dict[str, Any] = field(default_factory=dict[str, Any])
    made: LitAgent[Any] | None = field(default=None, init=False)

    async def __call__(self, store: LightningStore, worker_id: int, event: StopEvent) -> None:
        """Work on the rollouts of the store until told to end. Raises as ``LitAgentRunner.iter``."""
        runner = LitAgentRunner[Any](OtelTracer(), **self.runner)
        with runner.run_context(agent=self.made or self.make(), store=store, worker_id=worker_id):
            await runner.iter(event=event)

    def wants_main_thread(self, worker_id: int) -> bool:
        """Make the agent, and return whether it is to be called in the main thread. Raises as ``make``."""
        self.made = self.make()
        return LitAgentRunner[Any](OtelTracer(), **self.runner).wants_main_thread(self.made)

    def make(self) -> LitAgent[Any]:
        """The agent.

        Raises:
            InvalidValue: neither an agent nor a program is given, or there is no such agent.
        """
        if self.program is not None:
            return ProgramAgent(self.program, cwd=self.folder, **self.isolation)
        if self.agent is None:
            raise InvalidValue("neither an agent nor a program is given; give one")
        return load_agent(self.agent, self.folder)


def load_agent(spec: str, folder: str) -> LitAgent[Any]:
    """The agent called ``module:name`` or ``file.py:name``.

    It may be an agent, a class of agents that needs no arguments, or a function, which is wrapped as by ``@rollout``.

    Args:
        spec: its place and name.
        folder: looked into first, before the installed modules.

    Raises:
        InvalidValue: there is no such object, it is something else, or the user's code raises; the message says where.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise InvalidValue(f"{spec!r} is no agent; write MODULE:NAME or FILE.py:NAME")
    found: Any = _module(place, folder)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidValue(f"{place!r} has nothing called {name!r}")
        found = getattr(found, part)
    kind = type(found).__name__
    if inspect.isroutine(found):
        return rollout_agent(found)
    if isinstance(found, LitAgent):
        return found  # pyright: ignore[reportUnknownVariableType]
    if isinstance(found, type) and issubclass(found, LitAgent):
        return _by_user(spec, "cannot be made", cast("Callable[[], LitAgent[Any]]", found))
    raise InvalidValue(f"{spec!r} is a {kind}; it must be an agent, a class of agents, or a function")


def _by_user(what: str, trouble: str, code: Callable[[], T]) -> T:
    """Run code of the user's.

    Raises:
        InvalidValue: it raises; the message says what, and where in the user's code.
    """
    try:
        return code()
    except AgentLightningError:
        raise
    except (Exception, SystemExit) as error:
        place, advice = "", "; `agl --debug runner …` shows the traceback"
        if isinstance(error, SyntaxError):
            place, said = f"{error.filename}, line {error.lineno}", error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            user = [each for each in frames if not each.filename.startswith(("<frozen", str(_PACKAGE)))]
            place, said = (f"{user[-1].filename}, line {user[-1].lineno}" if user else ""), str(error)
        if isinstance(error, SystemExit):
            advice = "; put what is to happen only in a run of the file below `if __name__ == '__main__':`"
        raise InvalidValue(
            f"{what!r} {trouble}: {type(error).__name__}: {said}{place and f' ({place})'}{advice}"
        ) from error


def _module(place: str, folder: str) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not place.endswith(".py") and os.sep not in place:
        try:
            return _by_user(place, "cannot be imported", lambda: importlib.import_module(place))
        except InvalidValue as told:
            error = told.__cause__
            if not isinstance(error, ModuleNotFoundError) or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module exists, and needs another one that does not
            raise InvalidValue(f"there is no module {place!r}, neither in {folder!r} nor installed") from error
    file = Path(folder, place)
    if not file.is_file():
        raise InvalidValue(f"there is no file {str(file)!r}")
    known = sys.modules.get(file.stem)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise InvalidValue(f"{str(file)!r} is no Python file")
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # before it runs, so that its classes can be pickled by name
    try:
        _by_user(place, "cannot be imported", lambda: loader.exec_module(module))
    except InvalidValue:
        del sys.modules[file.stem]
        raise
    return module

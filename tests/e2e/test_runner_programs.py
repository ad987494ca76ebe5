"""Programs in any language as agents: what they are told, how they say their reward, and how they are stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

import agentlightning as agl
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import LLM, PromptTemplate, ProxyLLM, RolloutConfig, Span


class Done(NamedTuple):
    status: str
    reason: str
    spans: Sequence[Span]
    code: str | None = None

    @property
    def reward(self) -> float | None:
        return agl.find_final_reward(self.spans)

    @property
    def stdout(self) -> str:
        return next(
            agl.get_message_value(each) or ""
            for each in self.spans
            if each.attributes.get("program.stream") == "stdout"
        )


async def ran(
    command: str | list[str], task: Any = "task", *, resources: Any = None, timeout: float | None = None, **agent: Any
) -> Done:
    """Run a program as the agent of one rollout."""
    async with InMemoryLightningStore() as store:
        if resources:
            await store.add_resources(resources)
        rollout = await store.enqueue_rollout(task, "train", config=RolloutConfig(timeout_seconds=timeout))
        runner = agl.LitAgentRunner[Any](agl.OtelTracer(), max_rollouts=1)
        with runner.run_context(agent=agl.ProgramAgent(command, **agent), store=store):
            await runner.iter()
        ended = await store.get_rollout_by_id(rollout.rollout_id)
        assert ended is not None
        spans = await store.query_spans(rollout.rollout_id)
        return Done(ended.status, ended.reason_message or "", spans, ended.reason_code)


PYTHON_POST = """python3 -c '
import os, urllib.request as u
for body in (b"0.1", b"{\\"reward\\": {\\"a\\": 1, \\"b\\": 2}, \\"primary_key\\": \\"b\\"}"):
    print(u.urlopen(u.Request(os.environ["AGL_REWARD_URL"], data=body)).status)'"""
NODE_POST = (
    """node -e 'fetch(process.env.AGL_REWARD_URL, {method: "POST", body: "0.75"}).then(r => console.log(r.status))'"""
)


@pytest.mark.parametrize(
    ("command", "reward"),
    [
        ("echo thinking; echo 0.5", 0.5),
        ("""echo '{"reward": 0.25}'; echo""", 0.25),
        ("""echo '{"reward": {"a": 1, "b": 3}, "primary_key": "b"}'""", 3.0),
        ("echo 1 > $AGL_REWARD_FILE; echo 7", 1.0),
        ("echo done", None),
        ("python3 -c 'print(10**400)'", None),
        ("python3 -c 'print(\"[\" * 5000)'", None),
        ("true", None),
        (PYTHON_POST, 2.0),
        (NODE_POST, 0.75),
    ],
    ids=["line", "json", "dimensions", "file", "words", "huge", "deep", "nothing", "python", "node"],
)
async def test_ways_to_say_the_reward(command: str, reward: float | None) -> None:
    if "node" in command and shutil.which("node") is None:
        assert not os.environ.get("CI"), "node is missing, and CI must not skip"
        pytest.skip("node is missing")
    done = await ran(command)
    assert (done.status, done.reward) == ("succeeded", reward), done.reason


async def test_what_a_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_API_KEY", "secret of the store")
    monkeypatch.setenv("AGL_SERVER_URL", "http://agl:secret%20of%20the%20store@lab:4747")
    monkeypatch.setenv("AGL_PROXY_CONTROL_KEY", "secret of the algorithm")
    resources = {
        "llm": ProxyLLM(endpoint="http://proxy:1/v1", model="policy", api_key="key"),
        "prompt": PromptTemplate(template="Say {x}", engine="f-string"),
    }
    command = ["python3", "-c", "import os, json; print(json.dumps(dict(os.environ)))"]
    done = await ran(command, {"question": "ü"}, resources=resources, env={"MINE": "1"})
    env = json.loads(done.stdout)
    assert json.loads(env["AGL_TASK"]) == {"question": "ü"}
    assert (
        env["OPENAI_BASE_URL"] == f"http://proxy:1/rollout/{env['AGL_ROLLOUT_ID']}/attempt/{env['AGL_ATTEMPT_ID']}/v1"
    )
    assert (env["OPENAI_API_KEY"], env["AGL_MODEL"], env["AGL_PROMPT_TEMPLATE"]) == ("key", "policy", "Say {x}")
    assert (env["AGL_MODE"], env["MINE"]) == ("train", "1")
    assert "secret" not in done.stdout
    assert env["AGL_REWARD_URL"].startswith("http://127.0.0.1:")
    assert not Path(env["AGL_TASK_FILE"]).exists()  # cleaned up


async def test_tasks_as_text_and_as_files() -> None:
    assert (await ran("echo $AGL_TASK; cat $AGL_TASK_FILE", "plain")).stdout == 'plain\n"plain"'
    large = await ran("echo ${AGL_TASK-unset}; wc -c < $AGL_TASK_FILE", "x" * 200_000)
    assert large.stdout.split() == ["unset", "200002"]
    resources = {"m": LLM(endpoint="http://h/v1", model="m", api_key="secret")}
    assert "secret" not in (await ran("cat $AGL_RESOURCES_FILE", resources=resources)).stdout


@pytest.mark.parametrize(
    ("command", "said", "code"),
    [
        ("echo lost >&2; exit 3", "exit code 3; its standard error ends with: lost", "agent_error"),
        ("kill -KILL $$", "ended by SIGKILL", "agent_error"),
        ("echo much > $AGL_REWARD_FILE", "'much\\n' into AGL_REWARD_FILE", "bad_result"),
        ("echo NaN > $AGL_REWARD_FILE", "finite", "bad_result"),  # as of a function that returns it
        ("echo nan", "finite", "bad_result"),
        ("echo working; echo -Inf", "finite", "bad_result"),
        (["/no/such/program"], "FileNotFoundError", "agent_error"),
    ],
    ids=["code", "signal", "words", "nan", "printed nan", "printed infinity", "missing"],
)
async def test_ways_to_fail(command: Any, said: str, code: str) -> None:
    done = await ran(command)
    assert (done.status, done.code) == ("failed", code)
    assert said in done.reason
    assert done.spans[-1].name == agl.AGL_EXCEPTION


async def test_a_bad_reward_by_http_is_answered_with_what_is_wrong() -> None:
    post = "curl -s -o - -w '%{http_code}' -d" if shutil.which("curl") else None
    command = f"{post} nonsense $AGL_REWARD_URL" if post else PYTHON_POST.replace('b"0.1"', 'b"nonsense"')
    done = await ran(command)
    assert "422" in (done.stdout if post else done.reason)


async def test_much_output_is_kept_at_both_ends() -> None:
    done = await ran("echo first; yes | head -c 3000000; echo last >&2; echo 0.5", output_bytes=4096)
    assert done.reward == 0.5
    assert done.stdout.startswith("first\n")
    assert "bytes are left out" in done.stdout
    assert len(done.stdout) < 5000
    messages = {each.attributes.get("program.stream"): each for each in done.spans if each.name == agl.AGL_MESSAGE}
    assert messages["stdout"].attributes["program.bytes"] == 3_000_010
    assert agl.get_message_value(messages["stderr"]) == "last\n"


def alive(mark: str) -> list[psutil.Process]:
    """Processes that have this in their environment, and are not zombies."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TEST_MARK") == mark:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.parametrize(
    "command",
    ["sleep 61 & sleep 62", "trap '' TERM; sleep 61 & while true; do sleep 1; done"],
    ids=["two", "stubborn"],
)
async def test_a_timeout_stops_the_whole_group(command: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = await ran(f"echo begun; {command}", timeout=0.5, env={"TEST_MARK": str(tmp_path)}, stop_seconds=0.3)
    assert (done.status, "not finished within 0.5 s" in done.reason) == ("failed", True)
    assert done.stdout == "begun\n"  # what it said before is kept
    assert time.monotonic() - began < 10
    assert alive(str(tmp_path)) == []


async def test_what_a_program_leaves_behind_is_stopped(tmp_path: Path) -> None:
    done = await ran("sleep 61 & echo 0.5", env={"TEST_MARK": str(tmp_path)})
    assert done.reward == 0.5
    assert alive(str(tmp_path)) == []


def test_the_harness_sees_what_is_alive(tmp_path: Path) -> None:
    pid = os.spawnvpe(os.P_NOWAIT, "sleep", ["sleep", "60"], os.environ | {"TEST_MARK": str(tmp_path)})
    try:
        deadline = time.monotonic() + 10
        while not alive(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)  # until it has begun
        assert [process.pid for process in alive(str(tmp_path))] == [pid]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_an_empty_command_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        agl.ProgramAgent("  ")


# --- A place of its own for each attempt -------------------------------------------------------------

_SHOW = """python3 -c '
import json, os
left = {name: os.path.exists(os.path.join(folder, "left")) for name, folder in
        (("home", os.environ["HOME"]), ("tmp", os.environ.get("TMPDIR", "/")), ("cwd", "."))}
for folder in (os.environ["HOME"], os.environ.get("TMPDIR"), "."):
    if folder: open(os.path.join(folder, "left"), "w").close()
print(json.dumps([left, os.getcwd(), dict(os.environ)]))'"""


async def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **agent: Any) -> tuple[dict[str, bool], str, Any]:
    """What the second of two attempts finds: what the first one left, its folder, its environment."""
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("A_SECRET", "1")
    monkeypatch.setenv("WANTED", "2")
    await ran(_SHOW, cwd=str(tmp_path), **agent)
    done = await ran(_SHOW, cwd=str(tmp_path), **agent)
    return tuple(json.loads(done.stdout))


async def test_nothing_of_an_earlier_attempt_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left, cwd, env = await shown(monkeypatch, tmp_path, fresh_cwd=True, fresh_home=True)
    assert left == {"home": False, "tmp": False, "cwd": False}
    assert "XDG_CACHE_HOME" not in env
    assert env["AGL_AGENT_FOLDER"] == str(tmp_path)
    assert not any(Path(each).exists() for each in (cwd, env["HOME"], env["TMPDIR"]))


async def test_by_default_everything_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Negative control."""
    left, cwd, env = await shown(monkeypatch, tmp_path)
    assert left == {"home": True, "tmp": True, "cwd": True}
    assert cwd == str(tmp_path)
    assert {"XDG_CACHE_HOME", "A_SECRET", "WANTED"} <= env.keys()


async def test_only_declared_variables_are_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, _, env = await shown(monkeypatch, tmp_path, pass_env=["WANTED"], env={"OURS": "3"})
    assert (env["WANTED"], env["OURS"]) == ("2", "3")
    assert os.environ["PATH"] in env["PATH"]  # a wrapper of the interpreter may have added to it
    assert "A_SECRET" not in env
    assert {"AGL_TASK", "AGL_REWARD_URL", "AGL_ROLLOUT_ID", "HOME"} <= env.keys()


async def test_opentelemetry_finds_the_attempt_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,agentlightning.rollout_id=wrong")
    program = (
        "from opentelemetry.sdk.resources import Resource; import json, os; "
        "print(json.dumps([dict(Resource.create().attributes), os.environ['AGL_ROLLOUT_ID'], "
        "os.environ['AGL_ATTEMPT_ID']]))"
    )
    done = await ran([sys.executable, "-c", program])
    attributes, rollout_id, attempt_id = json.loads(done.stdout)
    assert attributes["agentlightning.rollout_id"] == rollout_id
    assert attributes["agentlightning.attempt_id"] == attempt_id
    assert attributes["service.name"] == "mine"

"""`agl proxy` as a user starts it: a process of its own, with its store behind HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.semconv import LLMCallAttributes as Call
from command_line import agl, clean_environment
from openai_backend import WAIT_SECONDS, Hold, OpenAIBackend
from proxied import MESSAGES, attribute
from served_store import served

KEY, CONTROL_KEY, STORE_KEY = "key-for-agents-0123", "key-for-control-0123", "key-for-the-store-0123"


@contextmanager
def program(*words: object, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`agl` with these words, and the line that says where it serves."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "agentlightning", *(str(word) for word in words)],
        env=clean_environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(WAIT_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http" in line, (line, process.communicate())
        yield process, line
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate()


def url_in(line: str) -> str:
    found = re.search(r"at (http\S+)/v1", line)
    assert found
    return found[1]


async def steer(url: str, what: str, key: str = CONTROL_KEY, **body: Any) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{url}/control/{what}", json=body) as response,
    ):
        return response.status, await response.json()


def test_the_proxy_as_a_program_with_its_store_on_a_server(tmp_path: Path) -> None:
    secret = "sk-upstream-from-environment"
    env = {"POLICY_KEY": secret, "JUDGE_KEY": secret, "AGL_PROXY_KEY": KEY, "AGL_PROXY_CONTROL_KEY": CONTROL_KEY}
    env |= {"AGL_API_KEY": STORE_KEY, "AGL_SPOOL_DIR": str(tmp_path / "spool")}
    with OpenAIBackend(key=secret) as backend, served(tmp_path / "store.db", api_key=STORE_KEY) as server:
        config = tmp_path / "models.json"
        entry = backend.entry("judge", api_key="os.environ/JUDGE_KEY")
        config.write_text(json.dumps({"model_list": [entry]}), encoding="utf-8")
        words = ("--model", f"policy={backend.url}", "--upstream-key-env", "POLICY_KEY", "--config", config)
        with program("proxy", *words, "--port", 0, "--url", server.endpoint, **env) as (process, line):
            assert line.startswith("serving policy, judge at ")
            asyncio.run(_use(process, url_in(line), backend, server.endpoint))


async def _use(process: subprocess.Popen[str], url: str, backend: OpenAIBackend, store_url: str) -> None:
    hold = Hold(0)
    store = LightningStoreClient(store_url, api_key=STORE_KEY)
    try:
        rollout = await store.start_rollout({"question": "any"})
        base = f"{url}/rollout/{rollout.rollout_id}/attempt/{rollout.attempt.attempt_id}/v1"
        async with AsyncOpenAI(base_url=base, api_key=KEY, max_retries=0) as agent:
            await _steering(agent, url)
            for _ in range(3):
                await agent.chat.completions.create(model="judge", messages=MESSAGES)
            assert len(list(await store.query_spans(rollout.rollout_id))) == 4
            backend.plan(hold)
            last = asyncio.create_task(agent.chat.completions.create(model="policy", messages=MESSAGES))
            assert await asyncio.to_thread(hold.reached.wait, WAIT_SECONDS)
            process.send_signal(signal.SIGTERM)
            hold.release.set()
            assert (await last).choices[0].message.content, "a call in flight may end"
        assert await asyncio.to_thread(process.wait, WAIT_SECONDS) == 0
        spans = list(await store.query_spans(rollout.rollout_id))
        assert [attribute(span, Call.MODEL_VERSION) for span in spans] == ["step-7", *["fp-test"] * 3, "step-7"]
    finally:
        await store.close()


async def _steering(agent: AsyncOpenAI, url: str) -> None:
    """Pause, new weights, resume; all by HTTP, and not with the key that agents have."""
    status, body = await steer(url, "pause", key=KEY)
    assert (status, body["error"]["code"]) == (401, "invalid_control_key")
    assert await steer(url, "pause", hold_seconds=0, retry_after_seconds=0.01) == (200, {"calls_in_flight": 0})
    call = asyncio.create_task(
        agent.with_options(max_retries=1000).chat.completions.create(model="policy", messages=MESSAGES)
    )
    assert await steer(url, "model_version", version="step-7", model="policy") == (200, {"policy": "step-7"})
    imposed = {"temperature": 1.0, "seed": None}
    assert await steer(url, "sampling", parameters=imposed, model="policy") == (200, {"policy": imposed})
    status, body = await steer(url, "sampling", parameters={"stop": 1})
    assert (status, body["error"]["param"]) == (422, "parameters")
    status, body = await steer(url, "pause", hold_seconds=-1)
    assert (status, body["error"]["param"]) == (422, "hold_seconds")
    assert (await steer(url, "resume"))[0] == 200
    assert (await call).choices[0].message.content


def test_without_a_key_there_is_no_steering_and_ctrl_c_ends_the_program() -> None:
    with OpenAIBackend() as backend:
        words = ("proxy", "--model", f"policy={backend.url}", "--port", 0, "--no-record", "--host", "0.0.0.0")
        with program(*words, AGL_SERVER_URL="ftp://no-store") as (process, line):  # which nobody asks for
            assert process.stdout is not None
            told = process.stdout.readline()
            key = told.split()[6]
            url = url_in(line)
            assert asyncio.run(steer(url, "pause"))[0] == 404

            async def ask() -> str | None:
                async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as agent:
                    reply = await agent.chat.completions.create(model="policy", messages=MESSAGES)
                    return reply.choices[0].message.content

            assert asyncio.run(ask())
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT_SECONDS) == 0
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ((), 2, "give --model NAME=URL"),
        (("--model", "policy"), 2, "write NAME=URL"),
        (("--model", "policy=nowhere"), 2, "give a URL such as"),
        (("--config", "models.yaml"), 2, "neither .toml nor .json"),
        (("--config", "absent.toml"), 2, "No such file"),
        (
            ("--model", "p=http://127.0.0.1:9/v1", "--upstream-key-env", "AGL_NOT_SET"),
            2,
            "AGL_NOT_SET, which is not set",
        ),
        (("--model", "p=http://127.0.0.1:9/v1", "--url", "http://127.0.0.1:9"), 4, "127.0.0.1:9"),
        (("--url", "ftp://no-store"), 2, "ftp://no-store"),
        (("--url", "ftp://no-store", "--no-record"), 2, "give --model NAME=URL"),
    ],
)
def test_what_is_wrong_is_said(words: tuple[str, ...], code: int, text: str, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("model_list: []", encoding="utf-8")
    located = [str(tmp_path / word) if word.endswith((".yaml", ".toml")) else word for word in words]
    done = agl("proxy", *located)
    assert done.code == code
    assert text in " ".join(done.err.split()), done


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("model_list = 3", "has no model_list"),
        ("x = [", "cannot be understood"),
        ('port = 3\n[[model_list]]\nmodel_name = "p"', "has port beside model_list"),
        ('[[model_list]]\nmodel_name = "p"', "litellm_params"),
    ],
)
def test_a_config_file_that_is_wrong(content: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(content, encoding="utf-8")
    done = agl("proxy", "--config", path, "--no-record")
    assert done.code == 2
    assert text in " ".join(done.err.split()), done

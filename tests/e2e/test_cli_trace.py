"""`agl trace`: an attempt whose calls the real proxy recorded, read as a transcript."""

from __future__ import annotations

import asyncio
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError

import agentlightning as agl
from agentlightning.cli.app import main
from agentlightning.cli.terminal import ExitCode
from agentlightning.types import Span
from command_line import agl as command
from openai_backend import Fail, OpenAIBackend
from proxied import proxied

TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
LONG = "\n".join(f"rule {number}: be brief" for number in range(200))
HOSTILE = "rain\x1b[2J in Paris"


async def talk(path: Path) -> str:
    """An agent that calls a tool, answers, is refused once, asks for a title, and gets a reward; its rollout's id."""
    backend = OpenAIBackend()
    async with proxied(backend, into=agl.SqliteLightningStore(path)) as scene, scene.client() as client:
        messages: list[Any] = [{"role": "system", "content": LONG}, {"role": "user", "content": "Weather in Paris?"}]
        asked = await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])
        said = asked.choices[0].message
        (called,) = said.tool_calls or []
        messages += [said.model_dump(exclude_none=True)]
        messages += [{"role": "tool", "tool_call_id": called.id, "content": HOSTILE}]
        await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])
        backend.plan(Fail(400, {"error": {"message": "too long", "type": "invalid_request_error", "code": None}}))
        with pytest.raises(APIStatusError):
            await client.chat.completions.create(model="policy", messages=[*messages, messages[1]], tools=[TOOL])
        await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "A title, please"}])
        attempt = await scene.store.get_latest_attempt(scene.rollout_id)
        assert attempt is not None
        reward = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 0.75}
        await scene.store.add_span(
            Span.from_attributes(
                rollout_id=scene.rollout_id,
                attempt_id=attempt.attempt_id,
                attributes=reward,
                name="agentlightning.annotation",
            )
        )
        await scene.store.update_attempt(
            scene.rollout_id, attempt.attempt_id, "failed", reason_code="agent_error", reason_message="gave up"
        )
        return scene.rollout_id


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("talked") / "store.db"
    return path, asyncio.run(talk(path))


def test_it_reads_from_the_first_word_to_the_reward(talked: tuple[Path, str]) -> None:
    path, rollout_id = talked
    text = command("trace", rollout_id, "--url", path).ok().out
    head, *lines = text.splitlines()
    assert re.match(rf"{rollout_id}  attempt 1  failed \(agent_error\)  .*  4 model calls  ", head)
    assert head.endswith("9 → 8 tokens  reward 0.75")
    headings = [line.split("  ")[0] for line in lines if line and not line.startswith(" ")]
    assert headings == [
        *("system", "user", "assistant", "tool", "assistant", "user", "assistant", "user", "assistant"),
        *("reward", "failed: gave up"),
    ]
    assert "    rule 11: be brief\n    … " in text
    assert "rule 12:" not in text
    assert '    → weather({"city":"Paris"})'.replace(" ", "") in text.replace(" ", "")
    assert re.search(r"^assistant  policy, 3 → 0 tokens, finish reason tool_calls, ", text, re.M)
    assert re.search(r"^assistant  policy, 3 → 4 tokens, finish reason stop, ", text, re.M)
    assert re.search(r"^tool  call-\S+\n    rain. in Paris$", text.replace("[2J", ""), re.M)
    assert "✗ the call failed: " in text
    assert "too long" in text
    assert re.search(r"^user  side call\n    A title, please$", text, re.M)
    assert "\x1b" not in text
    assert not re.search(r" +$", text, re.M), "no line ends in blanks"


def test_long_texts_are_whole_on_request(talked: tuple[Path, str]) -> None:
    path, rollout_id = talked
    text = command("trace", rollout_id, "--full", "--url", path).ok().out
    assert "    rule 199: be brief\n\nuser" in text
    assert "more characters" not in text


def test_programs_get_the_entries_whole(talked: tuple[Path, str]) -> None:
    path, rollout_id = talked
    told = command("trace", rollout_id, "--json", "--url", path).ok().json
    assert command("trace", rollout_id, "-o", "json", "--url", path).ok().json == told
    assert (told["rollout"]["rollout_id"], told["attempt"]["sequence_id"], told["reward"]) == (rollout_id, 1, 0.75)
    assert [each["kind"] for each in told["entries"]].count("reply") == 4
    assert told["entries"][0]["text"] == LONG
    assert told["entries"][3]["text"] == HOSTILE
    (called,) = told["entries"][2]["tool_calls"]
    assert called["name"] == "weather"
    assert [each["side"] for each in told["entries"]].count("side call") == 2


def test_fewer_spans_than_there_are_is_said(talked: tuple[Path, str]) -> None:
    path, rollout_id = talked
    some = command("trace", rollout_id, "--limit", "1", "--url", path)
    assert some.code == ExitCode.OK
    assert "the first 1 of 5 spans; more with --limit" in some.err
    assert "1 model call" in some.out


class Terminal(io.StringIO):
    """Standard output that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_roles_have_colours_and_lines_fit(
    talked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rollout_id = talked
    for name, value in {"TERM": "xterm", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with redirect_stdout(Terminal()) as out, pytest.raises(SystemExit):
        main(["trace", rollout_id, "--url", str(path)])
    text = out.getvalue()
    assert "\x1b[1;34muser" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= 60


def test_an_attempt_without_model_calls_says_so(tmp_path: Path) -> None:
    async def work() -> str:
        async with agl.SqliteLightningStore(tmp_path / "s.db") as store:
            begun = await store.start_rollout(1)
            ids: dict[str, Any] = {"rollout_id": begun.rollout_id, "attempt_id": begun.attempt.attempt_id}
            await store.add_span(Span.from_attributes(attributes={}, name="agent", **ids))
            return begun.rollout_id

    text = command("trace", asyncio.run(work()), "--url", tmp_path / "s.db").ok().out
    assert "No model calls were recorded; `agl trace --spans` shows what was." in text

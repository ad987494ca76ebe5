"""Functions become agents that get what their parameters ask for."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import agentlightning as agl
from agentlightning.litagent.litagent import is_v0_1_rollout_api
from agentlightning.types import LLM, Attempt, AttemptedRollout, PromptTemplate, ProxyLLM, Rollout

LLM_RESOURCE = LLM(endpoint="http://h/v1", model="m")
PROXY = ProxyLLM(endpoint="http://p/v1", model="m")
PROMPT = PromptTemplate(template="{x}", engine="f-string")


def attempted() -> AttemptedRollout:
    attempt = Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0)
    return AttemptedRollout(rollout_id="ro-1", input="task", start_time=0.0, attempt=attempt)


@agl.rollout
def importable(task: Any) -> float:
    """An agent that can be found by its name."""
    return float(task)


def test_parameters_are_filled_by_name() -> None:
    resources: Any = {"p": PROMPT, "m": LLM_RESOURCE}
    rollout = attempted()
    assert agl.rollout(lambda task, llm: (task, llm)).rollout("t", resources, rollout) == ("t", LLM_RESOURCE)
    assert agl.rollout(lambda task, prompt_template: prompt_template).rollout("t", resources, rollout) is PROMPT
    assert agl.rollout(lambda task, resources: resources).rollout("t", resources, rollout) is resources
    assert agl.rollout(lambda task, rollout: rollout).rollout("t", resources, rollout) is rollout
    both = agl.rollout(lambda task, llm, rollout, extra=5: (llm, rollout, extra))
    assert both.rollout("t", resources, rollout) == (LLM_RESOURCE, rollout, 5)


async def test_coroutine_functions() -> None:
    @agl.llm_rollout
    async def agent(task: Any, llm: LLM) -> float:
        return 0.5

    assert agent.is_async()
    assert await agent.validation_rollout_async("t", {"m": LLM_RESOURCE}, attempted()) == 0.5
    with pytest.raises(RuntimeError, match="await"):
        agent.rollout("t", {}, attempted())
    with pytest.raises(RuntimeError, match="plain function"):
        await importable.rollout_async("t", {}, attempted())


def test_a_proxy_is_told_whose_calls_these_are() -> None:
    strip = agl.llm_rollout(lambda task, llm: llm)
    llm: Any = strip.rollout("t", {"m": PROXY}, attempted())
    assert type(llm) is LLM
    assert llm.endpoint == "http://p/rollout/ro-1/attempt/at-1/v1"
    keep = agl.llm_rollout(strip_proxy=False)(lambda task, llm: llm)
    assert keep.rollout("t", {"m": PROXY}, attempted()) is PROXY
    with pytest.raises(ValueError, match="without its attempt"):
        strip.rollout("t", {"m": PROXY}, Rollout(rollout_id="ro-1", input="t", start_time=0.0))


def test_a_missing_resource_is_an_error_that_names_what_there_is() -> None:
    agent = agl.prompt_rollout(lambda task, prompt_template: 1)
    with pytest.raises(ValueError, match=r"prompt template.*m \(LLM\)"):
        agent.rollout("t", {"m": LLM_RESOURCE}, attempted())


def test_of_several_the_first_is_taken_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    other = LLM(endpoint="http://o/v1", model="o")
    agent = agl.llm_rollout(lambda task, llm: llm)
    assert agent.rollout("t", {"a": LLM_RESOURCE, "b": other}, attempted()) is LLM_RESOURCE
    assert "first of several" in caplog.text


@pytest.mark.parametrize(
    "function",
    [
        lambda: 1,
        lambda x: 1,
        lambda llm, task: 1,
        lambda task, unknown: 1,
        lambda task, llm, prompt_template: 1,
    ],
)
def test_other_signatures_are_refused(function: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"\(task, llm\)"):
        agl.rollout(function)


def test_the_special_decorators_insist_on_their_parameter() -> None:
    with pytest.raises(NotImplementedError, match="llm"):
        agl.llm_rollout(lambda task: 1)
    with pytest.raises(NotImplementedError, match="prompt_template"):
        agl.prompt_rollout()(lambda task: 1)


def test_an_agent_still_is_its_function() -> None:
    assert importable(3) == 3.0
    assert importable.__name__ == "importable"
    assert importable.__doc__ is not None


def test_agents_travel_to_other_processes(tmp_path: Path) -> None:
    """By name where there is one; by value from a script, whose functions no other process can import."""
    (tmp_path / "named.py").write_text(
        "import agentlightning as agl\n\n@agl.rollout\ndef agent(task):\n    return 2.0\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import pickle, sys, cloudpickle, agentlightning as agl
        import named

        @agl.rollout
        def agent(task):
            return factor * task
        factor = 2

        by_name = pickle.dumps(named.agent)
        assert b"named" in by_name and len(by_name) < 200
        sys.stdout.buffer.write(cloudpickle.dumps((agent, named.agent)))
        """)
    )
    sent = subprocess.run([sys.executable, script], capture_output=True, check=True, cwd=tmp_path).stdout
    receive = "import sys, pickle; a, b = pickle.load(sys.stdin.buffer); print(a.rollout(4, {}, None), b(1))"
    got = subprocess.run([sys.executable, "-c", receive], input=sent, capture_output=True, check=True, cwd=tmp_path)
    assert got.stdout.split() == [b"8", b"2.0"]


def test_a_local_agent_travels_by_value() -> None:
    factor = 3

    @agl.rollout
    def agent(task: int) -> float:
        return float(task * factor)

    agent.set_trainer(object())
    copied = pickle.loads(cloudpickle.dumps(agent))
    assert copied.rollout(2, {}, attempted()) == 6.0
    with pytest.raises(ValueError, match="no trainer"):
        copied.get_trainer()


def test_agents_by_class() -> None:
    class Sync(agl.LitAgent[int]):
        def rollout(self, task: int, resources: Any, rollout: Any) -> float:
            return 1.0

        def training_rollout(self, task: int, resources: Any, rollout: Any) -> float:
            return 2.0

    class Async(agl.LitAgent[int]):
        async def training_rollout_async(self, task: int, resources: Any, rollout: Any) -> float:
            return 3.0

    assert not Sync().is_async()
    assert Async().is_async()
    assert Sync().validation_rollout(1, {}, attempted()) == 1.0
    for missing in (lambda: agl.LitAgent[int]().rollout(1, {}, attempted()), Sync().get_runner, Sync().get_trainer):
        with pytest.raises((NotImplementedError, ValueError)):
            missing()


def test_methods_of_v0_1_are_known() -> None:
    assert is_v0_1_rollout_api(lambda task, rollout_id, resources: 1)
    assert not is_v0_1_rollout_api(lambda task, resources, rollout: 1)

"""Every module path and name that scripts of agentlightning 0.3 import answers, or says what to use instead."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import cloudpickle
import pytest

import agentlightning as agl
from agentlightning.compat import OLD_NAMES, REPLACED, removed


def full(module: str) -> str:
    return module if module == "agentlightning" else f"agentlightning.{module}"


@pytest.mark.parametrize("module", OLD_NAMES)
def test_a_module_of_03_answers_for_each_of_its_names(module: str) -> None:
    found = importlib.import_module(full(module))
    for name in OLD_NAMES[module].split():
        try:
            value = getattr(found, name)
        except ImportError as error:
            assert name in str(error)
            assert "is not offered any more: " in str(error)
        else:
            assert value is not None or name == "TaskInput"
            if name in agl.__all__:
                assert value is getattr(agl, name)


@pytest.mark.parametrize(
    ("statement", "public"),
    [
        ("from agentlightning.store.client_server import LightningStoreServer", "LightningStoreServer"),
        ("from agentlightning.litagent import LitAgent", "LitAgent"),
        ("from agentlightning.litagent.decorator import rollout", "rollout"),
        ("from agentlightning.litagent.decorator import FunctionalLitAgent", "FunctionalLitAgent"),
        ("from agentlightning.runner.agent import Hook", "Hook"),
        ("from agentlightning.types.core import RolloutConfig", "RolloutConfig"),
        ("from agentlightning.reward import find_final_reward", "find_final_reward"),
        ("from agentlightning.store.memory import InMemoryLightningStore", "InMemoryLightningStore"),
        ("from agentlightning.emitter.message import emit_message", "emit_message"),
        ("from agentlightning.execution.base import LightningStore", "LightningStore"),
        ("import agentlightning.emitter.reward\nfrom agentlightning.emitter import reward", "reward"),
        ("import agentlightning.reward\nfrom agentlightning import reward", "reward"),
        ("import agentlightning.llm_proxy\nLLMProxy = agentlightning.llm_proxy.LLMProxy", "LLMProxy"),
    ],
)
def test_statements_of_scripts(statement: str, public: str) -> None:
    """In a process that has imported nothing yet."""
    program = f"{statement}\nimport agentlightning as agl\nassert {public} is agl.{public}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("from agentlightning import VERL", "agl.GRPO"),
        ("from agentlightning.algorithm.verl import VERL", "agl.GRPO"),
        ("from agentlightning.store.mongo import MongoLightningStore", "agl.SqliteLightningStore"),
        ("from agentlightning.tracer.agentops import AgentOpsTracer", "agl.OtelTracer"),
        ("from agentlightning.store.collection import KeyValue", "agl.SqliteLightningStore"),
        ("from agentlightning.utils.metrics import PrometheusMetricsBackend", "GET /metrics"),
        ("from agentlightning.utils.server_launcher import PythonServerLauncher", "agl.LightningStoreServer"),
        ("from agentlightning.algorithm.utils import T_task", "define your own"),
    ],
)
def test_what_is_gone_says_what_to_use(statement: str, hint: str) -> None:
    with pytest.raises(ImportError, match="not offered any more") as caught:
        exec(statement, {})  # noqa: S102 - an import statement as a script has it
    assert hint in str(caught.value)


def test_each_replacement_is_used() -> None:
    gone = set()
    for module, names in OLD_NAMES.items():
        for name in names.split():
            try:
                getattr(importlib.import_module(full(module)), name)
            except ImportError:
                gone.add(name)
    messages = {removed(name) for name in gone}
    for _, text in REPLACED:
        assert any(text in message for message in messages), text


def test_names_that_03_did_not_have_stay_unknown() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Trainr'"):
        exec("from agentlightning.trainer import Trainr", {})  # noqa: S102
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("agentlightning.no_such_module")
    assert not hasattr(importlib.import_module("agentlightning.runner"), "Trainer"), "0.3 had it elsewhere"


def test_a_function_that_refers_to_the_package_can_be_shipped() -> None:
    emitter = importlib.import_module("agentlightning.emitter")

    def agent() -> object:
        return agl.emit_reward, emitter.emit_reward

    again = pickle.loads(cloudpickle.dumps(agent))
    assert again() == agent()
    assert pickle.loads(cloudpickle.dumps(agl)) is agl

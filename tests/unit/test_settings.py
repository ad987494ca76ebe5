"""Environment variables: an argument wins over them, and they win over the default."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentlightning.errors import InvalidValue
from agentlightning.settings import (
    LightningEnvVar,
    resolve_bool_env_var,
    resolve_int_env_var,
    resolve_str_env_var,
)

MANAGED = LightningEnvVar.AGL_MANAGED_STORE
PORT = LightningEnvVar.AGL_SERVER_PORT
HOST = LightningEnvVar.AGL_SERVER_HOST


def test_each_variable_has_its_own_name() -> None:
    assert [each.name for each in LightningEnvVar] == [each.value for each in LightningEnvVar]


@pytest.mark.parametrize("resolve", [resolve_bool_env_var, resolve_int_env_var, resolve_str_env_var])
def test_nothing_is_none(resolve: Callable[[LightningEnvVar], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MANAGED.value, raising=False)
    assert resolve(MANAGED) is None


@pytest.mark.parametrize("text", ["1", "true", "yes", "on", "TRUE", " On "])
def test_words_for_true(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANAGED.value, text)
    assert resolve_bool_env_var(MANAGED, fallback=False) is True
    assert resolve_bool_env_var(MANAGED, False) is False


@pytest.mark.parametrize("text", ["0", "false", "no", "off", "False"])
def test_words_for_false(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANAGED.value, text)
    assert resolve_bool_env_var(MANAGED, fallback=True) is False
    assert resolve_bool_env_var(MANAGED, True) is True


@pytest.mark.parametrize("text", ["", "2", "maybe"])
def test_other_words_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MANAGED.value, text)
    with pytest.raises(InvalidValue, match=r"AGL_MANAGED_STORE is .*; set it to 1"):
        resolve_bool_env_var(MANAGED)


def test_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PORT.value, raising=False)
    assert resolve_int_env_var(PORT, fallback=4747) == 4747
    monkeypatch.setenv(PORT.value, "80")
    assert resolve_int_env_var(PORT, fallback=4747) == 80
    assert resolve_int_env_var(PORT, 0) == 0
    monkeypatch.setenv(PORT.value, "eighty")
    with pytest.raises(ValueError, match="AGL_SERVER_PORT is 'eighty'; set it to a whole number"):
        resolve_int_env_var(PORT)


def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOST.value, raising=False)
    assert resolve_str_env_var(HOST, fallback="localhost") == "localhost"
    monkeypatch.setenv(HOST.value, "10.0.0.1")
    assert resolve_str_env_var(HOST, fallback="localhost") == "10.0.0.1"
    assert resolve_str_env_var(HOST, "10.0.0.2") == "10.0.0.2"

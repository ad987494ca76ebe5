"""The model list: what is understood, and what is refused without showing a key."""

from __future__ import annotations

from typing import Any

import pytest

from agentlightning import LLMProxy
from agentlightning.errors import InvalidValue
from agentlightning.proxy.dialects import ChatCompletions, Completions
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS
from agentlightning.proxy.models import ModelBackend, backends_of

URL = "http://gpu:8000/v1"
CHAT, TEXT = ChatCompletions(), Completions()


def backend_of(model: str = "openai/m", /, **params: Any) -> ModelBackend:
    """The backend of one entry."""
    entry: Any = {"model_name": "policy", "litellm_params": {"model": model, "api_base": URL, **params}}
    return backends_of([entry])["policy"][0]


@pytest.mark.parametrize(
    ("model", "upstream"),
    [
        ("openai/gpt-4o", "gpt-4o"),
        ("hosted_vllm/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("policy", "policy"),
    ],
)
def test_what_stands_before_the_model_says_only_that_the_protocol_is_openais(model: str, upstream: str) -> None:
    assert backend_of(model).upstream_model == upstream


def test_an_entry_is_understood() -> None:
    backend = backend_of(
        api_key="sk-1", timeout=5, temperature=0.5, max_tokens=9, extra_body={"seed": 1}, extra_headers={"x-a": "b"}
    )
    assert (backend.name, backend.base_url, backend.timeout_seconds) == ("m@gpu:8000", URL, 5.0)
    assert (backend.defaults, backend.overrides) == ({"temperature": 0.5, "max_tokens": 9}, {"seed": 1})
    assert backend.headers == {"x-a": "b"}
    assert "sk-1" not in repr(backend)


def test_backends_of_one_address_have_names_of_their_own() -> None:
    entry: Any = {"model_name": "policy", "litellm_params": {"model": "openai/m", "api_base": URL}}
    assert [backend.name for backend in backends_of([entry] * 3)["policy"]] == [
        "m@gpu:8000",
        "m@gpu:8000#2",
        "m@gpu:8000#3",
    ]


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-mine")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert backend_of(api_key="os.environ/MY_KEY").api_key == "sk-mine"
    assert backend_of().api_key is None, "the key for OpenAI is for OpenAI only"
    plain: Any = {"model_name": "policy", "litellm_params": {"model": "openai/gpt-4o"}}
    backend = backends_of([plain])["policy"][0]
    assert (backend.base_url, backend.api_key) == ("https://api.openai.com/v1", "sk-openai")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"model": "anthropic/claude"}, "anthropic has an API of its own"),
        ({"model": ""}, "length >= 1.*model"),
        ({"model": "hosted_vllm/m", "api_base": None}, "no api_base"),
        ({"api_base": "gpu:8000"}, "give a URL such as"),
        ({"api_base": "http://gpu:x/v1"}, "is no URL"),
        ({"api_base": "http://u:sk-secret@gpu/v1"}, "user or key inside of api_base"),
        ({"api_base": "http://gpu/v1?key=sk-secret"}, "has a query"),
        ({"api_key": "os.environ/AGL_NO_SUCH"}, "AGL_NO_SUCH, which is not set"),
        ({"api_key": "sk-secret\n"}, "no HTTP header can carry"),
        ({"api_key": 3}, "got `int`.*api_key"),
        ({"timeout": 0}, "> 0.*timeout"),
        ({"timeout": True}, "got `bool`.*timeout"),
        ({"rpm": 3}, "unknown field `rpm`.*litellm_params .*timeout.*seed"),
        ({"extra_body": 3}, "got `int`.*extra_body"),
    ],
)
def test_what_is_not_understood_is_refused_and_no_key_is_shown(params: dict[str, Any], text: str) -> None:
    given: Any = {"model": "openai/m", "api_base": URL, **params}
    with pytest.raises(InvalidValue, match=text) as caught:
        LLMProxy(model_list=[{"model_name": "policy", "litellm_params": given}])
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (3, "got `int`"),
        ({}, "missing required field `model_name`"),
        ({"model_name": "*", "litellm_params": {}}, "of one model, not a pattern"),
        ({"model_name": "p"}, "missing required field `litellm_params`"),
        ({"model_name": "p", "litellm_params": {}, "weight": 2}, "unknown field `weight`"),
        *(
            (
                {"model_name": "p", "litellm_params": {"model": "m", "api_base": URL}, "model_info": {"ask_for": each}},
                "ask_for",
            )
            for each in (["x"], "usage", 3, [{}])
        ),
    ],
)
def test_an_entry_that_is_none(entry: Any, text: str) -> None:
    with pytest.raises(InvalidValue, match=text):
        backends_of([entry])


def test_a_list_that_is_refused_leaves_the_old_one() -> None:
    entry: Any = {"model_name": "policy", "litellm_params": {"model": "openai/m", "api_base": URL}}
    proxy = LLMProxy(port=1, model_list=[entry])
    with pytest.raises(InvalidValue):
        proxy.update_model_list([{"model_name": "p", "litellm_params": {}}])
    assert proxy.models == ["policy"]


# --- What is asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        ({}, {"token_ids", "logprobs"}),
        ({"stream": True}, {"token_ids", "logprobs", "usage"}),
        ({"stream": True, "stream_options": {"include_usage": True}}, {"token_ids", "logprobs"}),
        ({"stream": True, "stream_options": {"include_usage": False}}, {"token_ids", "logprobs", "usage"}),
        ({"stream": True, "stream_options": 3}, {"token_ids", "logprobs"}),
        ({"logprobs": True, "return_token_ids": True}, set()),
        ({"logprobs": False}, {"token_ids", "logprobs"}),
    ],
)
def test_what_the_agent_asks_for_itself_is_not_missing(body: dict[str, Any], missing: set[str]) -> None:
    assert CHAT.missing_capture(body, CAPTURE_FIELDS) == missing


def test_a_text_completion_asks_for_log_probabilities_by_a_number() -> None:
    assert "logprobs" not in TEXT.missing_capture({"logprobs": 0}, CAPTURE_FIELDS)
    assert TEXT.add_capture({}, frozenset({"logprobs"})) == {"logprobs": 1}


def test_the_request_of_the_agent_stays_as_it_is() -> None:
    body = {"stream": True, "stream_options": {"x": 1}}
    assert CHAT.add_capture(body, CAPTURE_FIELDS) == {
        "stream": True,
        "stream_options": {"x": 1, "include_usage": True},
        "return_token_ids": True,
        "logprobs": True,
    }
    assert body == {"stream": True, "stream_options": {"x": 1}}


def test_an_error_is_about_what_it_names_or_else_about_everything() -> None:
    assert CHAT.blamed_capture(b"Unknown field: return_token_ids", CAPTURE_FIELDS) == {"token_ids"}
    assert CHAT.blamed_capture(b"logprobs and stream_options are not supported", CAPTURE_FIELDS) == {
        "logprobs",
        "usage",
    }
    assert CHAT.blamed_capture(b"bad request", CAPTURE_FIELDS) == CAPTURE_FIELDS

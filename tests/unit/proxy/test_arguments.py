"""Arguments of 0.3: honoured, warned of, or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from agentlightning import LLMProxy
from agentlightning.errors import InvalidValue


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"litellm_config": {"router_settings": {}}}, "router_settings have no effect"),
        ({"num_workers": 4}, "several proxies"),
        ({"launch_mode": "mp"}, "agl proxy"),
        ({"launcher_args": object()}, "host and port"),
        ({"middlewares": ["rollout_attempt", "stream_conversion"]}, "built in"),
    ],
)
def test_what_has_no_effect_is_said_once(given: dict[str, Any], instead: str) -> None:
    with pytest.warns(DeprecationWarning, match=instead) as caught:
        LLMProxy(**given)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points to who called"


def test_the_defaults_of_0_3_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLMProxy(4321, [], None, "127.0.0.1", None, 0, 1, "thread", None, None, None)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"litellm_config": {"model_list": []}}, "as the argument model_list"),
        ({"middlewares": [object]}, "without a record of it"),
        ({"callbacks": ["mine", "opentelemetry"]}, "knows only return_token_ids, logprobs, opentelemetry"),
        ({"callbacks": ["return_token_ids"]}, "always records"),
        ({"callbacks": ["opentelemetry"], "ask_for": []}, "not both"),
        ({"ask_for": ["token-ids"]}, "some of logprobs, token_ids, usage"),
        ({"ask_for": "usage"}, "some of"),
        ({"ask_for": [["usage"]]}, "some of"),
        ({"ask_for": {"usage": True}}, "some of"),
        ({"num_retries": -1}, "at least 0"),
        ({"num_retries": True}, "at least 0"),
        ({"max_calls": 0}, "at least 1"),
        ({"record_wait_seconds": float("nan")}, "seconds, 0 or more"),
        ({"grace_seconds": -1}, "seconds, 0 or more"),
        ({"api_key": "short"}, "not usable"),
        ({"control_key": "has spaces in it"}, "not usable"),
    ],
)
def test_what_would_change_results_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidValue, match=reason):
        LLMProxy(**given)


@pytest.mark.parametrize(
    ("callbacks", "asks"),
    [
        (["return_token_ids", "logprobs", "opentelemetry"], {"token_ids", "logprobs", "usage"}),
        (["opentelemetry"], {"usage"}),
    ],
)
def test_callbacks_say_what_is_asked_for(callbacks: list[str], asks: set[str]) -> None:
    assert LLMProxy(callbacks=callbacks)._settings.capture == asks

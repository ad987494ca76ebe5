"""The arguments of agentlightning 0.3 that `LLMProxy` takes: what they mean here, or that they have no effect."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from agentlightning.errors import InvalidValue
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, CaptureField
from agentlightning.proxy.models import check_capture_fields

_BUILT_IN_MIDDLEWARES = ("rollout_attempt", "stream_conversion", "message_inspection")
"""The middlewares of agentlightning 0.3, whose work this proxy does by itself."""

_FIELDS_OF_CALLBACKS: Mapping[str, frozenset[CaptureField]] = {
    "return_token_ids": frozenset({"token_ids"}),
    "logprobs": frozenset({"logprobs"}),
    "opentelemetry": frozenset({"usage"}),
}
"""The callbacks of agentlightning 0.3 that made LiteLLM capture something."""


def capture_fields(
    ask_for: Collection[CaptureField] | None, callbacks: Sequence[object] | None
) -> frozenset[CaptureField]:
    """Return what backends are asked for. Raises ``InvalidValue`` if that is not clear."""
    if callbacks is None:
        return CAPTURE_FIELDS if ask_for is None else check_capture_fields(ask_for, "ask_for")
    if ask_for is not None:
        raise InvalidValue("give ask_for or callbacks, not both")
    given = [each if isinstance(each, str) else repr(each) for each in callbacks]
    unknown = [each for each in given if each not in _FIELDS_OF_CALLBACKS]
    if unknown:
        raise InvalidValue(
            f"callbacks has {unknown!r}; the proxy has no LiteLLM and knows only {', '.join(_FIELDS_OF_CALLBACKS)} "
            "(in place of the first two, give ask_for)"
        )
    if "opentelemetry" not in given:
        raise InvalidValue(
            "callbacks leaves out 'opentelemetry', but the proxy always records the calls of an attempt; "
            "let agents call the backend itself if nothing is to be recorded"
        )
    return frozenset[CaptureField]().union(*(_FIELDS_OF_CALLBACKS[each] for each in given))


def warn_of_unused(
    litellm_config: Mapping[str, Any] | None,
    num_workers: int,
    launch_mode: str | None,
    launcher_args: object,
    middlewares: Sequence[object] | None,
) -> None:
    """Warn of arguments of 0.3 that have no effect; refuse those that would change what is answered or recorded."""
    if litellm_config and "model_list" in litellm_config:
        raise InvalidValue("litellm_config has a model_list; give it as the argument model_list")
    unknown = [each for each in middlewares or () if each not in _BUILT_IN_MIDDLEWARES]
    if unknown:
        raise InvalidValue(
            f"middlewares has {unknown!r}, which would change requests or replies without a record of it; "
            "put them before the backend, or into the agent's client"
        )
    names = ", ".join(litellm_config or ())
    process = "`agl proxy`, which is a process of its own"
    for argument, is_given, reason, instead in (
        ("litellm_config", bool(litellm_config), f"LiteLLM is not used, so {names} have no effect", "model_list"),
        (
            "num_workers",
            num_workers != 1,
            "one event loop serves all calls",
            "several proxies with the same model_list",
        ),
        ("launch_mode", launch_mode not in (None, "thread"), "the proxy runs in a thread of this process", process),
        ("launcher_args", launcher_args is not None, "there is no launcher", "host and port"),
        ("middlewares", middlewares is not None, "the work of these is built in", "nothing"),
    ):
        if is_given:
            warnings.warn(
                f"LLMProxy({argument}=…) of agentlightning 0.3 has no effect: {reason}; what replaces it: {instead}",
                DeprecationWarning,
                stacklevel=3,
            )

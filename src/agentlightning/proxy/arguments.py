"""The constructor arguments of agentlightning 0.3 that this proxy has no use for.

Each is accepted with one warning that says what replaces it, or refused where the results of a program would differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentlightning.errors import InvalidValue
from agentlightning.proxy.models import Ask

__all__ = ["ask_for_of_callbacks", "warn_of_unused"]

_MIDDLEWARES = frozenset({"rollout_attempt", "stream_conversion", "message_inspection"})
_CALLBACKS: Mapping[str, Ask | None] = {
    "return_token_ids": "token_ids",
    "logprobs": "logprobs",
    "opentelemetry": None,
}


def warn_of_unused(
    *,
    litellm_config: Mapping[str, Any] | None,
    num_workers: int,
    launch_mode: str | None,
    launcher_args: object,
    middlewares: Sequence[object] | None,
) -> None:
    """Say what became of arguments that are not used any more.

    Raises:
        InvalidValue: an argument would change what is answered or recorded, so it cannot be passed over.
    """
    if litellm_config:
        if "model_list" in litellm_config:
            raise InvalidValue("litellm_config has a model_list; give it as the argument model_list")
        _warn("litellm_config", f"LiteLLM is not used, so {', '.join(litellm_config)} have no effect", "model_list")
    if num_workers != 1:
        _warn("num_workers", "one event loop serves all calls", "several proxies with the same model_list")
    if launch_mode is not None and launch_mode != "thread":
        _warn("launch_mode", "the proxy runs in a thread of this process", "`agl proxy`, which is a process of its own")
    if launcher_args is not None:
        _warn("launcher_args", "there is no launcher", "host and port")
    unknown = [each for each in middlewares or () if not (isinstance(each, str) and each in _MIDDLEWARES)]
    if unknown:
        raise InvalidValue(
            f"middlewares has {unknown!r}, which would change requests or replies unseen by the record; "
            "put them before the backend, or into the agent's client"
        )
    if middlewares is not None:
        _warn("middlewares", "what these did is built in", "nothing")


def ask_for_of_callbacks(callbacks: Sequence[object]) -> frozenset[Ask]:
    """What backends are asked for, as ``callbacks`` of 0.3 say it.

    Raises:
        InvalidValue: a callback is unknown, or recording is left out.
    """
    unknown = [each for each in callbacks if not (isinstance(each, str) and each in _CALLBACKS)]
    if unknown:
        raise InvalidValue(
            f"callbacks has {unknown!r}; the proxy has no LiteLLM and knows only {', '.join(_CALLBACKS)} "
            "(in place of the first two, give ask_for)"
        )
    if "opentelemetry" not in callbacks:
        raise InvalidValue(
            "callbacks leaves out 'opentelemetry', but the proxy always records the calls of an attempt; "
            "let agents call the backend itself if nothing is to be recorded"
        )
    asked: set[Ask] = {"usage"}
    for each in cast("Sequence[str]", callbacks):
        ask = _CALLBACKS[each]
        if ask is not None:
            asked.add(ask)
    return frozenset(asked)


def _warn(argument: str, reason: str, instead: str) -> None:
    warnings.warn(
        f"LLMProxy({argument}=…) of agentlightning 0.3 has no effect: {reason}; what replaces it: {instead}",
        DeprecationWarning,
        stacklevel=4,
    )

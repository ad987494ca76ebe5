"""The model list: which backends stand behind a model's name.

An entry has the shape that agentlightning 0.3 took over from LiteLLM::

    {"model_name": "policy",
     "litellm_params": {"model": "openai/Qwen/Qwen3-8B", "api_base": "http://gpu:8000/v1", "api_key": "…"}}

Several entries with one ``model_name`` are several backends of one model. Every backend must take the calls of
OpenAI's API itself, because the proxy sends them no other.
"""

from __future__ import annotations

import itertools
import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, cast
from urllib.parse import urlsplit

import msgspec

from agentlightning.errors import InvalidValue
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, CaptureField


class ModelConfig(TypedDict):
    """One backend of one model."""

    model_name: str
    """What agents call the model."""
    litellm_params: dict[str, Any]
    """``model`` (what the backend calls it, after ``openai/`` or ``hosted_vllm/``), ``api_base`` (its URL, such as
    ``http://host:8000/v1``), ``api_key`` (or ``os.environ/NAME``), ``timeout`` (seconds without a byte),
    ``extra_headers``, ``extra_body``; and sampling parameters, sent where the agent gives none."""
    model_info: NotRequired[dict[str, Any]]
    """``ask_for``: what this backend can be asked for (``token_ids``, ``logprobs``, ``usage``). Not given: the proxy
    finds out by asking."""


@dataclass(frozen=True, slots=True)
class ModelBackend:
    """One endpoint that answers for one model."""

    name: str
    """``model@host:port``: what logs and spans call it."""
    model_name: str
    upstream_model: str
    """What the backend calls the model."""
    base_url: str
    """Without a slash at the end."""
    api_key: str | None = field(repr=False)
    timeout_seconds: float
    """How long it may send nothing."""
    headers: Mapping[str, str] = field(repr=False)
    defaults: Mapping[str, Any]
    """Fields of the request that are used if the agent gives none."""
    overrides: Mapping[str, Any]
    """Fields of the request that replace those of the agent."""
    capture: frozenset[CaptureField] | None
    """The capture fields that it accepts; None: not declared, so the proxy finds out by asking."""


_OPENAI_URL = "https://api.openai.com/v1"
_OPENAI_SHAPED = frozenset({"openai", "hosted_vllm", "vllm", "openai_like", "custom_openai", "litellm_proxy"})
"""Prefixes of ``model`` that only say that the backend has OpenAI's API."""
_OTHER_APIS = frozenset({
    "anthropic", "azure", "bedrock", "cohere", "gemini", "huggingface", "ollama", "replicate", "sagemaker", "vertex_ai",
})  # fmt: skip
"""Prefixes of APIs that LiteLLM translates to and this proxy does not."""
_SAMPLING = frozenset({
    "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "min_p", "n", "presence_penalty",
    "reasoning_effort", "response_format", "seed", "stop", "temperature", "top_k", "top_p", "user",
})  # fmt: skip


class _Params(msgspec.Struct, forbid_unknown_fields=True):
    """The ``litellm_params`` of an entry, without sampling parameters."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    api_base: str | None = None
    base_url: str | None = None
    api_key: str | None = None
    timeout: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 600.0
    extra_headers: dict[str, Any] | None = None
    extra_body: dict[str, Any] | None = None


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of a model list."""

    model_name: Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^*]*$")]
    litellm_params: dict[str, Any]
    model_info: dict[str, Any] | None = None


def backends_of(model_list: Sequence[ModelConfig | dict[str, Any]]) -> dict[str, tuple[ModelBackend, ...]]:
    """Read a model list into the backends of each model, by the model's name. Raises ``InvalidValue`` if an entry is
    not understood; the message names it, and never shows a key."""
    found: dict[str, list[ModelBackend]] = {}
    names: set[str] = set()
    for index, entry in enumerate(model_list):
        backend = _backend_of(entry, f"model_list[{index}]", names)
        names.add(backend.name)
        found.setdefault(backend.model_name, []).append(backend)
    return {name: tuple(backends) for name, backends in found.items()}


def _backend_of(entry: ModelConfig | dict[str, Any], where: str, taken: set[str]) -> ModelBackend:
    try:
        known = msgspec.convert(entry, _Entry)
        sampling = {key: value for key, value in known.litellm_params.items() if key in _SAMPLING}
        others = {key: value for key, value in known.litellm_params.items() if key not in _SAMPLING}
        params = msgspec.convert(others, _Params)
    except msgspec.ValidationError as error:  # says no value
        raise InvalidValue(
            f"{where} is not understood: {error}. It has a model_name (of one model, not a pattern), litellm_params "
            f"({', '.join(_Params.__struct_fields__)}, {', '.join(sorted(_SAMPLING))}), and may have model_info"
        ) from error
    upstream_model, provider = _upstream_model(params.model, where)
    base_url = _base_url(params.api_base or params.base_url, provider, where)
    plain = f"{upstream_model}@{urlsplit(base_url).netloc}"
    names = itertools.chain([plain], (f"{plain}#{number}" for number in itertools.count(2)))
    ask_for = (known.model_info or {}).get("ask_for")
    return ModelBackend(
        name=next(name for name in names if name not in taken),
        model_name=known.model_name,
        upstream_model=upstream_model,
        base_url=base_url,
        api_key=_api_key(params.api_key, base_url, where),
        timeout_seconds=params.timeout,
        headers={key: str(value) for key, value in (params.extra_headers or {}).items()},
        defaults=sampling,
        overrides=params.extra_body or {},
        capture=None if ask_for is None else check_capture_fields(ask_for, f"ask_for of {where}"),
    )


def _upstream_model(model: str, where: str) -> tuple[str, str | None]:
    """Return what the backend calls the model, and the provider that the entry names before it."""
    provider, _, rest = model.partition("/")
    if rest and provider in _OTHER_APIS:
        raise InvalidValue(
            f"{where} has the model {model!r}: {provider} has an API of its own, and this proxy translates none; "
            "put an OpenAI-compatible endpoint in front of it and write openai/MODEL with its api_base"
        )
    return (rest, provider) if rest and provider in _OPENAI_SHAPED else (model, None)


def _base_url(given: str | None, provider: str | None, where: str) -> str:
    if given is None and provider == "openai":
        given = os.environ.get("OPENAI_BASE_URL") or _OPENAI_URL
    if given is None:
        raise InvalidValue(f"{where} has no api_base; give the backend's URL, such as http://127.0.0.1:8000/v1")
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise InvalidValue(f"{where} has an api_base that is no URL: {error}") from error
    if parts.username or parts.password:
        raise InvalidValue(f"{where} has a user or key inside of api_base; give it as api_key")
    if parts.query or parts.fragment:
        raise InvalidValue(f"{where} has a query or fragment inside of api_base; give the URL without")
    if not usable:
        raise InvalidValue(f"{where} has the api_base {given!r}; give a URL such as http://127.0.0.1:8000/v1")
    return given.rstrip("/")


def _api_key(key: str | None, base_url: str, where: str) -> str | None:
    if key is not None and key.startswith("os.environ/"):
        name = key.removeprefix("os.environ/")
        key = os.environ.get(name)
        if not key:
            raise InvalidValue(f"{where} takes its api_key from the environment variable {name}, which is not set")
    if key is None and base_url == _OPENAI_URL:
        key = os.environ.get("OPENAI_API_KEY")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise InvalidValue(f"{where} has an api_key that no HTTP header can carry")
    return key or None


def check_capture_fields(given: object, where: str) -> frozenset[CaptureField]:
    """Return the capture fields that an argument or an entry called ``where`` names. Raises ``InvalidValue`` if it is
    no list of them."""
    try:
        return msgspec.convert(given, frozenset[CaptureField])
    except msgspec.ValidationError as error:
        known = ", ".join(sorted(CAPTURE_FIELDS))
        raise InvalidValue(f"{where} is {given!r}; give a list of some of {known}") from error


def read_model_list(path: Path) -> list[ModelConfig]:
    """Read the ``model_list`` of a TOML or JSON file. Its entries are checked by ``backends_of``. Raises
    ``InvalidValue`` if the file cannot be read, or has no such list."""
    readers: Mapping[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise InvalidValue(f"{str(path)!r} is neither .toml nor .json; write the model list as one of these")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidValue(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidValue(f"{str(path)!r} cannot be understood: {error}") from error
    entries = cast("Mapping[str, Any]", content).get("model_list") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InvalidValue(f"{str(path)!r} has no model_list; give a list of model_name and litellm_params")
    others = sorted(set(cast("dict[str, Any]", content)) - {"model_list"})
    if others:
        raise InvalidValue(f"{str(path)!r} has {', '.join(others)} beside model_list; give options to the command")
    return cast("list[ModelConfig]", entries)


def model_of_word(word: str, api_key: str | None) -> ModelConfig:
    """Make an entry of the model list from ``NAME=URL`` and the backend's key, or ``os.environ/NAME``. Raises
    ``InvalidValue`` if ``word`` does not have that form."""
    name, equals, url = word.partition("=")
    if not (name and equals and url):
        raise InvalidValue(f"{word!r} names no model; write NAME=URL, such as policy=http://gpu:8000/v1")
    params: dict[str, Any] = {"model": f"openai/{name}", "api_base": url}
    return {"model_name": name, "litellm_params": params if api_key is None else {**params, "api_key": api_key}}

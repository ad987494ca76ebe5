"""The model list of `agl proxy`, from a file or from words of the command line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from agentlightning.errors import InvalidValue
from agentlightning.proxy.models import ModelConfig

__all__ = ["model_of_word", "read_model_list"]


def read_model_list(path: Path) -> list[ModelConfig]:
    """The ``model_list`` of a TOML or JSON file.

    Raises:
        InvalidValue: the file cannot be read, or has no such list. What stands in an entry is checked by the proxy.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            content: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            content = json.loads(text)
        else:
            raise InvalidValue(f"{str(path)!r} is neither .toml nor .json; write the model list as one of these")
    except OSError as error:
        raise InvalidValue(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, InvalidValue):
            raise
        raise InvalidValue(f"{str(path)!r} cannot be understood: {error}") from error
    entries = cast("Mapping[str, Any]", content).get("model_list") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InvalidValue(f"{str(path)!r} has no model_list; give a list of model_name and litellm_params")
    others = sorted(set(cast("dict[str, Any]", content)) - {"model_list"})
    if others:
        raise InvalidValue(f"{str(path)!r} has {', '.join(others)} beside model_list; give options to the command")
    return cast("list[ModelConfig]", entries)


def model_of_word(word: str, api_key: str | None) -> ModelConfig:
    """An entry of the model list from ``NAME=URL``.

    Args:
        api_key: the backend's, or ``os.environ/NAME``.

    Raises:
        InvalidValue: it is not of that form.
    """
    name, equals, url = word.partition("=")
    if not (name and equals and url):
        raise InvalidValue(f"{word!r} is no model; write NAME=URL, such as policy=http://gpu:8000/v1")
    params: dict[str, Any] = {"model": f"openai/{name}", "api_base": url}
    return {"model_name": name, "litellm_params": params if api_key is None else {**params, "api_key": api_key}}

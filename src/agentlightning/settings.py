"""The environment variables that Agent Lightning reads, and how their values are understood.

An argument given in code wins over the environment, and the environment over the default.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import overload

from agentlightning.errors import InvalidValue

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class LightningEnvVar(Enum):
    """Every environment variable that is read, by its own name."""

    AGL_EMITTER_DEBUG = "AGL_EMITTER_DEBUG"
    """Whether spans and rewards are logged as they are emitted."""
    AGL_MANAGED_STORE = "AGL_MANAGED_STORE"
    """Whether an execution strategy serves the store by itself."""
    AGL_CURRENT_ROLE = "AGL_CURRENT_ROLE"
    """``algorithm``, ``runner`` or ``both``: what this process is started for."""
    AGL_SERVER_HOST = "AGL_SERVER_HOST"
    """Address at which the store is served, or found."""
    AGL_SERVER_PORT = "AGL_SERVER_PORT"
    """Its port."""
    AGL_SERVER_URL = "AGL_SERVER_URL"
    """The store that commands talk to: ``http://host:port``, or the path of a database file."""
    AGL_API_KEY = "AGL_API_KEY"
    """The key that a server asks for, and that clients send."""
    AGL_SPOOL_DIR = "AGL_SPOOL_DIR"
    """Where spans wait on the disk while the server cannot be reached."""
    AGL_DEBUG = "AGL_DEBUG"
    """Whether commands show tracebacks and logs instead of one-line errors."""
    AGL_PROXY_KEY = "AGL_PROXY_KEY"
    """The key that agents have to show to ``agl proxy``."""
    AGL_PROXY_CONTROL_KEY = "AGL_PROXY_CONTROL_KEY"
    """The key that opens the ``/control`` routes of ``agl proxy``."""
    AGL_RUN_ID = "AGL_RUN_ID"
    """The run that a process belongs to; a runner refuses the server of another one."""
    AGL_WORKER_NAME = "AGL_WORKER_NAME"
    """The worker id of this process, given by whoever supervises it."""


@overload
def resolve_bool_env_var(env_var: LightningEnvVar, override: bool | None = None, *, fallback: bool) -> bool: ...
@overload
def resolve_bool_env_var(env_var: LightningEnvVar, override: bool, fallback: bool | None = None) -> bool: ...
@overload
def resolve_bool_env_var(
    env_var: LightningEnvVar, override: bool | None = None, fallback: bool | None = None
) -> bool | None: ...
def resolve_bool_env_var(
    env_var: LightningEnvVar, override: bool | None = None, fallback: bool | None = None
) -> bool | None:
    """A switch: ``override`` if given, else the variable, else ``fallback``.

    True is 1, true, yes or on; false is 0, false, no or off; in any case of letters.

    Raises:
        InvalidValue: the variable is set to anything else. (It is a ``ValueError``, too.)
    """
    if override is not None:
        return override
    text = os.environ.get(env_var.value)
    if text is None:
        return fallback
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise InvalidValue(f"{env_var.value} is {text!r}; set it to 1, true, yes or on, or to 0, false, no or off")


@overload
def resolve_int_env_var(env_var: LightningEnvVar, override: int | None = None, *, fallback: int) -> int: ...
@overload
def resolve_int_env_var(env_var: LightningEnvVar, override: int, fallback: int | None = None) -> int: ...
@overload
def resolve_int_env_var(
    env_var: LightningEnvVar, override: int | None = None, fallback: int | None = None
) -> int | None: ...
def resolve_int_env_var(
    env_var: LightningEnvVar, override: int | None = None, fallback: int | None = None
) -> int | None:
    """A whole number: ``override`` if given, else the variable, else ``fallback``.

    Raises:
        InvalidValue: the variable is not a whole number. (It is a ``ValueError``, too.)
    """
    if override is not None:
        return override
    text = os.environ.get(env_var.value)
    if text is None:
        return fallback
    try:
        return int(text)
    except ValueError as error:
        raise InvalidValue(f"{env_var.value} is {text!r}; set it to a whole number") from error


@overload
def resolve_str_env_var(env_var: LightningEnvVar, override: str | None = None, *, fallback: str) -> str: ...
@overload
def resolve_str_env_var(env_var: LightningEnvVar, override: str, fallback: str | None = None) -> str: ...
@overload
def resolve_str_env_var(
    env_var: LightningEnvVar, override: str | None = None, fallback: str | None = None
) -> str | None: ...
def resolve_str_env_var(
    env_var: LightningEnvVar, override: str | None = None, fallback: str | None = None
) -> str | None:
    """A text: ``override`` if given, else the variable, else ``fallback``."""
    return override if override is not None else os.environ.get(env_var.value, fallback)

"""The environment variables that Agent Lightning reads, and how their values are understood.

An argument given in code wins over the environment, and the environment over the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

from agentlightning.errors import InvalidValue

T = TypeVar("T")

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


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
    AGL_TLS_CERTIFICATE = "AGL_TLS_CERTIFICATE"
    """File with the certificate of servers that other machines reach."""
    AGL_TLS_KEY = "AGL_TLS_KEY"
    """File with its private key."""
    AGL_TLS_CA_FILE = "AGL_TLS_CA_FILE"
    """File with the authorities that the certificates of our servers are checked with."""
    AGL_RUN_ID = "AGL_RUN_ID"
    """The run that a process belongs to; a runner refuses the server of another one."""
    AGL_WORKER_NAME = "AGL_WORKER_NAME"
    """The worker id of this process, given by whoever supervises it."""


def state_home() -> Path:
    """Where this user's programs keep what outlives them (XDG Base Directory Specification, ``XDG_STATE_HOME``)."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "agentlightning"


class _Resolve(Protocol[T]):
    """``override`` if given, else the variable, else ``fallback``."""

    @overload
    def __call__(self, env_var: LightningEnvVar, override: T | None = None, *, fallback: T) -> T: ...
    @overload
    def __call__(self, env_var: LightningEnvVar, override: T, fallback: T | None = None) -> T: ...
    @overload
    def __call__(self, env_var: LightningEnvVar, override: T | None = None, fallback: T | None = None) -> T | None: ...


def _resolver(read: Callable[[str], T], expected: str) -> _Resolve[T]:
    def resolve(env_var: LightningEnvVar, override: Any = None, fallback: Any = None) -> Any:
        text = os.environ.get(env_var.value)
        if override is not None or text is None:
            return fallback if override is None else override
        try:
            return read(text)
        except (KeyError, ValueError) as error:
            raise InvalidValue(f"{env_var.value} is {text!r}; set it to {expected}") from error

    return resolve


resolve_bool_env_var = _resolver(
    lambda text: _SWITCH[text.strip().lower()], "1, true, yes or on, or to 0, false, no or off"
)
"""A switch: ``override`` if given, else the variable, in any case of letters, else ``fallback``. Any other value of the
variable raises ``InvalidValue``, which is a ``ValueError``, too."""
resolve_int_env_var = _resolver(int, "a whole number")
"""A whole number: ``override`` if given, else the variable, else ``fallback``. Any other value of the variable raises
``InvalidValue``, which is a ``ValueError``, too."""
resolve_str_env_var = _resolver(str, "a text")
"""A text: ``override`` if given, else the variable, else ``fallback``."""

"""The name of a worker, unique across machines and restarts."""

from __future__ import annotations

import os
import platform
import re
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from agentlightning.settings import LightningEnvVar, resolve_str_env_var

_FOREIGN = re.compile(r"[^A-Za-z0-9._~-]+")
_HOST_CHARACTERS = 64


def worker_name(index: int) -> str:
    """The name of this process's worker number ``index``, the same each time it is asked for.

    A supervisor gives it by ``AGL_WORKER_NAME``, so that a slot keeps its name when its process is started again.
    Otherwise it is ``{host}-{pid}-{start}-{index}``, where start tells the process from others that had its pid.
    """
    given = resolve_str_env_var(LightningEnvVar.AGL_WORKER_NAME)
    if given:
        return given
    start = int(psutil.Process().create_time() * 100) & 0xFFFF_FFFF
    return f"{_host()}-{os.getpid()}-{start:08x}-{index}"


def registration(labels: dict[str, str] | None = None) -> dict[str, Any]:
    """What a worker says of itself when it begins: host, process, versions, and labels of the user's."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_space": process_space(),
        "start_time": psutil.Process().create_time(),
        "python": platform.python_version(),
        "agentlightning": metadata.version("agentlightning"),
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "labels": labels or {},
    }


def process_space() -> str | None:
    """Where process ids of this process mean something: the boot of the machine, and the PID namespace.

    Two processes with the same one can look each other up by their ids. None: it cannot be told here.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _host() -> str:
    return _FOREIGN.sub("-", socket.gethostname()).strip("-")[:_HOST_CHARACTERS] or "host"

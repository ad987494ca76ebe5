"""The name of a worker, unique across machines and restarts, and what it tells the store about itself."""

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

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._~-]+")
_HOST_CHARACTERS = 64


def worker_name(index: int) -> str:
    """The name of this process's worker number ``index``; the same on each call.

    A supervisor sets it by ``AGL_WORKER_NAME``, so that a restarted process keeps the name of its slot.
    Otherwise it is ``{host}-{pid}-{start}-{index}``; the start time tells the process from others that had its pid.
    """
    given = resolve_str_env_var(LightningEnvVar.AGL_WORKER_NAME)
    if given:
        return given
    host = _NOT_IN_IDS.sub("-", socket.gethostname()).strip("-")[:_HOST_CHARACTERS] or "host"
    start = int(psutil.Process().create_time() * 100) & 0xFFFF_FFFF
    return f"{host}-{os.getpid()}-{start:08x}-{index}"


def registration(labels: dict[str, str] | None = None) -> dict[str, Any]:
    """What a worker says about itself when it starts: host, process, versions, and the user's labels."""
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
    """Where this process's pid is valid: the boot id of the machine and the PID namespace.

    Two processes with the same value can look each other up by pid. None: unknown on this platform.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None

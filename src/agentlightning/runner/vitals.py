"""How a worker's process and machine are doing, for its heartbeat."""

from __future__ import annotations

import shutil
import subprocess
import time
from typing import Any

import psutil

__all__ = ["system_snapshot"]

_GPU_FIELDS = ("index", "name", "utilization.gpu", "memory.used", "memory.total")
_GPU_SECONDS = 5.0


def system_snapshot(include_gpu: bool = False) -> dict[str, Any]:
    """CPU (percent since the last call), memory and disk (bytes) of the machine and of this process, as JSON.

    Args:
        include_gpu: also ask ``nvidia-smi``; the list is empty where there is none.
    """
    memory, disk, process = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.Process()
    with process.oneshot():
        own = {
            "rss_bytes": process.memory_info().rss,
            "cpu_seconds": sum(process.cpu_times()[:2]),
            "threads": process.num_threads(),
        }
    snapshot: dict[str, Any] = {
        "time": time.time(),
        "cpu_percent": psutil.cpu_percent(None),
        "load_average": list(psutil.getloadavg()),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available, "percent": memory.percent},
        "disk": {"total_bytes": disk.total, "free_bytes": disk.free, "percent": disk.percent},
        "process": own,
    }
    if include_gpu:
        snapshot["gpus"] = _gpus()
    return snapshot


def _gpus() -> list[dict[str, str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [{"error": str(error)}]
    return [dict(zip(_GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in told.splitlines()]

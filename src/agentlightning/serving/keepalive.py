"""TCP keep-alive: a peer that vanished without a farewell (no power, no link) is noticed while nothing is sent."""

from __future__ import annotations

import socket

_IDLE_SECONDS = 8
_INTERVAL_SECONDS = 4


def probe_when_idle(made: socket.socket, gone_seconds: int) -> None:
    """Have the kernel end the connections of this socket whose peer is gone; those that a listening socket accepts
    inherit it.

    The system's own default probes after two hours. ``TCP_USER_TIMEOUT`` (RFC 5482) bounds data that is never
    acknowledged, for which it would try for a quarter of an hour; where it is missing, only idle connections end.

    Args:
        made: before it is connected, or listens.
        gone_seconds: after so many without an answer, to data or to a probe, a connection ends; also when its peer
            takes no data for so long.
    """
    if made.family not in (socket.AF_INET, socket.AF_INET6):
        return
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": _IDLE_SECONDS,
        "TCP_KEEPALIVE": _IDLE_SECONDS,  # macOS has this name for it
        "TCP_KEEPINTVL": _INTERVAL_SECONDS,
        "TCP_KEEPCNT": max(1, gone_seconds - _IDLE_SECONDS) // _INTERVAL_SECONDS,
        "TCP_USER_TIMEOUT": gone_seconds * 1000,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

"""The key in the endpoint of an LLM proxy.

A proxy that only this machine reaches makes a key for itself. Programs that were written for agentlightning 0.3 know no
such key and send another one; but all of them call the endpoint that they are given, so the key is in it, too.
"""

from __future__ import annotations

import re

KEY_PATH = "/key/"
"""What stands before the key, in the path of the endpoint."""
_KEY_IN_URL = re.compile(rf"{KEY_PATH}[\w-]{{16,}}(?=/|$)")


def without_key(url: str) -> str:
    """The URL of an endpoint as people may see it: without the key."""
    return _KEY_IN_URL.sub(f"{KEY_PATH}…", url)

"""``python -m agentlightning``: the same as ``agl``."""

from __future__ import annotations

from agentlightning.cli.app import main

if __name__ == "__main__":
    main()

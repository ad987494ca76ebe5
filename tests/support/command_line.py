"""Running `agl`: in this process, which is quick, or in one of its own, which is real."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

from agentlightning.cli.app import main

__all__ = ["Done", "agl", "agl_process", "clean_environment"]

_READ = ("AGL_", "FORCE_COLOR", "NO_COLOR", "TTY_", "COLUMNS", "COV_")
_SECONDS = 60


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def ok(self) -> Done:
        """Itself, if it ended well and complained of nothing."""
        assert (self.code, self.err) == (0, ""), self
        return self


def clean_environment(**more: str) -> dict[str, str]:
    """What this process was started with, without what would change a command, and with ``more``."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_READ)} | more


def agl(*words: object, env: Mapping[str, str] | None = None) -> Done:
    """`agl` with these words, in this process: as if its output went into a file."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith(_READ):
                patch.delenv(name)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
    code = ended.value.code
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def agl_process(*words: object, env: Mapping[str, str] | None = None, **options: Any) -> Done:
    """`agl` with these words, as a user starts it; a warning of Python's would be an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "agentlightning", *(str(word) for word in words)],
        env=clean_environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
        **options,
    )
    return Done(done.returncode, done.stdout, done.stderr)

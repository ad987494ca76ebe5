"""The root of the command line: quick help, true table, errors in one line."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import get_args

import pytest
import typer

from agentlightning import SqliteLightningStore, errors
from agentlightning.cli.app import COMMANDS, Command, Group, _unwrapped, build, exit_code
from agentlightning.cli.terminal import ExitCode
from agentlightning.types import RolloutStatus
from command_line import Done, agl, agl_process, clean_environment

HEAVY = ("aiohttp", "apsw", "asyncio", "fastapi", "jinja2", "msgspec", "opentelemetry", "psutil", "pydantic", "uvicorn")
MAX_HELP_CPU_SECONDS = 0.5

_MEASURE = """
import json, sys, time
from agentlightning.cli.app import main
try:
    main(["--help"])
finally:
    print(json.dumps({"seconds": time.process_time(), "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def leaves() -> Iterator[tuple[list[str], Command]]:
    """Every command, by the words that call it."""
    for name, entry in COMMANDS.items():
        if isinstance(entry, Group):
            yield from (([name, inner], command) for inner, command in entry.commands.items())
        else:
            yield [name], entry


LEAVES = list(leaves())
NAMES = [" ".join(words) for words, _ in LEAVES]


# --- Help --------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, env=clean_environment()
    )
    measured = json.loads(done.stderr)
    assert "Usage: agl" in done.stdout
    assert measured["seconds"] < MAX_HELP_CPU_SECONDS  # all that the process has used, Python's own start included
    assert not set(measured["modules"]).intersection(HEAVY)


def test_the_installed_program_is_this_one() -> None:
    [script] = entry_points(group="console_scripts", name="agl")
    assert script.value == "agentlightning.cli.app:main"
    assert agl_process("--version").out == f"agentlightning {version('agentlightning')}\n"


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_root_lists_every_command(words: tuple[str, ...]) -> None:
    done = agl(*words)
    for name, entry in COMMANDS.items():
        assert f" {name} " in done.out
        assert entry.help.split(",")[0].split(":")[0][:30] in done.out
    assert "Exit codes:" in done.out


@pytest.mark.parametrize(("words", "command"), LEAVES, ids=NAMES)
def test_every_command_is_where_the_table_says_and_teaches_by_examples(words: list[str], command: Command) -> None:
    module, _, function = command.target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    done = agl(*words, "--help").ok()
    assert f"Usage: agl {' '.join(words)}" in done.out
    assert f"agl {' '.join(words)}" in done.out.split("Usage:")[1].partition("\n")[2], "its help shows no example"


def test_a_group_lists_its_commands() -> None:
    done = agl("rollouts", "--help").ok()
    assert "ls" in done.out
    assert "show" in done.out


def test_every_state_of_a_rollout_can_be_asked_for() -> None:
    words = [word for state in get_args(RolloutStatus) for word in ("-s", state)]
    assert "there is no database" in agl("rollouts", "ls", *words, "--url", "none.db").err, "so all were understood"


# --- Wrong usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "meant"), [(["statu"], "status"), (["rollouts", "sho"], "show"), (["vrify"], "verify")]
)
def test_a_misspelt_command_is_told_what_was_meant(words: list[str], meant: str) -> None:
    done = agl(*words)
    assert done.code == ExitCode.USAGE
    assert f"Did you mean '{meant}'?" in done.err
    assert not done.out


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--nothing"],
        ["status", "-o", "xml"],
        ["rollouts", "ls", "--limit", "0"],
        ["rollouts", "ls", "--status", "dead"],
        ["rollouts", "show"],
        ["workers", "drain"],
        ["workers", "drain", "w-1", "--all"],
        ["workers", "stop"],
        ["resources", "show", "--version", "2"],
        ["status", "--url", "ftp://host/x"],
        ["status", "--url", "localhost:4747"],
        ["status", "--url", "http://"],
        ["status", "--url", "http://host:port"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_without_a_traceback(words: list[str]) -> None:
    done = agl(*words)
    assert done.code == ExitCode.USAGE
    assert done.err
    assert "Traceback" not in done.err


# --- Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("x"), ExitCode.NOT_FOUND),
        (errors.InvalidId("x"), ExitCode.USAGE),
        (errors.StoreOwned("x"), ExitCode.UNREACHABLE),
        (errors.StoreUnreachable("x"), ExitCode.UNREACHABLE),
        (errors.ForeignFile("x"), ExitCode.UNREACHABLE),
        (errors.DiskFull("x"), ExitCode.FAILED),
        (errors.CorruptStore("x"), ExitCode.FAILED),
        (errors.NotAuthenticated("x"), ExitCode.FAILED),
        (errors.IllegalMove("x"), ExitCode.FAILED),
        (errors.AgentLightningError("x"), ExitCode.FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_has_its_exit_code(error: errors.AgentLightningError, code: ExitCode) -> None:
    assert exit_code(error) is code


def run_failing(error: str, *before: str) -> Done:
    """A command line whose one command raises ``error``, called with the words ``before`` it."""
    return agl_program(f"raise {error}", *before, "fail")


def agl_program(body: str, *words: str) -> Done:
    """A program with a command `fail` that does ``body``, behind the same root as `agl`."""
    program = f"""
import sys, types
import typer
from agentlightning.cli import app
from agentlightning.cli.app import Command
from agentlightning.errors import *
module = types.ModuleType("made_for_a_test")
def fail() -> None:
    {body}
module.fail = fail
sys.modules["made_for_a_test"] = module
app.COMMANDS["fail"] = Command("made_for_a_test:fail", "Fails.")
app.main({list(words)!r})
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=clean_environment(),
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_an_error_of_ours_is_one_line() -> None:
    done = run_failing("NotFound('there is no such thing; look elsewhere')")
    assert done == (ExitCode.NOT_FOUND, "", "error: there is no such thing; look elsewhere\n")


def test_an_error_of_the_system_is_one_line() -> None:
    done = run_failing("PermissionError(13, 'Permission denied', '/etc/shadow')")
    assert done == (ExitCode.FAILED, "", "error: /etc/shadow: Permission denied\n")


def test_a_mistake_of_ours_says_so_and_how_to_see_more() -> None:
    done = run_failing("KeyError('x')")
    assert done.code == ExitCode.FAILED
    assert done.err == "error: KeyError: 'x'. This is a bug of Agent Lightning; `agl --debug fail …` shows where\n"


@pytest.mark.parametrize("error", ["NotFound('x')", "KeyError('x')"])
def test_debug_shows_the_traceback(error: str) -> None:
    done = run_failing(error, "--debug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert error.partition("(")[0] in done.err


def test_interrupted_is_130_and_silent() -> None:
    assert agl_program("import os, signal; os.kill(os.getpid(), signal.SIGINT)", "fail") == (130, "", "")


def test_a_reader_that_goes_away_is_no_error_to_tell(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nowhere:
        done = subprocess.run(
            [sys.executable, "-m", "agentlightning", "--help"],
            stdout=nowhere,
            stderr=subprocess.PIPE,
            env=clean_environment(),
            timeout=30,
            check=False,
        )
    assert b"Traceback" not in done.stderr


def test_ctrl_c_at_a_terminal_ends_a_watch(tmp_path: Path) -> None:
    """Through a real terminal, whose driver turns the key into the signal."""
    database = tmp_path / "store.db"

    async def make() -> None:
        async with SqliteLightningStore(database) as store:
            await store.enqueue_rollout("task")

    asyncio.run(make())
    terminal, its_side = pty.openpty()
    watch = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-m", "agentlightning", "status", "--watch", "--url", str(database)],
        env=clean_environment(TERM="xterm", COLUMNS="100"),
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
    )
    os.close(its_side)
    seen = b""
    while b"no runner has ever connected" not in seen:
        seen += os.read(terminal, 65_536)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # the terminal has nobody on its other side any more
        while chunk := os.read(terminal, 65_536):
            seen += chunk
    os.close(terminal)
    assert watch.wait(timeout=20) == ExitCode.INTERRUPTED
    assert b"Traceback" not in seen


# --- Lazy --------------------------------------------------------------------------------------------


def test_a_command_is_imported_only_when_it_is_called() -> None:
    """The negative control: a command whose module does not exist is listed all the same, and fails when called."""

    def root() -> None:
        """Root."""

    command_line = build(root, {"ghost": Command("agentlightning.cli.no_such_module:ghost", "Is not there.")})
    assert command_line.list_commands(typer.Context(command_line)) == ["ghost"]
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        command_line.main(["ghost"], prog_name="agl")


def test_paragraphs_of_help_are_wrapped_to_the_terminal_and_examples_are_kept() -> None:
    text = "First line.\n\nTwo lines\nof words.\n\nExamples\n\n  agl one\n  agl two\n"
    assert _unwrapped(text) == "First line.\n\nTwo lines of words.\n\nExamples\n\n  agl one\n  agl two\n"

"""The documentation tells the truth: every code block in it is run, or held against what is.

What the first words of a fence mean:

- ``python``: a program, which is run. ``python file=name.py``: a file for the commands of the page.
- ``bash run``: commands that are run, all of a page in order, in one shell, in a folder of their own.
  ``bash background``: one that goes on meanwhile, and has to end well by itself or on SIGTERM. ``bash serve``: the
  same, and the page goes on when it has printed its first line, by which it says that it is ready.
- ``bash``: commands that are run elsewhere (`scripts/…`, examples, `agl demo`), or on machines that a test does not
  have: each has to be one that exists, and `agl` has to take its options.
- ``text``, ``toml``, ``json``: shown, not run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agentlightning.cli.app import COMMANDS, _root, build

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXAMPLE_TESTS = ROOT / "tests" / "e2e" / "test_examples.py"
"""Runs examples that need more than to be started."""
PORT = "4747"
"""What pages say; the test takes one that is free."""
PROGRESS = re.compile(r"\d+ rollouts ended of \d+ ")
RUN_SECONDS = 100
SESSION_SECONDS = 280
"""A page has many commands, each of which starts Python anew; and the machine may have other things to do."""
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>[^`\n]*)$")


class Block(NamedTuple):
    """One fenced code block of a page."""

    page: Path
    line: int
    language: str
    manner: str
    """What stands behind the language: how it is to be tested."""
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fenced_blocks(page: Path) -> Iterator[Block]:
    opened: re.Match[str] | None = None
    start, lines = 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, start, lines = fence, number, []
        elif fence and fence["ticks"].startswith(opened["ticks"]) and not fence["info"].strip():
            language, _, manner = opened["info"].strip().partition(" ")
            yield Block(page, start, language, manner.strip(), "\n".join(lines) + "\n")
            opened = None
        else:
            lines.append(line.removeprefix(opened["indent"]))
    assert opened is None, f"{page.name}:{start}: the code block never ends"


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.manner]
BASH = [block for block in BLOCKS if block.language == "bash" and not block.manner]
IN_A_SESSION = ("run", "serve", "background")
SESSIONS = [page for page in PAGES if any(block.page == page and block.manner in IN_A_SESSION for block in BLOCKS)]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def run_python(script: Path, folder: Path) -> str:
    """Run a script as a user would, in `folder`; it may warn of nothing. Returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))}
    environment["AGL_SERVER_PORT"] = free_port()
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    said = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert not said, f"a warning or an error that was swallowed:\n{done.stderr}"
    return done.stdout


def commands(block: Block) -> Iterator[list[str]]:
    """The single commands of a bash block, as words, without the variables that are set for them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((index for index, word in enumerate(words) if word in ("&&", "||", "|", ";", "&")), len(words))
            command = list(dropwhile(_ASSIGNMENT.match, words[:end]))
            if command:
                yield command
            words = words[end + 1 :]


def ci_commands() -> list[str]:
    return [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]


def check_command(words: list[str]) -> None:
    """Fail unless the command of a page is one that is known to work.

    Scripts that install or test are not run from here, where they would run themselves: it is enough that CI,
    which runs exactly these, has come this far. Examples are run by `test_example_runs`.
    """
    program, *arguments = words
    if program in (".venv/bin/agl", "agl"):
        check_usage(arguments)
        return
    if program in (".venv/bin/python", "python"):
        if arguments == ["train.py"]:  # README's program, which `test_readme_two_machines.py` runs by these commands
            return
        assert len(arguments) == 1, f"{shlex.join(words)}: only examples without arguments are run by a test"
        assert ROOT / arguments[0] in EXAMPLES, f"{shlex.join(words)}: not an example that a test runs"
        return
    script = ROOT / program
    assert program.startswith("scripts/"), f"{shlex.join(words)}: no test runs this command; teach this test how"
    assert script.is_file(), f"{program} does not exist"
    assert os.access(script, os.X_OK), f"{program} is not executable"
    if program == "scripts/install":
        assert "scripts/install" in (ROOT / "scripts" / "test").read_text(encoding="utf-8").splitlines()
        assert not arguments
    elif program == "scripts/bench":
        assert (ROOT / "bench" / f"{arguments[0]}.py").is_file(), f"{shlex.join(words)}: there is no such benchmark"
    elif not arguments:
        assert program in ci_commands(), f"{program} is not what .ci/run runs"
    else:
        assert program == "scripts/test"
        assert arguments == ["--long"], f"{shlex.join(words)}: no test runs this command; teach this test how"


def check_usage(arguments: list[str]) -> None:
    """Fail unless `agl` has this command, and the command takes these options. It is not called."""
    command: Any = build(_root, COMMANDS)
    rest = list(arguments)
    while hasattr(command, "commands"):
        assert "".join(rest[:1]) in command.commands, f"agl {shlex.join(arguments)}: there is no such command"
        _, command, rest = command.resolve_command(command.make_context("agl", rest, resilient_parsing=True), rest)
    try:
        command.make_context("agl", rest)
    except Exception as error:
        raise AssertionError(f"agl {shlex.join(arguments)}: {error}") from error


# --- A page that is run as a whole -----------------------------------------------------------------

_SESSION = """
set -euo pipefail
served=()
finish() {
    for process in "${served[@]}"; do kill -s TERM "$process" 2>/dev/null || true; done
    for process in "${served[@]}"; do wait "$process"; done
}
background() {
    bash -euo pipefail -c "exec $1" > "$2" 2>&1 &
    served=("$!" "${served[@]}")
}
serve() {
    background "$@"
    for _ in $(seq 300); do
        if [ -s "$2" ]; then return; fi
        kill -0 "$!" || { echo "$1 ended at once:"; cat "$2"; return 1; }
        sleep 0.1
    done
    echo "$1 is silent"
    return 1
}
"""
"""A command that is served is stopped at the end, those that began last first, and has to end well."""


def session_of(blocks: list[Block]) -> str:
    """The commands of a page as one script."""
    lines = [_SESSION]
    for block in blocks:
        if block.manner in ("serve", "background"):
            lines.append(f"{block.manner} {shlex.quote(block.text.strip())} served-{block.line}.log")
        elif block.manner == "run":
            lines += [f"echo '--- {block.name}'", block.text]
    return "\n".join([*lines, "finish", ""])


def run_session(blocks: list[Block], folder: Path) -> str:
    """Run the commands of a page, on a port of their own, and return what they printed."""
    port = free_port()
    for block in blocks:
        if block.manner.startswith("file="):
            folder.joinpath(block.manner.removeprefix("file=")).write_text(
                block.text.replace(PORT, port), encoding="utf-8"
            )
    script = folder / "session.sh"
    script.write_text(session_of(blocks).replace(PORT, port), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))} | {
        "AGL_SERVER_PORT": port,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "error",
        "XDG_STATE_HOME": str(folder / "state"),
    }
    with subprocess.Popen(
        ["bash", str(script)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as session:
        try:
            out, _ = session.communicate(timeout=SESSION_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what a script that failed has left behind
                os.killpg(session.pid, signal.SIGKILL)
    logs = "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("served-*.log")))
    assert session.returncode == 0, f"exit code {session.returncode}\n{out}\n{logs}"
    assert "Traceback" not in out + logs
    return out


@pytest.mark.timeout(SESSION_SECONDS + 20)
@pytest.mark.parametrize("page", SESSIONS, ids=[page.name for page in SESSIONS])
def test_commands_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    assert run_session([block for block in BLOCKS if block.page == page], tmp_path)


@pytest.mark.parametrize(
    ("manner", "text"),
    [
        ("run", "agl rollouts ls --url nothing.db\n"),
        ("run", "agl rollouts ls --url nothing.db | cat\n"),
        ("serve", "agl store --db /nonexistent/store.db\n"),
        ("serve", "bash -c 'echo ready; trap \"exit 3\" TERM; while true; do sleep 0.05; done'\n"),
    ],
)
def test_a_command_that_fails_is_found(manner: str, text: str, tmp_path: Path) -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match="exit code"):
        run_session([Block(ROOT / "docs" / "made-up.md", 1, "bash", manner, text)], tmp_path)


# --- Names in the text -----------------------------------------------------------------------------

_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|pyi)|(?:src|tests|examples|bench|scripts|docs)(?:/[\w.-]+)+/?")
_DOTTED = re.compile(r"agentlightning(?!\.db)(?:\.\w+)+")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
TEXTS = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "bench" / "README.md",
    ROOT / "changes" / "README.md",
]
PATHS = [
    f"/{path.relative_to(ROOT)}"
    for folder in ("src", "tests", "examples", "bench", "scripts", "docs")
    for path in (ROOT / folder).rglob("*")
]
ATTRIBUTES = (ROOT / "src" / "agentlightning" / "semconv.py").read_text(encoding="utf-8")


def names_without_a_thing(text: str, folder: Path) -> list[str]:
    """What a page names in its text, outside of code blocks, and what is not there: files, modules, links."""
    prose = re.sub(r"^( *)(`{3,}|~{3,}).*?^ *\2`*$", "", text, flags=re.DOTALL | re.MULTILINE)
    missing = [link for link in _LINK.findall(prose) if not (folder / link).exists()]
    for code in _CODE.findall(prose):
        is_there = True
        if _FILE.fullmatch(code) and "NAME" not in code:
            is_there = any(path.endswith(f"/{code.rstrip('/')}") for path in PATHS)
        elif _DOTTED.fullmatch(code):
            is_there = f'"{code}"' in ATTRIBUTES or can_be_imported(code)
        missing += [] if is_there else [code]
    return missing


def can_be_imported(dotted: str) -> bool:
    """Whether it is a module, or a name in one."""
    module, _, name = dotted.rpartition(".")
    with contextlib.suppress(ImportError):
        return bool(import_module(dotted))
    with contextlib.suppress(ImportError):
        return hasattr(import_module(module), name)
    return False


@pytest.mark.parametrize("page", TEXTS, ids=[page.name for page in TEXTS])
def test_what_a_page_names_is_there(page: Path) -> None:
    assert names_without_a_thing(page.read_text(encoding="utf-8"), page.parent) == []


def test_a_name_without_a_thing_is_found() -> None:
    """The negative control."""
    text = "`demo/gone.py`, `agentlightning.gone`, `tests/gone/`, [x](gone.md)\n```text\n`demo/shown.py`\n```\n"
    found = names_without_a_thing(text + "`demo/agent.py`, `agentlightning.types.Span`, [x](README.md#y)", ROOT)
    assert found == ["gone.md", "demo/gone.py", "agentlightning.gone", "tests/gone/"]


# --- Blocks by themselves --------------------------------------------------------------------------


def test_pages_have_blocks() -> None:
    """If nothing were found, nothing would be tested."""
    readme = {block.language for block in BLOCKS if block.page.name == "README.md"}
    assert {"bash", "python"} <= readme
    assert EXAMPLES


def test_every_block_says_what_it_is() -> None:
    nameless = [block.name for block in BLOCKS if block.language not in ("bash", "python", "text", "toml", "json")]
    assert not nameless, "give these blocks a language: python and bash are run, text is not"
    manners = [
        block.name
        for block in BLOCKS
        if block.manner not in {"bash": ("", *IN_A_SESSION)}.get(block.language, ("",))
        and not (block.language == "python" and block.manner.startswith("file="))
    ]
    assert not manners, "the top of this file says what may stand behind a language"


@pytest.mark.parametrize("block", PYTHON, ids=[block.name for block in PYTHON])
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block.text, encoding="utf-8")
    run_python(script, tmp_path)


@pytest.mark.parametrize("block", BASH, ids=[block.name for block in BASH])
def test_bash_block_is_what_is_tested(block: Block) -> None:
    for words in commands(block):
        check_command(words)


@pytest.mark.parametrize(
    "words",
    [
        ["curl", "x"],
        ["scripts/nothing"],
        ["python", "x.py"],
        ["scripts/test", "-k", "x"],
        ["agl", "statu"],
        ["agl", "status", "--colour"],
        ["agl", "rollouts"],
        ["agl", "rollouts", "show"],
    ],
)
def test_an_untested_command_is_found(words: list[str]) -> None:
    with pytest.raises(AssertionError):
        check_command(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agl status  # now", [["agl", "status"]]),
        ("A=1 B='x y' agl demo && agl status", [["agl", "demo"], ["agl", "status"]]),
        ("agl rollouts ls \\\n  -n 3 | cat", [["agl", "rollouts", "ls", "-n", "3"], ["cat"]]),
        ("agl runner --exec 'a && b' &", [["agl", "runner", "--exec", "a && b"]]),
    ],
)
def test_commands_are_told_apart(text: str, words: list[list[str]]) -> None:
    assert list(commands(Block(ROOT, 1, "bash", "", text))) == words


def test_a_command_of_agl_is_held_against_its_options() -> None:
    check_command(["agl", "store", "--host", "0.0.0.0", "--port", "0"])
    check_command([".venv/bin/agl", "rollouts", "ls", "-s", "failed"])


EXAMPLES_RUN_ALONE = [path for path in EXAMPLES if path.name not in EXAMPLE_TESTS.read_text(encoding="utf-8")]


@pytest.mark.parametrize("example", EXAMPLES_RUN_ALONE, ids=[path.name for path in EXAMPLES_RUN_ALONE])
def test_example_runs(example: Path, tmp_path: Path) -> None:
    assert run_python(example, tmp_path), "an example shows something"


def test_ci_runs_the_readme_test_command_last() -> None:
    readme_commands = [
        shlex.join(words) for block in BASH if block.page.name == "README.md" for words in commands(block)
    ]
    last = [command for command in ci_commands() if command][-1]
    assert last == "scripts/test"
    assert last in readme_commands

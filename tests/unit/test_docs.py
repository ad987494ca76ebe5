"""The documentation tells the truth: every code block in it is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RUN_SECONDS = 100
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>[^`\n]*)$")


class Block(NamedTuple):
    """One fenced code block of a page."""

    page: Path
    line: int
    language: str
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
            language = (opened["info"].split() or [""])[0]
            yield Block(page, start, language, "\n".join(lines) + "\n")
            opened = None
        else:
            lines.append(line.removeprefix(opened["indent"]))
    assert opened is None, f"{page.name}:{start}: the code block never ends"


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]


def run_python(script: Path, folder: Path) -> str:
    """Run a script as a user would, in `folder`; it may warn of nothing. Returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
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
    assert not done.stderr, f"a warning or an error that was swallowed:\n{done.stderr}"
    return done.stdout


def commands(block: Block) -> Iterator[list[str]]:
    """The single commands of a bash block, as words."""
    for line in block.text.splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words:
                yield words


def ci_commands() -> list[str]:
    return [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]


def check_command(words: list[str]) -> None:
    """Fail unless the command of a page is one that is known to work.

    Scripts that install or test are not run from here, where they would run themselves: it is enough that CI,
    which runs exactly these, has come this far. Examples are run by `test_example_runs`.
    """
    program, *arguments = words
    if program in (".venv/bin/python", "python"):
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


def test_pages_have_blocks() -> None:
    """If nothing were found, nothing would be tested."""
    readme = {block.language for block in BLOCKS if block.page.name == "README.md"}
    assert {"bash", "python"} <= readme
    assert EXAMPLES


def test_every_block_says_what_it_is() -> None:
    nameless = [block.name for block in BLOCKS if block.language not in ("bash", "python", "text", "toml", "json")]
    assert not nameless, "give these blocks a language: python and bash are run, text is not"


@pytest.mark.parametrize("block", PYTHON, ids=[block.name for block in PYTHON])
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block.text, encoding="utf-8")
    run_python(script, tmp_path)


@pytest.mark.parametrize("block", BASH, ids=[block.name for block in BASH])
def test_bash_block_is_what_is_tested(block: Block) -> None:
    for words in commands(block):
        check_command(words)


@pytest.mark.parametrize("words", [["curl", "x"], ["scripts/nothing"], ["python", "x.py"], ["scripts/test", "-k", "x"]])
def test_an_untested_command_is_found(words: list[str]) -> None:
    with pytest.raises(AssertionError):
        check_command(words)


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_example_runs(example: Path, tmp_path: Path) -> None:
    assert run_python(example, tmp_path), "an example shows something"


def test_ci_runs_the_readme_test_command_last() -> None:
    readme_commands = [
        shlex.join(words) for block in BASH if block.page.name == "README.md" for words in commands(block)
    ]
    last = [command for command in ci_commands() if command][-1]
    assert last == "scripts/test"
    assert last in readme_commands

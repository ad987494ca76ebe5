"""Log files that are put away: when, compressed, for their owner only, and no line is lost by it."""

from __future__ import annotations

import gzip
import logging
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentlightning.telemetry.rotation import RotatingLog, Rotation, older_parts
from execution_programs import until
from limited import limited, without_descriptors


@contextmanager
def logging_to(path: Path, limits: Rotation) -> Iterator[Callable[..., None]]:
    """A function that logs a line, at a moment of the wall clock."""
    handler = RotatingLog(path, limits)

    def log(text: str, at: float | None = None) -> None:
        record = logging.LogRecord("agentlightning", logging.INFO, __file__, 1, text, None, None)
        record.created = record.created if at is None else at
        handler.emit(record)

    try:
        yield log
    finally:
        handler.close()


def text_of(part: Path) -> str:
    """A part of a log; one that is compressed is read through gzip."""
    return gzip.decompress(part.read_bytes()).decode() if part.suffix == ".gz" else part.read_text()


async def all_compressed(path: Path, number: int) -> list[Path]:
    await until(lambda: [each.suffix for each in older_parts(path)] == [".gz"] * number)
    return older_parts(path)


async def test_a_file_that_would_grow_too_large_is_compressed_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logging_to(path, Rotation(max_bytes=2_000, kept=1_000)) as log:
        for number in range(1_000):
            log(f"line {number:04d}")
        parts = await all_compressed(path, 4)
        assert [each.stat().st_size <= 2_000 for each in (*parts, path)] == [True] * 5
        read = "".join(map(text_of, (*parts, path))).splitlines()
        assert read == [f"line {number:04d}" for number in range(1_000)]
        assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o600}
        assert set(tmp_path.iterdir()) == {*parts, path}


async def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    other = tmp_path / "log.notes"
    other.write_text("not a part of the log")
    with logging_to(path, Rotation(max_bytes=100, kept=2)) as log:
        for number in range(100):
            log(f"line {number:04d}")
        parts = await all_compressed(path, 2)
        assert text_of(parts[-1]).splitlines()[-1] == "line 0089"
        assert text_of(path).splitlines()[-1] == "line 0099"
        assert set(tmp_path.iterdir()) == {*parts, path, other}


async def test_a_file_is_put_away_at_multiples_of_its_age(tmp_path: Path) -> None:
    path, day = tmp_path / "log", 86_400.0
    limits = Rotation(max_age_seconds=day)
    with logging_to(path, limits) as log:
        log("monday, first", at=100 * day)
        log("monday, last", at=101 * day - 1)
        assert not older_parts(path)
        log("tuesday", at=101 * day)
        (monday,) = await all_compressed(path, 1)
        assert text_of(monday).splitlines() == ["monday, first", "monday, last"]
    os.utime(path, (101 * day, 101 * day))  # nobody logged since
    with logging_to(path, limits) as log:
        log("friday", at=104 * day)
        (_, tuesday) = await all_compressed(path, 2)
        assert (text_of(tuesday), text_of(path)) == ("tuesday\n", "friday\n")


def test_without_an_age_files_become_as_old_as_they_like(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log", Rotation()) as log:
        log("old", at=0.0)
        log("new", at=10e9)
    assert text_of(tmp_path / "log") == "old\nnew\n"


async def test_what_an_earlier_process_left_is_compressed(tmp_path: Path) -> None:
    left = tmp_path / "log.20260101T000000.000000Z"
    left.write_text("left\n")
    left.with_name(left.name + ".partial").write_text("half of it")
    with logging_to(tmp_path / "log", Rotation()):
        (part,) = await all_compressed(tmp_path / "log", 1)
        assert text_of(part) == "left\n"
        await until(lambda: set(tmp_path.iterdir()) == {part, tmp_path / "log"})


async def test_a_part_that_cannot_be_compressed_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, said = tmp_path / "log", list[str]()
    with logging_to(path, Rotation(max_bytes=20)) as log, limited(resource.RLIMIT_FSIZE, 20):  # no gzip file is smaller
        log("line 1")
        log("line 2, longer")
        await until(lambda: bool(said.append(capsys.readouterr().err) or "".join(said)))
        assert "stays as it is" in "".join(said)
        assert [text_of(each) for each in tmp_path.iterdir() if each != path] == ["line 1\n"]
        assert text_of(path) == "line 2, longer\n"


def test_a_file_that_an_operator_moved_away_is_begun_anew(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log", Rotation()) as log:
        log("before")
        (tmp_path / "log").rename(tmp_path / "moved")
        log("after")
    assert (text_of(tmp_path / "moved"), text_of(tmp_path / "log")) == ("before\n", "after\n")


def test_lines_go_on_where_no_file_can_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logging_to(path, Rotation(max_bytes=20)) as log:
        log("line 1")
        with without_descriptors():
            log("line 2, longer")
            log("line 3, longer")
        log("line 4")
    (away,) = (each for each in tmp_path.iterdir() if each != path)
    assert text_of(away) + text_of(path) == "line 1\nline 2, longer\nline 3, longer\nline 4\n"

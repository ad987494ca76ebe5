"""Spans on the disk: their order, who owns them, what is left after a crash, and when there is no room."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentlightning.errors import NotFound, SpoolFull
from agentlightning.http.client.spool import Batch, Spool, SpoolFolder


def _spans(*numbers: int, size: int = 0) -> list[bytes]:
    return [f'{{"n":{number},"pad":"{"x" * size}"}}'.encode() for number in numbers]


def _drain(spool: Spool, most: int = 100) -> list[bytes]:
    found: list[bytes] = []
    while (batch := spool.next_batch(most, 10_000_000)) is not None:
        found += batch.spans
        spool.acknowledge(batch)
    return found


def _files(spool: Spool) -> set[str]:
    return {each.name for each in spool.folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(tmp_path / "spools", max_bytes=100_000_000)


def test_spans_come_out_in_the_order_in_which_they_went_in(folder: SpoolFolder) -> None:
    spool = folder.create()
    assert spool.empty
    spool.append(_spans(1, 2))
    spool.append(_spans(3))
    first = spool.next_batch(2, 10_000)
    assert first is not None
    assert first.spans == _spans(1, 2)
    assert spool.next_batch(2, 10_000) == first, "until it is acknowledged"
    spool.acknowledge(first)
    spool.append(_spans(4))
    assert _drain(spool) == _spans(3, 4)
    assert spool.empty
    assert spool.next_batch(1, 1) is None
    spool.append(_spans(5))
    assert _drain(spool) == _spans(5)


def test_a_batch_is_bounded_but_never_too_small_for_one_span(folder: SpoolFolder) -> None:
    spool = folder.create()
    spans = _spans(*range(50), size=100) + _spans(99, size=500_000)
    spool.append(spans)
    batch = spool.next_batch(1000, 1000)
    assert batch is not None
    assert 1 <= len(batch.spans) <= 10
    found: list[bytes] = []
    while (batch := spool.next_batch(1000, 1000)) is not None:
        found += batch.spans
        spool.acknowledge(batch)
    assert found == spans


def test_segments_are_deleted_when_the_server_has_them(folder: SpoolFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentlightning.http.client.spool._SEGMENT_BYTES", 1000)
    spool = folder.create()
    for number in range(20):
        spool.append(_spans(number, size=400))
    assert len(list(spool.folder.glob("*.seg"))) > 5
    assert spool.waiting_bytes > 8000
    assert _drain(spool, most=3) == [span for number in range(20) for span in _spans(number, size=400)]
    assert not list(spool.folder.glob("*.seg"))
    assert spool.waiting_bytes == 0
    spool.close()
    assert not spool.folder.exists()


def test_one_process_owns_a_spool(folder: SpoolFolder) -> None:
    spool = folder.create()
    spool.append(_spans(1))
    assert Spool.take(spool.folder) is None
    assert folder.adopt() == []
    spool.close()
    [adopted] = folder.adopt()
    assert _drain(adopted) == _spans(1)
    adopted.close()
    assert folder.adopt() == []
    assert not spool.folder.exists()


def test_an_adopted_spool_goes_on_where_the_server_was(folder: SpoolFolder) -> None:
    spool = folder.create()
    spool.append(_spans(1, 2, 3, 4))
    first = spool.next_batch(3, 10_000)
    assert first is not None
    spool.acknowledge(first)
    spool.abandon()
    [adopted] = folder.adopt()
    assert _drain(adopted) == _spans(4)


@pytest.mark.parametrize("text", [b"", b"nonsense", b"0000000001", b"\xff\xff", b"0000000001 9999"])
def test_a_lost_place_means_from_the_beginning(folder: SpoolFolder, text: bytes) -> None:
    spool = folder.create()
    spool.append(_spans(1, 2))
    batch = spool.next_batch(1, 10_000)
    assert batch is not None
    spool.acknowledge(batch)
    spool.abandon()
    (spool.folder / "cursor").write_bytes(text)
    adopted = Spool.take(spool.folder)
    assert adopted is not None
    assert _drain(adopted) == _spans(1, 2)
    adopted.close()


def test_a_torn_record_at_the_end_was_never_accepted(folder: SpoolFolder) -> None:
    spool = folder.create()
    spool.append(_spans(1, 2, size=50))
    spool.append(_spans(3))
    spool.abandon()
    [segment] = spool.folder.glob("*.seg")
    os.truncate(segment, segment.stat().st_size - 3)
    adopted = Spool.take(spool.folder)
    assert adopted is not None
    assert _drain(adopted) == _spans(1, 2, size=50)
    assert adopted.empty
    adopted.close()
    assert not spool.folder.exists()


def test_damage_in_the_middle_costs_what_it_hit(folder: SpoolFolder, caplog: pytest.LogCaptureFixture) -> None:
    spool = folder.create()
    for number in range(5):
        spool.append(_spans(number, size=50))
    spool.abandon()
    [segment] = spool.folder.glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    adopted = Spool.take(spool.folder)
    assert adopted is not None
    assert _drain(adopted) == _spans(0, 1, 3, 4, size=50)
    assert any("were damaged" in record.message for record in caplog.records)


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """A disk that takes files of so many bytes: writes beyond come back short, then fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_does_not_take_it_leaves_no_trace_of_it(folder: SpoolFolder) -> None:
    spool = folder.create()
    spool.append(_spans(1, 2))
    with _largest_file(2000), pytest.raises(SpoolFull) as caught:
        spool.append(_spans(3, 4, size=3000))
    assert os.strerror(errno.EFBIG) in caught.value.message
    spool.append(_spans(5))
    assert _drain(spool) == _spans(1, 2, 5)


def test_all_processes_share_the_room(tmp_path: Path) -> None:
    now = 0.0
    folder = SpoolFolder(tmp_path, max_bytes=5000, monotonic=lambda: now)
    mine, other = folder.create(), folder.create()
    other.append(_spans(1, size=3000))
    folder.check_room(mine, 1500)
    with pytest.raises(SpoolFull, match=r"5,000 are allowed; 2,500 more were not taken"):
        folder.check_room(mine, 2500)
    _drain(other)
    now = 2.0  # others are counted about once a second
    folder.check_room(mine, 2500)
    mine.append(_spans(2, size=4000))
    with pytest.raises(SpoolFull):
        folder.check_room(mine, 2500)


def test_a_folder_that_cannot_be_written_is_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolFull, match="AGL_SPOOL_DIR"):
        SpoolFolder(tmp_path / "file" / "spools", max_bytes=1000).create()


def test_what_is_refused_is_put_away_with_the_reason(folder: SpoolFolder) -> None:
    folder.create()
    assert folder.quarantine([(_spans(1)[0], NotFound("no such attempt"))]) == 1
    assert folder.quarantine([(_spans(2)[0], NotFound("nor this one"))]) == 1
    lines = folder.quarantine_file.read_text().splitlines()
    assert len(lines) == 2
    assert '"code": "not_found"' in lines[0]
    assert '"span": {"n": 1, "pad": ""}' in lines[0]


def test_the_quarantine_file_stays_within_its_share(tmp_path: Path) -> None:
    folder = SpoolFolder(tmp_path / "spools", max_bytes=40_000)
    mine = folder.create()
    refused = [(span, NotFound("gone")) for span in _spans(*range(100), size=400)]
    kept = folder.quarantine(refused)
    assert 0 < kept < 100
    assert folder.quarantine(refused) == 0
    lines = folder.quarantine_file.read_text().splitlines()
    assert len(lines) == kept == len([json.loads(line) for line in lines])
    size = folder.quarantine_file.stat().st_size
    assert 9_000 < size <= 10_000
    folder.check_room(mine, 40_000 - size)
    with pytest.raises(SpoolFull):  # both together are within the bound
        folder.check_room(mine, 40_001 - size)


def test_a_full_spool_leaves_no_room_in_the_quarantine_file(tmp_path: Path) -> None:
    folder = SpoolFolder(tmp_path / "spools", max_bytes=5_000)
    folder.create().append(_spans(1, size=4_500))
    assert folder.quarantine([(span, NotFound("gone")) for span in _spans(1, 2, 3, size=400)]) == 0


@pytest.mark.parametrize("written", [0, 1, 7, 300])
def test_a_disk_that_fills_up_tears_no_line(folder: SpoolFolder, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    folder.create()
    refused = [(span, NotFound("gone")) for span in _spans(1, 2, 3, 4, size=100)]
    assert folder.quarantine(refused[:1]) == 1
    whole = folder.quarantine_file.read_bytes()
    left = written
    write = os.write

    def short(handle: int, data: bytes | memoryview) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "no space left on device")
        taken = write(handle, data[:left])
        left -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(OSError, match="no space"):
            folder.quarantine(refused)
    assert folder.quarantine_file.read_bytes() == whole
    folder.quarantine_file.write_bytes(whole + whole[:written])  # as after a kill
    assert folder.quarantine(refused) == 4
    lines = folder.quarantine_file.read_text().splitlines()
    assert [json.loads(line)["code"] for line in lines if line.endswith("}")][-4:] == ["not_found"] * 4


def test_only_their_owner_can_read_them(folder: SpoolFolder) -> None:
    spool = folder.create()
    spool.append(_spans(1))
    folder.quarantine([(b"{}", NotFound("x"))])
    for path in [folder.root, *folder.root.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


_WRITER = """
import os, sys
from pathlib import Path
from agentlightning.http.client.spool import SpoolFolder
spool = SpoolFolder(Path(sys.argv[1]), 10**9).create()
number = 0
while True:
    spool.append([b'{"n":%d}' % n for n in range(number, number + 3)])
    number += 3
    os.write(1, b"%d\\n" % number)
"""


def test_what_was_accepted_survives_kill_9_of_its_writer(tmp_path: Path) -> None:
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout as accepted:
            lines = [accepted.readline() for _ in range(20)]
            writer.send_signal(signal.SIGKILL)
            lines += accepted.readlines()
            writer.wait()
        accepted_spans = int([line for line in lines if line.endswith(b"\n")][-1])
        [adopted] = SpoolFolder(tmp_path, 10**9).adopt()
        found = _drain(adopted)
        assert found[:accepted_spans] == [b'{"n":%d}' % n for n in range(accepted_spans)]
        assert accepted_spans <= len(found) <= accepted_spans + 3, "what was being written when it died may be there"
        adopted.close()


def test_the_lock_is_not_held_by_children(folder: SpoolFolder) -> None:
    """A child that outlives its parent must not keep the spool from being adopted."""
    spool = folder.create()
    spool.append(_spans(1))
    child = subprocess.Popen(["sleep", "60"])
    try:
        spool.abandon()
        assert [_drain(each) for each in folder.adopt()] == [_spans(1)]
    finally:
        child.kill()
        child.wait()


def test_acknowledging_after_close_changes_nothing(folder: SpoolFolder) -> None:
    spool = folder.create()
    spool.append(_spans(1))
    batch = spool.next_batch(1, 1000)
    assert isinstance(batch, Batch)
    spool.close()
    spool.close()
    spool.acknowledge(batch)
    with pytest.raises(SpoolFull, match="closed"):
        spool.append(_spans(2))
    assert [_drain(each) for each in folder.adopt()] == [_spans(1)]

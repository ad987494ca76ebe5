"""Resources on the disk, with their age."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentlightning.http.client.cache import CachedResources, ResourceCache
from agentlightning.types import LLM, ProxyLLM, ResourcesUpdate


def _update(resources_id: str = "rs-1", version: int = 1, text: str = "m") -> ResourcesUpdate:
    return ResourcesUpdate(
        resources_id=resources_id,
        create_time=1.0,
        update_time=2.0,
        version=version,
        resources={"llm": LLM(endpoint="e", model=text, api_key="secret"), "p": ProxyLLM(endpoint="e", model="m")},
    )


class _Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def cache(tmp_path: Path, clock: _Clock) -> ResourceCache:
    return ResourceCache(tmp_path / "resources", wall=clock)


def test_what_was_kept_is_read_with_its_age(cache: ResourceCache, clock: _Clock) -> None:
    assert not cache.has(None, None)
    assert cache.read(None, None) is None
    cache.keep(_update(), None, None)
    clock.now += 90
    assert cache.has(None, None)
    found = cache.read(None, None)
    assert isinstance(found, CachedResources)
    assert found.age_seconds == pytest.approx(90)
    assert found.resources == _update().resources
    assert (found.resources_id, found.version, found.update_time) == ("rs-1", 1, 2.0)


def test_each_question_has_its_own_answer(cache: ResourceCache) -> None:
    cache.keep(_update("rs-2", 5), None, None)
    cache.keep(_update("rs-1", 3), "rs-1", None)
    cache.keep(_update("rs-1", 2), "rs-1", 2)
    found = [cache.read(*asked) for asked in [(None, None), ("rs-1", None), ("rs-1", 2), ("rs-1", 3), ("rs-2", None)]]
    assert [each and (each.resources_id, each.version) for each in found] == [
        ("rs-2", 5),
        ("rs-1", 3),
        ("rs-1", 2),
        None,
        None,
    ]


def test_the_same_version_is_dated_anew_and_another_one_written(cache: ResourceCache, clock: _Clock) -> None:
    cache.keep(_update(), None, None)
    clock.now += 60
    cache.keep(_update(text="a content that version 1 cannot have"), None, None)
    found = cache.read(None, None)
    assert found is not None
    assert found.age_seconds == pytest.approx(0, abs=1e-3)
    assert found.resources == _update().resources, "a version never changes, so it was not written again"
    cache.keep(_update(version=2, text="new"), None, None)
    newer = cache.read(None, None)
    assert newer is not None
    assert newer.resources == _update(text="new").resources


def test_another_process_reads_it(cache: ResourceCache, tmp_path: Path, clock: _Clock) -> None:
    cache.keep(_update(), "rs-1", None)
    assert ResourceCache(tmp_path / "resources", wall=clock).has("rs-1", None)
    assert ResourceCache(tmp_path / "resources", wall=clock).read("rs-1", None) is not None


def test_keys_are_for_their_owner_only(cache: ResourceCache, tmp_path: Path) -> None:
    cache.keep(_update(), None, None)
    [file] = (tmp_path / "resources").iterdir()
    assert b"secret" in file.read_bytes()
    assert file.stat().st_mode & 0o077 == 0
    assert (tmp_path / "resources").stat().st_mode & 0o077 == 0


def test_a_file_that_cannot_be_read_is_no_answer(
    cache: ResourceCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.keep(_update(), None, None)
    [file] = (tmp_path / "resources").iterdir()
    file.write_text('{"resources_id": "rs-1"')
    assert cache.read(None, None) is None
    assert "cannot be used" in caplog.text


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = ResourceCache(tmp_path / "file" / "resources")
    cache.keep(_update(), None, None)
    assert not cache.has(None, None)
    assert "could not be kept" in caplog.text


def test_it_does_not_grow_without_end(cache: ResourceCache, tmp_path: Path, clock: _Clock) -> None:
    for number in range(300):
        clock.now += 1
        cache.keep(_update(f"rs-{number}"), f"rs-{number}", None)
    assert len(os.listdir(tmp_path / "resources")) == 256
    assert not cache.has("rs-43", None)
    assert cache.has("rs-44", None)
    assert cache.has("rs-299", None)


def test_what_the_server_has_no_more_is_forgotten(cache: ResourceCache) -> None:
    cache.forget("rs-1", None)
    cache.keep(_update(), "rs-1", None)
    cache.keep(_update(), None, None)
    cache.forget("rs-1", None)
    assert not cache.has("rs-1", None)
    assert cache.read("rs-1", None) is None
    assert cache.has(None, None)
    cache.keep(_update(), "rs-1", None)
    assert cache.has("rs-1", None)

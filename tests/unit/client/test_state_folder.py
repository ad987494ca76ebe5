"""Where things are kept on this machine, and for how long."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agentlightning.http.client.cache import ResourceCache, state_folder
from agentlightning.http.routes import parse_address
from agentlightning.types import LLM, UNSET, ResourcesUpdate


def _folder(chosen: object, address: str = "http://host:4747") -> Path | None:
    return state_folder(chosen, parse_address(address))  # type: ignore[arg-type]


def test_an_argument_then_the_environment_then_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_SPOOL_DIR", str(tmp_path / "env"))
    assert _folder(None) is None
    argument, environment = _folder(tmp_path / "given"), _folder(UNSET)
    assert argument is not None
    assert argument.parent == tmp_path / "given"
    assert environment is not None
    assert environment.parent == tmp_path / "env"
    monkeypatch.delenv("AGL_SPOOL_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    home = _folder(UNSET)
    assert home is not None
    assert home.parent == tmp_path / "state" / "agentlightning" / "spool"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = _folder(UNSET)
    assert home is not None
    assert home.parent == tmp_path / "home" / ".local" / "state" / "agentlightning" / "spool"


def test_each_server_has_its_own_folder_whoever_comes(tmp_path: Path) -> None:
    addresses = ["http://host:4747", "http://agl:key@host:4747", "http://host:4747/v1/agl", "http://host:4747/"]
    assert len({_folder(tmp_path, each) for each in addresses}) == 1
    others = ["http://host:4748", "https://host:4747", "http://host-4747", "http://other:4747", "http://host:4747/lab"]
    assert len({_folder(tmp_path, each) for each in [addresses[0], *others]}) == 6


def test_servers_that_are_gone_are_forgotten_but_no_span_is(tmp_path: Path) -> None:
    def used(name: str, *, days: float, with_file: str | None = None) -> Path:
        folder = tmp_path / name
        (folder / "resources").mkdir(parents=True)
        (folder / "resources" / "latest.json").write_text("{}")
        if with_file is not None:
            (folder / with_file).write_text("")
        when = time.time() - days * 24 * 3600
        for each in [folder / "resources" / "latest.json", folder / "resources", folder]:
            os.utime(each, (when, when))
        return folder

    old, recent = used("old", days=8), used("recent", days=6)
    refused = used("refused", days=800, with_file="quarantine.jsonl")
    waiting = used("waiting", days=800, with_file="1-a.spool")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.utime(foreign, (0, 0))
    mine = ResourceCache(tmp_path / "mine" / "resources")
    update = ResourcesUpdate(
        resources_id="rs-1", create_time=1, update_time=1, version=1, resources={"m": LLM(endpoint="e", model="m")}
    )
    mine.keep(update, None, None)
    assert not old.exists()
    assert all(each.exists() for each in (recent, refused, waiting, foreign))
    assert mine.read(None, None) is not None

"""Host names and origins: what a web page cannot fake decides who is answered."""

from __future__ import annotations

import pytest

from agentlightning.errors import InvalidValue
from agentlightning.security.hosts import AllowedHosts, AllowedOrigins, is_loopback


@pytest.mark.parametrize(
    "host",
    [
        None,
        b"localhost",
        b"LOCALHOST:4747",
        b"store.localhost",
        b"127.0.0.1",
        b"127.0.0.1:4747",
        b"10.1.2.3:80",
        b"[::1]",
        b"[::1]:4747",
        b"[fe80::1]:1",
        b"store.lab",
        b"Store.Lab:4747",
        b"store.lab.",
    ],
)
def test_hosts_that_pass(host: bytes | None) -> None:
    allowed = AllowedHosts(["store.lab"])
    assert allowed.allows(host)
    assert allowed.allows(host)


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b"evil.example",
        b"127.0.0.1.evil.example",
        b"localhost.evil.example",
        b"xlocalhost",
        b"store.lab.evil.example",
        b"127.0.0.1:80:80",
        b"127.0.0.1:x",
        b"[::1",
        b"[::1]x",
        b"[store.lab]:1",
        b"\xff",
        b"2130706433x",
    ],
)
def test_hosts_that_do_not(host: bytes) -> None:
    allowed = AllowedHosts(["other.lab"])
    assert not allowed.allows(host)
    assert not allowed.allows(host)


def test_a_star_lets_every_name_pass() -> None:
    assert AllowedHosts(["*"]).allows(b"evil.example")


@pytest.mark.parametrize(
    ("origin", "host", "answered"),
    [
        (b"http://127.0.0.1:4747", b"127.0.0.1:4747", True),
        (b"https://store.lab", b"store.lab", True),
        (b"http://127.0.0.1:4747", b"127.0.0.1:4748", False),
        (b"http://evil.example", b"127.0.0.1:4747", False),
        (b"null", b"127.0.0.1:4747", False),
        (b"null", b"null", False),
        (b"", b"", False),
        (b"http://x", None, False),
    ],
)
def test_pages_of_the_server_itself_are_answered(origin: bytes, host: bytes | None, answered: bool) -> None:
    assert AllowedOrigins().allows(origin, host) is answered
    assert AllowedOrigins().shown_to(origin) is None


def test_listed_pages_are_answered_and_may_read() -> None:
    allowed = AllowedOrigins(["https://lab.example"])
    assert allowed.allows(b"https://Lab.Example", b"127.0.0.1")
    assert allowed.shown_to(b"https://lab.example") == b"https://lab.example"
    assert not allowed.allows(b"http://lab.example", b"127.0.0.1")
    assert AllowedOrigins("*").shown_to(b"https://any.example") == b"*"


@pytest.mark.parametrize("origin", ["lab.example", "https://", "https://lab.example/", "ftp://lab.example", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(InvalidValue, match="not an origin"):
        AllowedOrigins([origin])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("store.lab", False),
        ("", False),
    ],
)
def test_what_only_this_machine_can_reach(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback

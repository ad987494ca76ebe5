"""The API key: shown as bearer or as password, and by nothing else."""

from __future__ import annotations

import base64

import pytest

from agentlightning.errors import InvalidValue
from agentlightning.security.keys import ApiKey

KEY = "correct-horse-battery"


def basic(text: str) -> bytes:
    return b"Basic " + base64.b64encode(text.encode())


@pytest.mark.parametrize(
    "shown",
    [
        b"Bearer correct-horse-battery",
        b"bearer correct-horse-battery",
        b"BEARER  correct-horse-battery ",
        basic(f"agl:{KEY}"),
        basic(f":{KEY}"),
        basic(f"anybody at all:{KEY}"),
    ],
)
def test_opens(shown: bytes) -> None:
    assert ApiKey(KEY).opens(shown)


@pytest.mark.parametrize(
    "shown",
    [
        None,
        b"",
        b"correct-horse-battery",
        b"Bearer",
        b"Bearer ",
        b"Bearer correct-horse-batter",
        b"Bearer correct-horse-battery2",
        b"Bearer Correct-horse-battery",
        b"Token correct-horse-battery",
        b"Basic correct-horse-battery",
        b"Basic \xff\xff",
        basic(KEY),
        basic(f"{KEY}:"),
        basic(f"agl:{KEY}x"),
        b"Bearer \xff",
    ],
)
def test_does_not_open(shown: bytes | None) -> None:
    assert not ApiKey(KEY).opens(shown)


@pytest.mark.parametrize("key", ["", "short", "with space in it", "ümlaut-ümlaut", "x" * 513, "line\nbreak-line"])
def test_a_key_that_cannot_be_sent_or_guessed_too_soon_is_refused(key: str) -> None:
    with pytest.raises(InvalidValue, match="8 to 512"):
        ApiKey(key)


def test_a_key_is_never_shown() -> None:
    assert KEY not in repr(ApiKey(KEY))

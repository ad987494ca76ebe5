"""How long is waited before a retry, and how ``Retry-After`` is read."""

from __future__ import annotations

import random

import pytest

from agentlightning.http.client.retry import fixed_delays, full_jitter, retry_after_seconds


def test_the_bound_doubles_up_to_the_cap() -> None:
    longest = full_jitter(0.2, 30.0, lambda: 1.0)
    assert [longest(n) for n in (1, 2, 3, 4, 8, 9, 100, 10_000)] == [0.2, 0.4, 0.8, 1.6, 25.6, 30, 30, 30]


def test_jitter_is_full() -> None:
    """Delays fill the whole interval evenly; a back-off without jitter would not."""
    backoff = full_jitter(1.0, 30.0, random.Random(1).random)
    delays = [backoff(4) or 0.0 for _ in range(4000)]
    assert 0.0 <= min(delays) < 0.05
    assert 7.95 < max(delays) <= 8.0
    tenths = [sum(n * 0.8 <= each < (n + 1) * 0.8 for each in delays) for n in range(10)]
    assert min(tenths) > 320


def test_fixed_delays_bound_the_number_of_tries() -> None:
    fixed = fixed_delays((1.0, 2.0, 5.0))
    assert [fixed(n) for n in (1, 2, 3, 4, 5)] == [1.0, 2.0, 5.0, None, None]
    assert fixed_delays(())(1) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 120 ", 120.0),
        ("999999999999", 3600.0),
        ("Fri, 15 Jan 2027 08:00:10 GMT", 10.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("٣", None),
        (None, None),
    ],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(text, wall=lambda: 1_800_000_000.0) == seconds

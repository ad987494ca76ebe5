"""The tables of docs/capture.md, each made from what the tests have seen.

`python tests/support/capture_table.py` writes them anew; ``tests/unit/test_capture.py`` fails while the page says
something else. A section is a function in `TABLES`, and the two comments around its place in the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentlightning import TracerTraceToTriplet, Triplet
from recorded_spans import ANSWER, CHOICES, FINISH_REASONS, conversations, names, recorded

PAGE = Path(__file__).resolve().parents[2] / "docs" / "capture.md"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _says(holds: bool) -> str:
    return "yes" if holds else "no"


def _calls(message: Any) -> Any:
    calls = (message or {}).get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def _choices(name: str) -> str:
    """Whether all choices of two calls that asked for two are read, of which the second one streamed."""
    if name not in names("choices"):
        return "–"
    adapted = TracerTraceToTriplet(call_filter=None).examine(recorded(name, "choices").spans)
    texts = [each.response["message"]["content"] for each in adapted.made]
    whole = [text for text, _ in CHOICES]
    return "no" if texts[:2] != whole else "yes" if texts == whole * 2 else "not of streams"


def _row(name: str) -> list[str]:
    versions, spans = recorded(name)
    made: list[Triplet] = TracerTraceToTriplet(call_filter=None).adapt(spans)
    said = conversations(name)
    assert len(made) == len(said)
    asked = [[message["role"] for message in each.prompt["messages"]] for each in made]
    expected = [[message["role"] for message in each["messages"][:-1]] for each in said]
    replies = [each.response["message"] for each in made]
    library = ", ".join(f"{package} {version}" for package, version in versions.items())
    return [
        name,
        library or "as documented, not run",
        _says(asked == expected),
        _says(bool(made[0].prompt["tools"])),
        _says(_calls(replies[0]) == _calls(said[0]["messages"][-1]) and replies[1]["content"] == ANSWER),
        _says(replies[2]["content"] == ANSWER),
        _choices(name),
        _says([each.metadata["finish_reason"] for each in made] == FINISH_REASONS),
        _says(all(each.metadata["response_id"] for each in made)),
        _says(all(each.metadata["agent_name"] for each in made)),
        _says(all(each.response["token_ids"] for each in made)),
    ]


def instrumentations() -> str:
    """What each tracing library records of a model call."""
    head = ("Written by", "Versions", "Messages", "Tools", "Reply", "Streams", "Choices", "Finish reason")
    return table((*head, "Response id", "Agent", "Token ids"), [_row(name) for name in names()])


TABLES: Mapping[str, Callable[[], str]] = {"instrumentations": instrumentations}
"""What makes the table of each section."""


def with_tables(page: str) -> str:
    """The text of the page with its tables made anew."""
    for name, make in TABLES.items():
        before, found, rest = page.partition(f"<!-- table: {name} -->\n")
        _, ended, after = rest.partition(f"<!-- end: {name} -->")
        assert found, f"the page has no place for the table {name}"
        assert ended, f"the table {name} has no end in the page"
        page = f"{before}{found}{make()}\n{ended}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

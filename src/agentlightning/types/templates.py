"""Filling prompt templates, within bounds.

A template may have been written by a model, so it is not trusted: it reads the values that it is given, and can neither
reach into what they are made of, nor take more text, work or time than `TemplateBounds` allow. The bounds hold in every
thread, because what takes long is counted, and nothing has to be interrupted. Here is what both languages share, and
``f-string``; ``jinja`` is in ``jinja_templates``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from string import Formatter
from typing import Any, NamedTuple

from agentlightning.errors import InvalidValue, TemplateOutOfBounds

LISTS: Any = (list, tuple, dict, set, frozenset)
"""The types that are looked into to tell how large a value is."""

_FORMATTER = Formatter()
_DIGITS = re.compile(r"\d+")
_SHOWN_CHARACTERS = 40
_MAX_DIGITS = 18
"""More make no difference: Python would take very many of them for an error, or long to read them."""
_DEPTH = 50
_TOTAL = 8
"""How many times ``characters`` one filling may make in all."""
_ITEM = 16
"""What an item of a list counts as, in characters: about what it takes in memory, beside its own text."""


class TemplateBounds(NamedTuple):
    """What filling one template may take. Pass other ones to ``PromptTemplate.fill``."""

    characters: int = 2_000_000
    """The longest text that may come out, or come up on the way. Lists count too: an item as 16 characters and its
    text. All that one filling makes is together at most eight times this."""
    width: int = 1_000
    """The largest width, precision or number of columns that a filter or a format may ask for."""
    steps: int = 1_000_000
    """Parts of the template that may be worked through: loops and macros count each time with all that is in them.
    Reading a template of ``jinja`` takes 50 for each of its tokens."""
    seconds: float = 1.0
    """CPU time of the thread that fills it, so that a machine that stood still, or is busy, refuses nothing."""


DEFAULT_BOUNDS = TemplateBounds()
"""Those of ``PromptTemplate.format``."""


class TemplateBudget:
    """What is left of the bounds while one template is filled.

    Args:
        language: of the template, for messages.
        template: its text.
        bounds: what it may take.
    """

    def __init__(self, language: str, template: str, bounds: TemplateBounds) -> None:
        shown = template if len(template) <= _SHOWN_CHARACTERS else template[: _SHOWN_CHARACTERS - 1] + "…"
        self._template = f"the {language} template {shown!r}"
        self.bounds = bounds
        """What it may take."""
        self._steps = bounds.steps
        self._characters = bounds.characters * _TOTAL
        self._deadline = time.thread_time() + bounds.seconds

    def step(self, count: int = 1) -> None:
        """So many parts of the template are worked through."""
        self._steps -= count
        if self._steps < 0:
            raise self.beyond("steps", f"takes more than {self.bounds.steps} steps")
        if time.thread_time() > self._deadline:
            raise self.beyond("seconds", f"takes more than {self.bounds.seconds:g} s of CPU time")

    def check_size(self, characters: int) -> None:
        """A text of this length shall be made."""
        if characters > self.bounds.characters:
            raise self.beyond("characters", f"makes a text or a list of more than {self.bounds.characters} characters")

    def charge(self, characters: int) -> None:
        """A text of this length has been made."""
        self.check_size(characters)
        self._characters -= characters
        if self._characters < 0:
            total = self.bounds.characters * _TOTAL
            raise self.beyond("characters", f"makes texts and lists of more than {total} characters in all")

    def check_width(self, number: Any) -> None:
        """Something shall be so wide, or have so many columns or digits."""
        if isinstance(number, int | float) and abs(number) > self.bounds.width:
            raise self.beyond("width", f"asks for a width, a precision or a count of {number:.6g}")

    def check_spec(self, spec: str) -> None:
        """Check the widths and precisions in a format."""
        if len(spec) > self.bounds.width:
            raise self.beyond("width", f"has a format of {len(spec)} characters")
        for digits in _DIGITS.findall(spec):
            self.check_digits(digits)

    def check_digits(self, digits: str) -> None:
        """Check a width or precision that is written out, or nothing."""
        self.check_width(int(digits.lstrip("0")[:_MAX_DIGITS] or 0))

    def weigh(self, value: Any) -> int:
        """Return what a list, tuple, dictionary or set would have as text, about. What occurs twice counts twice.

        Raises:
            TemplateOutOfBounds: that is too much, or it is nested too deep.
        """
        return self._weigh(value, 0, _DEPTH)

    def _weigh(self, value: Any, before: int, depth: int) -> int:
        """Return ``before`` and what this value adds to it."""
        total = before + _ITEM
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, LISTS):
            if depth == 0:
                raise self.never(f"nests more than {_DEPTH} lists in each other")
            parts: Any = value
            for part in parts:
                total = self._weigh(part, total, depth - 1)
                if isinstance(value, dict):
                    total = self._weigh(parts[part], total, depth - 1)
        self.check_size(total)
        return total

    def beyond(self, bound: str, what: str) -> TemplateOutOfBounds:
        """Return the error for a bound that can be raised."""
        return TemplateOutOfBounds(
            f"{self._template} {what}, which is beyond the bound {bound!r}; simplify it, or pass "
            f"TemplateBounds({bound}=...) to PromptTemplate.fill()"
        )

    def never(self, what: str) -> TemplateOutOfBounds:
        """Return the error for what no template may do."""
        return TemplateOutOfBounds(f"{self._template} {what}; compute that in the agent, and pass it as a value")


# --- The language of str.format ----------------------------------------------------------------------


def format_braces(template: str, values: Mapping[str, Any], bounds: TemplateBounds = DEFAULT_BOUNDS) -> str:
    """Fill a template as `str.format` does, save that a placeholder is a plain name.

    ``{name}``, ``{name!r}``, ``{name:>10}``, ``{name:{width}}``, and ``{{`` and ``}}`` for
    literal braces. No ``{}`` or ``{0}``, no ``{name.attribute}``, no ``{name[index]}``. A format
    spec may hold placeholders, whose own spec may not: the two levels of `str.format`.

    Raises:
        InvalidValue: The template is malformed, a placeholder is not a plain name or has no
            value, or a value does not take its format spec.
        TemplateOutOfBounds: It takes more than the bounds allow.
    """
    return _fill(template, values, TemplateBudget("f-string", template, bounds), levels=2)


def names_in_braces(template: str) -> set[str]:
    """Return the placeholders of such a template, also those in format specs.

    Raises:
        InvalidValue: The template is malformed.
    """
    found: set[str] = set()
    for _, name, spec, _ in _parse(template):
        if name is not None:
            found |= {name} | (names_in_braces(spec) if spec else set())
    return found


def _fill(template: str, values: Mapping[str, Any], budget: TemplateBudget, levels: int) -> str:
    if levels == 0:
        raise InvalidValue(f"the format spec {template!r} is nested too deep; placeholders go two levels deep at most")
    filled: list[str] = []
    size = 0
    for literal, name, spec, conversion in _parse(template):
        budget.step()
        filled.append(literal)
        if name is not None:
            filled_spec = _fill(spec, values, budget, levels - 1) if spec else ""
            budget.check_spec(filled_spec)
            filled.append(_render(name, _look_up(name, values), filled_spec, conversion))
            size += len(filled[-1])
        size += len(literal)
        budget.check_size(size)
    return "".join(filled)


def _parse(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(_FORMATTER.parse(template))
    except ValueError as error:
        raise InvalidValue(f"the template is malformed: {error}; write '{{{{' and '}}}}' for literal braces") from error


def _look_up(name: str, values: Mapping[str, Any]) -> Any:
    if not name or name.isdecimal():
        raise InvalidValue(f"the placeholder '{{{name}}}' has no name; values are given by name: write '{{some_name}}'")
    if "." in name or "[" in name:
        raise InvalidValue(
            f"the placeholder '{{{name}}}' reaches into a value, which a template must not; "
            "pass what it needs under a plain name of its own"
        )
    if name not in values:
        raise InvalidValue(
            f"the placeholder '{{{name}}}' has no value; {names_given(values)}; "
            "write '{{' and '}}' if the braces were meant literally"
        )
    return values[name]


def _render(name: str, value: Any, spec: str, conversion: str | None) -> str:
    try:
        return format(_FORMATTER.convert_field(value, conversion), spec)
    except Exception as error:  # a boundary: the value's own __format__, __str__ or __repr__ runs here
        shown = f"{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
        raise InvalidValue(
            f"the placeholder '{{{name}{shown}}}' cannot show a value of type {type(value).__name__}: {error}"
        ) from error


def names_given(values: Mapping[str, Any]) -> str:
    """Return a part of a message: the names that have values."""
    return f"the names given are: {', '.join(sorted(values))}" if values else "no names were given"

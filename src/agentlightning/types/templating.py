"""Filling prompt templates, in two languages.

A template may come from an algorithm, a model or another machine, so it is not trusted.
With braces it sees the values it is given, and nothing behind them. With Jinja it may also
use their public attributes and call their public methods, as far as Jinja's sandbox lets it:
it changes no list or dict, and gets at nothing with an underscore. Give a Jinja template plain
data, not objects whose methods do things.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from string import Formatter
from typing import TYPE_CHECKING, Any

from agentlightning.errors import InvalidValue

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["format_braces", "format_jinja"]

_FORMATTER = Formatter()

# A format spec may hold placeholders, whose own spec may not: the two levels of str.format.
_LEVELS = 2


def format_braces(template: str, values: Mapping[str, Any]) -> str:
    """Fill a template as `str.format` does, save that a placeholder is a plain name.

    ``{name}``, ``{name!r}``, ``{name:>10}``, ``{name:{width}}``, and ``{{`` and ``}}`` for
    literal braces. No ``{}`` or ``{0}``, no ``{name.attribute}``, no ``{name[index]}``.

    Raises:
        InvalidValue: The template is malformed, a placeholder is not a plain name or has no
            value, or a value does not take its format spec.
    """
    return _fill_braces(template, values, _LEVELS)


def format_jinja(template: str, values: Mapping[str, Any]) -> str:
    """Fill a Jinja template in a sandbox. A name that has no value is an error, not an empty text.

    Nothing is escaped, since a prompt is not HTML, and a newline at the end stays.

    Raises:
        InvalidValue: The template is malformed, uses a name without a value, does what the
            sandbox forbids, or fails in some other way.
    """
    try:
        return _compile_jinja(template).render(values)
    except Exception as error:  # a boundary: a template is a program, and whatever it raises is its error
        raise InvalidValue(
            f"the jinja template cannot be filled: {error} ({type(error).__name__}); {_given(values)}"
        ) from error


def _fill_braces(template: str, values: Mapping[str, Any], levels: int) -> str:
    if levels == 0:
        raise InvalidValue(f"the format spec {template!r} is nested too deep; placeholders go two levels deep at most")
    try:
        pieces = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise InvalidValue(f"the template is malformed: {error}; write '{{{{' and '}}}}' for literal braces") from error
    filled: list[str] = []
    for literal, name, spec, conversion in pieces:
        filled.append(literal)
        if name is not None:
            value = _look_up(name, values)
            filled.append(_render(name, value, _fill_braces(spec, values, levels - 1) if spec else "", conversion))
    return "".join(filled)


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
            f"the placeholder '{{{name}}}' has no value; {_given(values)}; "
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


def _given(values: Mapping[str, Any]) -> str:
    return f"the names given are: {', '.join(sorted(values))}" if values else "no names were given"


@lru_cache(maxsize=128)
def _compile_jinja(template: str) -> Template:
    """Compile once per text: it takes about a hundred times longer than filling."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)

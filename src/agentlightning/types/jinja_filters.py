"""Filters and tests of ``jinja`` templates that are counted, or checked before they are done.

Those that take time in proportion to what they are given are only counted. For the others it is checked how much would
come of them. A filter whose cost cannot be told in advance is not offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context

from agentlightning.types.templates import TemplateBudget

Function = Callable[..., Any]

_MAX_INDENT = 16
_MAX_NEEDLE = 100
"""Characters of what is looked for from the end of a text, or stripped from it: that takes this times the text."""

STEP, MADE, JOINED = "(step)", "(made)", "(joined)"
"""Filters that only a compiler names: count steps, charge for a value that was built, join a list of values."""

_PRINTF = re.compile(r"[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?")
_FILTERS = frozenset(
    (  # noqa: SIM905 - names alone read best
        "abs batch capitalize center count d default dictsort e escape filesizeformat first float forceescape format "
        "groupby indent int items last length list lower map max min random reject rejectattr replace reverse round "
        "safe select selectattr slice sort string title tojson trim truncate upper urlencode wordcount"
    ).split()
)


def bounded_filters(filters: Mapping[str, Function]) -> dict[str, Function]:
    """Return what stands for the filters of Jinja, and those for the compiler."""
    own = {STEP: _step, MADE: _made, JOINED: _joined, "join": _join, "sum": _sum, "unique": _unique}
    others = filters.items() - own.items()
    return {name: _counted(name, each) if name in _FILTERS else refused(name) for name, each in others} | own


def bounded_tests(tests: Mapping[str, Function]) -> dict[str, Function]:
    """Return what stands for the tests of Jinja."""
    return {name: _counted(name, each) for name, each in tests.items()}


def refused(name: str) -> Function:
    """Return what stands for a filter or a function that is not offered."""

    @pass_context
    def refuse(*_: Any, **__: Any) -> Any:
        raise SecurityError(f"{name!r} is not offered in templates")

    return refuse


def check_call(budget: TemplateBudget, name: str, value: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Check a filter, or a method of a text or a list, before it is called."""
    check = _CHECKS.get(name)
    if check is not None:
        check(budget, value, *args, **kwargs)


def _counted(name: str, function: Function) -> Function:
    """Return a filter or a test that is counted, and checked before it is done. It takes the context, and is for this
    reason never run while a template is compiled."""
    takes = getattr(function, "jinja_pass_arg", None)
    kind = "" if takes is None else takes.name

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        environment: Any = context.environment
        environment.budget.step()
        check_call(environment.budget, name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": environment}.get(kind)
        result = function(*(() if first is None else (first,)), value, *args, **kwargs)
        return environment.counted(result) if isinstance(result, Iterator) else environment.made(result)

    return counted


@pass_context
def _step(context: Context, value: Any, count: int = 1) -> Any:
    environment: Any = context.environment
    environment.budget.step(count)
    return value


@pass_context
def _made(context: Context, value: Any) -> Any:
    environment: Any = context.environment
    environment.budget.step()
    return environment.made(value)


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    environment: Any = context.environment
    return environment.joined("", values)


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    environment: Any = context.environment
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return environment.joined(environment.text(d), value)


@pass_context
def _sum(context: Context, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    environment: Any = context.environment
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    for each in iterable:
        start = environment.call_binop(context, "+", start, each)
    return start


@pass_context
def _unique(
    context: Context, value: Iterable[Any], case_sensitive: bool = False, attribute: str | int | None = None
) -> list[Any]:
    environment: Any = context.environment
    key_of = make_attrgetter(environment, attribute)
    found: dict[Any, Any] = {}
    for each in value:
        environment.budget.step()
        key = key_of(each)
        if not isinstance(key, str | int | float | None):
            raise environment.budget.never(f"looks for unique values of type {type(key).__name__}")
        found.setdefault(key.lower() if isinstance(key, str) and not case_sensitive else key, each)
    return environment.made(list(found.values()))


def _check_columns(budget: TemplateBudget, _value: Any, count: Any = 0, *_: Any, **named: Any) -> None:
    named.pop("fill_with", None)
    for number in (count, *named.values()):
        budget.check_width(number)


def _check_indent(budget: TemplateBudget, value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    budget.check_width(width)
    text = str(value)
    budget.check_size(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))


def _check_replace(budget: TemplateBudget, value: Any, old: Any, new: Any, count: int | None = None) -> None:
    text, old, new = str(value), str(old), str(new)
    found = text.count(old)
    if count is not None and count >= 0:
        found = min(found, count)
    budget.check_size(len(text) + found * max(0, len(new) - len(old)))


def _check_format(budget: TemplateBudget, value: Any, *args: Any, **kwargs: Any) -> None:
    check_printf(budget, str(value), kwargs or args)


def check_printf(budget: TemplateBudget, template: str, values: Any) -> None:
    """Check a format for the operator ``%``, as Python reads it."""
    at = template.find("%")
    while at >= 0:
        at = _end_of_key(template, at + 1)
        for width in ((read := _PRINTF.match(template, at)) and read.groups()) or ():
            if width == "*":
                raise budget.never("formats with a width or a precision that is a value")
            budget.check_digits(width or "")
        at = template.find("%", (read.end() if read else at) + 1)  # after the character that says how
    each = template.count("%") if isinstance(values, Mapping) else 1
    budget.check_size(len(template) + each * budget.weigh(values))


def _end_of_key(template: str, at: int) -> int:
    """Return where the name in parentheses that may stand at a place has ended."""
    depth = 0
    for place in range(at, len(template)):
        depth += {"(": 1, ")": -1}.get(template[place], 0)
        if depth == 0:
            return place + (place > at)
    return at


def _check_needle(budget: TemplateBudget, _value: Any, needle: Any = None, *_: Any, **named: Any) -> None:
    for text in (needle, *named.values()):
        if isinstance(text, str) and len(text) > _MAX_NEEDLE:
            raise budget.never(f"strips, or splits from the end by, more than {_MAX_NEEDLE} characters")


def _check_json(budget: TemplateBudget, value: Any, indent: int | None = None) -> None:
    budget.weigh(value)
    if indent is not None and indent > _MAX_INDENT:
        raise budget.never(f"indents JSON by more than {_MAX_INDENT}")


_CHECKS: dict[str, Function] = {
    **dict.fromkeys(("batch", "center", "ljust", "rjust", "round", "slice", "zfill"), _check_columns),
    **dict.fromkeys(("lstrip", "rsplit", "rstrip", "strip", "trim"), _check_needle),
    "format": _check_format,
    "indent": _check_indent,
    "replace": _check_replace,
    "tojson": _check_json,
}

"""The template language ``jinja``, within bounds.

Jinja's sandbox keeps a template from reaching into values. Here every operation whose cost can grow is counted, or is
checked before it is done: operators, filters, tests, calls, comparisons, lists that are built, texts that are joined,
and each round of a loop or a macro. What cannot be bounded is not offered: some filters, and methods of texts and
lists that few prompts need. Values of other types, and functions among the values, are the agent's own: what they do
is not bounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, lru_cache
from types import CodeType
from typing import Any, TypeVar, cast

from jinja2 import StrictUndefined, meta, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from agentlightning.errors import InvalidValue, TemplateOutOfBounds
from agentlightning.types.jinja_filters import (
    JOINED,
    MADE,
    STEP,
    bounded_filters,
    bounded_tests,
    check_call,
    check_printf,
    refused,
)
from agentlightning.types.templates import DEFAULT_BOUNDS, LISTS, TemplateBounds, TemplateBudget, names_given

Body = TypeVar("Body", nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)

_STEPS_OF_A_TOKEN = 50
_MAX_BITS = 64
_MAX_MESSAGE = 500

_OPERATORS = frozenset({"+", "-", "*", "/", "//", "%", "**"})
_BUILTINS: Any = (str, bytes, int, float, complex, *LISTS, range)

_METHODS = frozenset(
    (  # noqa: SIM905 - names alone read best
        "capitalize casefold center count endswith find get index isalnum isalpha isascii isdecimal isdigit "
        "isidentifier islower isnumeric isprintable isspace istitle isupper is_integer items join keys ljust lower "
        "lstrip partition removeprefix removesuffix replace rjust rsplit rstrip split splitlines startswith strip "
        "swapcase title upper values zfill"
    ).split()
)


def format_jinja(template: str, values: Mapping[str, Any], bounds: TemplateBounds = DEFAULT_BOUNDS) -> str:
    """Fill a Jinja template in a sandbox. A name that has no value is an error, not an empty text.

    Nothing is escaped, since a prompt is not HTML, and a newline at the end stays.

    Raises:
        InvalidValue: The template is malformed, uses a name without a value, does what the
            sandbox forbids, or fails in some other way.
        TemplateOutOfBounds: It takes more than the bounds allow.
    """
    try:
        code = _compile(template, bounds)
        environment = _environment(template, bounds)
        compiled = environment.template_class.from_code(environment, code, environment.make_globals(None))
        return compiled.render(values)
    except TemplateOutOfBounds:
        raise
    except Exception as error:  # a boundary: a template is a program, and whatever it raises is its error
        raise InvalidValue(
            f"the jinja template cannot be filled: {_shortened(error)} ({type(error).__name__}); {names_given(values)}"
        ) from error


def names_in_jinja(template: str, bounds: TemplateBounds = DEFAULT_BOUNDS) -> set[str]:
    """Return the names that such a template takes from its values. Nothing of it is run.

    Raises:
        InvalidValue: The template is malformed.
        TemplateOutOfBounds: It is too long to be read within the bounds.
    """
    environment = _environment(template, bounds)
    try:
        return meta.find_undeclared_variables(_parse(environment, template)) - environment.globals.keys()
    except TemplateOutOfBounds:
        raise
    except Exception as error:  # a boundary, as above
        raise InvalidValue(f"the template is malformed: {_shortened(error)}") from error


def _shortened(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"


# --- Reading -----------------------------------------------------------------------------------------


@lru_cache(maxsize=128)
def _compile(template: str, bounds: TemplateBounds) -> CodeType:
    """Compile once per text: it takes about a hundred times longer than filling."""
    environment = _environment(template, bounds)
    return environment.compile(_parse(environment, template))


def _parse(environment: BoundedEnvironment, template: str) -> nodes.Template:
    environment.budget.check_size(len(template))
    for _ in environment.lex(template):
        environment.budget.step(_STEPS_OF_A_TOKEN)
    tree = environment.parse(template)
    _Counting().visit(tree)
    return tree.set_environment(environment)  # pyright: ignore[reportReturnType] - returns the tree itself


class _Counting(NodeTransformer):
    """Puts filters that count around what has a cost of its own and cannot be intercepted otherwise."""

    def _repeated(self, node: Body) -> Body:
        self.generic_visit(node)
        count = sum(1 for _ in node.find_all(nodes.Node))
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None), STEP, nodes.Const(count))))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _repeated

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._repeated(node)
        if node.test is not None:
            node.test = _filtered(cast(nodes.Expr, node.test), STEP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, STEP)

    def _built(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filtered(node, MADE)

    visit_List = visit_Tuple = visit_Dict = _built

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, MADE) if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


# --- Filling -----------------------------------------------------------------------------------------


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that counts. Each filling has a copy of its own, with a budget."""

    intercepted_binops = _OPERATORS
    budget: TemplateBudget
    """What is left for the template that is read or filled."""

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Join the output of a template or of a part of it, which is a generator or a list."""
        size, kept = 0, list[str]()
        for part in parts:
            size += len(part)
            self.budget.check_size(size)
            kept.append(part)
        self.budget.charge(size)
        return "".join(kept)

    def joined(self, separator: str, parts: Iterable[Any]) -> str:
        """Join values as texts."""

        def texts() -> Iterator[str]:
            for number, part in enumerate(parts):
                self.budget.step()
                if number:
                    yield separator
                yield self.text(part)

        return self.concat(texts())

    def text(self, value: Any) -> str:
        """A value as text."""
        if isinstance(value, str):
            return value
        if isinstance(value, LISTS):
            self.budget.weigh(value)
        return self.made(str(value))

    def made(self, value: Any) -> Any:
        """Charge for a value that has come up, and return it."""
        if isinstance(value, str | bytes):
            self.budget.charge(len(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise self.budget.never(f"makes a whole number of more than {_MAX_BITS} bits")
        elif isinstance(value, LISTS):
            self.budget.charge(self.budget.weigh(value))
        return value

    def counted(self, values: Iterator[Any]) -> Iterator[Any]:
        """What a filter yields by and by."""
        for value in values:
            self.budget.step()
            yield self.made([value])[0]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do what an operator says, if it is within the bounds."""
        self.budget.step()
        if operator == "*":
            self._check_repetition(left, right)
            self._check_repetition(right, left)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            check_printf(self.budget, left, right)
        elif operator == "**":
            self._check_power(left, right)
        return self.made(super().call_binop(context, operator, left, right))

    def _check_repetition(self, value: Any, times: Any) -> None:
        if isinstance(value, str | bytes | list | tuple) and isinstance(times, int) and times > 0:
            size = len(value) if isinstance(value, str | bytes) else self.budget.weigh(value)
            self.budget.check_size(size * times)

    def _check_power(self, base: Any, exponent: Any) -> None:
        if isinstance(base, float) or isinstance(exponent, float):
            return
        least_bits = base.bit_length() - 1 if isinstance(base, int) else 1
        if abs(exponent) * least_bits > _MAX_BITS:
            raise self.budget.never(f"asks for a power of more than {_MAX_BITS} bits")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what the template calls, if it is within the bounds."""
        __self.budget.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, _BUILTINS):
            if __obj.__name__ not in _METHODS or isinstance(owner, bytes):
                raise SecurityError(f"{type(owner).__name__}.{__obj.__name__} is not offered in templates")
            if __obj.__name__ == "join":
                return __self.joined(str(owner), *args)
            check_call(__self.budget, __obj.__name__, owner, args, kwargs)
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what ``str.format`` is replaced by; None if the value is another function."""
        if super().wrap_str_format(value) is None:
            return None
        template, is_map, formatter = str(value.__self__), value.__name__ == "format_map", _Formatter(self)

        def fill(*args: Any, **kwargs: Any) -> str:
            return formatter.vformat(template, () if is_map else args, args[0] if is_map else kwargs)

        return fill


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: BoundedEnvironment) -> None:
        super().__init__(environment)
        self._environment = environment

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._environment.budget.step()
        self._environment.budget.check_spec(format_spec)
        return self._environment.made(super().format_field(value, format_spec))


class _Namespace(Namespace):
    """Has no text of its values, which may be namespaces again."""

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)

    def __repr__(self) -> str:
        return "<Namespace>"


def _environment(template: str, bounds: TemplateBounds) -> BoundedEnvironment:
    environment = copy.copy(_shared_environment())
    environment.budget = TemplateBudget("jinja", template, bounds)
    return environment


@cache
def _shared_environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_finalize)
    environment.filters = bounded_filters(environment.filters)
    environment.tests = bounded_tests(environment.tests)
    names: dict[str, Any] = environment.globals  # pyright: ignore[reportAssignmentType] - the union of its own
    names |= {"range": _range, "dict": _dict, "namespace": _Namespace, "lipsum": refused("lipsum")}
    return environment


@pass_context
def _finalize(context: Context, value: Any) -> str:
    environment: Any = context.environment
    environment.budget.step()
    return environment.text(value)


@pass_environment
def _range(environment: BoundedEnvironment, *args: int) -> range:
    numbers = range(*args)
    if len(numbers) > environment.budget.bounds.steps:
        raise environment.budget.beyond("steps", f"asks for a range of {len(numbers)} numbers")
    for number in (numbers.start, numbers.stop):
        environment.made(number)
    return numbers


def _dict(values: Mapping[str, Any] | None = None, /, **more: Any) -> dict[str, Any]:
    return {**(values or {}), **more}

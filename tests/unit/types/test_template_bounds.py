"""What a template takes is bounded. Each template here is small: what refuses it is a bound that is smaller, and the
same template is filled where the bound is larger."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from agentlightning.errors import InvalidValue, TemplateOutOfBounds
from agentlightning.types import PromptTemplate, TemplateBounds
from agentlightning.types.jinja_templates import format_jinja, names_in_jinja
from agentlightning.types.templates import format_braces

SMALL = TemplateBounds(characters=200, width=20, steps=5_000)
LARGE = TemplateBounds(characters=20_000, width=2_000, steps=500_000, seconds=10)

CHARACTERS = {
    "repeats a text": "{{ 'ab' * 101 }}",
    "repeats a list": "{{ ([1, 2] * 10) | length }}",
    "repeats from the right": "{{ 101 * 'ab' }}",
    "adds": "{{ half + half + 'x' }}",
    "joins with ~": "{{ half ~ half ~ 'x' }}",
    "joins a list": "{{ [half, half] | join('-') }}",
    "joins by a method": "{{ '-'.join([half[:50]] * 2 + [half[:50]]) }}{{ half }}",
    "joins an attribute": "{{ rows | join('--', attribute='text') }}",
    "doubles": "{% set n = namespace(t='abc') %}{% for i in range(7) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "doubles a list": "{% set n = namespace(t=1) %}{% for i in range(4) %}{% set n.t = [n.t, n.t] %}{% endfor %}x",
    "writes in a loop": "{% for i in range(67) %}abc{% endfor %}",
    "writes in a block": "{% set t %}{% for i in range(67) %}abc{% endfor %}{% endset %}{{ t | length }}",
    "writes in a macro": "{% macro m() %}{% for i in range(67) %}abc{% endfor %}{% endmacro %}{{ m() | length }}",
    "writes many values": "{{ half }}{{ half }}{{ half }}",
    "shows a list": "{{ rows }}",
    "shows a value": "{{ shown }}",
    "replaces": "{{ half | replace('x', 'yyy') }}",
    "replaces nothing": "{{ half | replace('', 'yy') }}",
    "replaces by a method": "{{ half.replace('x', 'yyy') }}",
    "indents": "{{ ('a\n' * 20) | indent(19, true) }}",
    "indents by a text": "{{ ('a\n' * 20) | indent('-' * 10) | length }}",
    "lists": "{{ half | list | length }}",
    "lists by and by": "{{ range(40) | map('string') | list | length }}",
    "splits": "{{ half.split('x') | length }}",
    "slices": "{{ long[1:] | length }}",
    "formats": "{{ '%s and %s' % (half, half) }}",
    "formats a mapping": "{{ '%(a)s %(a)s %(a)s' | format(a=half) }}",
    "formats by a method": "{{ '{0} {0} {0}'.format(half) }}",
    "sums lists": "{{ [[1], [2], [3], [4], [5], [6], [7]] | sum(start=[]) | length }}",
    "makes much in all": "{% for i in range(20) %}{% set t = 'a' * 150 %}{% endfor %}x",
    "is long itself": "a" * 201,
}
WIDTH = {
    "center": "{{ 'x' | center(21) }}",
    "center, named": "{{ 'x' | center(width=21) }}",
    "center, a method": "{{ 'x'.center(21) }}",
    "ljust": "{{ 'x'.ljust(21) }}",
    "zfill": "{{ '1'.zfill(21) }}",
    "indent": "{{ 'x' | indent(21) }}",
    "batch": "{{ [1] | batch(21, 'x') | list | length }}",
    "slice": "{{ [1] | slice(21) | list | length }}",
    "round": "{{ 1.5 | round(21) }}",
    "round, negative": "{{ 5 | round(-21) }}",
    "percent": "{{ '%21d' % 1 }}",
    "percent, precise": "{{ '%.21f' % 1 }}",
    "percent, after another": "{{ '%d%% %21d' % (1, 2) }}",
    "percent, named": "{{ '%(a)21d' | format(a=1) }}",
    "percent, a name with parentheses": "{{ '%((a))21d' % {'(a)': 1} }}",
    "format": "{{ '{:>21}'.format(1) }}",
    "format, a value": "{{ '{:>{w}}'.format(1, w=21) }}",
    "format_map": "{{ '{a:>21}'.format_map({'a': 1}) }}",
    "format, through a filter": "{{ (['{:>21}'] | map(attribute='format') | first)(1) }}",
}
STEPS = {
    "a loop": "{% for i in range(2000) %}{% endfor %}",
    "a loop in a loop": "{% for i in range(40) %}{% for j in range(40) %}{% endfor %}{% endfor %}",
    "a loop that passes all over": "{% for i in range(4000) if i < 0 %}{% endfor %}",
    "a loop over a text": "{% for i in long * 2 %}{% endfor %}",
    "a recursive loop": "{% for i in [1, 2] recursive %}{% if loop.depth < 9 %}{{ loop("
    "[1, 2]) }}{% endif %}{% endfor %}",
    "a macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(8) }}",
    "a block": "{% block b %}{% endblock %}{% for i in range(500) %}{{ self.b() }}{% endfor %}",
    "a filter": "{% for i in range(500) %}{{ '' | upper | lower | trim | upper | lower }}{% endfor %}",
    "a filter for each": "{{ range(4000) | map('string') | select('none') | first is defined }}",
    "a test": "{% for i in range(3000) if i is odd and i is even %}{% endfor %}",
    "a range": "{{ range(5001) | length }}",
    "tokens": "{% if a %}{% endif %}" * 20,
}


def fill(template: str, bounds: TemplateBounds) -> str:
    class Shown:
        def __str__(self) -> str:
            return "s" * 201

    half = "x" * 100
    values = {"half": half, "long": "x" * 3000, "rows": [{"text": half}, {"text": half}], "shown": Shown(), "a": 1}
    return format_jinja(template, values, bounds)


@pytest.mark.parametrize("template", CHARACTERS.values(), ids=CHARACTERS)
def test_jinja_makes_no_more_text_than_allowed(template: str) -> None:
    with pytest.raises(TemplateOutOfBounds, match=r"TemplateBounds\(characters="):
        fill(template, SMALL)
    assert fill(template, LARGE)


@pytest.mark.parametrize("template", WIDTH.values(), ids=WIDTH)
def test_jinja_makes_nothing_wider_than_allowed(template: str) -> None:
    with pytest.raises(TemplateOutOfBounds, match=r"TemplateBounds\(width="):
        fill(template, SMALL)
    assert fill(template, LARGE)


@pytest.mark.parametrize("template", STEPS.values(), ids=STEPS)
def test_jinja_takes_no_more_steps_than_allowed(template: str) -> None:
    with pytest.raises(TemplateOutOfBounds, match=r"TemplateBounds\(steps="):
        fill(template, SMALL._replace(characters=10_000))
    fill(template, LARGE)


@pytest.mark.parametrize(
    ("bounded", "free"),
    [
        ("{{ 2 ** 65 }}", "{{ 2 ** 63 }}"),
        ("{{ 3 ** 50 }}", "{{ 3 ** 40 }}"),
        ("{{ 2 ** -65 }}", "{{ 2 ** -60 }}"),
        ("{{ fraction ** 70 }}", "{{ fraction ** 2 }}"),
        ("{{ 9999999999 * 9999999999 }}", "{{ 9999999999 * 9999.5 }}"),
        ("{{ ('9' * 30) | int }}", "{{ ('9' * 18) | int }}"),
        ("{{ range(0, 99999999999999999999, 9999999999999999999) | list }}", "{{ range(0, 99, 9) | list }}"),
        ("{{ '%*d' % (3, 1) }}", "{{ '%3d' % 1 }}"),
        ("{{ {'a': [1]} | tojson(17) }}", "{{ {'a': [1]} | tojson(16) }}"),
        ("{{ 'aXa'.strip('a' * 101) }}", "{{ 'aXa'.strip('a' * 100) }}"),
        ("{{ [(1, 2)] | unique | list }}", "{{ [1, 1.0, 'a', 'A', none] | unique | list }}"),
        (
            "{% set n = namespace(t=1) %}{% for i in range(60) %}{% set n.t = [n.t] %}{% endfor %}{{ n.t }}",
            "{% set n = namespace(t=1) %}{% for i in range(40) %}{% set n.t = [n.t] %}{% endfor %}{{ n.t }}",
        ),
    ],
)
def test_what_no_bound_allows_is_refused_with_a_way_out(bounded: str, free: str) -> None:
    from fractions import Fraction

    values = {"fraction": Fraction(3, 2)}
    with pytest.raises(TemplateOutOfBounds, match="compute that in the agent, and pass it as a value"):
        format_jinja(bounded, values)
    assert format_jinja(free, values)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' | wordwrap(10) }}",
        "{{ 'a' | attr('upper') }}",
        "{{ lipsum(1) }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.rfind('a') }}",
        "{{ (1).bit_length() }}",
        "{{ raw.decode() }}",
    ],
)
def test_what_cannot_be_bounded_is_not_offered(template: str) -> None:
    with pytest.raises(InvalidValue, match="is not offered in templates"):
        format_jinja(template, {"raw": b"a"})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ [3, 1, 2] | sort | join(', ') }}", "1, 2, 3"),
        ("{{ ['b', 'A', 'B'] | unique | list }}", "['b', 'A']"),
        ("{{ ['b', 'B'] | unique(case_sensitive=true) | list }}", "['b', 'B']"),
        ("{{ rows | unique(attribute='k') | map(attribute='v') | list }}", "[1, 3]"),
        ("{{ rows | sum(attribute='v', start=10) }}", "16"),
        ("{{ rows | groupby('k') | map('first') | list }}", "['a', 'b']"),
        ("{{ rows | map(attribute='v') | batch(2, 0) | list }}", "[[1, 2], [3, 0]]"),
        ("{{ rows | selectattr('v', 'gt', 1) | map(attribute='v') | list }}", "[2, 3]"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{% set a, b = 1, 2 %}{{ b - a }}{{ [1, 2, 3][1:] }}{{ 'abc'[::-1] }}", "1[2, 3]cba"),
        ("{{ '%s: %05.1f%%' % ('x', 2.5) }} {{ '{:>4}|{a!r}'.format(1, a='b') }}", "x: 002.5%    1|'b'"),
        ("{{ {'b': 1} | tojson }} {{ dict(a=1, b=2) | length }} {{ dict({'a': 1}).get('a') }}", '{"b": 1} 2 1'),
        (
            "{% for i in [1, 2] %}{{ loop.index }}/{{ loop.length }}{{ loop.cycle('a', 'b') }} {% endfor %}",
            "1/2a 2/2b ",
        ),
        ("{% for i in range(3) | select('odd') %}{{ loop.length }}{% endfor %}", "1"),
        ("{% macro m(x, y=2) %}{{ x }}{{ y }}{{ caller() }}{% endmacro %}{% call m(1) %}!{% endcall %}", "12!"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% with x = 1 %}{{ x }}{% endwith %}", "AB1"),
        ("{{ 'a' in 'abc' and 1 < 2 <= 2 and 3 not in [1] }}", "True"),
        ("{{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ 2.0 ** 0.5 > 1 }} {{ -3 + 1.5 }}", "3 3 8 True -1.5"),
        ("{{ function(2) }}{{ day.isoformat() }}", "42020-01-02"),
        ("{{ namespace(a=1) }}", "<Namespace>"),
    ],
)
def test_within_the_bounds_it_is_jinja(template: str, expected: str) -> None:
    import datetime

    rows = [{"k": "a", "v": 1}, {"k": "a", "v": 2}, {"k": "b", "v": 3}]
    values: dict[str, Any] = {"rows": rows, "function": lambda x: x * 2, "day": datetime.date(2020, 1, 2)}
    assert format_jinja(template, values) == expected


LONG_LOOP = "{% for i in range(3000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"


def test_time_runs_out_in_any_thread_without_a_signal() -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            format_jinja(LONG_LOOP, {}, TemplateBounds(steps=10**9, seconds=0.05))
        except InvalidValue as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (error,) = errors
    assert isinstance(error, TemplateOutOfBounds)
    assert "more than 0.05 s of CPU time" in str(error)


def test_time_in_which_the_thread_did_not_run_does_not_count() -> None:
    def stand_still() -> str:
        time.sleep(0.3)
        return "awake"

    bounds = TemplateBounds(seconds=0.2)
    assert format_jinja("{{ wait() }}{% for i in range(100) %}.{% endfor %}", {"wait": stand_still}, bounds)


def test_reading_has_bounds_too() -> None:
    template = "{{ a }}" * 200
    with pytest.raises(TemplateOutOfBounds, match=r"TemplateBounds\(steps="):
        names_in_jinja(template, TemplateBounds(steps=10_000))
    assert names_in_jinja(template) == {"a"}


def test_nothing_is_computed_while_a_template_is_read() -> None:
    template = "{{ 2 ** 65 }}{{ 'x' * 99999999 }}{{ 'x' | center(99999999) }}{{ '%99999999d' % 1 }}{{ a }}"
    assert names_in_jinja(template) == {"a"}


def test_names_are_those_that_are_missing_and_not_those_of_jinja() -> None:
    template = "{% set b = 1 %}{% for i in range(n) %}{{ i }}{{ b }}{{ c.d }}{% endfor %}{{ dict(x=e) }}"
    assert PromptTemplate(template=template, engine="jinja").placeholders() == {"n", "c", "e"}
    braces = PromptTemplate(template="{a} {b:>{width}} {{c}}", engine="f-string")
    assert braces.placeholders() == {"a", "b", "width"}


# --- f-string ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "bound"),
    [
        ("{a}{a}{a}", "characters"),
        ("x" * 201, "characters"),
        ("{n:>21}", "width"),
        ("{n:>{width}}", "width"),
        ("{n:.21f}", "width"),
        ("{n:000000000000000000000021d}", "width"),
        ("{n:" + "<" * 21 + "}", "width"),
        ("{e}" * 5001, "steps"),
    ],
)
def test_braces_are_bounded(template: str, bound: str) -> None:
    values = {"a": "x" * 100, "n": 1, "width": 21, "e": ""}
    with pytest.raises(TemplateOutOfBounds, match=rf"TemplateBounds\({bound}="):
        format_braces(template, values, SMALL)
    if "<<" not in template:
        format_braces(template, values, LARGE)


def test_time_runs_out_for_braces() -> None:
    with pytest.raises(TemplateOutOfBounds, match="CPU time"):
        format_braces("{a}" * 10_000, {"a": ""}, TemplateBounds(seconds=0))
    assert format_braces("{a}" * 10_000, {"a": ""}) == ""


def test_the_error_names_template_bound_and_way_out() -> None:
    prompt = PromptTemplate(template="Answer as a list of the most important things: {n:>2001}", engine="f-string")
    with pytest.raises(TemplateOutOfBounds) as refusal:
        prompt.format(n=1)
    assert str(refusal.value) == (
        "the f-string template 'Answer as a list of the most important …' asks for a width, a precision or a count of "
        "2001, which is beyond the bound 'width'; simplify it, or pass TemplateBounds(width=...) "
        "to PromptTemplate.fill()"
    )
    assert len(prompt.fill({"n": 1}, TemplateBounds(width=3000))) > 2001


# --- Any template --------------------------------------------------------------------------------------

ATOMS = st.sampled_from(["1", "7", "'ab'", "a", "xs", "[1, a]", "(a, 2)", "{'k': a}", "n.t", "range(9)", "none"])
OPERATORS = ["+", "-", "*", "**", "//", "%", "~", "==", "in", "and"]
FILTERS = ["center", "list", "join", "sum", "unique", "tojson", "replace('a', a)", "batch(7)", "map('string')", "upper"]
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda each: f"({' '.join(each)})"),
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda each: f"({each[0]} | {each[1]})"),
        inner.map(lambda each: f"[{each}, {each}]"),
        inner.map(lambda each: f"{each}[1:]"),
    ),
    max_leaves=8,
)
STATEMENTS = st.recursive(
    EXPRESSIONS.map(lambda each: f"{{{{ {each} }}}}")
    | EXPRESSIONS.map(lambda each: f"{{% set n.t = {each} %}}")
    | st.just("text"),
    lambda inner: st.one_of(
        st.tuples(EXPRESSIONS, inner).map(lambda each: f"{{% for a in {each[0]} %}}{each[1]}{{% endfor %}}"),
        st.tuples(inner, inner).map("".join),
        inner.map(lambda each: f"{{% macro m() %}}{each}{{% endmacro %}}{{{{ m() }}}}{{{{ m() }}}}"),
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(STATEMENTS)
def test_whatever_a_template_does_its_output_is_within_the_bounds(template: str) -> None:
    bounds = TemplateBounds(characters=500, width=50, steps=20_000, seconds=10)
    try:
        filled = format_jinja("{% set n = namespace(t='t') %}" + template, {"a": "text", "xs": [1, "b"]}, bounds)
    except InvalidValue:
        return
    assert len(filled) <= 500

from __future__ import annotations

import contextlib
import datetime
import string
from typing import Any

import pytest
from hypothesis import given, strategies as st

from agentlightning.errors import InvalidValue
from agentlightning.types.jinja_templates import format_jinja
from agentlightning.types.templates import format_braces


class Secret:
    """Something a template must not get into."""

    key = "hunter2"

    def __init__(self) -> None:
        self.token = "hunter2"

    def __str__(self) -> str:
        return "shown"


class TestBraces:
    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("", ""),
            ("no places", "no places"),
            ("{a}", "x"),
            ("{a}{b}{a}", "x7x"),
            ("{a!r}", "'x'"),
            ("{a!r:>5}", "  'x'"),
            ("{b:03d}", "007"),
            ("{b:>{width}}", "    7"),
            ("{day:%Y-%m}", "2026-02"),
            ("{{a}}", "{a}"),
            ('{{"k": {b}}}', '{"k": 7}'),
            ("{odd-name}", "odd"),
            ("{ä}", "umlaut"),
        ],
    )
    def test_fills_as_str_format_does(self, template: str, expected: str) -> None:
        values: dict[str, Any] = {
            "a": "x",
            "b": 7,
            "width": 5,
            "day": datetime.date(2026, 2, 3),
            "odd-name": "odd",
            "ä": "umlaut",
            "ignored": 0,
        }
        assert format_braces(template, values) == expected == template.format(**values)

    @given(
        pieces=st.lists(st.tuples(st.text(), st.sampled_from("abc"), st.sampled_from(["", "!r", "!s", "!a"]))),
        values=st.fixed_dictionaries({name: st.text() | st.integers() | st.none() for name in "abc"}),
    )
    def test_is_str_format_for_every_plain_template(
        self, pieces: list[tuple[str, str, str]], values: dict[str, Any]
    ) -> None:
        template = "".join(
            text.replace("{", "{{").replace("}", "}}") + "{" + name + conversion + "}"
            for text, name, conversion in pieces
        )
        assert format_braces(template, values) == template.format(**values)

    @given(st.text(alphabet=string.printable + "{}{}{}:!.[]"))
    def test_any_text_is_filled_or_refused(self, template: str) -> None:
        with contextlib.suppress(InvalidValue):
            assert isinstance(format_braces(template, {"a": 1}), str)

    def test_a_missing_name_is_told_with_the_names_given(self) -> None:
        with pytest.raises(InvalidValue, match=r"'\{question\}' has no value; the names given are: answer, topic"):
            format_braces("{question}", {"topic": 1, "answer": 2})
        with pytest.raises(InvalidValue, match="no names were given"):
            format_braces("{question}", {})

    def test_json_in_a_template_gets_a_hint(self) -> None:
        with pytest.raises(InvalidValue, match=r"write '\{\{' and '\}\}' if the braces were meant literally"):
            format_braces('Answer as {"score": 1}', {"question": "?"})

    @pytest.mark.parametrize(
        "template",
        [
            "{x.__class__}",
            "{x.token}",
            "{x.__init__.__globals__}",
            "{x.__class__.__mro__[1]}",
            "{x[0]}",
            "{x[key]}",
            "{x.token!r:>10}",
            "{n:{x.token}}",
            "{n:{x[0]}}",
        ],
    )
    def test_cannot_reach_into_a_value(self, template: str) -> None:
        with pytest.raises(InvalidValue, match="reaches into a value") as refusal:
            format_braces(template, {"x": Secret(), "n": 3})
        assert "hunter2" not in str(refusal.value)

    def test_cannot_be_made_to_by_a_value(self) -> None:
        assert format_braces("{a}", {"a": "{x.token}", "x": Secret()}) == "{x.token}"

    @pytest.mark.parametrize("template", ["{}", "{0}", "{!r}", "{:>3}", "{a} {}"])
    def test_places_without_a_name_are_refused(self, template: str) -> None:
        with pytest.raises(InvalidValue, match="has no name"):
            format_braces(template, {"a": 1, "0": 2, "": 3})

    @pytest.mark.parametrize("template", ["{", "}", "{a", "a}", "{a!}", "{a!rr}", "{a:{}"])
    def test_malformed_templates_are_refused(self, template: str) -> None:
        with pytest.raises(InvalidValue):
            format_braces(template, {"a": 1})

    @pytest.mark.parametrize("template", ["{a:d}", "{a!z}", "{a:%Q^}"])
    def test_a_value_that_does_not_take_its_spec_is_refused_with_the_cause(self, template: str) -> None:
        with pytest.raises(InvalidValue, match="cannot show a value of type str") as refusal:
            format_braces(template, {"a": "text"})
        assert isinstance(refusal.value.__cause__, ValueError)

    def test_nesting_ends_after_two_levels(self) -> None:
        with pytest.raises(InvalidValue, match="nested too deep"):
            format_braces("{a:{b:{c}}}", {"a": 1, "b": 2, "c": 3})


class TestJinja:
    def test_fills(self) -> None:
        template = "{% for x in xs %}{{ loop.index }}:{{ x.name | upper }} {% endfor %}"
        assert format_jinja(template, {"xs": [{"name": "a"}, {"name": "b"}]}) == "1:A 2:B "

    def test_escapes_nothing_and_keeps_the_last_newline(self) -> None:
        assert format_jinja("{{ a }}\n", {"a": "<b> & 'c'"}) == "<b> & 'c'\n"

    def test_a_missing_name_is_told_with_the_names_given(self) -> None:
        with pytest.raises(InvalidValue, match=r"'question' is undefined.*the names given are: answer, topic"):
            format_jinja("{{ question }}", {"topic": 1, "answer": 2})

    @pytest.mark.parametrize(
        "template", ["{{ a.nope }}", "{% if nope %}{% endif %}", "{% for x in nope %}{% endfor %}"]
    )
    def test_nothing_undefined_becomes_empty_text(self, template: str) -> None:
        with pytest.raises(InvalidValue, match="UndefinedError"):
            format_jinja(template, {"a": {}})

    def test_a_name_may_be_tested_for(self) -> None:
        assert format_jinja("{% if hint is defined %}{{ hint }}{% else %}none{% endif %}", {}) == "none"

    @pytest.mark.parametrize(
        "template",
        [
            "{{ x.__class__ }}",
            "{{ x.__class__.__mro__ }}",
            "{{ x['__class__'] }}",
            "{{ x | attr('__class__') }}",
            "{{ ''.__class__.__base__.__subclasses__() }}",
            "{{ x.__init__.__globals__ }}",
            "{{ lipsum.__globals__ }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ self.__init__.__globals__ }}",
            "{{ '{0.__class__.__mro__}'.format(x) }}",
            "{{ '{a.__class__}'.format_map({'a': x}) }}",
            "{{ f.__code__ }}",
            "{{ f.__globals__ }}",
            "{{ words.append('more') }}",
            "{{ words.clear() }}",
            "{{ table.update({'k': 2}) }}",
            "{% set words[0] = 'other' %}",
        ],
    )
    def test_cannot_leave_the_sandbox(self, template: str) -> None:
        words, table = ["one"], {"k": 1}
        with pytest.raises(InvalidValue) as refusal:
            format_jinja(template, {"x": Secret(), "f": lambda: 1, "words": words, "table": table})
        assert type(refusal.value.__cause__).__name__ in {"SecurityError", "TemplateSyntaxError"}
        assert words == ["one"]
        assert table == {"k": 1}

    def test_filters_do_not_get_out_either(self) -> None:
        assert "class" not in format_jinja("{{ [x] | map(attribute='__class__') | list }}", {"x": Secret()})

    def test_a_huge_range_is_refused(self) -> None:
        with pytest.raises(InvalidValue, match=r"[Rr]ange"):
            format_jinja("{% for i in range(10 ** 9) %}{% endfor %}", {})

    @pytest.mark.parametrize(
        ("template", "cause"),
        [
            ("{% for", "TemplateSyntaxError"),
            ("{{ a | no_such_filter }}", "TemplateAssertionError"),
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
            ("{{ a + 1 }}", "TypeError"),
            ("{% include 'other' %}", "TypeError"),
            ("{{" + "(" * 3000, "RecursionError"),
        ],
    )
    def test_every_failure_of_a_template_is_an_invalid_value_with_its_cause(self, template: str, cause: str) -> None:
        with pytest.raises(InvalidValue, match=cause) as refusal:
            format_jinja(template, {"a": "text"})
        assert type(refusal.value.__cause__).__name__ == cause

    def test_one_filling_leaves_nothing_for_the_next(self) -> None:
        template = "{% set seen = a %}{{ seen }}"
        assert [format_jinja(template, {"a": a}) for a in "xy"] == ["x", "y"]

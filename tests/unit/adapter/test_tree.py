"""The tree of spans: whole ones, broken ones, deep ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from agentlightning import TraceTree
from agentlightning.types import Span

Make = Callable[..., Span]


def test_children_come_in_the_order_of_time(span: Make) -> None:
    root = span("root", at=(0, 9))
    late, early = span("late", parent=root, at=(5, 6)), span("early", parent=root, at=(1, 2))
    leaf = span("leaf", parent=late, at=(5, 5.5))
    tree = TraceTree.from_spans([leaf, late, root, early])
    assert tree.names_tuple() == ("root", [("early", []), ("late", [("leaf", [])])])
    assert [node.span.name for node in tree.traverse()] == ["root", "early", "late", "leaf"]
    assert (tree.start_time, tree.end_time) == (0, 9)
    found = tree.find_id(leaf.span_id)
    assert found is not None
    assert found.span is leaf
    assert tree.find_id("nobody") is None
    assert tree.to_json()["children"][1]["children"][0]["span"]["name"] == "leaf"


def test_spans_whose_parent_is_missing_get_one_that_is_made_up(span: Make) -> None:
    orphans = [span("a", parent="0" * 16, at=(3, 4)), span("b", at=(1, 2))]
    tree = TraceTree.from_spans(orphans)
    assert tree.names_tuple() == ("agentlightning.virtual", [("b", []), ("a", [])])
    assert (tree.start_time, tree.end_time) == (1, 4)
    with pytest.raises(ValueError, match="no spans"):
        TraceTree.from_spans([])


@given(st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=10))
def test_every_span_is_in_the_tree_once_whatever_the_parents_are(parents: list[int | None]) -> None:
    spans = [
        Span.from_attributes(
            attributes={}, span_id=f"{number:016x}", parent_id=None if parent is None else f"{parent:016x}"
        )
        for number, parent in enumerate(parents)
    ]
    ids = [node.id for node in TraceTree.from_spans(spans).traverse()]
    assert len(ids) == len(set(ids))
    assert set(ids) >= {span.span_id for span in spans}
    assert len(ids) <= len(spans) + 1


def test_three_thousand_levels_are_no_problem(span: Make, tmp_path: Path) -> None:
    spans = [span("top", at=(0, 1))]
    for _ in range(3_000):
        spans.append(span("level", parent=spans[-1], at=(0, 1)))
    tree = TraceTree.from_spans(spans)
    assert len(tree.traverse()) == 3_001
    tree.names_tuple()
    tree.to_json()
    tree.repair_hierarchy()
    tree.visualize(str(tmp_path / "deep"))
    assert tree.find_llm_calls(llm_call_match="level", agent_match=None)


def test_a_span_that_lost_its_parent_moves_into_the_shortest_one_around_it(span: Make) -> None:
    root = span("root", at=(0, 100))
    agent = span("agent", parent=root, at=(10, 50))
    turn = span("turn", parent=agent, at=(20, 30))
    inside, outside = span("inside", parent=root, at=(21, 22)), span("outside", parent=root, at=(45, 60))
    tree = TraceTree.from_spans([root, agent, turn, inside, outside])
    tree.repair_hierarchy()
    assert tree.names_tuple() == ("root", [("agent", [("turn", [("inside", [])])]), ("outside", [])])
    before = tree.to_json()
    tree.repair_hierarchy()
    assert tree.to_json() == before


def test_spans_at_the_same_time_do_not_move_into_each_other(span: Make) -> None:
    root = span("root", at=(0, 100))
    twins = [span("twin", parent=root, at=(1, 2)) for _ in range(3)]
    tree = TraceTree.from_spans([root, *twins])
    tree.repair_hierarchy()
    assert len(tree.children) == 3


def test_what_a_span_says_of_rewards_and_agents(span: Make) -> None:
    tree = TraceTree("x", span("agentlightning.reward", {"reward": 2}))
    assert tree.maybe_reward_dict() == {"type": "reward", "value": 2.0}
    assert tree.is_reward_span()
    other = TraceTree("y", span("plain", {"gen_ai.agent.name": "a"}))
    assert (other.maybe_reward_dict(), other.is_reward_span(), other.agent_name()) == ({}, False, "a")
    tree.add_child(other)
    assert tree.children == [other]


def test_names_are_quoted_in_the_drawing(span: Make, tmp_path: Path) -> None:
    TraceTree.from_spans([span('say "hi"\\n')]).visualize(str(tmp_path / "odd"))
    assert '[label="say \\"hi\\"\\\\n\\n0.500 s"]' in (tmp_path / "odd.dot").read_text()

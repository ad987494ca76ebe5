from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from agentlightning.types.contract import FilterField, FilterOptions, PaginatedResult, SortOptions
from agentlightning.types.rollouts import Rollout
from agentlightning.types.spans import Span


def make_page(*items: int) -> PaginatedResult[int]:
    return PaginatedResult[int](items=list(items), limit=-1, offset=0, total=9)


def test_is_a_sequence_of_its_items() -> None:
    page = make_page(4, 5, 6)
    assert isinstance(page, Sequence)
    assert len(page) == 3
    assert list(page) == [4, 5, 6]
    assert page[0] == 4
    assert page[-1] == 6
    assert page[1:] == [5, 6]
    assert page[::-1] == [6, 5, 4]
    assert list(reversed(page)) == [6, 5, 4]
    assert 5 in page
    assert 7 not in page
    assert page.index(6) == 2
    assert page.count(4) == 1
    first, *rest = page
    assert (first, rest) == (4, [5, 6])


def test_an_index_outside_is_an_error() -> None:
    with pytest.raises(IndexError):
        make_page(1)[1]


def test_truth_is_by_items() -> None:
    assert make_page(0)
    assert not make_page()


def test_knows_where_it_was_cut() -> None:
    page = make_page(1)
    assert (page.limit, page.offset, page.total) == (-1, 0, 9)


def test_equal_to_a_page_with_the_same_content_only() -> None:
    assert make_page(1, 2) == make_page(1, 2)
    assert make_page(1, 2) != make_page(1, 3)


def test_items_are_checked_against_their_type() -> None:
    row = {"rollout_id": "r", "input": 1, "start_time": 0.0}
    page = PaginatedResult[Rollout].model_validate({"items": [row], "limit": 1, "offset": 0, "total": 1})
    assert isinstance(page[0], Rollout)
    with pytest.raises(ValidationError):
        PaginatedResult[Rollout].model_validate({"items": [{}], "limit": 1, "offset": 0, "total": 1})


def test_round_trips_through_json() -> None:
    page = make_page(1, 2)
    assert json.loads(page.model_dump_json()) == {"items": [1, 2], "limit": -1, "offset": 0, "total": 9}
    assert PaginatedResult[int].model_validate_json(page.model_dump_json()) == page


@pytest.mark.parametrize("page_type", [PaginatedResult[Span], PaginatedResult])
def test_survives_pickle_and_copy(page_type: type[PaginatedResult[Span]]) -> None:
    page = page_type(items=[Span.from_attributes(attributes={"a": 1})], limit=1, offset=2, total=3)
    for again in (pickle.loads(pickle.dumps(page)), copy.copy(page), copy.deepcopy(page)):
        assert again == page
        assert isinstance(again, PaginatedResult)
        assert again.model_dump_json() == page.model_dump_json()


def test_takes_items_of_a_type_it_was_not_told() -> None:
    assert list(PaginatedResult(items=["a"], limit=1, offset=0, total=1)) == ["a"]


@pytest.mark.parametrize("page_type", [PaginatedResult[Span], PaginatedResult])
def test_non_finite_attributes_of_spans_are_kept(page_type: type[PaginatedResult[Span]]) -> None:
    page = page_type(items=[Span.from_attributes(attributes={"x": math.nan})], limit=1, offset=0, total=1)
    assert json.loads(page.model_dump_json())["items"][0]["attributes"] == {"x": "NaN"}


def test_the_shapes_of_filter_and_order() -> None:
    field: FilterField = {"within": ["a", "b"], "contains": "x"}
    options: FilterOptions = {"_aggregate": "or", "_must": {"rollout_id": {"exact": "r"}}, "name": field}
    order: SortOptions = {"name": "start_time", "order": "desc"}
    assert set(FilterField.__optional_keys__) == {"exact", "within", "contains"}
    assert set(SortOptions.__required_keys__) == set(order)
    assert options["name"] == field

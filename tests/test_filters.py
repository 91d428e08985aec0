"""Filters: what each operator means, by type, and how that compares with LangGraph's in-memory store."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from langgraph.store.memory import _compare_values

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import FilterError
from langgraph_memstate.filters import compile_filter


def matches(value: dict[str, Any], filter: dict[str, Any] | None) -> bool:
    predicate = compile_filter(filter)
    return predicate is None or predicate(value)


@pytest.mark.parametrize(
    ("value", "filter"),
    [
        # a value is compared by equality
        ({"a": 1}, {"a": 1}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": "é\U0001f600"}, {"a": "é\U0001f600"}),
        ({"a": None}, {"a": None}),
        ({}, {"a": None}),
        ({"a": True}, {"a": True}),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}),
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ({"a": []}, {"a": []}),
        # a dict matches the fields it names, at any depth; inside a list, too
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1}}}),
        ({"a": {"b": 1}}, {"a": {}}),
        ({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]}),
        ({"a": {"b": [9, 10]}}, {"a": {"b": [{"$lt": 10}, 10]}}),
        # $eq and $ne compare whole values
        ({"a": {"b": 1, "c": [2]}}, {"a": {"$eq": {"c": [2.0], "b": 1}}}),
        ({"a": ["x", "y"]}, {"a": {"$eq": ["x", "y"]}}),
        ({"a": {"$gt": 1}}, {"a": {"$eq": {"$gt": 1}}}),
        ({"a": None}, {"a": {"$eq": None}}),
        ({}, {"a": {"$eq": None}}),
        ({"a": 1}, {"a": {"$ne": "1"}}),
        ({"a": 1}, {"a": {"$ne": True}}),
        ({}, {"a": {"$ne": 1}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"$ne": {"b": 1}}}),
        # order is that of numbers or of strings
        ({"a": 9}, {"a": {"$lt": 10}}),
        ({"a": {"b": 9}}, {"a": {"b": {"$lt": 10}}}),
        ({"a": "10"}, {"a": {"$lt": "9"}}),
        ({"a": 1e300}, {"a": {"$gt": 10**20}}),
        ({"a": 2**60 + 1}, {"a": {"$gt": 2**60}}),
        ({"a": -0.5}, {"a": {"$gte": -0.5, "$lte": 0}}),
        ({"a": "é"}, {"a": {"$gt": "z"}}),
        # several fields
        ({"a": 1, "b": 2}, {"a": 1, "b": {"$gte": 2}}),
        ({"a": 1}, {}),
        ({"a": 1}, None),
        # keys are names and nothing else
        ({"a.b": 1}, {"a.b": 1}),
        ({"a'b\"--": 1}, {"a'b\"--": 1}),
        ({"": 1}, {"": 1}),
    ],
)
def test_it_matches(value: dict[str, Any], filter: dict[str, Any]) -> None:
    assert matches(value, filter)


@pytest.mark.parametrize(
    ("value", "filter"),
    [
        ({"a": 1}, {"a": "1"}),
        ({"a": 1}, {"a": True}),
        ({"a": True}, {"a": 1}),
        ({"a": 0}, {"a": False}),
        ({"a": 0}, {"a": None}),
        ({"a": ""}, {"a": None}),
        ({"a": [1, True]}, {"a": [1, 1]}),
        ({"a": {"b": True}}, {"a": {"$eq": {"b": 1}}}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": [1, 2]}, {"a": [1]}),
        ({"a": [1]}, {"a": 1}),
        ({"a": 1}, {"a": [1]}),
        ({"a": "[1]"}, {"a": [1]}),
        ({"a": 1}, {"a": {"b": 1}}),
        ({}, {"a": {"b": None}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"$eq": {"b": 1}}}),
        ({"a": ["x", "y"]}, {"a": {"$ne": ["x", "y"]}}),
        ({"a": 1}, {"a": {"$ne": 1.0}}),
        ({"a": None}, {"a": {"$ne": None}}),
        ({"a": 10}, {"a": {"$lt": 9}}),
        ({"a": "9"}, {"a": {"$lt": 10}}),
        ({"a": 9}, {"a": {"$lt": "91"}}),
        ({"a": None}, {"a": {"$lt": 10}}),
        ({}, {"a": {"$gte": 0}}),
        ({"a": True}, {"a": {"$gte": 0}}),
        ({"a": [5]}, {"a": {"$gt": 1}}),
        ({"a": 5}, {"a": {"$gt": 1, "$lt": 5}}),
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
    ],
)
def test_it_does_not_match(value: dict[str, Any], filter: dict[str, Any]) -> None:
    assert not matches(value, filter)


@pytest.mark.parametrize(
    ("filter", "said"),
    [
        ({"a": {"$regex": "x"}}, r"filter\.a.*\$regex"),
        ({"a": {"$in": [1]}}, r"\$in"),
        ({"$or": [{"a": 1}]}, r"\$or"),
        ({"$eq": 1}, "belongs under"),
        ({"a": 1, "$gt": 3}, "belongs under"),
        ({"a": {"$eq": 1, "b": 2}}, "'b'"),
        ({"a": {"b": [{"$nope": 1}]}}, r"filter\.a\.b\[0\]"),
        ({"a": {"$gt": None}}, r"\$gt compares"),
        ({"a": {"$lt": [1]}}, r"\$lt compares"),
        ({"a": {"$gte": {"b": 1}}}, r"\$gte compares"),
        ({"a": datetime.now(UTC)}, "not a JSON value"),
        ({"a": {1, 2}}, "not a JSON value"),
        ({"a": {"$eq": object()}}, r"filter\.a\.\$eq.*not a JSON value"),
        ({"a": {"$ne": [b"x"]}}, r"\[0\].*not a JSON value"),
        ({1: 2}, "field 1"),
        ({"a": {1: 2}}, "field 1"),
        ({"a": {"$eq": {1: 2}}}, "field 1"),
        ([("a", 1)], "not list"),
        ("a", "not str"),
    ],
)
def test_a_filter_without_meaning_is_refused(filter: Any, said: str) -> None:
    with pytest.raises(FilterError, match=said):
        compile_filter(filter)


def test_a_filter_of_absurd_depth_is_refused() -> None:
    filter: dict[str, Any] = {"a": 1}
    for _ in range(100_000):
        filter = {"a": filter}
    with pytest.raises(FilterError, match="deep"):
        compile_filter(filter)


# -- beside LangGraph's in-memory store -----------------------------------------------------------
# Differences on purpose: a boolean is no number (theirs: True == 1), and `$gt` and its kin compare numbers with
# numbers and strings with strings (theirs turns both into floats, or fails).

WORDS = st.sampled_from(["", "a", "b", "9", "10"])
SCALARS = st.none() | WORDS | st.integers(-3, 12) | st.floats(-3, 12, allow_nan=False)
FIELDS = st.sampled_from(["a", "b", "c"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3))
WANTED = st.recursive(
    SCALARS | st.fixed_dictionaries({"$eq": VALUES}) | st.fixed_dictionaries({"$ne": VALUES}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3),
)


@given(st.dictionaries(FIELDS, VALUES, max_size=3), st.dictionaries(FIELDS, WANTED, max_size=3))
def test_equality_agrees_with_upstream(value: dict[str, Any], filter: dict[str, Any]) -> None:
    upstream = all(_compare_values(value.get(key), wanted) for key, wanted in filter.items())
    assert matches(value, filter) == upstream


@given(
    st.integers(-5, 5) | st.floats(allow_nan=False), st.integers(-5, 5) | st.floats(allow_nan=False),
    st.sampled_from(["$gt", "$gte", "$lt", "$lte"]),
)  # fmt: skip
def test_order_of_numbers_agrees_with_upstream(value: float, operand: float, operator: str) -> None:
    assume(not math.isinf(value))
    assert matches({"n": value}, {"n": {operator: operand}}) == _compare_values(value, {operator: operand})


# -- in SQL -----------------------------------------------------------------------------------------

ANY_NUMBER = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
ANY_FIELD = st.sampled_from(["a", "b", "", "a.b", 'a"b', "a\\b", "$", "[0]", "é", "\n"]) | ANY_TEXT
ANY_VALUE = st.recursive(
    st.none() | ANY_NUMBER | ANY_TEXT | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_FIELD, inner, max_size=3),
)


@st.composite
def stored_and_wanted(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A value, and a filter that was made from it and often matches it."""
    value = draw(st.dictionaries(ANY_FIELD, ANY_VALUE, min_size=1, max_size=3))
    filter: dict[str, Any] = {}
    for field in draw(st.lists(st.sampled_from(sorted(value)), min_size=1, max_size=2, unique=True)):
        held = draw(st.just(value[field]) | ANY_VALUE)
        if isinstance(held, bool | int | float | str):
            operator = draw(st.sampled_from(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"]))
            held = draw(st.just(held) | st.just({operator: held}))
        if not field.startswith("$"):
            filter[field] = held
    return value, filter


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryStore]:
    with MemoryStore.open(":memory:") as memory:
        yield memory


@given(stored_and_wanted())
def test_what_sql_leaves_out_does_not_match(memory: MemoryStore, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    value, filter = pair
    try:
        wanted = matches(value, filter)
    except FilterError:  # a dict in the filter holds something like an operator
        assume(False)
    memory.commit(Fact("one", value, id="1"))
    assert [fact.payload for fact in memory.query("one", filter=filter)] == ([value] if wanted else [])


def test_sql_leaves_out_what_does_not_match(memory: MemoryStore) -> None:
    memory.commit([Fact("many", {"n": n, "deep": {"name": f"name {n}"}}, id=str(n)) for n in range(50)])
    for filter in ({"n": 7}, {"deep": {"name": "name 7"}}, {"n": {"$gte": 7, "$lt": 7.5}}, {"n": 7.0}):
        conditions = compile_filter(filter).conditions
        with memory.storage.snapshot() as reader:
            assert [record.key for record in reader.items(("many",), 0.0, conditions)] == ["7"]


@pytest.mark.parametrize("wanted", [{"$eq": sys.float_info.max}, {"$gte": sys.float_info.max}, {"$gt": 1.5}])
def test_the_largest_number(url: str, wanted: dict[str, float]) -> None:
    with MemoryStore.open(url) as memory:
        memory.commit([Fact("far", {"n": sys.float_info.max}, id="it"), Fact("far", {"n": 1.5}, id="near")])
        assert [fact.id for fact in memory.query("far", filter={"n": wanted})] == ["it"]
        assert len(memory.query("far", filter={"n": {"$lte": sys.float_info.max, "$gte": -sys.float_info.max}})) == 2


@pytest.mark.parametrize("count", [101, 2_500])
def test_a_filter_has_as_many_fields_as_it_likes(file_memory: MemoryStore, count: int) -> None:
    store, filter = file_memory.store, {f"field{n}": {"$gte": n} for n in range(count)}
    store.put(("large",), "all", {f"field{n}": n for n in range(count)})
    store.put(("large",), "not the last", {f"field{n}": n for n in range(count - 1)})
    start = len(file_memory.log())
    store.put(("large",), "later", {})
    assert [item.key for item in store.search(("large",), filter=filter)] == ["all"]
    assert [item.key for item in file_memory.as_of(start).search(("large",), filter=filter)] == ["all"]


@pytest.mark.parametrize("wanted", ["\ud800", {"$eq": "\ud800"}, {"$gt": "\udfff"}, {"b": "\ud800"}, {"\ud800": 1}])
def test_what_no_value_can_hold_matches_nothing(memory: MemoryStore, wanted: Any) -> None:
    memory.commit(Fact("kept", {"a": "x"}, id="a"))
    assert memory.query("kept", filter={"a": wanted}) == []

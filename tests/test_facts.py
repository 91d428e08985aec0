"""Namespaces, versions, values and facts as plain values, without a database."""

from __future__ import annotations

import math
import threading
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langgraph_memstate import Fact
from langgraph_memstate.errors import (
    CorruptRowError,
    KeyTypeError,
    MemStateError,
    NamespaceError,
    SerializationError,
)
from langgraph_memstate.facts import (
    Draft,
    Origin,
    Record,
    check_key,
    check_namespace,
    check_text,
    check_ttl,
    decode_namespace,
    decode_value,
    encode_namespace,
    encode_value,
    namespace_range,
    new_version,
)

# Labels that a naive separator, LIKE pattern or range end would confuse.
AWKWARD = st.sampled_from(["a", "b", "ab", "%", "_", ".", ":", "*", "/", "\x1f", "\x1b", "\x1bu", "\x1be", "\x20", "é"])
LABELS = AWKWARD | st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=4) | st.just("\U0010ffff")
NAMESPACES = st.lists(LABELS, min_size=1, max_size=4).map(tuple)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        st.characters(exclude_categories=("Cs",))
    ),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


# -- namespaces -----------------------------------------------------------------------------------


@given(NAMESPACES)
def test_a_namespace_survives_its_encoding(namespace: tuple[str, ...]) -> None:
    assert decode_namespace(encode_namespace(namespace)) == namespace


@given(NAMESPACES, NAMESPACES)
def test_two_namespaces_never_share_an_encoding(left: tuple[str, ...], right: tuple[str, ...]) -> None:
    assert (encode_namespace(left) == encode_namespace(right)) == (left == right)


@given(st.one_of(st.just(()), NAMESPACES), NAMESPACES)
def test_the_range_of_a_prefix_holds_what_starts_with_its_labels_and_nothing_else(
    prefix: tuple[str, ...], namespace: tuple[str, ...]
) -> None:
    start, end = namespace_range(prefix)
    in_range = start.encode() <= encode_namespace(namespace).encode() < end.encode()  # as SQLite compares text
    assert in_range == (namespace[: len(prefix)] == prefix)


@pytest.mark.parametrize("namespace", [("users", "u1"), ["users", "u1"]])
def test_a_namespace_is_a_tuple_or_list_of_labels(namespace: Any) -> None:
    assert check_namespace(namespace) == ("users", "u1")


def test_a_string_is_a_namespace_of_one_label() -> None:
    assert check_namespace("users") == ("users",)


@pytest.mark.parametrize(
    "namespace", [(), [], "", None, 5, ("a", ""), ("a", 1), ("a", None), ("\ud800",), {"a"}, b"a", ("a", ("b",))]
)
def test_an_invalid_namespace_is_refused(namespace: Any) -> None:
    with pytest.raises(NamespaceError) as caught:
        check_namespace(namespace)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("key", ["", None, 5, b"k", "\ud800"])
def test_an_invalid_key_is_refused(key: Any) -> None:
    with pytest.raises(KeyTypeError):
        check_key(key)


@pytest.mark.parametrize("encoded", ["a", "a\x1fb", "\x1bx\x1f", "\x1b"])
def test_a_namespace_nobody_wrote_is_corrupt(encoded: str) -> None:
    with pytest.raises(CorruptRowError):
        decode_namespace(encoded)


# -- versions -------------------------------------------------------------------------------------


def test_versions_are_uuid7_and_increase() -> None:
    versions = [new_version() for _ in range(5_000)]
    assert versions == sorted(versions)
    assert len(set(versions)) == len(versions)
    assert {UUID(version).version for version in versions} == {7}


def test_versions_of_many_threads_are_distinct_and_increase_in_each() -> None:
    made: list[list[str]] = [[] for _ in range(8)]

    def make(mine: list[str]) -> None:
        mine.extend(new_version() for _ in range(500))

    threads = [threading.Thread(target=make, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len({version for mine in made for version in mine}) == 8 * 500


def test_a_version_carries_its_time() -> None:
    milliseconds = UUID(new_version()).int >> 80
    assert abs(milliseconds / 1000 - datetime.now(UTC).timestamp()) < 5


# -- values ---------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=5), JSON, max_size=5))
def test_a_value_survives_its_encoding(value: dict[str, Any]) -> None:
    back = decode_value(encode_value(value))
    assert back == value
    assert repr(back) == repr(value)  # 1 stays 1, 1.0 stays 1.0, True stays True, and so does the order of keys


class Point(NamedTuple):
    x: int
    y: int


class Colour(IntEnum):
    RED = 1


class Text(str):
    """As the text of a LangChain message is."""


def test_subclasses_are_stored_as_what_they_are_made_of() -> None:
    value = decode_value(encode_value({Text("key"): Text("text"), "colour": Colour.RED}))
    assert value == {"key": "text", "colour": 1}
    assert [type(inner) for inner in value.values()] == [str, int]


def test_mappings_and_tuples_become_dicts_and_lists() -> None:
    value = MappingProxyType({"a": MappingProxyType({"b": (1, Point(2, 3))})})
    assert decode_value(encode_value(value)) == {"a": {"b": [1, [2, 3]]}}


LOOP: dict[str, Any] = {}
LOOP["loop"] = LOOP


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"when": datetime.now(UTC)}, ["$.when", "datetime.datetime"]),
        ({"a": [{"b": {1, 2}}]}, ["$.a[0].b", "builtins.set"]),
        ({"a": {"b": b"bytes"}}, ["$.a.b", "builtins.bytes"]),
        ({"a": math.nan}, ["$.a", "nan"]),
        ({"a": [1.0, math.inf]}, ["$.a[1]", "inf"]),
        ({"a": {1: "one"}}, ["$.a", "key 1"]),
        ({None: 1}, ["$", "key None"]),
        ({"a": "\ud800"}, ["$.a", "Unicode"]),
        ({"a": {"\udfff": 1}}, ["$.a", "key '\\udfff'"]),
        ({"a": 2**20_000}, ["$.a", "20001 bits"]),
        ({"a": object()}, ["$.a", "builtins.object"]),
        ({"a": Decimal("1.5")}, ["$.a", "decimal.Decimal"]),
        ({"a": 1j}, ["$.a", "builtins.complex"]),
        (nested(100_000), ["$.in.in", "deeper than 200"]),
        (LOOP, ["$.loop.loop", "deeper than 200"]),
        ([1], ["list"]),
        ("text", ["str"]),
        (None, ["NoneType"]),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_value_that_json_cannot_hold_is_refused_by_name_and_place(value: Any, named: list[str]) -> None:
    with pytest.raises(SerializationError) as caught:
        encode_value(value)
    assert isinstance(caught.value, TypeError)
    assert [word for word in named if word not in str(caught.value)] == []
    assert len(str(caught.value)) < 400


def test_values_at_the_limits_are_kept() -> None:
    value = {"deep": nested(198), "int": 2**13_999, "negative": -(2**13_999), "nul": "a\0b", "key\0": 1}
    assert decode_value(encode_value(value)) == value


@pytest.mark.parametrize("text", ["", "{", "{}x", "{} {}", "[1]", "1", '"a"', "null", "[" * 100_000, None, b"\xff"])
def test_a_stored_value_nobody_wrote_is_corrupt(text: Any) -> None:
    with pytest.raises(CorruptRowError):
        decode_value(text)


# -- drafts and facts -----------------------------------------------------------------------------


@given(
    namespace=NAMESPACES,
    key=LABELS,
    value=st.none() | st.just('{"a":1}'),
    index=st.sampled_from([None, False, (), ("a.b[*].c", "$")]),
    ttl=st.none() | st.floats(0, 1e6),
    origin=st.lists(st.none() | LABELS, min_size=8, max_size=8),
)
def test_a_draft_survives_the_staging_table(
    namespace: Any, key: str, value: str | None, index: Any, ttl: float | None, origin: list[str | None]
) -> None:
    draft = Draft(
        new_version(), namespace, key, "put" if value else "delete", value,
        type="note", index=index, ttl=ttl, schema="Note", schema_version=3, origin=Origin(*origin),
    )  # fmt: skip
    assert Draft.loads(draft.dumps()) == draft


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"namespace": []}', '{"origin": [1], "namespace": ["a"], "index": null}']
)
def test_a_staged_draft_nobody_wrote_is_corrupt(text: str) -> None:
    with pytest.raises(CorruptRowError):
        Draft.loads(text)


def test_a_fact_lives_in_the_namespace_of_its_type() -> None:
    assert Fact("profile", {}, id="p1").address == (("profile",), "p1")
    assert Fact("profile", {}, id="p1", namespace=("users", "u1")).address == (("users", "u1"), "p1")


def test_facts_get_distinct_ids() -> None:
    assert len({Fact("note", {}).id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "fact",
    [Fact("", {}), Fact("note", {}, namespace=()), Fact("note", {}, id=""), Fact(5, {})],  # type: ignore[arg-type]
)
def test_a_fact_without_a_valid_address_is_refused(fact: Fact) -> None:
    with pytest.raises(MemStateError):
        _ = fact.address


def test_a_fact_read_from_a_store_item_has_its_last_label_as_type() -> None:
    record = Record(("users", "notes"), "k", new_version(), '{"a":1}', created_at=1.0, updated_at=2.0)
    fact = Fact.of(record, score=0.5)
    assert (fact.type, fact.id, fact.payload, fact.score) == ("notes", "k", {"a": 1}, 0.5)
    assert fact.created_at == datetime.fromtimestamp(1, UTC)
    assert fact.updated_at == datetime.fromtimestamp(2, UTC)


@pytest.mark.parametrize("text", ["\ud800", 5, b"x", ("a",)])
def test_provenance_is_text(text: Any) -> None:
    with pytest.raises(KeyTypeError, match="actor"):
        Origin(actor=text)
    with pytest.raises(KeyTypeError, match="type"):
        check_text("type", text)


@pytest.mark.parametrize("ttl", [-1, math.nan, math.inf, "5", True, 1e300])
def test_a_time_to_live_is_a_number_of_minutes(ttl: Any) -> None:
    with pytest.raises(SerializationError, match="ttl"):
        check_ttl(ttl)


def test_times_to_live_that_make_sense() -> None:
    assert [check_ttl(ttl) for ttl in (None, 0, 5, 0.001)] == [None, 0.0, 5.0, 0.001]

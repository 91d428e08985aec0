"""Bugs that users met in LangGraph's stores and do not meet here. Numbers are issues of langchain-ai/langgraph."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langgraph.store.base import PutOp

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import FilterError, MemStateError


def keys(items: Sequence[Any]) -> list[str]:
    return sorted(item.key for item in items)


# -- filters --------------------------------------------------------------------------------------


def test_8759_eq_and_ne_on_a_list_or_a_dict(memory: MemoryStore) -> None:
    """The operand was bound as bytes, so `$eq` never matched and `$ne` always did."""
    store = memory.store
    store.put(("docs",), "a", {"tags": ["x", "y"], "meta": {"n": 1, "deep": ["z"]}})
    store.put(("docs",), "b", {"tags": ["y", "x"], "meta": {"n": 2}})
    store.put(("docs",), "c", {})
    for field, operand in [("tags", ["x", "y"]), ("meta", {"deep": ["z"], "n": 1})]:
        assert keys(store.search(("docs",), filter={field: {"$eq": operand}})) == ["a"]
        assert keys(store.search(("docs",), filter={field: {"$ne": operand}})) == ["b", "c"]
        assert keys(store.search(("docs",), filter={field: operand})) == ["a"]
        for operator in ("$gt", "$gte", "$lt", "$lte"):
            with pytest.raises(FilterError):  # there is no order of lists: an error, and not an empty answer
                store.search(("docs",), filter={field: {operator: operand}})


def test_7684_numbers_are_not_compared_as_text(memory: MemoryStore) -> None:
    """`score >= 10` returned the scores 2 to 9, because "9" comes after "10"."""
    store = memory.store
    store.batch([PutOp(("docs",), str(n), {"score": n, "meta": {"score": n}}) for n in (1, 2, 9, 10, 10.5, 100, -3)])
    store.put(("docs",), "text", {"score": "99", "meta": {"score": "99"}})
    store.put(("docs",), "none", {"score": None})
    store.put(("docs",), "true", {"score": True})
    for operator, operand, expected in [
        ("$gte", 10, ["10", "10.5", "100"]),
        ("$gt", 10, ["10.5", "100"]),
        ("$lt", 10, ["-3", "1", "2", "9"]),
        ("$lte", 2, ["-3", "1", "2"]),
        ("$gt", 9.5, ["10", "10.5", "100"]),
        ("$gt", "10", ["text"]),
        ("$lt", "10", []),
    ]:
        assert keys(store.search(("docs",), filter={"score": {operator: operand}}, limit=50)) == expected
        nested = store.search(("docs",), filter={"meta": {"score": {operator: operand}}}, limit=50)
        assert keys(nested) == expected
    assert keys(store.search(("docs",), filter={"score": {"$gt": 2, "$lt": 100}})) == ["10", "10.5", "9"]


def test_8786_a_dict_in_a_filter_is_not_taken_for_operators(memory: MemoryStore) -> None:
    memory.store.put(("docs",), "a", {"author": {"name": "Ann", "role": "editor"}})
    memory.store.put(("docs",), "b", {"author": {"name": "Bo", "role": "editor"}})
    assert keys(memory.store.search(("docs",), filter={"author": {"name": "Ann"}})) == ["a"]
    assert keys(memory.store.search(("docs",), filter={"author": {"role": "editor"}})) == ["a", "b"]


def test_7795_a_dot_in_a_filter_key_is_not_a_path(memory: MemoryStore) -> None:
    memory.store.put(("docs",), "flat", {"user.id": 1})
    memory.store.put(("docs",), "nested", {"user": {"id": 1}})
    assert keys(memory.store.search(("docs",), filter={"user.id": 1})) == ["flat"]
    assert keys(memory.store.search(("docs",), filter={"user": {"id": 1}})) == ["nested"]


# -- injection ------------------------------------------------------------------------------------

HOSTILE = [
    "x') = '1' OR '1' = '1' --",
    "x' OR 1=1 --",
    'x" OR 1=1 --',
    "a') UNION SELECT key, value, 1, 1, 1 FROM items --",
    "'; DROP TABLE items; --",
    "a.b[0]",
    "*",
    "%",
    "a\0b",
    "`a`",
    "[a]",
    "?1",
    ":name",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_cve_2025_8709_filter_keys_and_values_are_only_compared(
    file_memory: MemoryStore, database: Path, hostile: str
) -> None:
    """A filter key became part of the SQL, and returned or dropped what the filter was to protect."""
    store = file_memory.store
    store.put(("private",), "secret", {"text": "secret", "a": 1})
    store.put(("docs",), "mine", {"a": 1})
    for filter in (
        {hostile: "1"}, {hostile: {"$eq": 1}}, {hostile: {"$gt": 0}}, {"a": hostile}, {"a": {"$eq": hostile}},
        {"a": {"$gt": hostile}}, {"a": {hostile: 1}}, {hostile: [hostile]},
    ):  # fmt: skip
        assert store.search(("docs",), filter=filter) == []
    assert keys(store.search((), filter={hostile: None})) == ["mine", "secret"]
    # As a name in a value, a namespace or a key, it is found by its name and by nothing else.
    file_memory.commit(Fact("any", {hostile: hostile}, id=hostile, namespace=("docs", hostile)))
    assert keys(store.search(("docs",), filter={hostile: hostile})) == [hostile]
    assert [fact.id for fact in file_memory.query(("docs", hostile))] == [hostile]
    assert file_memory.get(("docs", hostile), hostile) is not None
    file_memory.delete(("docs", hostile), hostile)
    assert keys(store.search(())) == ["mine", "secret"]
    with sqlite3.connect(database) as conn:
        assert conn.execute("SELECT count(*) FROM items").fetchone() == (2,)
    conn.close()


@pytest.mark.parametrize("hostile", ["$.a", "$", "$[0]", "$.a') = 1 OR 1=1 --", "$where"])
def test_cve_2025_8709_paths_and_unknown_operators_are_refused(memory: MemoryStore, hostile: str) -> None:
    memory.store.put(("docs",), "mine", {"a": 1})
    for filter in ({hostile: 1}, {"a": {hostile: 1}}, {"a": {"b": {hostile: 1}}}):
        with pytest.raises(FilterError):
            memory.store.search(("docs",), filter=filter)


# -- namespaces -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (("user_1",), ("userX1",)),  # `_` is any character to LIKE
        (("user%",), ("user-of-another-tenant",)),  # `%` is any text
        (("user",), ("users",)),  # a prefix of the text, not of the labels
        (("user",), ("USER",)),  # LIKE ignores case
        (("users", "1"), ("users", "10")),
        (("a", "b"), ("a:b",)),
        (("a", "b"), ("a.b",)),
        (("a", "b"), ("a/b",)),
        (("a*",), ("abc",)),  # and GLOB has signs of its own
        (("a[bc]",), ("ab",)),
        (("a?",), ("ab",)),
        (("a\\",), ("a\\b",)),
    ],
)
def test_cve_2026_71433_a_prefix_matches_labels_and_no_pattern(
    memory: MemoryStore, mine: tuple[str, ...], theirs: tuple[str, ...]
) -> None:
    """A namespace went into LIKE as it was, so one tenant's search returned the items of another."""
    store = memory.store
    places = {"mine": mine, "theirs": theirs, "deep": (*mine, "x")}
    store.batch([PutOp(namespace, key, {"n": 1}) for key, namespace in places.items()])
    assert keys(store.search(mine)) == ["deep", "mine"]
    assert keys(store.search(mine, filter={"n": 1})) == ["deep", "mine"]
    assert {fact.id for fact in memory.query(mine)} == {"deep", "mine"}
    assert set(store.list_namespaces(prefix=mine)) == {mine, (*mine, "x")}
    assert set(store.list_namespaces(suffix=mine)) == {mine}
    memory.delete(mine, "mine")
    assert memory.get(theirs, "theirs") is not None


def test_cve_2026_71433_semantic_search_stays_in_its_namespace() -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[1.0, 0.0]] * len(texts)

    with MemoryStore.open(":memory:", index={"dims": 2, "embed": embed, "fields": ["text"]}) as memory:
        for namespace in [("user_1",), ("userX1",), ("user_10",), ("USER_1",), ("user_1", "deep")]:
            memory.store.put(namespace, "k", {"text": "secret"})
        found = memory.store.search(("user_1",), query="secret")
        assert {item.namespace for item in found} == {("user_1",), ("user_1", "deep")}


# -- embeddings -----------------------------------------------------------------------------------


async def test_8822_the_same_text_twice_in_one_batch() -> None:
    """Embeddings of distinct texts were counted against the items that share them: an error, or a wrong vector."""
    asked: list[list[str]] = []

    def embed(texts: Sequence[str]) -> list[list[float]]:
        asked.append(list(texts))
        return [[1.0, 0.0] if "same" in text else [0.0, 1.0] for text in texts]

    with MemoryStore.open(":memory:", index={"dims": 2, "embed": embed, "fields": ["text"]}) as memory:
        puts = [PutOp(("docs",), key, {"text": text}) for key, text in [("a", "same"), ("b", "other"), ("c", "same")]]
        memory.store.batch(puts)
        await memory.store.abatch([op._replace(namespace=("more",)) for op in puts])
        assert asked == [["same", "other"]]
        for namespace in [("docs",), ("more",)]:
            found = memory.store.search(namespace, query="same")
            assert [(item.key, item.score) for item in found] == [("c", 1.0), ("a", 1.0), ("b", 0.0)]


def test_9007_a_query_is_embedded_as_a_query() -> None:
    class TwoSided(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[1.0, 0.0] if text == "alpha" else [0.0, 1.0] for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return [1.0, 0.0]

    with MemoryStore.open(":memory:", index={"dims": 2, "embed": TwoSided(), "fields": ["text"]}) as memory:
        memory.store.batch([PutOp(("docs",), text, {"text": text}) for text in ("alpha", "beta")])
        assert memory.store.search(("docs",), query="find alpha")[0].key == "alpha"


def test_the_errors_are_ours(memory: MemoryStore) -> None:
    for call in (
        lambda: memory.store.search(("docs",), filter={"a": {"$nope": 1}}),
        lambda: memory.store.put((), "k", {}),
        lambda: memory.store.put(("a",), "k", {"a": object()}),
    ):
        with pytest.raises(MemStateError):
            call()

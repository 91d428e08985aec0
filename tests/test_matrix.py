"""The vectors held in memory say what SQL says, whoever wrote, deleted, forgot or let expire, and however asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate import matrix as matrices

WORDS = ("tea", "milk", "rain", "snow", "boat")
NAMESPACES = (("a",), ("ab",), ("a", "b"), ("a", "b", "c"), ("z",))


def embed(texts: list[str]) -> list[list[float]]:
    return [[1.0 + text.split().count(word) for word in WORDS] for text in texts]


INDEX = {"dims": len(WORDS), "embed": embed, "fields": ["text"]}


def cosine(left: str, right: str) -> float:
    (a, b) = embed([left, right])
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def check(
    memory: MemoryStore, held: dict[tuple[tuple[str, ...], str], str], query: str, prefix: tuple[str, ...]
) -> None:
    under = {address: text for address, text in held.items() if address[0][: len(prefix)] == prefix}
    for limit in (1, 3, 100):
        wanted = sorted((cosine(query, text) for text in under.values()), reverse=True)[:limit]
        found = memory.search(query, namespace=prefix, limit=limit)
        assert [fact.score for fact in found] == pytest.approx(wanted, abs=1e-6)
        for fact in found:
            assert under[fact.address] == fact.payload["text"]
            assert fact.score == pytest.approx(cosine(query, fact.payload["text"]), abs=1e-6)
    few = [fact.address for fact in memory.search(query, namespace=prefix, filter={"odd": True}, limit=2)]
    matching = {address for address, text in under.items() if len(text) % 2}
    assert set(few) <= matching
    assert len(few) == min(2, len(matching))


TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 1), st.sampled_from(["put", "put", "put", "delete", "forget", "look"]),
        st.sampled_from(NAMESPACES), st.sampled_from("kl"), TEXTS,
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS, query=TEXTS)
def test_two_memories_on_one_file_search_what_either_wrote(
    tmp_path_factory: pytest.TempPathFactory, actions: list[Any], query: str
) -> None:
    path = tmp_path_factory.mktemp("matrix") / "memory.db"
    held: dict[tuple[tuple[str, ...], str], str] = {}
    with (
        MemoryStore(SQLiteStorage(path), index=INDEX) as one,
        MemoryStore(SQLiteStorage(path), index=INDEX) as other,
    ):
        for who, what, namespace, key, text in actions:
            memory = (one, other)[who]
            if what == "put":
                memory.commit(Fact("f", {"text": text, "odd": bool(len(text) % 2)}, id=key, namespace=namespace))
                held[namespace, key] = text
            elif what == "delete":
                memory.delete(namespace, key)
                held.pop((namespace, key), None)
            elif what == "forget":
                memory.forget(namespace, key)
                for address in [address for address in held if address[0][: len(namespace)] == namespace]:
                    if address[1] == key:
                        del held[address]
            else:
                check(memory, held, query, namespace)
        for memory in (one, other):
            for prefix in ((), ("a",), ("a", "b")):
                check(memory, held, query, prefix)


@pytest.fixture
def memory() -> Iterator[MemoryStore]:
    with MemoryStore.open(":memory:", index=INDEX) as memory:
        yield memory


def test_an_expired_item_is_not_found(memory: MemoryStore) -> None:
    memory.store.put(("a",), "stays", {"text": "tea"})
    memory.store.put(("a",), "goes", {"text": "tea"}, ttl=0.0)
    assert [fact.id for fact in memory.search("tea")] == ["stays"]
    memory.sweep()
    assert [fact.id for fact in memory.search("tea")] == ["stays"]


def test_an_item_with_several_texts_is_found_once(memory: MemoryStore) -> None:
    memory.store.put(("a",), "k", {"text": "tea", "more": ["rain rain", "snow"]}, index=["text", "more[*]"])
    for number in range(5):
        memory.store.put(("a",), str(number), {"text": "boat milk"})
    found = memory.search("rain rain", limit=3)
    assert found[0].id == "k"
    assert found[0].score == pytest.approx(1.0, abs=1e-6)
    assert len({fact.id for fact in found}) == 3


def test_what_does_not_fit_into_memory_is_read_from_sql(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "BUDGET", 40 * len(WORDS))  # ten vectors
    texts = {str(number): " ".join(WORDS[: number % 5 + 1]) for number in range(30)}
    held = {(("a",), key): text for key, text in texts.items()}
    for key, text in texts.items():
        memory.commit(Fact("f", {"text": text, "odd": bool(len(text) % 2)}, id=key, namespace=("a",)))
        check(memory, {address: held[address] for address in list(held)[: int(key) + 1]}, "tea milk", ())
    index = memory._outbox.indexes[0]
    with index.matrix.following(memory.storage) as (_, matrix):
        assert matrix is None


def test_a_matrix_that_failed_to_follow_starts_again(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.commit(Fact("f", {"text": "tea"}, id="1"))
    memory.search("tea")
    memory.commit([Fact("f", {"text": "tea"}, id=str(number)) for number in (2, 3)])
    index = memory._outbox.indexes[0]
    add, calls = index.matrix._add, []

    def failing(*row: Any) -> None:
        calls.append(row)
        if len(calls) == 2:
            raise MemoryError
        add(*row)

    monkeypatch.setattr(index.matrix, "_add", failing)
    with pytest.raises(MemoryError):
        memory.search("tea")
    assert sorted(fact.id for fact in memory.search("tea", limit=9)) == ["1", "2", "3"]
    with index.matrix.following(memory.storage) as (_, matrix):
        assert matrix.count(()) == 3

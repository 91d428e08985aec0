"""Semantic search over real Chroma: SQL decides what is visible and what scores, the index only proposes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from truth import (
    DIMS,
    Words,
    check_search,
    collection_of,
    commit,
    cosine,
    eventually,
    exact_below,
    faulty_chroma,
    hook_of,
    note,
    notes,
    open_memory,
    vector_of,
)

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.hooks.base import Vector

TEA = "green tea in the morning"
MANY = notes(300)


@pytest.fixture(autouse=True)
def search_asks_the_index() -> Iterator[None]:
    """However few facts there are."""
    with exact_below(2):
        yield


@pytest.fixture
def memory(database: Path) -> Iterator[MemoryStore]:
    with open_memory(database) as opened:
        yield opened


def asked(memory: MemoryStore) -> list[int]:
    """How many candidates the index was asked for, call by call."""
    return [args[1] for method, args in hook_of(memory).calls if method == "query"]


def ids(found: list[Fact]) -> list[str | None]:
    return [fact.id for fact in found]


# -- which way ------------------------------------------------------------------------------------


def test_few_facts_are_scanned_and_many_are_asked_for(memory: MemoryStore) -> None:
    commit(memory, notes(20))
    with exact_below(20):
        memory.search(TEA)
    assert asked(memory) == []
    with exact_below(19):
        memory.search(TEA)
    assert asked(memory)[0] == 11, "one more than wanted, to see that nothing nearer was left out"


def test_only_facts_under_the_namespace_count_as_many(memory: MemoryStore) -> None:
    commit(memory, notes(20))
    memory.store.put(("small", "u1"), "k", {"text": TEA})
    found = memory.search(TEA, namespace=("small",))
    assert (ids(found), asked(memory)) == (["k"], [])


def test_scores_are_exact_cosines_of_real_neighbours(memory: MemoryStore) -> None:
    commit(memory, MANY)
    check_search(memory, MANY)
    with exact_below(2, floor=200):
        check = [fact.score for fact in memory.search(TEA, limit=20)]
    assert check == pytest.approx(sorted((cosine(TEA, text) for text in MANY.values()), reverse=True)[:20], abs=1e-6)
    assert asked(memory)[-1] == 200


def test_the_index_is_asked_for_more_when_a_filter_leaves_few(memory: MemoryStore) -> None:
    texts = MANY | {f"far{n}": f"nothing like it {n}" for n in range(300)}
    rare = {"n7", "n19", "n23", "far0", "far1"}
    memory.commit([note(key, text, rare=key in rare) for key, text in texts.items()])
    expected = sorted(rare, key=lambda key: cosine(TEA, texts[key]), reverse=True)
    with exact_below(2, floor=200):
        assert ids(memory.search(TEA, filter={"rare": True}, limit=1)) == expected[:1]
        assert asked(memory) == [200]
        found = memory.search(TEA, filter={"rare": True}, limit=10)
    assert [fact.score for fact in found] == pytest.approx([cosine(TEA, texts[key]) for key in expected], abs=1e-6)
    assert {fact.id for fact in found} == rare
    assert asked(memory) == [200, 200, 400, 800], "more than it holds, and what is missing is looked for in SQL"


def test_a_scan_takes_over_where_asking_for_more_does_not_pay(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.search._CEILING", 250)
    memory.commit([note(key, text, rare=key == "n299") for key, text in MANY.items()])
    with exact_below(2, floor=200):
        assert ids(memory.search("black coffee", filter={"rare": True}, limit=1)) == ["n299"]
        assert asked(memory) == [200]
        assert len(memory.search(TEA, limit=250)) == 250
        assert asked(memory) == [200]


def test_nothing_and_everything(memory: MemoryStore) -> None:
    commit(memory, notes(20))
    assert memory.search(TEA, limit=0) == []
    assert memory.search(TEA, limit=0, offset=5) == []
    assert len(memory.search(TEA, limit=sys.maxsize)) == 20
    assert memory.search(TEA, offset=20) == []
    assert memory.search("   ") == []


def test_an_index_far_behind_is_not_asked(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.search._MANY_PENDING", 10)
    with open_memory(database, vector_sync="deferred") as memory:
        hook_of(memory).fail("apply")
        commit(memory, notes(11))
        check_search(memory, notes(11))
        assert asked(memory) == []
        hook_of(memory).heal()


# -- what crowds the proposals ----------------------------------------------------------------------


def test_pending_removals_do_not_crowd_out_what_is_left(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.search._FLOOR", 1)
    with open_memory(database, vector_sync="deferred") as memory:
        commit(memory, {f"near{n}": f"{TEA} {n}" for n in range(40)})
        commit(memory, notes(20))
        memory.flush()
        hook_of(memory).fail("apply")
        for n in range(40):
            memory.delete("note", f"near{n}")
        check_search(memory, notes(20))
        assert min(asked(memory)) > 40
        hook_of(memory).heal()


def test_pending_facts_do_not_stand_in_for_nearer_ones(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that the index does not have yet match the filter, but so do nearer ones beyond its first proposals."""
    monkeypatch.setattr("langgraph_memstate.search._FLOOR", 4)
    with open_memory(database, vector_sync="deferred") as memory:
        memory.commit([note(f"tea{n}", TEA, kind="tea") for n in range(8)])
        memory.commit([note(f"cat{n}", f"green cat {n}", kind="cat") for n in range(3)])
        memory.flush()
        hook_of(memory).fail("apply")
        memory.commit([note(f"dog{n}", f"dog number {n}", kind="cat") for n in range(3)])
        found = memory.search(TEA, filter={"kind": "cat"}, limit=3)
        assert {fact.payload["text"] for fact in found} == {f"green cat {n}" for n in range(3)}
        hook_of(memory).heal()


def test_strangers_in_the_collection_are_never_shown(memory: MemoryStore) -> None:
    commit(memory, notes(20))
    vector = np.array(vector_of(TEA), np.float32)
    numbers = range(300)
    collection_of(memory).add(
        ids=[f"00000000-0000-4000-8000-{n:012}" for n in numbers],
        embeddings=[vector for _ in numbers],
        metadatas=[{"ns0": "note\x1f"} for _ in numbers],
    )
    check_search(memory, notes(20))
    assert len(memory.verify().indexes[0].orphaned) == 300


def test_vectors_missing_in_the_index(memory: MemoryStore) -> None:
    """Nothing is known of their loss until `verify` looks; a search that comes short finds them all the same."""
    texts = notes(20)
    commit(memory, texts)
    collection = collection_of(memory)
    collection.delete(ids=collection.get(limit=5)["ids"])
    assert len(memory.search(TEA, limit=20)) == 20
    assert len(memory.verify().indexes[0].missing) == 5
    assert memory.repair().ok
    check_search(memory, texts)


def test_expired_items_are_not_found_and_do_not_crowd_others_out(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.search._FLOOR", 2)
    for n in range(10):
        memory.store.put(("note",), f"gone{n}", {"text": TEA}, ttl=0.0005)
    commit(memory, notes(10))
    time.sleep(0.05)
    check_search(memory, notes(10))
    assert memory.sweep() == 10
    memory.flush()
    check_search(memory, notes(10))
    assert memory.verify().ok


# -- ties, pages, namespaces --------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [2, 2_000])
def test_equal_scores_come_last_written_first(memory: MemoryStore, candidates: int) -> None:
    commit(memory, {f"n{n:03}": TEA for n in range(300)})
    memory.commit(note("n000", TEA))
    with exact_below(candidates):
        assert ids(memory.search(TEA, limit=3)) == ["n000", "n299", "n298"]
        assert memory.search(TEA, limit=3)[0].score == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("candidates", [2, 2_000])
def test_pages_cover_everything_once_and_in_order(memory: MemoryStore, candidates: int) -> None:
    commit(memory, notes(60) | {f"same{n}": TEA for n in range(10)})
    with exact_below(candidates):
        whole = ids(memory.search(TEA, limit=70))
        assert len(set(whole)) == 70
        pages = [ids(memory.search(TEA, limit=7, offset=offset)) for offset in range(0, 77, 7)]
        assert [key for page in pages for key in page] == whole


@pytest.mark.parametrize("candidates", [0, 2_000])
def test_a_prefix_is_made_of_whole_labels(memory: MemoryStore, candidates: int) -> None:
    places = [("a",), ("ab",), ("a", "b"), ("a", "b", "c"), ("a.b",), ("a%",), ("a\x1fb",), ("b",)]
    for place in places:
        memory.commit(Fact("note", {"text": TEA}, id="k", namespace=place))
    with exact_below(candidates):
        for prefix in places:
            found = {fact.namespace for fact in memory.search(TEA, namespace=prefix, limit=20)}
            assert found == {place for place in places if place[: len(prefix)] == prefix}
    assert bool(asked(memory)) is (candidates == 0)


# -- items with several vectors -------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [2, 2_000])
def test_an_item_counts_once_by_its_nearest_text(database: Path, candidates: int) -> None:
    texts = {
        f"n{n}": [f"{topic} {n}" for topic in ("a cat", "the roof", "black coffee")[: 1 + n % 3]] for n in range(30)
    }
    texts["tea"] = ["trains to berlin", TEA, "green tea"]
    hook = faulty_chroma(database, text_field="parts[*].text")
    with open_memory(database, vectors=hook) as memory, exact_below(candidates):
        memory.commit(
            [Fact("note", {"parts": [{"text": part} for part in parts]}, id=key) for key, parts in texts.items()]
        )
        assert hook.inner.count() == sum(map(len, texts.values()))
        for query in (TEA, "a cat", "black coffee on the roof"):
            scores = {key: max(cosine(query, part) for part in parts) for key, parts in texts.items()}
            found = memory.search(query, limit=31)
            assert len(set(ids(found))) == 31
            assert [fact.score for fact in found] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-6)
            assert [fact.score for fact in found] == pytest.approx([scores[str(fact.id)] for fact in found], abs=1e-6)
        memory.commit(Fact("note", {"parts": [{"text": "trains"}]}, id="tea"))
        memory.flush()
        assert hook.inner.count() == sum(map(len, texts.values())) - 2
        assert memory.search("trains", limit=1)[0].id == "tea"
        assert memory.verify().ok


def test_an_item_scores_by_its_nearest_text_though_the_index_proposes_another(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An approximate index may leave out the nearest vector of an item and propose a farther one."""
    hook = faulty_chroma(database, text_field="parts[*]")
    with open_memory(database, vectors=hook) as memory:
        written = memory.commit(Fact("note", {"parts": ["trains", TEA]}, id="tea"))
        memory.commit([Fact("note", {"parts": [f"a cat {n}"]}, id=f"cat{n}") for n in range(5)])
        query = hook.inner.query

        def approximate(vector: Vector, k: int, namespace: Any = ()) -> list[str]:
            nearest, *others = query(vector, k + 1, namespace)
            assert nearest != written.version, "the item's first text is the farther one"
            return others

        monkeypatch.setattr(hook.inner, "query", approximate)
        with exact_below(2, floor=6):
            (found,) = memory.search(TEA, limit=1)
        assert (found.id, found.score, asked(memory)) == ("tea", pytest.approx(1.0, abs=1e-6), [6])


# -- an index that does not answer ----------------------------------------------------------------------


def test_an_outage_is_told_once(
    memory: MemoryStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.index._REST", 0.0)
    caplog.set_level(logging.INFO, "langgraph_memstate")
    texts = notes(20)
    commit(memory, texts)
    hook = hook_of(memory)

    def told() -> list[str]:
        return [record.levelname for record in caplog.records if "answer" in record.message]

    for outage in (1, 2):
        hook.fail("query")
        for _ in range(5):
            check_search(memory, texts)
        assert told() == ["WARNING", "INFO"] * (outage - 1) + ["WARNING"]
        hook.heal()
        check_search(memory, texts)
        assert told() == ["WARNING", "INFO"] * outage


def test_an_index_that_is_away_is_not_asked_again_by_every_search(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.index._REST", 0.3)
    texts = notes(20)
    commit(memory, texts)
    hook_of(memory).fail("query")
    for _ in range(10):
        check_search(memory, texts)
    tries = len(asked(memory))
    assert 1 <= tries <= 3
    hook_of(memory).heal()
    eventually(lambda: memory.search(TEA) and len(asked(memory)) > tries + 1)


@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
async def test_the_async_face_tells_the_same_truth(database: Path, vector_sync: Any) -> None:
    texts = notes(20)
    with open_memory(database, model=Words(), vector_sync=vector_sync) as memory:
        await memory.acommit([note(key, text) for key, text in texts.items()])
        await memory.adelete("note", "n0")
        found = await memory.asearch(TEA, limit=20)
        await memory.aflush()
        assert ids(found) == ids(await memory.asearch(TEA, limit=20))
        assert set(ids(found)) == texts.keys() - {"n0"}
        assert (await memory.averify()).ok
        assert (await memory.arepair()).ok


def test_vectors_are_stored_as_they_are_asked_for(database: Path) -> None:
    """Documents only on request, and those of a replay are those of the commit."""
    for number, vector_sync in enumerate(("atomic", "deferred")):
        path = database.with_name(f"{number}.db")
        hook = faulty_chroma(path, store_documents=True, metadata_fields=["role"])
        with open_memory(path, vectors=hook, vector_sync=vector_sync) as memory:
            memory.commit(note("a", TEA, role="user"))
            memory.store.put(("note",), "b", {"text": "no", "other": ["a cat", "the roof"]}, index=["other[*]"])
            memory.flush()
            held = collection_of(memory).get(include=["documents", "metadatas", "embeddings"])
            assert sorted(held["documents"]) == ["a cat", TEA, "the roof"]
            roles = dict(zip(held["documents"], (data.get("role") for data in held["metadatas"]), strict=True))
            assert roles == {TEA: "user", "a cat": None, "the roof": None}
            assert np.allclose(np.linalg.norm(held["embeddings"], axis=1), 1.0, atol=1e-6)
            assert len(held["embeddings"][0]) == DIMS

"""The contract of search: it says what SQL holds, whichever hook proposes the vectors, and without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from langgraph_memstate import search
from langgraph_memstate.facts import Fact
from langgraph_memstate.hooks.base import SyncHook
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.testing.hook_calls import AWKWARD
from langgraph_memstate.testing.hook_making import HookMaking
from langgraph_memstate.testing.texts import DIMS, QUERIES, Words, cosine, note, notes

FIRST = notes(12)


@contextmanager
def index_is_asked() -> Iterator[None]:
    """However few facts there are: a scan would answer in the index's place."""
    usual = search.EXACT_BELOW, search._FLOOR
    search.EXACT_BELOW, search._FLOOR = 2, 3
    try:
        yield
    finally:
        search.EXACT_BELOW, search._FLOOR = usual


def held_by_sql(memory: MemoryStore) -> dict[str, str]:
    """Every note by key."""
    return {fact.id: fact.payload["text"] for fact in memory.query("note", limit=100_000)}


def check_search(memory: MemoryStore, texts: Mapping[str, str]) -> None:
    """Search finds exactly these notes, the nearest first, with their exact cosine, and SQL holds the same."""
    assert held_by_sql(memory) == texts
    for query in QUERIES:
        scores = {key: cosine(query, text) for key, text in texts.items()}
        best = sorted(scores.values(), reverse=True)
        for limit in (3, len(texts) + 5):
            found = memory.search(query, namespace="note", limit=limit)
            assert [fact.score for fact in found] == pytest.approx(best[:limit], abs=1e-6)
            assert [fact.score for fact in found] == pytest.approx([scores[fact.id] for fact in found], abs=1e-6)
            assert {fact.id: fact.payload["text"] for fact in found}.items() <= texts.items()
            assert len({fact.id for fact in found}) == len(found)


def check_settled(memory: MemoryStore) -> None:
    """Nothing waits, and the index holds exactly what is current."""
    memory.flush()
    report = memory.verify()
    assert report.ok, report
    assert sum(index.pending for index in report.indexes) == 0
    index = memory._outbox.indexes[0]
    if index.hook is not None:
        with memory.storage.snapshot() as reader:
            assert index.held_ids() == set(reader.vector_ids(index.name))


def commit(memory: MemoryStore, texts: Mapping[str, str]) -> None:
    memory.commit([note(key, text) for key, text in texts.items()])


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what a background thread brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


class HookSearch(HookMaking):
    """Tests of search over a memory while nothing fails."""

    def hook_of_a_memory(self, tmp_path: Path) -> SyncHook | None:
        """The hook of the memories in these tests; None for search without a vector database."""
        return self.make_hook(tmp_path)

    def open_memory(self, tmp_path: Path, hook: SyncHook | None = None, **options: Any) -> MemoryStore:
        """A memory on `make_storage`, with a hook of its own where none is given."""
        index = {"dims": DIMS, "embed": options.pop("model", None) or Words(), "fields": ["text"]}
        memory = MemoryStore(self.make_storage(tmp_path), index=index, **options)
        try:
            hook = hook or self.hook_of_a_memory(tmp_path)
            if hook is not None:
                memory.add_hook(hook)
            else:
                memory.view()  # an index without a vector database comes with the first read
        except BaseException:
            memory.close()
            raise
        return memory

    @pytest.fixture(autouse=True)
    def _index_is_asked(self) -> Iterator[None]:
        with index_is_asked():
            yield

    @pytest.fixture(params=["atomic", "deferred"])
    def vector_sync(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    def test_search_says_what_sql_holds(self, tmp_path: Path, vector_sync: Any) -> None:
        with self.open_memory(tmp_path, vector_sync=vector_sync) as memory:
            check_search(memory, {})
            commit(memory, FIRST)
            check_search(memory, FIRST)
            texts = FIRST | notes(6, start=100) | {"n0": "trains to paris", "n1": "the roof"}
            commit(memory, notes(6, start=100) | {"n0": "trains to berlin and back"})
            check_search(memory, FIRST | notes(6, start=100) | {"n0": "trains to berlin and back"})
            commit(memory, {"n0": "trains to paris", "n1": "the roof"})
            memory.delete("note", "n2")
            memory.delete("note", "n100")
            texts = {key: text for key, text in texts.items() if key not in ("n2", "n100")}
            check_search(memory, texts)
            check_settled(memory)
            check_search(memory, texts)

    def test_one_commit_may_write_a_fact_twice(self, tmp_path: Path, vector_sync: Any) -> None:
        with self.open_memory(tmp_path, vector_sync=vector_sync) as memory:
            memory.commit([note("a", "green tea"), note("b", "a cat"), note("a", "trains to berlin")])
            check_search(memory, {"a": "trains to berlin", "b": "a cat"})
            check_settled(memory)

    def test_a_rollback_takes_the_vectors_back(self, tmp_path: Path, vector_sync: Any) -> None:
        with self.open_memory(tmp_path, vector_sync=vector_sync) as memory:
            commit(memory, FIRST)
            changed = FIRST | {"n0": "trains to paris", "new": "green tea in the morning"}
            commit(memory, {"n0": "trains to paris", "new": "green tea in the morning"})
            check_search(memory, changed)
            report = memory.rollback(1)
            check_search(memory, FIRST)
            check_settled(memory)
            memory.rollback(to=report.undone)
            check_search(memory, changed)
            check_settled(memory)

    def test_a_search_stays_under_its_prefix(self, tmp_path: Path) -> None:
        with self.open_memory(tmp_path) as memory:
            text = "green tea in the morning"
            memory.commit([Fact("note", {"text": text}, id=str(n), namespace=ns) for n, ns in enumerate(AWKWARD)])
            for prefix in AWKWARD:
                under = {str(n) for n, namespace in enumerate(AWKWARD) if namespace[: len(prefix)] == prefix}
                found = memory.search(text, namespace=prefix, limit=100)
                assert {fact.id for fact in found} == under, prefix
            assert len(memory.search(text, limit=100)) == len(AWKWARD)
            check_settled(memory)

    def test_a_search_with_a_filter(self, tmp_path: Path) -> None:
        with self.open_memory(tmp_path) as memory:
            memory.commit(
                [Fact("note", {"text": text, "n": n}, id=key) for n, (key, text) in enumerate(notes(60).items())]
            )
            few = {key: text for key, text in notes(60).items() if int(key[1:]) >= 55}
            best = sorted((cosine("green tea", text) for text in few.values()), reverse=True)
            found = memory.search("green tea", filter={"n": {"$gte": 55}}, limit=5)
            assert {fact.id for fact in found} == few.keys()
            assert [fact.score for fact in found] == pytest.approx(best, abs=1e-6)

    def test_a_memory_that_is_opened_again(self, tmp_path: Path, vector_sync: Any) -> None:
        texts = notes(70)
        with self.open_memory(tmp_path, vector_sync=vector_sync) as memory:
            commit(memory, texts)
        model = Words()
        with self.open_memory(tmp_path, model=model, vector_sync=vector_sync) as memory:
            check_search(memory, texts)
            check_settled(memory)
            check_search(memory, texts)
            assert set(model.texts) <= set(QUERIES), "SQL holds the embeddings"

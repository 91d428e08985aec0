"""Semantic search of the store: what is embedded, by whom, how often, and in which order it comes back.

Vectors come from a feature hash (words into 256 buckets), so related texts are near and nothing is downloaded. Where
it matters, a test runs twice: answered by a scan over SQL, and through a hook that follows the log.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langgraph.store.base import PutOp, get_text_at_path
from langgraph.store.memory import InMemoryStore

from langgraph_memstate import MemoryStore, MemStateStore
from langgraph_memstate.embedding import texts_of
from langgraph_memstate.errors import EmbeddingError, IndexConfigError
from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook, Vector, VectorRecord

DIMS = 256
NS = ("docs",)
TEXTS = {
    "vegetarian": "the user is vegetarian and likes tofu",
    "meat": "the user eats meat on sundays",
    "paris": "paris is the capital of france",
    "berlin": "berlin is the capital of germany",
    "cats": "cats and dogs are pets",
}


def feature_hash(texts: Sequence[str]) -> list[list[float]]:
    vectors = np.zeros((len(texts), DIMS))
    for row, text in enumerate(texts):
        for word in text.lower().split():
            vectors[row, int.from_bytes(blake2b(word.encode(), digest_size=4).digest(), "big") % DIMS] += 1
    return vectors.tolist()


def cosine(left: str, right: str) -> float:
    a, b = map(np.array, feature_hash([left, right]))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


class Model:
    """A feature hash that remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        self.calls.append(list(texts))
        return feature_hash(texts)

    @property
    def texts(self) -> list[str]:
        return [text for call in self.calls for text in call]


class Shelf(SyncHook):
    """The least index that follows the log: a dict."""

    name = "shelf"

    def __init__(self) -> None:
        self.held: dict[str, VectorRecord] = {}
        self.spec: IndexSpec | None = None

    def open(self, spec: IndexSpec) -> IndexState:
        return IndexState.EMPTY if self.spec is None else IndexState.OK

    def reset(self, spec: IndexSpec) -> None:
        self.spec = spec
        self.held.clear()

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        self.held.update((record.id, record) for record in upserts)
        for id_ in deletes:
            self.held.pop(id_, None)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        under = [record for record in self.held.values() if record.namespace[: len(namespace)] == tuple(namespace)]
        under.sort(key=lambda record: float(vector @ record.vector), reverse=True)
        return [record.id for record in under[:k]]

    def ids(self) -> Iterator[str]:
        return iter(list(self.held))

    def count(self) -> int:
        return len(self.held)

    def close(self) -> None:
        self.held.clear()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture(params=["scan", "hook"])
def indexed(request: pytest.FixtureRequest, model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    """A memory that embeds the field "text", searched by a scan over SQL and through a hook."""
    vectors = None
    if request.param == "hook":
        vectors = Shelf()
        monkeypatch.setattr("langgraph_memstate.search.EXACT_BELOW", 0)  # ask the hook however few there are
        monkeypatch.setattr("langgraph_memstate.search._FLOOR", 1)
    index = {"dims": DIMS, "embed": model, "fields": ["text"]}
    with MemoryStore.open(":memory:", index=index, vectors=vectors) as memory:
        yield memory
        assert memory.verify().ok


@pytest.fixture
def store(indexed: MemoryStore) -> MemStateStore:
    return indexed.store


def fill(store: MemStateStore) -> None:
    store.batch([PutOp(NS, key, {"text": text, "long": len(text) > 30}) for key, text in TEXTS.items()])


def keys(items: Sequence[Any]) -> list[str]:
    return [item.key for item in items]


# -- ranking --------------------------------------------------------------------------------------


def test_the_nearest_comes_first_and_scores_are_cosines(store: MemStateStore) -> None:
    fill(store)
    query = "which capital is in france"
    found = store.search(NS, query=query)
    assert keys(found)[:2] == ["paris", "berlin"]
    assert len(found) == len(TEXTS)
    for item in found:
        assert item.score == pytest.approx(cosine(query, TEXTS[item.key]), abs=1e-6)
    scores = [item.score for item in found]
    assert scores == sorted(scores, reverse=True)


def test_the_ranking_agrees_with_upstream(store: MemStateStore) -> None:
    upstream = InMemoryStore(index={"dims": DIMS, "embed": feature_hash, "fields": ["text"]})
    upstream.batch([PutOp(NS, key, {"text": text}) for key, text in TEXTS.items()])
    fill(store)
    for query in ("tofu for the vegetarian user", "dogs or meat on sundays", "is the capital of germany berlin"):
        ours, theirs = store.search(NS, query=query, limit=2), upstream.search(NS, query=query, limit=2)
        assert keys(ours) == keys(theirs)
        assert [item.score for item in ours] == pytest.approx([item.score for item in theirs], abs=1e-6)


async def test_the_async_face_finds_the_same(store: MemStateStore) -> None:
    await store.abatch([PutOp(NS, key, {"text": text}) for key, text in TEXTS.items()])
    [found] = await store.asearch(NS, query="tofu", limit=1)
    assert (found.key, found.score) == ("vegetarian", pytest.approx(cosine("tofu", TEXTS["vegetarian"])))


def test_pages_by_meaning_cover_everything_once(store: MemStateStore) -> None:
    fill(store)
    whole = keys(store.search(NS, query="the capital"))
    pages = [keys(store.search(NS, query="the capital", limit=2, offset=offset)) for offset in (0, 2, 4, 6)]
    assert [key for page in pages for key in page] == whole
    assert [len(page) for page in pages] == [2, 2, 1, 0]


def test_a_filter_and_a_namespace_narrow_it(store: MemStateStore) -> None:
    fill(store)
    store.put(("other",), "paris", {"text": TEXTS["paris"], "long": True})
    store.put(("docsx",), "paris", {"text": TEXTS["paris"]})
    store.put(("docs", "deep"), "paris", {"text": TEXTS["paris"], "long": True})
    found = store.search(NS, query="paris france capital", filter={"long": True}, limit=3)
    assert [(item.namespace, item.key) for item in found] == [
        (("docs", "deep"), "paris"), (NS, "berlin"), (NS, "vegetarian"),
    ]  # fmt: skip
    assert {item.namespace for item in store.search((), query="paris", limit=50)} == {
        NS, ("other",), ("docsx",), ("docs", "deep"),
    }  # fmt: skip
    assert store.search(("none",), query="paris") == []


def test_updates_and_deletes_are_seen_at_once(store: MemStateStore) -> None:
    fill(store)
    store.put(NS, "cats", {"text": "rome is the capital of italy"})
    assert store.search(NS, query="rome italy", limit=1)[0].key == "cats"
    assert store.search(NS, query="pets dogs", limit=1)[0].score == pytest.approx(0)
    store.delete(NS, "cats")
    assert "cats" not in keys(store.search(NS, query="rome italy"))


def test_equal_scores_come_last_written_first(store: MemStateStore) -> None:
    for key in ("a", "b", "c"):
        store.put(NS, key, {"text": "same words"})
    assert keys(store.search(NS, query="same words")) == ["c", "b", "a"]


def test_an_empty_query_lists_by_time_as_upstream(store: MemStateStore) -> None:
    fill(store)
    found = store.search(NS, query="")
    assert keys(found) == list(reversed(TEXTS))
    assert {item.score for item in found} == {None}


def test_a_query_without_direction_finds_nothing(store: MemStateStore) -> None:
    fill(store)
    assert store.search(NS, query="   ") == []


# -- what is embedded -----------------------------------------------------------------------------


def test_an_item_that_is_not_indexed_is_read_but_not_found_by_meaning(store: MemStateStore, model: Model) -> None:
    store.put(NS, "k", {"text": "secret words"}, index=False)
    store.put(NS, "none", {"other": "no text"})
    store.put(NS, "blank", {"text": "  "})
    store.put(NS, "nothing", {"text": "x"}, index=[])
    assert model.calls == []
    assert store.search(NS, query="secret words") == []
    assert len(store.search(NS)) == 4
    assert store.get(NS, "k").value == {"text": "secret words"}


def test_the_paths_of_a_put_replace_those_of_the_index(store: MemStateStore, model: Model) -> None:
    value = {"text": "not this", "a": {"b": [{"c": "red"}, {"c": "green"}, {"d": "blue"}]}}
    store.put(NS, "k", value, index=["a.b[*].c"])
    assert model.texts == ["red", "green"]
    assert store.search(NS, query="green")[0].score == pytest.approx(1)
    assert store.search(NS, query="blue")[0].score == pytest.approx(0)


def test_an_item_with_many_vectors_counts_once_by_its_nearest(store: MemStateStore) -> None:
    store.put(NS, "many", {"parts": ["red apple", "red apple pie", "green pear", "apple"]}, index=["parts[*]"])
    store.put(NS, "one", {"text": "green apple"})
    found = store.search(NS, query="red apple", limit=10)
    assert [(item.key, round(item.score, 6)) for item in found] == [("many", 1.0), ("one", 0.5)]
    assert keys(store.search(NS, query="red apple", limit=1, offset=1)) == ["one"]


def test_an_update_with_fewer_vectors_forgets_the_others(store: MemStateStore, indexed: MemoryStore) -> None:
    store.put(NS, "k", {"parts": ["red", "green", "blue"]}, index=["parts[*]"])
    store.put(NS, "k", {"parts": ["red"]}, index=["parts[*]"])
    assert store.search(NS, query="blue")[0].score == pytest.approx(0)
    indexed.flush()
    assert indexed.verify().ok


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("title", ["T"]),
        ("a.b", ['[{"c": "x"}, {"c": "y"}, {"d": 1}]']),
        ("a.b[0].c", ["x"]),
        ("a.b[-2].c", ["y"]),
        ("a.b[9].c", []),
        ("a.b[*].c", ["x", "y"]),
        ("a.b[*].d", ["1"]),
        ("{title,a.n}", ["T", "2.5"]),
        ("a.*", ['[{"c": "x"}, {"c": "y"}, {"d": 1}]', "2.5", "True"]),
        ("list[*]", ["p", "q"]),
        ("list", ['["p", "q"]']),
        ("list.x", []),
        ("title[0]", []),
        ("nothing", []),
        ("none", []),
        ("{nothing,title}", ["T"]),
        ("matrix[*][*]", ["1", "2", "3"]),
    ],
)
def test_paths_select_the_texts_that_upstream_selects(path: str, texts: list[str]) -> None:
    value = {
        "title": "T", "none": None, "list": ["p", "q"], "matrix": [[1, 2], [3]],
        "a": {"b": [{"c": "x"}, {"c": "y"}, {"d": 1}], "n": 2.5, "t": True},
    }  # fmt: skip
    assert texts_of(value, [path]) == texts == get_text_at_path(value, path)


def test_the_whole_value_is_the_default_field() -> None:
    model = Model()
    with MemoryStore.open(":memory:", index={"dims": DIMS, "embed": model}) as memory:
        memory.store.put(NS, "k", {"b": "é", "a": [1]})
    assert model.texts == ['{"a": [1], "b": "é"}']


@pytest.mark.parametrize("index", [["a[0"], ["{a,b"], "text", [1], True, 0, [["a"]]])
def test_paths_that_cannot_be_read_are_refused(store: MemStateStore, indexed: MemoryStore, index: Any) -> None:
    with pytest.raises(IndexConfigError):
        store.put(NS, "k", {"text": "x"}, index=index)
    assert indexed.stats()["facts"] == 0


# -- how often the model is asked -----------------------------------------------------------------


def test_a_batch_asks_the_model_once(store: MemStateStore, model: Model) -> None:
    fill(store)
    assert model.calls == [list(TEXTS.values())]


def test_a_text_is_embedded_once_for_good(store: MemStateStore, model: Model) -> None:
    store.put(NS, "a", {"text": "hello world"})
    store.put(NS, "a", {"text": "hello world", "n": 2})  # a later version
    store.put(("other",), "b", {"text": "hello world"})
    store.delete(NS, "a")
    store.put(NS, "a", {"text": "hello world"})
    store.put(NS, "c", {"parts": ["hello world", "new"]}, index=["parts[*]"])
    assert model.calls == [["hello world"], ["new"]]
    assert len(store.search((), query="hello world")) == 3


def test_embeddings_outlive_the_process(database: Path) -> None:
    first, second = Model(), Model()
    for model in (first, second):
        index = {"dims": DIMS, "embed": model, "fields": ["text"]}
        with MemoryStore.open(database, index=index, vectors=Shelf()) as memory:
            memory.store.put(NS, "k", {"text": "hello world"})
            assert memory.store.search(NS, query="hello")[0].key == "k"
    assert first.calls == [["hello world"], ["hello"]]
    assert second.calls == [["hello"]]


def test_a_hook_that_lost_everything_is_filled_from_sql_without_the_model(database: Path) -> None:
    model = Model()
    index = {"dims": DIMS, "embed": model, "fields": ["text"]}
    with MemoryStore.open(database, index=index, vectors=Shelf()) as memory:
        fill(memory.store)
    asked = len(model.calls)
    shelf = Shelf()
    with MemoryStore.open(database, index=index, vectors=shelf) as memory:
        memory.flush()
        assert len(shelf.held) == len(TEXTS)
        assert memory.verify().ok
    assert len(model.calls) == asked


# -- models ---------------------------------------------------------------------------------------


class LangChainModel(Embeddings):
    """A model whose queries are embedded in another way than its documents."""

    model = "two-sided"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return feature_hash([text.removeprefix("doc: ") for text in texts])

    def embed_query(self, text: str) -> list[float]:
        return feature_hash([text.removeprefix("query: ")])[0]


def test_a_langchain_model_embeds_queries_by_its_query_side() -> None:
    with MemoryStore.open(":memory:", index={"dims": DIMS, "embed": LangChainModel(), "fields": ["text"]}) as memory:
        memory.store.put(NS, "k", {"text": "doc: apple"})
        assert memory.store.search(NS, query="query: apple")[0].score == pytest.approx(1)


class AsyncModel:
    """An async model that notes on which loop and thread it runs."""

    def __init__(self) -> None:
        self.ran_on: list[tuple[asyncio.AbstractEventLoop, threading.Thread]] = []

    async def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        self.ran_on.append((asyncio.get_running_loop(), threading.current_thread()))
        await asyncio.sleep(0)
        return feature_hash(texts)


@pytest.fixture
def async_model() -> AsyncModel:
    return AsyncModel()


@pytest.fixture
def async_store(async_model: AsyncModel) -> Iterator[MemStateStore]:
    with MemoryStore.open(":memory:", index={"dims": DIMS, "embed": async_model, "fields": ["text"]}) as memory:
        yield memory.store


async def test_an_async_model_runs_on_the_callers_loop(async_store: MemStateStore, async_model: AsyncModel) -> None:
    await async_store.aput(NS, "k", {"text": "apple"})
    assert (await async_store.asearch(NS, query="apple"))[0].score == pytest.approx(1)
    here = (asyncio.get_running_loop(), threading.current_thread())
    assert async_model.ran_on == [here, here]


async def test_an_async_model_serves_sync_calls_inside_a_running_loop(
    async_store: MemStateStore, async_model: AsyncModel
) -> None:
    async_store.put(NS, "k", {"text": "apple"})
    assert async_store.search(NS, query="apple")[0].score == pytest.approx(1)
    assert all(loop is not asyncio.get_running_loop() for loop, _ in async_model.ran_on)
    assert len(async_model.ran_on) == 2


def test_an_async_model_serves_sync_calls_without_a_loop(async_store: MemStateStore) -> None:
    async_store.put(NS, "k", {"text": "apple"})
    assert async_store.search(NS, query="apple")[0].score == pytest.approx(1)


def _asked_on_a_loop(*, closes: bool) -> tuple[MemoryStore, asyncio.AbstractEventLoop]:
    """A memory, a put of which waits for a model that never answers; nobody awaits it any more."""
    memory: list[MemoryStore] = []

    async def main() -> None:
        asked = asyncio.Event()

        async def never(texts: Sequence[str]) -> list[list[float]]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

        memory.append(MemoryStore.open(":memory:", index={"dims": DIMS, "embed": never, "fields": ["text"]}))
        put = asyncio.create_task(memory[0].store.aput(NS, "k", {"text": "apple"}))
        await asked.wait()
        put.cancel()
        if closes:
            memory[0].close()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    return memory[0], loop


@pytest.mark.parametrize("on_loop", [True, False])
def test_closing_does_not_wait_for_a_model_that_cannot_answer(on_loop: bool) -> None:
    """Its loop is held up by that very call, or is closed."""

    def close() -> None:
        memory, loop = _asked_on_a_loop(closes=on_loop)
        loop.close()
        memory.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


async def test_the_database_is_free_while_the_model_thinks() -> None:
    """A model call may last seconds, and an async one may need the very thread that waits to read."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(texts: Sequence[str]) -> list[list[float]]:
        asked.set()
        await answer.wait()
        return feature_hash(texts)

    async with MemoryStore.open(":memory:", index={"dims": DIMS, "embed": slow, "fields": ["text"]}) as memory:
        put = asyncio.create_task(memory.store.aput(NS, "k", {"text": "apple"}))
        await asked.wait()
        memory.store.put(NS, "other", {"n": 1})
        assert memory.store.get(NS, "other").value == {"n": 1}
        assert memory.store.get(NS, "k") is None
        answer.set()
        await put
        assert memory.store.get(NS, "k") is not None


def test_a_provider_string_needs_langchain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain", None)
    monkeypatch.setitem(sys.modules, "langchain.embeddings", None)
    with pytest.raises(IndexConfigError, match="pip install langchain"):
        MemoryStore.open(":memory:", index={"dims": 3, "embed": "openai:text-embedding-3-small"})


Answer = Callable[[Sequence[str]], Any]


def fails(texts: Sequence[str]) -> Any:
    raise ConnectionError("the model is away")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (fails, "the model is away"),
        (lambda texts: None, "failed"),
        (lambda texts: [[1.0, 0.0]] * (len(texts) + 1), "2 vectors for 1 texts"),
        (lambda texts: [], "0 vectors for 1 texts"),
        (lambda texts: [[1.0, 0.0, 0.0]] * len(texts), "3 dimensions; the index has dims=2"),
        (lambda texts: [[1.0, float("nan")]] * len(texts), "NaN"),
        (lambda texts: [[1.0, float("inf")]] * len(texts), "infinity"),
        (lambda texts: [["a", "b"]] * len(texts), "no vector of numbers"),
        (lambda texts: [[[1.0, 2.0]]] * len(texts), "shape"),
        (lambda texts: [1.0] * len(texts), "shape"),
    ],
)
@pytest.mark.parametrize("vectors", [None, Shelf], ids=["scan", "hook"])
def test_a_model_that_fails_leaves_everything_as_it_was(
    answer: Answer, said: str, vectors: type[SyncHook] | None
) -> None:
    answers: list[Answer] = [lambda texts: [[1.0, 0.0]] * len(texts)]
    index = {"dims": 2, "embed": lambda texts: answers[-1](texts), "fields": ["text"]}
    with MemoryStore.open(":memory:", index=index, vectors=vectors and vectors()) as memory:
        memory.store.put(NS, "k", {"text": "old"})
        before = (memory.stats(), memory.store.search(NS, query="old"))
        answers.append(answer)
        with pytest.raises(EmbeddingError, match=said):
            memory.store.batch([PutOp(NS, "plain", {"n": 1}), PutOp(NS, "k", {"text": "new"})])
        with pytest.raises(EmbeddingError, match=said):
            memory.store.search(NS, query="new")
        answers.pop()
        assert (memory.stats(), memory.store.search(NS, query="old")) == before
        memory.store.put(NS, "k", {"text": "new"})
        assert memory.store.get(NS, "k").value == {"text": "new"}


def test_an_index_may_be_given_with_the_store() -> None:
    index = {"dims": DIMS, "embed": feature_hash, "fields": ["text"]}
    with MemoryStore.open(":memory:") as memory:
        store = MemStateStore(memory, index=index)
        MemStateStore(memory, index=index)  # the same again changes nothing
        with pytest.raises(IndexConfigError, match="another configuration"):
            MemStateStore(memory, index={**index, "dims": 3})
        store.put(NS, "k", {"text": "apple"})
        assert memory.store.search(NS, query="apple")[0].score == pytest.approx(1)


def test_items_from_before_the_index_are_found_too() -> None:
    with MemoryStore.open(":memory:") as memory:
        memory.store.put(NS, "k", {"text": "apple"})
        memory.store.put(NS, "hidden", {"text": "apple"}, index=False)
        memory.store.put(NS, "gone", {"text": "apple"})
        store = MemStateStore(memory, index={"dims": DIMS, "embed": feature_hash, "fields": ["text"]})
        memory.store.delete(NS, "gone")
        assert [(item.key, item.score) for item in store.search(NS, query="apple")] == [("k", pytest.approx(1))]
        assert memory.verify().ok


async def test_catching_up_with_an_async_model_does_not_block_a_search_on_its_loop() -> None:
    asked = asyncio.Event()

    async def slow(texts: Sequence[str]) -> list[list[float]]:
        asked.set()
        await asyncio.sleep(0.05)
        return feature_hash(texts)

    async with MemoryStore.open(":memory:") as memory:
        memory.store.put(NS, "k", {"text": "apple"})
        store = MemStateStore(memory, index={"dims": DIMS, "embed": slow, "fields": ["text"]})
        search = asyncio.create_task(store.asearch(NS, query="apple"))
        await asked.wait()
        assert keys(store.search(NS, query="apple")) == ["k"]
        assert keys(await search) == ["k"]

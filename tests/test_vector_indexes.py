"""Several indexes, other people's Chroma objects, and how often a model is asked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import pytest
from langchain_chroma import Chroma
from langchain_core.embeddings import Embeddings

sys.path.insert(0, str(Path(__file__).parent))
from truth import (
    DIMS,
    Words,
    check_search,
    check_settled,
    commit,
    cosine,
    directory,
    drafts_of,
    dump,
    eventually,
    exact_below,
    faulty_chroma,
    held_ids,
    hook_of,
    note,
    notes,
    open_memory,
    rows,
    vector_of,
    wanted_ids,
)

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from langgraph_memstate.hooks.faiss import FaissSyncHook

FIRST = notes(12)


@pytest.fixture(autouse=True)
def search_asks_the_index() -> Iterator[None]:
    """However few facts there are."""
    with exact_below(2):
        yield


# -- more than one index ---------------------------------------------------------------------------


@pytest.fixture
def double(database: Path) -> Iterator[MemoryStore]:
    """A memory with two collections in one directory: one embeds the text, the other the title."""
    with open_memory(database, vectors=faulty_chroma(database, text_field="text")) as memory:
        memory.add_hook(faulty_chroma(database, "titles", text_field="title", metadata_fields=["title"]))
        memory.commit([note(key, text, title=f"title {key}") for key, text in FIRST.items()])
        yield memory


def test_two_hooks_follow_one_log(double: MemoryStore, database: Path) -> None:
    double.delete("note", "n0")
    double.commit(note("n1", "green tea", title="another title"))
    double.commit(note("untitled", "black coffee"))
    double.flush()
    current = FIRST | {"n1": "green tea", "untitled": "black coffee"}
    del current["n0"]
    check_search(double, current)
    check_settled(double, database)
    assert len(held_ids(double, 0)) == 12
    assert len(held_ids(double, 1)) == 11


@pytest.mark.parametrize("failing", [0, 1])
def test_one_of_two_indexes_fails(double: MemoryStore, database: Path, failing: int) -> None:
    before = dump(database, without=["embeddings"])
    held = held_ids(double, 0), held_ids(double, 1)
    hook_of(double, failing).fail("apply", times=1, late=True)
    with pytest.raises(VectorSyncError):
        double.commit(note("new", "green tea", title="new title"))
    double.flush()
    assert dump(database, without=["embeddings"]) == before
    assert (held_ids(double, 0), held_ids(double, 1)) == held
    check_search(double, FIRST)
    check_settled(double, database)


def test_one_of_two_indexes_is_away(double: MemoryStore, database: Path) -> None:
    """In deferred mode the other one goes on."""
    double._outbox.mode = "deferred"
    hook_of(double, 0).go_away()
    double.commit(note("new", "green tea", title="new title"))
    eventually(lambda: held_ids(double, 1) == wanted_ids(database, "chroma:titles"))
    assert held_ids(double, 0) != wanted_ids(database)
    check_search(double, FIRST | {"new": "green tea"})
    with pytest.raises(VectorSyncError):
        double.flush()
    hook_of(double, 0).heal()
    double.flush()
    check_settled(double, database)


def test_two_models_of_one_name_are_told_apart(database: Path) -> None:
    def backwards(texts: Any) -> Any:
        return [vector_of(text)[::-1] for text in texts]

    def forwards(texts: Any) -> Any:
        return [vector_of(text) for text in texts]

    with MemoryStore(SQLiteStorage(database)) as memory:
        memory.add_hook(faulty_chroma(database, "one", embedding=forwards))
        with pytest.raises(IndexConfigError, match="model"):
            memory.add_hook(faulty_chroma(database, "two", embedding=backwards))
        backwards.model = "backwards"  # type: ignore[attr-defined]
        memory.add_hook(faulty_chroma(database, "two", embedding=backwards))
        commit(memory, FIRST)
        assert rows(database, "SELECT model, count(*) FROM embeddings GROUP BY model") == [
            ("backwards", 12),
            ("function", 12),
        ]


# -- how often the model is asked ------------------------------------------------------------------


def test_a_text_is_embedded_once(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model, vectors=faulty_chroma(database, text_field="text")) as memory:
        memory.add_hook(faulty_chroma(database, "again", text_field="text"))
        hook_of(memory).fail("apply", times=1)
        drafts = drafts_of(memory, FIRST | {"same": FIRST["n0"]})
        with pytest.raises(VectorSyncError):
            memory.land(drafts)
        memory.land(drafts)
        commit(memory, FIRST)
        memory.delete("note", "n0")
        commit(memory, {"n0": FIRST["n0"]})
        memory.flush()
        assert sorted(model.texts) == sorted(FIRST.values())
    shutil.rmtree(directory(database))
    with open_memory(database, model=model, vectors=faulty_chroma(database, text_field="text")) as memory:
        memory.add_hook(faulty_chroma(database, "again", text_field="text"))
        commit(memory, FIRST)
        memory.flush()
        assert memory.repair().ok
    assert sorted(model.texts) == sorted(FIRST.values())


# -- what the user brings --------------------------------------------------------------------------


@pytest.fixture
def ephemeral() -> Iterator[Any]:
    client = chromadb.EphemeralClient()
    yield client
    for collection in client.list_collections():
        client.delete_collection(collection.name)


class Model(Embeddings):
    """A LangChain model over the same vectors."""

    model = "words"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [vector_of(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return vector_of(text)


def given_by_a_user(kind: str, client: Any) -> Any:
    if kind == "client":
        return client
    if kind == "collection":
        return client.get_or_create_collection("mine", embedding_function=None)
    if kind == "langchain":
        return Chroma("mine", Model(), client=client)
    return ChromaSyncHook(client=client, collection_name="mine")


@pytest.mark.parametrize("kind", ["client", "collection", "langchain", "hook"])
@pytest.mark.parametrize("how", ["open", "add_hook"])
@pytest.mark.parametrize("where", ["in memory", "directory"])
def test_objects_of_the_user(database: Path, ephemeral: Any, kind: str, how: str, where: str) -> None:
    index = {"dims": DIMS, "embed": Model(), "fields": ["text"]}
    for _ in range(2):  # again on what the first one left
        client = ephemeral if where == "in memory" else chromadb.PersistentClient(str(database.with_name("user")))
        given = given_by_a_user(kind, client)
        if how == "open":
            memory = MemoryStore.open(database, index=index, vectors=given)
        else:
            memory = MemoryStore(SQLiteStorage(database), index=index)
            memory.add_hook(given if isinstance(given, ChromaSyncHook) else ChromaSyncHook(given))
        with memory:
            commit(memory, FIRST)
            memory.flush()
            check_search(memory, FIRST)
            assert memory.verify().ok
            name = "memory" if kind == "client" else "mine"
            assert set(client.get_collection(name).get()["ids"]) == wanted_ids(database, f"chroma:{name}")


def test_the_public_usage_spelled_out(database: Path, ephemeral: Any) -> None:
    chroma = ephemeral
    chroma.create_collection("memory", embedding_function=None)
    memory = MemoryStore(SQLiteStorage(str(database)), index={"dims": DIMS, "embed": vectors_of, "fields": ["content"]})
    memory.add_hook(
        ChromaSyncHook(client=chroma, collection_name="memory", text_field="content", metadata_fields=["role"])
    )
    with memory:
        memory.commit(Fact(type="profile_update", payload={"content": "User prefers vegetarian", "role": "preference"}))
        (found,) = memory.search("vegetarian food")
        assert found.payload["content"] == "User prefers vegetarian"
        assert found.score == pytest.approx(cosine("vegetarian food", "User prefers vegetarian"), abs=1e-6)
        stored = chroma.get_collection("memory").get(include=["metadatas", "documents"])
        assert stored["ids"] == [found.version]
        assert stored["metadatas"][0]["role"] == "preference"
        assert stored["documents"] in (None, [None])


def vectors_of(texts: Any) -> Any:
    return [vector_of(text) for text in texts]


def test_the_three_lines_most_users_need(database: Path) -> None:
    with MemoryStore.open(database, index={"dims": DIMS, "embed": vectors_of, "fields": ["text"]}) as memory:
        commit(memory, FIRST)
        check_search(memory, FIRST)
        assert memory.verify().ok
    assert (directory(database) / "chroma.sqlite3").is_file()


def test_an_index_in_memory_that_another_has_started_anew_is_not_asked(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_memory(database, vectors=FaissSyncHook()) as first:
        commit(first, FIRST)
        first.flush()
        with open_memory(database, vectors=FaissSyncHook()) as second:
            commit(second, {"theirs": "green tea in the morning"})
            second.flush()
            for memory in (first, second):
                assert memory.search("green tea in the morning", limit=1)[0].id == "theirs"
            commit(first, {"ours": "black tea at night"})
            second.flush()
            for memory in (first, second):
                assert memory.search("black tea at night", limit=1)[0].id == "ours"
            assert second.verify().ok
    assert "started anew by another process" in caplog.text


@pytest.mark.parametrize("kind", ["chroma", "faiss"])
def test_a_memory_whose_index_another_has_started_anew_goes_on(database: Path, kind: str) -> None:
    """An empty index is started anew by each memory that opens it, here two of one process."""

    def opened() -> MemoryStore:
        memory = MemoryStore(SQLiteStorage(database), index={"dims": DIMS, "embed": Words(), "fields": ["text"]})
        folder = database.with_name(kind)
        memory.add_hook(ChromaSyncHook(path=folder) if kind == "chroma" else FaissSyncHook(folder))
        return memory

    with opened() as first, opened() as second:
        first.commit(Fact("note", {"text": "a cat"}, id="a"))
        second.commit(Fact("note", {"text": "green tea"}, id="b"))
        second.flush()
        assert second.verify().ok
        for memory in (first, second):
            assert [fact.id for fact in memory.search("cat", namespace="note")] == ["a", "b"]

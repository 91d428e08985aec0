"""An index that is lost, damaged, incomplete or somebody else's, and what makes it right again."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
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
    ROOT,
    Words,
    check_search,
    check_settled,
    collection_of,
    command,
    commit,
    directory,
    drop_collection,
    dump,
    eventually,
    exact_below,
    faulty_chroma,
    held_ids,
    hook_of,
    note,
    notes,
    open_memory,
    python,
    rows,
    vector_of,
    wanted_ids,
)

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import EmbeddingError, IndexConfigError, VectorSyncError

FIRST = notes(12)


@pytest.fixture(autouse=True)
def search_asks_the_index() -> Iterator[None]:
    """However few facts there are."""
    with exact_below(2):
        yield


@pytest.fixture
def memory(database: Path) -> Iterator[MemoryStore]:
    """An atomic memory with twelve notes in it."""
    with open_memory(database) as opened:
        commit(opened, FIRST)
        yield opened


# -- an index that is lost, damaged or somebody else's ---------------------------------------------


@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_a_directory_deleted_while_closed(database: Path, vector_sync: Any) -> None:
    with open_memory(database, vector_sync=vector_sync) as memory:
        commit(memory, FIRST)
    shutil.rmtree(directory(database))
    model = Words()
    hook = faulty_chroma(database)
    hook.fail("apply")  # look before anything is rebuilt
    with open_memory(database, model=model, vectors=hook, vector_sync=vector_sync) as memory:
        check_search(memory, FIRST)
        hook.heal()
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)
        assert set(model.texts).isdisjoint(FIRST.values()), "SQL holds the embeddings"


def test_a_marker_left_behind_condemns_the_collection(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
        collection = collection_of(memory)
    (directory(database) / f"INFLIGHT-{collection.id}").touch()
    with open_memory(database) as memory:
        assert any("is suspect" in record.message for record in caplog.records)
        check_search(memory, FIRST)
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)
        assert collection_of(memory).id != collection.id
    assert rows(database, "SELECT generation FROM indexes") == [(2,)]


def test_a_rebuild_that_is_killed_starts_again(database: Path) -> None:
    texts = notes(120)
    with open_memory(database) as memory:
        commit(memory, texts)
    shutil.rmtree(directory(database))
    for method, call in (("reset", 1), ("apply", 1), ("apply", 2)):
        killed = python(
            """
hook = faulty_chroma(database)
seen = []
def die(*args):
    seen.append(args)
    if len(seen) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
hook.fail(sys.argv[2], late=True, only=die)
with open_memory(database, vectors=hook) as memory:
    memory.flush()
""",
            database, method, call,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    with open_memory(database) as memory:
        check_search(memory, texts)
        memory.flush()
        check_search(memory, texts)
        check_settled(memory, database)


@pytest.mark.parametrize("change", [{"dims": DIMS + 1}, {"model": "another"}], ids=["dims", "model"])
def test_another_model_is_refused(database: Path, change: dict[str, Any]) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
    before = dump(database)
    index = {"dims": DIMS, "embed": Words(), "fields": ["text"]} | change
    with pytest.raises(IndexConfigError, match="words"):
        MemoryStore.open(database, index=index)
    assert dump(database) == before
    with open_memory(database) as memory:
        check_search(memory, FIRST)


def test_the_collection_of_another_database_is_rebuilt(database: Path, tmp_path: Path) -> None:
    """A directory that was copied, or a database file that was swapped: the vectors in it are not ours."""
    other = tmp_path / "other.db"
    with open_memory(other) as memory:
        commit(memory, notes(8, start=50))
    with open_memory(database) as memory:
        commit(memory, FIRST)
    shutil.rmtree(directory(database))
    shutil.copytree(directory(other), directory(database))
    with open_memory(database) as memory:
        check_search(memory, FIRST)
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)
    with open_memory(other) as memory:
        check_search(memory, notes(8, start=50))
        check_settled(memory, other)


def test_a_collection_dropped_at_runtime(memory: MemoryStore, database: Path) -> None:
    drop_collection(memory)
    check_search(memory, FIRST)
    with pytest.raises(VectorSyncError):
        commit(memory, {"new": "green tea"})
    assert memory.get("note", "new") is None
    report = memory.verify().indexes[0]
    assert (report.reachable, report.index) == (False, "chroma:memory")
    assert report.error
    assert memory.repair().ok
    check_search(memory, FIRST)
    check_settled(memory, database)
    commit(memory, {"new": "green tea"})
    check_search(memory, FIRST | {"new": "green tea"})


# -- verify and repair -----------------------------------------------------------------------------


def test_verify_finds_what_differs_and_repair_mends_it(memory: MemoryStore, database: Path) -> None:
    collection = collection_of(memory)
    (lost,) = (row[0] for row in rows(database, "SELECT version FROM items WHERE key = 'n3'"))
    ghosts = ["00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"]
    collection.delete(ids=[lost])
    green = np.array(vector_of("green tea in the morning"), np.float32)
    collection.add(ids=ghosts, embeddings=[green, green], metadatas=[{"ns0": "note\x1f"}] * 2)
    before = dump(database)
    report = memory.verify()
    assert not report.ok
    (index,) = report.indexes
    assert (index.index, index.reachable, index.error) == ("chroma:memory", True, None)
    assert (index.missing, index.orphaned) == ((lost,), tuple(ghosts))
    assert (index.pending, index.quarantined, index.unembedded) == (0, 0, 0)
    assert dump(database) == before, "verify changes nothing"
    found = memory.search("green tea in the morning", limit=20)
    assert {fact.id for fact in found} <= FIRST.keys(), "a ghost is never shown"
    assert memory.repair().ok
    check_search(memory, FIRST)
    check_settled(memory, database)


def test_verify_during_commits_sees_no_phantoms(memory: MemoryStore) -> None:
    """Reading the index and SQL takes two looks, between which a commit may land."""
    hook = hook_of(memory)
    hook.meanwhile("ids", lambda: commit(memory, {"new": "green tea", "n0": "a cat"}), late=True)
    report = memory.verify().indexes[0]
    assert (report.missing, report.orphaned) == ((), ())


def test_facts_from_before_the_hook(database: Path) -> None:
    with MemoryStore.open(database) as memory:
        commit(memory, FIRST)
        memory.delete("note", "n0")
    current = {key: text for key, text in FIRST.items() if key != "n0"}
    model = Words()
    hook = faulty_chroma(database)
    model.error = RuntimeError("the model is away")
    with open_memory(database, model=model, vectors=hook) as memory:
        report = memory.verify().indexes[0]
        assert (report.pending, report.unembedded, report.missing) == (11, 0, ())
        with pytest.raises(EmbeddingError):
            memory.search("green tea")  # rather than an answer that misses what is not embedded
        model.error = None
        check_search(memory, current)
        memory.flush()
        check_search(memory, current)
        check_settled(memory, database)
        assert sorted(set(model.texts) & set(FIRST.values())) == sorted(current.values())


def test_facts_of_a_process_without_the_index(database: Path) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
        with MemoryStore.open(database) as unaware:
            commit(unaware, {"n0": "trains to paris", "new": "green tea"})
            unaware.delete("note", "n1")
        current = FIRST | {"n0": "trains to paris", "new": "green tea"}
        del current["n1"]
        check_search(memory, current)
        memory.flush()
        check_search(memory, current)
        check_settled(memory, database)


def test_a_value_the_model_refuses_does_not_stop_search(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Written by a process without the index; with it, the commit would have been refused."""

    class Picky(Words):
        strict = True

        def __call__(self, texts: Any) -> Any:
            if self.strict and any(len(text) > 1000 for text in texts):
                raise ValueError("too long for the model")
            return super().__call__(texts)

    model = Picky()
    with open_memory(database, model=model) as memory, MemoryStore.open(database) as unaware:
        commit(unaware, FIRST | {"long": "green tea " * 200})
        check_search(memory, FIRST)
        memory.flush()
        report = memory.verify()
        assert not report.ok
        assert report.indexes[0].unembedded == 1
        assert any("quarantined" in record.message for record in caplog.records)
        model.strict = False
        assert memory.repair().ok
        check_search(memory, FIRST | {"long": "green tea " * 200})
        check_settled(memory, database)


def test_unembedded_values_are_reported_and_embedded(memory: MemoryStore, database: Path) -> None:
    """However they came about: here the rows are removed by hand."""
    with memory.storage.snapshot() as reader:
        (version,) = [record.version for record in reader.items((), time.time()) if record.key == "n3"]
    edit(database, "DELETE FROM vectors WHERE version = ?", version)
    report = memory.verify().indexes[0]
    assert (report.unembedded, report.missing, report.orphaned) == (1, (), (version,))
    assert memory.repair().ok
    check_search(memory, FIRST)
    check_settled(memory, database)


def edit(database: Path, statement: str, *parameters: object) -> None:
    connection = sqlite3.connect(database)
    with connection:
        connection.execute(statement, parameters)
    connection.close()


def test_values_without_text_are_not_called_unembedded(memory: MemoryStore) -> None:
    memory.commit([Fact("note", {"number": 1}, id="no text"), note("blank", "   ")])
    memory.store.put(("note",), "unindexed", {"text": "green tea"}, index=False)
    assert memory.verify().ok


# -- two processes ---------------------------------------------------------------------------------

SECOND = """
from langgraph_memstate.hooks.base import IndexState
with open_memory(database) as memory:
    index = memory._outbox.indexes[0]
    assert index.state is IndexState.BUSY
    print("open", flush=True)
    texts = notes(200, start=1000)
    for key, text in texts.items():
        memory.commit(note(key, text))
    found = {fact.id for fact in memory.search(QUERIES[0], limit=500)}
    assert found >= texts.keys()
    memory.flush()
    assert not memory.verify().indexes[0].reachable
    print("wrote", flush=True)
    sys.stdin.readline()
    eventually(lambda: index.state is IndexState.OK)
    memory.commit(note("alone", "green tea"))
    memory.flush()
    check_settled(memory, database)
    print("owner", flush=True)
"""


def test_two_processes_on_one_database(database: Path) -> None:
    ours, theirs = notes(200), notes(200, start=1000)
    with open_memory(database) as memory:
        other = subprocess.Popen(
            command(SECOND, database),
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stderr is not None
        try:
            if other.stdout.readline() != "open\n":
                pytest.fail(other.stderr.read())
            for key, text in ours.items():
                memory.commit(note(key, text))
            if other.stdout.readline() != "wrote\n":
                pytest.fail(other.stderr.read())
            check_search(memory, ours | theirs)
            eventually(lambda: held_ids(memory) == wanted_ids(database))  # the owner applies what the other left
            check_search(memory, ours | theirs)
            memory.flush()
            check_settled(memory, database)
            memory.close()
            print(file=other.stdin, flush=True)
            if other.stdout.readline() != "owner\n":
                pytest.fail(other.stderr.read())
        finally:
            other.stdin.close()
            other.wait(30)
            other.stdout.close()
            errors = other.stderr.read()
            other.stderr.close()
    assert other.returncode == 0, errors
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    with open_memory(database) as memory:
        check_search(memory, ours | theirs | {"alone": "green tea"})
        check_settled(memory, database)


def test_an_index_is_built_anew_without_embedding_again(database: Path) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
        memory.flush()
        before = held_ids(memory)
        collection_of(memory).add(
            ids=["00000000-0000-4000-8000-000000000000"], embeddings=[[1.0] * DIMS], metadatas=[{"stranger": True}]
        )
        asked = memory._outbox.indexes[0].embedder
        embedded = []
        asked.documents = lambda texts: embedded.append(texts)  # type: ignore[method-assign, assignment]
        assert memory.reindex().ok
        assert held_ids(memory) == before
        assert embedded == []
        check_search(memory, FIRST)


def test_an_index_that_is_away_is_not_built_anew_in_silence(database: Path) -> None:
    hook = faulty_chroma(database)
    hook.go_away()
    with open_memory(database, vectors=hook) as memory:
        with pytest.raises(VectorSyncError, match="is away"):
            memory.reindex()
        hook.heal()
        assert memory.reindex().ok

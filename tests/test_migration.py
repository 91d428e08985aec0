"""A memory that moves is the same memory; one that did not arrive cannot be taken for it."""

from __future__ import annotations

import sqlite3
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from moved import MODEL, answer, config, faults, fill, graph_on, rows_of, say
from truth import Words

from langgraph_memstate import Fact, InMemoryStorage, MemoryStore, SQLiteStorage, migration
from langgraph_memstate.cli import main
from langgraph_memstate.errors import (
    CommitRaced,
    DatabaseOpenError,
    MemStateError,
    MigrationError,
    NewerSchemaError,
    StorageError,
    TransientError,
    UnfinishedCopyError,
)
from langgraph_memstate.migration import migrate
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Load
from langgraph_memstate.storage.tables import META, MOVED


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory to read."""
    path = tmp_path_factory.mktemp("source") / "memory.db"
    fill(path)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy.db"


@pytest.fixture
def server(postgres: Any) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    with postgres.database() as url:
        yield url


@pytest.fixture
def redis(redis_server: Any) -> Iterator[str]:
    """The URL of a memory in Redis that does not exist yet."""
    with redis_server.memory() as name:
        yield f"{redis_server.url}?name={name}"


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "_ROWS", 7)


class Broken(Exception):
    """Ends a copy in the middle."""


def broken_at(number: int) -> Callable[[str, int, int], None]:
    """Fails when it is told of progress so many times."""
    told: list[str] = []

    def report(table: str, done: int, total: int) -> None:
        told.append(table)
        if len(told) == number:
            raise Broken

    return report


# -- the same memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["server", "redis"])
def test_there_and_back_every_row_is_the_same(
    source: Path, copy: Path, small_batches: None, place: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(place)
    with pytest.raises(MigrationError, match="no memory at the source"):
        migrate(server, copy)
    before = rows_of(source)
    assert not [table for table in MOVED if not before[table]], "the sample should have rows in every table"
    counted = {table: len(rows) for table, rows in before.items()}
    assert migrate(source, server) == counted
    assert rows_of(server) == before
    assert migrate(server, copy) == counted
    assert rows_of(copy) == before == rows_of(source)


def told_by(memory: MemoryStore) -> Any:
    """What users ask of a memory."""
    graph = graph_on(memory.checkpointer, memory.store)
    past = memory.as_of(5)
    return (
        memory.log(),
        memory.history("note", "n3"),
        memory.history("note", "n5"),
        [item.dict() for item in memory.store.search((), limit=200)],
        [item.dict() for item in past.search((), limit=200)],
        [snapshot for thread in ("one", "two", "waits") for snapshot in graph.get_state_history(config(thread))],
        [(step.config, step.parent_config, step.pending_writes) for step in memory.checkpointer.list(None)],
        memory.timeline("one"),
        memory.query("note", session_id="s1"),
    )


@pytest.mark.parametrize("place", ["copy", "server", "redis"])
def test_a_copy_answers_as_the_source_does(source: Path, place: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(place)
    migrate(source, url)
    with MemoryStore.open(source) as original, MemoryStore.open(url) as moved:
        assert told_by(moved) == told_by(original)
        assert moved.store_id != original.store_id


def test_a_copy_goes_on_where_the_source_was(
    source: Path, server: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt and half a step resume, a rollback undoes, and both come to the same."""
    migrate(source, server)
    migrate(source, copy)
    outcomes = []
    for url in (copy, server):
        with MemoryStore.open(url) as memory:
            graph = graph_on(memory.checkpointer, memory.store)
            resumed = answer(graph, "waits")
            monkeypatch.setitem(faults, "on", False)
            looked = graph.invoke(None, config("half"))["seen"]
            say(graph, "one", "and again")
            memory.rollback(1, thread_id="one")
            memory.rollback(2, thread_id="two", on_conflict="keep")
            memory.sweep()
            items = {(item.namespace, item.key): item.value for item in memory.store.search((), limit=200)}
            counts = dict(memory.stats())
            with memory.storage.snapshot() as reader:  # PostgreSQL counts what only writes refer to besides
                counts["elements"] = len(list(reader.dump("elements")))
            outcomes.append((resumed["note"], looked, len(resumed["messages"]), items, counts))
            assert items[("users", "ada"), "answer"] == {"text": "ada answered yes"}
            assert ("short",) not in {namespace for namespace, _ in items}
    assert outcomes[0] == outcomes[1]


def test_an_index_is_built_from_the_copy_without_embedding(source: Path, copy: Path) -> None:
    with MemoryStore.open(source, index=MODEL) as original:
        original.flush()
        wanted = [(fact.id, fact.score) for fact in original.search("note 7", limit=5)]
    migrate(source, copy)
    model = Words()
    with MemoryStore.open(copy, index={**MODEL, "embed": model}) as moved:
        moved.flush()
        assert moved.verify().ok
        assert model.texts == []
        assert [(fact.id, fact.score) for fact in moved.search("note 7", limit=5)] == wanted
        assert model.texts == ["note 7"]


def test_storages_may_be_given_open_to_others(source: Path) -> None:
    """A copy in memory is gone when it is closed, but it was made."""
    assert migrate(SQLiteStorage(source), InMemoryStorage())["facts"] == len(rows_of(source)["facts"])


def test_an_empty_memory_can_be_moved(tmp_path: Path, copy: Path) -> None:
    MemoryStore.open(tmp_path / "empty.db").close()
    assert set(migrate(tmp_path / "empty.db", copy).values()) == {0}
    with MemoryStore.open(copy) as memory:
        memory.commit(Fact("note", {"text": "first"}))


def test_who_writes_meanwhile_is_not_held_up(tmp_path: Path, copy: Path, small_batches: None) -> None:
    """Nor is what they write in the copy."""
    path = tmp_path / "busy.db"
    fill(path)
    before = rows_of(path)
    with MemoryStore.open(path) as memory:
        migrate(path, copy, on_progress=lambda table, *_: memory.commit(Fact("meanwhile", {"in": table})))
        assert len(memory.query("meanwhile", limit=1_000)) > 20
    assert rows_of(copy) == before


def test_memory_does_not_grow_with_the_copy(tmp_path: Path, copy: Path) -> None:
    path = tmp_path / "large.db"
    with MemoryStore.open(path) as memory:
        for number in range(60):
            memory.commit(Fact("large", {"text": f"{number} " * 150_000}, id=str(number)))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        migrate(path, copy)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 40_000_000
    assert peak < size / 2


# -- broken off -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["sqlite", "postgres"])
@pytest.mark.parametrize("number", [1, 2, 5, 12, 40, -4, -1])
def test_what_was_broken_off_goes_on(
    source: Path, copy: Path, place: str, number: int, small_batches: None, request: pytest.FixtureRequest
) -> None:
    url = copy if place == "sqlite" else request.getfixturevalue("server")
    counted: list[str] = []
    migrate(source, copy.with_name("counted.db"), on_progress=lambda table, *_: counted.append(table))
    number = number if number > 0 else len(counted) + 1 + number
    with pytest.raises(Broken):
        migrate(source, url, on_progress=broken_at(number))
    with pytest.raises(UnfinishedCopyError, match="not finished: run the same command again"):
        MemoryStore.open(url)
    again: list[int] = []
    migrate(source, url, on_progress=lambda _, done, total: again.append(done))
    assert rows_of(url) == rows_of(source)
    assert again == sorted(again), "what was there is not copied again"
    MemoryStore.open(url).close()


@pytest.mark.parametrize("number", [3, 30])
def test_a_source_that_was_written_since_is_copied_anew(
    tmp_path: Path, copy: Path, number: int, small_batches: None
) -> None:
    path = tmp_path / "changed.db"
    fill(path)
    with pytest.raises(Broken):
        migrate(path, copy, on_progress=broken_at(number))
    with MemoryStore.open(path) as memory:
        memory.forget("note", "n0")
        memory.rollback(1, thread_id="one", on_conflict="keep")
        memory.checkpointer.delete_thread("two")
    migrate(path, copy)
    assert rows_of(copy) == rows_of(path)


def test_a_server_that_goes_away_is_only_an_interruption(source: Path, server: str, postgres: Any) -> None:
    with pytest.raises(StorageError) as caught:
        migrate(source, server, on_progress=lambda *_: postgres.cut())
    assert isinstance(caught.value, TransientError)
    migrate(source, server)
    assert rows_of(server) == rows_of(source)


def test_a_copy_that_somebody_wrote_to_is_refused_and_made_anew(source: Path, copy: Path) -> None:
    def meddle(table: str, done: int, total: int) -> None:
        if table == "outbox":
            with closing(sqlite3.connect(copy)) as conn:
                conn.execute("UPDATE items SET value = '{}' WHERE key = 'n1'")
                conn.commit()

    with pytest.raises(MigrationError, match=r"the copy of items is not what was read: \d+ rows with checksum"):
        migrate(source, copy, on_progress=meddle)
    with pytest.raises(UnfinishedCopyError):
        MemoryStore.open(copy)
    migrate(source, copy)
    assert rows_of(copy) == rows_of(source)


def test_of_two_copies_at_once_the_first_to_finish_stays(source: Path, copy: Path, small_batches: None) -> None:
    calls: list[str] = []

    def finish_first(table: str, done: int, total: int) -> None:
        calls.append(table)
        if len(calls) == 5:
            migrate(source, copy)

    with pytest.raises(CommitRaced, match="the database is finished"):
        migrate(source, copy, on_progress=finish_first)
    assert rows_of(copy) == rows_of(source)
    MemoryStore.open(copy).close()


# -- refused ----------------------------------------------------------------------------------------


def refused(error: type[MemStateError], match: str, source: str | Path | Storage, copy: str | Path | Storage) -> None:
    with pytest.raises(error, match=match):
        migrate(source, copy)


def test_a_destination_in_use_is_left_as_it_is(source: Path, copy: Path) -> None:
    with MemoryStore.open(copy) as memory:
        memory.commit(Fact("note", {"text": "mine"}))
    before = rows_of(copy)
    refused(MigrationError, r"a memory of its own \(with facts, items\); choose a new one", source, copy)
    assert rows_of(copy) == before
    migrate(source, copy.with_name("other.db"))
    refused(MigrationError, "a memory of its own", source, copy.with_name("other.db"))


def test_the_same_database_under_two_names(source: Path, server: str, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(source)
    for name in (source, f"sqlite:///{source}", tmp_path / "link.db"):
        refused(MigrationError, "the same database", source, name)
    migrate(source, server)
    refused(
        MigrationError, "the same database", server, f"{server}&application_name=other" if "?" in server else server
    )


def test_a_source_that_is_none(copy: Path, server: str, tmp_path: Path) -> None:
    refused(MigrationError, "there is no memory at the source", tmp_path / "nothing.db", copy)
    refused(MigrationError, "there is no memory at the source", server, copy)
    refused(MigrationError, "there is no memory at the source", ":memory:", copy)
    refused(DatabaseOpenError, "no scheme", "mysql://x", copy)
    (tmp_path / "text.db").write_text("not a database, but a long enough text " * 30)
    refused(DatabaseOpenError, "not a SQLite database", tmp_path / "text.db", copy)
    assert not copy.exists()
    assert not (tmp_path / "nothing.db").exists()


def test_a_newer_schema_on_either_side(source: Path, copy: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer.db"
    MemoryStore.open(newer).close()
    with closing(sqlite3.connect(newer)) as conn:
        conn.execute("PRAGMA user_version=99")
    refused(NewerSchemaError, "Upgrade", newer, copy)
    refused(NewerSchemaError, "Upgrade", source, newer)


def test_an_unfinished_copy_is_no_source_and_nobody_elses_destination(source: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        migrate(source, copy, on_progress=broken_at(4))
    refused(UnfinishedCopyError, "not finished", copy, tmp_path / "third.db")
    fill(tmp_path / "another.db")
    refused(MigrationError, "a copy of memory .*, which is not finished; choose another", tmp_path / "another.db", copy)


def test_a_storage_that_is_marked_by_hand_is_not_opened(tmp_path: Path) -> None:
    storage = SQLiteStorage(tmp_path / "marked.db")
    storage.open()
    assert storage.apply(((Load(META, (("unfinished", "a test"),)),),)) == [None]
    storage.close()
    with pytest.raises(UnfinishedCopyError):
        MemoryStore(storage)
    with pytest.raises(UnfinishedCopyError):  # it was closed again, and not "open already"
        MemoryStore(storage)


# -- the command line -------------------------------------------------------------------------------


def test_the_command_copies_and_says_what(source: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", str(source), f"sqlite:///{copy}"]) == 0
    said = capsys.readouterr()
    counts = {table: len(rows) for table, rows in rows_of(source).items()}
    assert said.out.startswith("copied, verified in ")
    assert f"{counts['facts']} facts, {counts['items']} items, {counts['checkpoints']} checkpoints" in said.out
    assert said.err.splitlines()[-1] == "100%"
    assert rows_of(copy) == rows_of(source)


def test_the_command_says_what_was_wrong(source: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", str(copy), str(source)]) == 1
    assert capsys.readouterr().err == "memstate: there is no memory at the source; check its name\n"
    with pytest.raises(SystemExit) as exit_:
        main(["migrate", str(source)])
    assert exit_.value.code == 2
    assert "the following arguments are required: DST" in capsys.readouterr().err

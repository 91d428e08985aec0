"""MemoryStore without a graph: facts, the log, transactions, schemas, and how it opens and closes."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, date, datetime
from pathlib import Path
from queue import Queue
from typing import Any, Literal

import chromadb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.store.base import PutOp
from pydantic import BaseModel, Field, field_validator

from langgraph_memstate import Fact, InMemoryStorage, LogEntry, MemoryStore, MemStateStore, SQLiteStorage
from langgraph_memstate.errors import (
    FilterError,
    IndexConfigError,
    NamespaceError,
    SchemaError,
    SerializationError,
    StorageClosedError,
    StorageError,
    VectorSyncError,
)
from langgraph_memstate.filters import compile_filter
from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from langgraph_memstate.storage import sqlite_read


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as conn:
        found = conn.execute(query).fetchall()
    conn.close()
    return found


def note(text: str, id: str = "n1", **rest: Any) -> Fact:
    return Fact("note", {"text": text}, id=id, **rest)


# -- facts ----------------------------------------------------------------------------------------


def test_a_committed_fact_is_read_back(memory: MemoryStore) -> None:
    before = datetime.now(UTC)
    written = memory.commit(note("hello"))
    fact = memory.get("note", "n1")
    assert fact is not None
    assert (fact.type, fact.id, fact.payload, fact.namespace) == ("note", "n1", {"text": "hello"}, ("note",))
    assert fact.version == written.version
    assert fact.created_at is not None
    assert before <= fact.created_at == fact.updated_at <= datetime.now(UTC)
    assert memory.get("note", "other") is None
    assert memory.get("other", "n1") is None


def test_a_fact_without_an_id_gets_one(memory: MemoryStore) -> None:
    fact = memory.commit(Fact("note", {"text": "hello"}))
    found = memory.get("note", fact.id)
    assert found is not None
    assert found.payload == {"text": "hello"}


def test_many_facts_are_one_transaction(file_memory: MemoryStore, database: Path) -> None:
    file_memory.commit(note("first"))
    written = file_memory.commit([note("a", "a"), note("b", "b"), Fact("other", {}, id="c")])
    file_memory.commit(note("last", "z"))
    assert [fact.id for fact in written] == ["a", "b", "c"]
    assert len({fact.version for fact in written}) == 3
    assert rows(database, "SELECT seq, commit_id, key FROM facts ORDER BY seq") == [
        (1, 1, "n1"), (2, 2, "a"), (3, 2, "b"), (4, 2, "c"), (5, 5, "z"),
    ]  # fmt: skip
    assert file_memory.commit([]) == []


def test_one_bad_fact_keeps_all_of_a_commit_out(memory: MemoryStore) -> None:
    with pytest.raises(SerializationError):
        memory.commit([note("good"), Fact("note", {"bad": object()})])
    assert memory.stats()["facts"] == 0


def test_the_same_fact_twice_in_one_commit_leaves_both_in_the_log(memory: MemoryStore) -> None:
    memory.commit([note("one"), note("two")])
    assert [entry.value for entry in memory.history("note", "n1")] == [{"text": "one"}, {"text": "two"}]
    fact = memory.get("note", "n1")
    assert fact is not None
    assert fact.payload == {"text": "two"}


def test_query_yields_the_last_written_first_below_a_prefix(memory: MemoryStore) -> None:
    memory.commit([note(str(n), f"n{n}") for n in range(15)])
    memory.commit(Fact("notebook", {"text": "0"}, id="x"))
    memory.commit(Fact("deep", {"text": "d"}, id="d", namespace=("note", "deep")))
    assert [fact.id for fact in memory.query("note", limit=3)] == ["d", "n14", "n13"]
    assert [fact.id for fact in memory.query("note", limit=3, offset=14)] == ["n1", "n0"]
    assert [fact.id for fact in memory.query("note", filter={"text": {"$gt": "8"}})] == ["d", "n9"]
    assert len(memory.query(limit=100)) == 17
    assert len(memory.query(("note",))) == 10
    with pytest.raises(FilterError):
        memory.query("note", limit=-1)
    with pytest.raises(NamespaceError):
        memory.query("")


def test_a_deleted_fact_is_gone_and_its_history_stays(memory: MemoryStore) -> None:
    memory.commit(note("hello"))
    memory.delete("note", "n1", actor="ann", reason="asked to")
    assert memory.get("note", "n1") is None
    assert memory.query("note") == []
    put, delete = memory.history("note", "n1")
    assert (put.op, delete.op, delete.value) == ("put", "delete", None)
    assert (delete.actor, delete.reason, delete.supersedes) == ("ann", "asked to", put.version)
    memory.delete("note", "never there")
    assert [entry.supersedes for entry in memory.history("note", "never there")] == [None]


def test_facts_and_store_items_are_one_thing(memory: MemoryStore) -> None:
    memory.commit(Fact("profile", {"name": "Ann"}, id="p1"))
    item = memory.store.get(("profile",), "p1")
    assert item is not None
    assert item.value == {"name": "Ann"}
    memory.store.put(("profile",), "p1", {"name": "Bo"})
    memory.store.put(("users", "u1"), "k", {"a": 1})
    fact, other = memory.get("profile", "p1"), memory.get(("users", "u1"), "k")
    assert fact is not None
    assert other is not None
    assert (fact.type, fact.payload, fact.created_at) == ("profile", {"name": "Bo"}, item.created_at)
    assert (other.type, other.namespace) == ("u1", ("users", "u1"))
    assert [entry.value for entry in memory.history("profile", "p1")] == [{"name": "Ann"}, {"name": "Bo"}]
    memory.store.delete(("profile",), "p1")
    assert memory.get("profile", "p1") is None
    memory.commit(Fact("profile", {"name": "Cy"}, id="p1", namespace=("users", "u1")))
    assert [found.key for found in memory.store.search(("users",))] == ["p1", "k"]


def test_a_log_entry_says_everything(memory: MemoryStore) -> None:
    before = datetime.now(UTC)
    first = memory.commit(note("one"), thread_id="t1", actor="ann", reason="because")
    second = memory.commit(note("two", actor="bo", thread_id="t2", reason="own"), actor="ann", thread_id="t1")
    entries = memory.history("note", "n1")
    assert [type(entry) for entry in entries] == [LogEntry, LogEntry]
    assert {field.name for field in fields(LogEntry)} >= {
        "seq", "version", "op", "namespace", "key", "value", "thread_id", "checkpoint_ns", "checkpoint_id", "task_id",
        "node", "run_id", "actor", "reason", "ts",
    }  # fmt: skip
    one, two = entries
    assert (one.seq, two.seq) == (1, 2)
    assert (one.version, two.version) == (first.version, second.version)
    assert (one.op, one.namespace, one.key, one.value) == ("put", ("note",), "n1", {"text": "one"})
    assert (one.supersedes, two.supersedes) == (None, one.version)
    assert (one.thread_id, one.actor, one.reason) == ("t1", "ann", "because")
    assert (two.thread_id, two.actor, two.reason) == ("t2", "bo", "own")  # the fact's own words come first
    assert (one.checkpoint_ns, one.checkpoint_id, one.task_id, one.node, one.run_id) == (None,) * 5
    assert (one.schema, one.schema_version) == (None, None)
    assert before <= one.ts <= two.ts <= datetime.now(UTC)
    assert memory.history("note", "other") == []


async def test_every_async_twin_does_the_same(memory: MemoryStore) -> None:
    written = await memory.acommit([note("a", "a"), note("b", "b")], actor="ann")
    assert [fact.id for fact in written] == ["a", "b"]
    fact = await memory.aget("note", "a")
    assert fact is not None
    assert fact.payload == {"text": "a"}
    assert [fact.id for fact in await memory.aquery("note", filter={"text": "b"})] == ["b"]
    await memory.adelete("note", "a", reason="done")
    assert [entry.reason for entry in await memory.ahistory("note", "a")] == [None, "done"]
    assert (await memory.astats())["facts"] == 3
    assert (await memory.averify()).ok
    assert (await memory.arepair()).ok
    assert await memory.asweep() == 0
    await memory.aflush()
    with pytest.raises(IndexConfigError):
        await memory.asearch("a")
    await memory.aclose()
    assert memory.closed


# -- the log is append-only and has no gaps -------------------------------------------------------


def test_the_sequence_has_no_gaps_across_failures_and_reopening(database: Path) -> None:
    history: list[tuple[Any, ...]] = []
    for round_ in range(4):
        with MemoryStore.open(database) as memory:
            assert rows(database, "SELECT * FROM facts ORDER BY seq")[: len(history)] == history
            memory.commit([note("a", "a"), note("b", "b")])
            with pytest.raises(SerializationError):
                memory.commit([note("a", "a"), Fact("note", {"bad": object()})])
            writer = memory.storage._writer  # type: ignore[attr-defined]
            (pages,) = writer.execute("PRAGMA page_count").fetchone()
            writer.execute(f"PRAGMA max_page_count={pages}")
            with pytest.raises(StorageError):
                memory.commit([note("x" * 100_000, str(n)) for n in range(3)])
            writer.execute("PRAGMA max_page_count=1000000000")
            with suppress(ZeroDivisionError), memory.transaction():
                memory.commit(note("never"))
                _ = 1 / 0
            memory.delete("note", "a" if round_ % 2 else "b")
            memory.store.put(("note",), "c", {"round": round_})
        history = rows(database, "SELECT * FROM facts ORDER BY seq")
        assert [row[0] for row in history] == list(range(1, 4 * (round_ + 1) + 1))


def test_two_memories_on_one_file_see_each_others_commits(database: Path) -> None:
    with MemoryStore.open(database) as one, MemoryStore.open(database) as two:
        assert one.store_id == two.store_id
        one.commit(note("from one", "a"))
        two.commit(note("from two", "b"))
        one.commit(note("again", "b"))
        assert [fact.payload["text"] for fact in two.query("note")] == ["again", "from one"]
        assert [entry.seq for entry in two.history("note", "b")] == [2, 3]


def test_two_memories_on_one_file_write_at_once(database: Path) -> None:
    with MemoryStore.open(database) as one, MemoryStore.open(database) as two:

        def write(memory: MemoryStore, name: str) -> None:
            for turn in range(40):
                memory.commit([note(str(turn), f"{name}{turn}"), note(name, "shared")])

        threads = [threading.Thread(target=write, args=pair) for pair in [(one, "a"), (two, "b"), (one, "c")]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.history("note", "shared") == two.history("note", "shared")
    log = rows(database, "SELECT seq, commit_id, key, version, supersedes FROM facts ORDER BY seq")
    assert [row[0] for row in log] == list(range(1, 241))
    assert {sum(1 for row in log if row[1] == commit_id) for commit_id in {row[1] for row in log}} == {2}
    shared = [row for row in log if row[2] == "shared"]
    assert [row[4] for row in shared] == [None, *(row[3] for row in shared[:-1])]


# -- transactions ---------------------------------------------------------------------------------


def test_a_transaction_is_one_commit(file_memory: MemoryStore, database: Path) -> None:
    file_memory.commit(note("old", "gone"))
    with file_memory.transaction() as same:
        assert same is file_memory
        file_memory.commit(note("a", "a"))
        file_memory.store.put(("users", "u1"), "k", {"b": 1})
        file_memory.delete("note", "gone")
        assert file_memory.get("note", "a") is None  # reads see what is committed
        assert rows(database, "SELECT count(*) FROM facts") == [(1,)]
    assert file_memory.get("note", "a") is not None
    assert rows(database, "SELECT commit_id FROM facts ORDER BY seq") == [(1,), (2,), (2,), (2,)]


def test_an_error_drops_the_transaction_and_is_raised(memory: MemoryStore) -> None:
    def fail() -> None:
        with memory.transaction():
            memory.commit(note("a"))
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert memory.stats()["facts"] == 0
    memory.commit(note("b"))  # and leaves nothing behind
    assert memory.stats()["facts"] == 1


def test_a_refused_write_can_be_left_out_of_a_transaction(memory: MemoryStore) -> None:
    with memory.transaction():
        memory.commit(note("a", "a"))
        with pytest.raises(SerializationError):
            memory.commit(Fact("note", {"bad": object()}))
        memory.commit(note("b", "b"))
    assert [fact.id for fact in memory.query("note")] == ["b", "a"]


def test_a_transaction_inside_another_is_part_of_its_commit(file_memory: MemoryStore, database: Path) -> None:
    with file_memory.transaction():
        file_memory.commit(note("a", "a"))
        with file_memory.transaction():
            file_memory.commit(note("b", "b"))
        assert rows(database, "SELECT count(*) FROM facts") == [(0,)]
        file_memory.commit(note("c", "c"))
    assert rows(database, "SELECT commit_id, key FROM facts ORDER BY seq") == [(1, "a"), (1, "b"), (1, "c")]


def test_an_error_in_the_inner_transaction_drops_the_inner_writes(memory: MemoryStore) -> None:
    with memory.transaction():
        memory.commit(note("a", "a"))
        with suppress(ZeroDivisionError), memory.transaction():
            memory.commit(note("b", "b"))
            _ = 1 / 0
        memory.commit(note("c", "c"))
    assert [fact.id for fact in memory.query("note")] == ["c", "a"]


def test_an_error_in_the_outer_transaction_drops_everything(memory: MemoryStore) -> None:
    with suppress(ZeroDivisionError), memory.transaction():
        with memory.transaction():
            memory.commit(note("b", "b"))
        _ = 1 / 0
    assert memory.stats()["facts"] == 0


def test_a_transaction_is_its_contexts_own(memory: MemoryStore) -> None:
    """A thread that was not started inside commits on its own."""
    inside, done = threading.Event(), threading.Event()

    def write() -> None:
        inside.wait(5)
        memory.commit(note("outside", "o"))
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    with suppress(ZeroDivisionError), memory.transaction():
        memory.commit(note("inside", "i"))
        inside.set()
        assert done.wait(5)
        _ = 1 / 0
    thread.join()
    assert [fact.id for fact in memory.query("note")] == ["o"]


def test_a_transaction_of_one_memory_is_none_of_another(memory: MemoryStore) -> None:
    with MemoryStore.open(":memory:") as other:
        with memory.transaction():
            other.commit(note("x"))
            assert other.get("note", "n1") is not None
        assert memory.stats()["facts"] == 0


async def test_a_transaction_in_async_code_takes_its_tasks_along(file_memory: MemoryStore, database: Path) -> None:
    async with file_memory.transaction() as same:
        assert same is file_memory
        await asyncio.gather(*(file_memory.acommit(note(str(n), str(n))) for n in range(10)))
        await file_memory.store.aput(("x",), "k", {})
        file_memory.commit(note("sync", "s"))
        assert (await file_memory.astats())["facts"] == 0
    assert rows(database, "SELECT count(*), max(commit_id) FROM facts") == [(12, 1)]
    with file_memory.transaction():  # the sync form serves async code, too
        await file_memory.acommit(note("plain", "p"))
    assert await file_memory.aget("note", "p") is not None


async def test_an_error_drops_a_transaction_of_async_code(memory: MemoryStore) -> None:
    with suppress(ZeroDivisionError):
        async with memory.transaction():
            await memory.acommit(note("a"))
            _ = 1 / 0
    assert memory.stats()["facts"] == 0


async def test_concurrent_transactions_do_not_mix(memory: MemoryStore) -> None:
    async def work(name: str) -> None:
        async with memory.transaction():
            for turn in range(5):
                await memory.acommit(note(name, f"{name}{turn}"))
                await asyncio.sleep(0)
            if name == "bad":
                raise ZeroDivisionError

    outcomes = await asyncio.gather(work("a"), work("bad"), work("b"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), ZeroDivisionError, type(None)]
    assert {fact.payload["text"] for fact in memory.query("note", limit=50)} == {"a", "b"}
    assert memory.stats()["facts"] == 10


async def test_a_write_that_outlives_its_transaction_is_not_lost(memory: MemoryStore) -> None:
    """What was acknowledged is there, also when the task was started inside and ran on after the end."""
    over = asyncio.Event()

    async def late(id: str) -> None:
        await over.wait()
        await memory.acommit(note("late", id))

    with memory.transaction():
        task = asyncio.create_task(late("a"))
    with suppress(ZeroDivisionError), memory.transaction():
        failed = asyncio.create_task(late("b"))
        _ = 1 / 0
    with memory.transaction():
        with memory.transaction():
            nested = asyncio.create_task(late("c"))
        over.set()
        await nested  # the inner one is over, the outer one takes it
        assert memory.get("note", "c") is None
    await asyncio.gather(task, failed)
    assert {fact.id for fact in memory.query("note")} == {"a", "b", "c"}


# -- schemas --------------------------------------------------------------------------------------


class Profile(BaseModel):
    name: str
    age: int = Field(ge=0)
    tags: list[str] = []
    born: date | None = None


class Task(BaseModel):
    title: str
    state: Literal["open", "done"] = "open"


class Loud(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def no_shouting(cls, text: str) -> str:
        if text.isupper():
            raise ValueError("do not shout")
        return text


def test_what_a_schema_rejects_is_never_written(memory: MemoryStore) -> None:
    memory.register_schema("profile", Profile)
    with pytest.raises(SchemaError) as caught:
        memory.commit([note("good"), Fact("profile", {"name": "Ann", "age": -5})])
    error = caught.value
    assert isinstance(error, ValueError)
    for said in ("profile", "Profile", "age", "greater than or equal to 0", "-5", "Ann"):
        assert said in str(error)
    assert error.where == "profile"
    assert "'age': -5" in error.output
    assert memory.stats()["facts"] == 0


def test_every_fault_is_named(memory: MemoryStore) -> None:
    memory.register_schema("profile", Profile)
    with pytest.raises(SchemaError) as caught:
        memory.commit(Fact("profile", {"age": "old", "tags": ["a", 5]}))
    for said in ("name: Field required", "age: Input should be a valid integer", "tags.1: Input should be a valid str"):
        assert said in str(caught.value)


USER_PROFILE = ("users", "u1", "profile")


def in_a_transaction(memory: MemoryStore, value: dict[str, Any]) -> None:
    with memory.transaction():
        memory.store.put(("free",), "k", {})
        memory.store.put(USER_PROFILE, "k", value)


@pytest.mark.parametrize(
    "write",
    [
        lambda memory, value: memory.store.put(USER_PROFILE, "k", value),
        lambda memory, value: asyncio.run(memory.store.aput(USER_PROFILE, "k", value)),
        lambda memory, value: memory.store.batch([PutOp(("free",), "k", {}), PutOp(USER_PROFILE, "k", value)]),
        lambda memory, value: memory.commit([note("free"), Fact("any", value, namespace=USER_PROFILE)]),
        in_a_transaction,
    ],
    ids=["put", "aput", "batch", "commit", "transaction"],
)
def test_every_way_in_is_validated(memory: MemoryStore, write: Callable[[MemoryStore, dict[str, Any]], Any]) -> None:
    memory.register_schema(("users", "*", "profile"), Profile)
    with pytest.raises(SchemaError, match=r"users/u1/profile.*age"):
        write(memory, {"name": "Ann"})
    assert memory.stats()["facts"] == 0
    write(memory, {"name": "Ann", "age": 3})
    memory.store.delete(USER_PROFILE, "k")  # a delete has no value to validate


def test_the_stored_value_is_what_the_model_dumps(memory: MemoryStore) -> None:
    memory.register_schema("profile", Profile)
    memory.commit(Fact("profile", {"name": "Ann", "age": "7", "born": date(2020, 1, 2), "unknown": 1}, id="p"))
    fact = memory.get("profile", "p")
    assert fact is not None
    assert fact.payload == {"name": "Ann", "age": 7, "tags": [], "born": "2020-01-02"}
    entry = memory.history("profile", "p")[0]
    assert (entry.schema, entry.value) == ("Profile", fact.payload)
    memory.commit(Fact("profile", Profile(name="Bo", age=1), id="p"))  # type: ignore[arg-type]
    assert [entry.value["name"] for entry in memory.history("profile", "p") if entry.value] == ["Ann", "Bo"]


@pytest.mark.parametrize(
    ("pattern", "governed", "free"),
    [
        ("task", [("task",)], [("tasks",), ("task", "x"), ("a", "task")]),
        (("task",), [("task",)], [("tasks",), ("task", "x")]),
        (("users", "*"), [("users", "a"), ("users", "*")], [("users",), ("users", "a", "b"), ("user", "a")]),
        (["*", "task"], [("a", "task")], [("task",), ("a", "b", "task")]),
        (("*",), [("a",), ("b",)], [("a", "b")]),
    ],
)
def test_a_pattern_governs_what_it_matches(
    memory: MemoryStore, pattern: Any, governed: list[tuple[str, ...]], free: list[tuple[str, ...]]
) -> None:
    memory.register_schema(pattern, Task)
    for namespace in governed:
        with pytest.raises(SchemaError):
            memory.store.put(namespace, "k", {"x": 1})
    for namespace in free:
        memory.store.put(namespace, "k", {"x": 1})


def test_a_type_is_governed_in_every_namespace(memory: MemoryStore) -> None:
    memory.register_schema("task", Task)
    with pytest.raises(SchemaError):
        memory.commit(Fact("task", {}, namespace=("users", "u1")))
    memory.commit(Fact("other", {}, namespace=("users", "u1")))


def test_the_schema_registered_last_decides(memory: MemoryStore) -> None:
    memory.register_schema("task", Task)
    memory.register_schema("task", Loud)
    memory.commit(Fact("task", {"text": "quiet"}))
    with pytest.raises(SchemaError, match="do not shout"):
        memory.commit(Fact("task", {"text": "LOUD"}))


def test_a_long_output_is_cut(memory: MemoryStore) -> None:
    memory.register_schema("task", Task)
    with pytest.raises(SchemaError) as caught:
        memory.commit(Fact("task", {"text": "x" * 100_000}))
    assert len(str(caught.value)) < 1_000
    assert "characters" in caught.value.output


@pytest.mark.parametrize("model", [dict, "Task", None, Task(title="x"), int])
def test_a_schema_is_a_model_class(memory: MemoryStore, model: Any) -> None:
    with pytest.raises(SchemaError, match="Pydantic"):
        memory.register_schema("task", model)


@pytest.mark.parametrize("pattern", ["", (), ("a", ""), ("a", 1)])
def test_a_pattern_is_labels(memory: MemoryStore, pattern: Any) -> None:
    with pytest.raises(NamespaceError):
        memory.register_schema(pattern, Task)


# -- indexes --------------------------------------------------------------------------------------


class Shelf(SyncHook):
    """The least index that follows the log; `broken` makes its next writes fail."""

    def __init__(self, name: str = "shelf", embedding: Any = None) -> None:
        self.name = name
        self.embedding = embedding
        self.held: dict[str, VectorRecord] = {}
        self.broken = False
        self.closed = False

    def open(self, spec: IndexSpec) -> IndexState:
        return IndexState.EMPTY

    def reset(self, spec: IndexSpec) -> None:
        self.held.clear()

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        if self.broken:
            raise ConnectionError("the shelf fell down")
        self.held.update((record.id, record) for record in upserts)
        for id_ in deletes:
            self.held.pop(id_, None)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        return list(self.held)[:k]

    def ids(self) -> Iterator[str]:
        return iter(list(self.held))

    def count(self) -> int:
        return len(self.held)

    def close(self) -> None:
        self.closed = True


def letters(texts: Sequence[str]) -> list[list[float]]:
    return [[text.count(letter) + 0.01 for letter in "abcd"] for text in texts]


INDEX: dict[str, Any] = {"dims": 4, "embed": letters, "fields": ["text"]}


def test_search_ranks_by_meaning() -> None:
    with MemoryStore.open(":memory:", index=INDEX) as memory:
        memory.commit([note("aaa", "a"), note("bbb", "b"), note("aab", "ab"), Fact("other", {"text": "aaa"}, id="o")])
        found = memory.search("a", namespace="note", limit=2)
        assert [fact.id for fact in found] == ["a", "ab"]
        assert found[0].score == pytest.approx(1, abs=0.01)
        assert [fact.id for fact in memory.search("b", filter={"text": {"$ne": "bbb"}}, offset=1)] != []
        assert {fact.type for fact in memory.search("a", limit=10)} == {"note", "other"}


def test_search_needs_an_index(memory: MemoryStore) -> None:
    with pytest.raises(IndexConfigError, match="needs an index"):
        memory.search("a")


def test_a_hook_without_a_model_needs_an_index(memory: MemoryStore) -> None:
    shelf = Shelf()
    with pytest.raises(IndexConfigError, match="embedding"):
        memory.add_hook(shelf)
    memory.commit(note("aaa"))
    assert shelf.held == {}


@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_a_hook_follows_the_log(database: Path, vector_sync: Any) -> None:
    shelf = Shelf(embedding=letters)
    with MemoryStore(SQLiteStorage(database), vector_sync=vector_sync) as memory:
        memory.commit(Fact("note", {"text": "before"}, id="old"))
        memory.add_hook(shelf)
        first = memory.commit(note("aaa", "a"))
        second = memory.commit(note("aab", "a"))
        memory.commit(note("bbb", "b"))
        memory.delete("note", "b")
        memory.flush()
        versions = {fact.version for fact in memory.query("note")}
        assert set(shelf.held) == versions
        assert second.version in versions
        assert first.version not in versions
        assert memory.verify().ok
    assert shelf.closed


@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_a_version_superseded_in_its_own_commit_leaves_no_vector(database: Path, vector_sync: Any) -> None:
    shelf = Shelf()
    with MemoryStore.open(database, index=INDEX, vectors=shelf, vector_sync=vector_sync) as memory:
        memory.commit([note("aaa"), note("bbb")])
        with memory.transaction():
            memory.commit(note("ccc", "gone"))
            memory.delete("note", "gone")
        memory.flush()
        fact = memory.get("note", "n1")
        assert fact is not None
        assert set(shelf.held) == {fact.version}
        assert memory.verify().ok


def test_a_hook_that_fails_takes_the_commit_back(database: Path) -> None:
    shelf = Shelf()
    with MemoryStore.open(database, index=INDEX, vectors=shelf) as memory:
        memory.commit(note("aaa"))
        shelf.broken = True
        with pytest.raises(VectorSyncError, match="fell down"):
            memory.commit([note("bbb"), Fact("plain", {"n": 1}, id="p")])
        assert memory.get("plain", "p") is None
        assert [entry.value for entry in memory.history("note", "n1")] == [{"text": "aaa"}]
        shelf.broken = False
        memory.flush()
        memory.commit(note("bbb"))
        assert memory.verify().ok


def test_two_hooks_of_one_name_are_refused(memory: MemoryStore) -> None:
    memory.add_hook(Shelf(embedding=letters))
    with pytest.raises(IndexConfigError, match="attached already"):
        memory.add_hook(Shelf(embedding=letters))
    memory.add_hook(Shelf("second", embedding=letters))
    memory.commit(note("aaa"))
    assert [report.index for report in memory.verify().indexes] == ["shelf", "second"]
    assert memory.verify().ok


# -- opening and closing --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_a_path_and_a_url_name_the_same_file(database: Path, form: str) -> None:
    with MemoryStore.open(form.format(database)) as memory:
        memory.commit(note("hello"))
    with MemoryStore.open(database) as memory:
        assert memory.get("note", "n1") is not None


def test_a_relative_url_is_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MemoryStore.open("sqlite:///sub/memory.db").close()
    assert (tmp_path / "sub" / "memory.db").exists()


@pytest.mark.parametrize("url", [":memory:", "sqlite://", "sqlite:///:memory:"])
def test_in_memory_urls_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    with MemoryStore.open(url) as one, MemoryStore.open(url) as two:
        one.commit(note("hello"))
        assert two.get("note", "n1") is None
    assert list(tmp_path.iterdir()) == []


def test_a_storage_may_be_given() -> None:
    with MemoryStore(InMemoryStorage()) as memory:
        memory.commit(note("hello"))
        assert memory.get("note", "n1") is not None


def test_the_faces_are_made_once_and_share_the_memory(memory: MemoryStore) -> None:
    assert memory.store is memory.store
    assert memory.checkpointer is memory.checkpointer
    MemStateStore(memory).put(("a",), "k", {"x": 1})
    assert memory.store.get(("a",), "k") is not None


def test_the_context_closes_also_after_an_error(database: Path) -> None:
    with suppress(ZeroDivisionError), MemoryStore.open(database) as memory:
        memory.commit(note("kept"))
        _ = 1 / 0
    assert memory.closed
    with MemoryStore.open(database) as memory:
        assert memory.get("note", "n1") is not None


async def test_the_async_context(database: Path) -> None:
    async with MemoryStore.open(database) as memory:
        await memory.acommit(note("hello"))
    assert memory.closed


def test_close_is_idempotent_and_ends_every_thread(database: Path) -> None:
    before = set(threading.enumerate())
    memory = MemoryStore.open(database, index=INDEX, vectors=Shelf())
    asyncio.run(memory.acommit(note("hello")))
    assert set(threading.enumerate()) - before
    memory.close()
    memory.close()
    assert set(threading.enumerate()) - before == set()
    assert not database.with_name(database.name + "-wal").exists()


def test_close_lands_what_was_submitted(database: Path) -> None:
    memory = MemoryStore.open(database)
    blocker = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(33) as pool:
        commits = [pool.submit(memory.commit, note(str(n), str(n))) for n in range(32)]
        time.sleep(0.1)  # they wait for the database, in the writer's queue
        assert not any(commit.done() for commit in commits)
        closing = pool.submit(memory.close)
        blocker.execute("ROLLBACK")
        blocker.close()
        closing.result(10)
    errors = [commit.exception() for commit in commits]
    landed = errors.count(None)
    assert landed > 0
    assert {type(error) for error in errors if error} <= {StorageClosedError}  # came too late
    with MemoryStore.open(database) as memory:
        assert memory.stats()["facts"] == landed


def test_close_drains_the_index(database: Path) -> None:
    shelf = Shelf()
    memory = MemoryStore.open(database, index=INDEX, vectors=shelf, vector_sync="deferred")
    for n in range(30):
        memory.commit(note("a" * n + "b", str(n)))
    memory.close()
    assert len(shelf.held) == 30
    assert rows(database, "SELECT count(*) FROM outbox") == [(0,)]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"embed": letters}, "dims"),
        ({"dims": 4}, "embed"),
        ({"dims": 0, "embed": letters}, "dims=0"),
        ({"dims": "4", "embed": letters}, "dims='4'"),
        ({"dims": True, "embed": letters}, "dims=True"),
        ({"dims": 4, "embed": 5}, "int"),
        ({"dims": 4, "embed": letters, "fields": "text"}, "text"),
        ({"dims": 4, "embed": letters, "fields": ["a["]}, "not closed"),
        ({"dims": 4, "embed": letters, "fields": [1]}, "paths"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused_before_anything_is_opened(
    database: Path, index: dict[str, Any], said: str
) -> None:
    before = set(threading.enumerate())
    openings: list[Callable[[], Any]] = [
        lambda: MemoryStore.open(":memory:", index=index),
        lambda: MemoryStore.open(database, index=index, vectors=Shelf()),
    ]
    for opening in openings:
        with pytest.raises(IndexConfigError, match=said):
            opening()
    assert set(threading.enumerate()) - before == set()
    with pytest.raises(IndexConfigError), MemoryStore(SQLiteStorage(database), vector_sync="soon"):  # type: ignore[arg-type]
        pass


def test_one_storage_belongs_to_one_memory(database: Path) -> None:
    storage = SQLiteStorage(database)
    with MemoryStore(storage), pytest.raises(StorageError, match="open already"):
        MemoryStore(storage)


def test_an_index_without_a_vector_database_is_searched_in_sql(database: Path) -> None:
    index = {"dims": 4, "embed": lambda texts: [[1.0, 0, 0, 0]] * len(texts)}
    with MemoryStore(SQLiteStorage(database), index=index) as memory:
        memory.commit(Fact("note", {"text": "hello"}, id="1"))
        assert [fact.id for fact in memory.search("hello")] == ["1"]
        assert [item.key for item in memory.store.search(("note",), query="hello")] == ["1"]


async def test_opening_and_hooks_have_async_twins(database: Path) -> None:
    async with await MemoryStore.aopen(database) as memory:
        with pytest.raises(IndexConfigError):
            await memory.aadd_hook(ChromaSyncHook(chromadb.EphemeralClient(), "twins"))


@pytest.mark.parametrize("is_face", [False, True])
async def test_what_is_open_only_after_its_await_was_cancelled_is_closed(
    database: Path, monkeypatch: pytest.MonkeyPatch, is_face: bool
) -> None:
    made: Queue[MemoryStore] = Queue()
    is_cancelled = threading.Event()
    open_now = MemoryStore.open

    def slowly(url: Any, **options: Any) -> MemoryStore:
        memory = open_now(url)
        made.put(memory)
        is_cancelled.wait(10)
        return memory

    monkeypatch.setattr(MemoryStore, "open", slowly)
    face = MemStateStore.from_conn_string(str(database))
    waiting = asyncio.create_task(face.__aenter__() if is_face else MemoryStore.aopen(database))  # type: ignore[arg-type]
    memory = await asyncio.to_thread(made.get)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    closes = threading.Event()
    memory.at_close(closes.set)
    is_cancelled.set()
    assert await asyncio.to_thread(closes.wait, 10)


# -- upkeep --------------------------------------------------------------------------------------------------------


def test_vacuum_gives_the_space_of_deleted_threads_back(url: str) -> None:
    with MemoryStore.open(url) as memory:
        for thread in range(20):
            save(memory, str(thread), random.Random(thread).randbytes(10_000).hex())
        memory.commit(Fact(type="note", payload={"text": "stays"}))
        full = memory.stats()
        memory.prune([str(thread) for thread in range(20)], strategy="delete")
        memory.vacuum()
        left = memory.stats()
        assert left["checkpoints"] == left["channel_values"] == 0
        assert left.bytes["channel_values"] == 0 < full.bytes["channel_values"]
        assert left.bytes["total"] < full.bytes["total"]
        assert [fact.payload["text"] for fact in memory.query("note")] == ["stays"]


def save(memory: MemoryStore, thread_id: str, value: str) -> None:
    checkpoint = empty_checkpoint()
    checkpoint["channel_values"] = {"text": value}
    checkpoint["channel_versions"] = {"text": "1"}
    config: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    memory.checkpointer.put(config, checkpoint, {"source": "update", "step": 0}, {"text": "1"})


# -- order ---------------------------------------------------------------------------------------------------------


PLACES = [("a", "x"), ("a", "y"), ("ab",)]
LOOKS = [(), ((1, 1, 0),), ((2, 3, 0), (2, 6, 1), (4, 12, 0)), ((0, 5, 0), (0, 9, 2), (0, 1_000, 0))]


@settings(deadline=None)
@given(
    writes=st.lists(
        st.tuples(
            st.sampled_from(PLACES),
            st.sampled_from("klmnop"),
            st.integers(-1, 8),
            st.sampled_from([None, None, None, 0.0, 60.0]),
        ),
        min_size=10,
        max_size=50,
    ),
    looks=st.sampled_from(LOOKS),
    prefix=st.sampled_from([(), ("a",), ("b",), *PLACES]),
    wanted=st.sampled_from([None, {"n": 1}, {"n": {"$gte": 4}}, {"n": {"$ne": 0}}]),
    limit=st.sampled_from([0, 1, 3, 10, 30]),
    offset=st.integers(0, 3),
)
def test_the_latest_come_first_wherever_they_are_looked_for(
    writes: list[tuple[tuple[str, ...], str, int, float | None]],
    looks: tuple[tuple[int, int, int], ...],
    prefix: tuple[str, ...],
    wanted: dict[str, Any] | None,
    limit: int,
    offset: int,
) -> None:
    held: dict[tuple[tuple[str, ...], str], dict[str, Any]] = {}  # in the order of the writes
    with pytest.MonkeyPatch.context() as patch, MemoryStore.open(":memory:") as memory:
        patch.setattr(sqlite_read, "_LOOKS", looks)
        for order, (namespace, key, n, ttl) in enumerate(writes):
            held.pop((namespace, key), None)
            if n < 0:
                memory.store.delete(namespace, key)
                continue
            value = {"n": n, "order": order}
            memory.store.put(namespace, key, value, ttl=ttl)
            if ttl != 0:
                held[namespace, key] = value
        matches = compile_filter(wanted) or (lambda value: True)
        under = [value for (place, _), value in held.items() if place[: len(prefix)] == prefix and matches(value)]
        found = memory.store.search(prefix, filter=wanted, limit=limit, offset=offset)
        assert [item.value for item in found] == under[::-1][offset : offset + limit]


def test_the_latest_of_many_come_first(file_memory: MemoryStore) -> None:
    """More than are looked for at once, with others between."""
    sizes = {"few": 90, "some": 300, "many": 2_100}
    order = [name for name, size in sizes.items() for _ in range(size)]
    random.Random(7).shuffle(order)
    order += ["late"] * 1_100
    facts = [Fact("note", {"n": n}, id=str(n), namespace=(name,)) for n, name in enumerate(order)]
    file_memory.commit([Fact("note", {"n": -1 - n}, id=str(n), namespace=("many",)) for n in range(100)])
    file_memory.commit(facts)
    for name in (*sizes, "late"):
        newest_first = [n for n, place in reversed(list(enumerate(order))) if place == name]
        if name == "many":
            newest_first += [-1 - n for n in reversed(range(100)) if n not in newest_first]
        for least in (-200, 0, len(order) - 1_200, len(order) - 30, len(order)):
            wanted = [n for n in newest_first if n >= least]
            for limit in (1, 10, 5_000):
                found = file_memory.store.search((name,), filter={"n": {"$gte": least}}, limit=limit, offset=1)
                assert [item.value["n"] for item in found] == wanted[1 : limit + 1]

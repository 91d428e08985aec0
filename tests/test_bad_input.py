"""What cannot work is refused by a named error of our tree, and the database is as it was."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.store.base import BaseStore, GetOp, PutOp
from pydantic import BaseModel

from langgraph_memstate import Fact, MemoryStore, MemStateCheckpointer, MemStateStore, SQLiteStorage
from langgraph_memstate.errors import (
    DatabaseOpenError,
    DiskFullError,
    EmbeddingError,
    IndexConfigError,
    KeyTypeError,
    MemStateError,
    MigrationError,
    NamespaceError,
    ReadOnlyError,
    SchemaError,
    SerializationError,
    StorageClosedError,
    StorageError,
)
from langgraph_memstate.facts import Draft, encode_value, new_version
from langgraph_memstate.graph.importing import import_langgraph
from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.migration import migrate
from langgraph_memstate.storage.operations import Append

THREAD = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}


def lengths(texts: Sequence[str]) -> list[list[float]]:
    return [[1.0, float(len(text))] for text in texts]


INDEX: dict[str, Any] = {"dims": 2, "embed": lengths, "fields": ["text"]}


def dump(database: Path) -> list[str]:
    """Everything the database holds, as another connection sees it."""
    conn = sqlite3.connect(database)
    try:
        return list(conn.iterdump())
    finally:
        conn.close()


def checkpoint(**values: Any) -> Checkpoint:
    made = empty_checkpoint()
    made["channel_values"] = values
    made["channel_versions"] = dict.fromkeys(values, "1")
    return made


def put_checkpoint(memory: MemoryStore, **values: Any) -> Any:
    made = checkpoint(**values)
    return memory.checkpointer.put(THREAD, made, {}, made["channel_versions"])


@pytest.fixture
def filled(file_memory: MemoryStore) -> MemoryStore:
    """A memory that holds a little of everything."""
    file_memory.commit(Fact("note", {"text": "hello"}, id="n1"))
    file_memory.store.put(("users", "u1"), "k", {"a": 1}, ttl=60)
    put_checkpoint(file_memory, messages=["hi"])
    return file_memory


@pytest.fixture
def unchanged(filled: MemoryStore, database: Path) -> Iterator[None]:
    """The test must leave the database as it was, and able to take the next commit."""
    before = dump(database)
    yield
    assert dump(database) == before
    filled.commit(Fact("note", {"text": "after"}, id="after"))
    assert filled.get("note", "after") is not None


class Shelf(SyncHook):
    """The least index that follows the log."""

    name = "shelf"

    def __init__(self) -> None:
        self.held: dict[str, VectorRecord] = {}

    def open(self, spec: IndexSpec) -> IndexState:
        return IndexState.OK

    def reset(self, spec: IndexSpec) -> None:
        self.held.clear()

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
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
        return


# -- what is opened -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["http://host/x", "mysql://localhost/db", "SQLITE://x", "sqlite+aiosqlite:///x", "://x", "", None, 5, b"x", "a\0b"],
)
def test_a_url_that_names_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatabaseOpenError) as caught:
        MemoryStore.open(url)
    assert ":memory:" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"I am a text file\n" * 100, b"\0" * 5_000, b"SQLite format 3\0" + b"\xff" * 4_000, b"xy", bytes(range(256)) * 20],
    ids=["text", "zeros", "broken header", "two bytes", "noise"],
)
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.db"
    path.write_bytes(content)
    for opening in (
        lambda: MemoryStore.open(path),
        lambda: MemStateStore.from_conn_string(str(path)).__enter__(),
        lambda: asyncio.run(MemStateCheckpointer.from_conn_string(str(path)).__aenter__()),
    ):
        with pytest.raises(DatabaseOpenError, match=r"file\.db"):
            opening()
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
def test_a_database_of_another_program(tmp_path: Path, journal_mode: str) -> None:
    path = tmp_path / "theirs.db"
    conn = sqlite3.connect(path)
    conn.execute(f"PRAGMA journal_mode={journal_mode}")
    conn.execute("PRAGMA user_version=7")
    conn.execute("CREATE TABLE facts (a)")
    conn.execute("INSERT INTO facts VALUES (1)")
    conn.commit()
    conn.close()
    before = path.read_bytes()
    with pytest.raises(DatabaseOpenError, match="another program"):
        MemoryStore.open(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_database_that_another_program_has_named_its_own(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    conn = sqlite3.connect(path)
    conn.execute("PRAGMA application_id=1234")
    conn.close()
    before = path.read_bytes()
    with pytest.raises(DatabaseOpenError, match="another program"):
        MemoryStore.open(path)
    assert path.read_bytes() == before


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DatabaseOpenError, match="folder"):
        MemoryStore.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatabaseOpenError, match="folder"):
        MemoryStore.open(tmp_path / "file" / "memory.db")


def test_a_path_with_a_nul_is_no_file() -> None:
    with pytest.raises(DatabaseOpenError, match="names no file"):
        MemoryStore(SQLiteStorage("a\0b"))


def test_a_path_that_the_system_refuses_to_look_at(tmp_path: Path) -> None:
    """As it does in a folder of somebody else."""
    refused = tmp_path / f"{'x' * 300}.db"
    with pytest.raises(DatabaseOpenError, match="cannot be opened"):
        MemoryStore.open(refused)
    with pytest.raises(MigrationError, match="no memory at the source"):
        migrate(refused, tmp_path / "copy.db")
    with pytest.raises(MigrationError, match="is not there"):
        import_langgraph([refused], tmp_path / "copy.db")


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    with MemoryStore.open(tmp_path / "not" / "yet" / "memory.db") as memory:
        memory.commit(Fact("note", {}))
    assert (tmp_path / "not" / "yet" / "memory.db").is_file()


# -- a closed memory ------------------------------------------------------------------------------


class Anything(BaseModel):
    pass


Call = Callable[[Any], Any]
MEMORY_CALLS: dict[str, Call] = {
    "commit": lambda memory: memory.commit(Fact("note", {})),
    "commit_model": lambda memory: memory.commit_model(Anything()),
    "update": lambda memory: memory.update("note", "n1", {}),
    "delete": lambda memory: memory.delete("note", "n1"),
    "promote_session": lambda memory: memory.promote_session("s"),
    "discard_session": lambda memory: memory.discard_session("s"),
    "write": lambda memory: memory.write([]),
    "begin": lambda memory: memory.begin([]),
    "land": lambda memory: memory.land([]),
    "land_together": lambda memory: memory.land_together(lambda: None),
    "enqueue": lambda memory: memory.enqueue(()),
    "submit": lambda memory: memory.submit(()),
    "transaction": lambda memory: memory.transaction(),
    "view": lambda memory: memory.view(),
    "get": lambda memory: memory.get("note", "n1"),
    "query": lambda memory: memory.query("note"),
    "search": lambda memory: memory.search("hello"),
    "history": lambda memory: memory.history("note", "n1"),
    "log": lambda memory: memory.log(),
    "as_of": lambda memory: memory.as_of(0),
    "timeline": lambda memory: memory.timeline("t"),
    "diff": lambda memory: memory.diff(0),
    "rollback": lambda memory: memory.rollback(),
    "forget": lambda memory: memory.forget("note"),
    "sweep": lambda memory: memory.sweep(),
    "flush": lambda memory: memory.flush(),
    "verify": lambda memory: memory.verify(),
    "check_schemas": lambda memory: memory.check_schemas(),
    "repair": lambda memory: memory.repair(),
    "reindex": lambda memory: memory.reindex(),
    "prune": lambda memory: memory.prune(["t"]),
    "stats": lambda memory: memory.stats(),
    "vacuum": lambda memory: memory.vacuum(),
    "add_hook": lambda memory: memory.add_hook(Shelf()),
    "use_index": lambda memory: memory.use_index(INDEX),
    "register_schema": lambda memory: memory.register_schema("note", Anything),
    "at_close": lambda memory: memory.at_close(print),
    "run": lambda memory: memory.run(print),
}
STORE_CALLS: dict[str, Call] = {
    "get": lambda store: store.get(("a",), "k"),
    "put": lambda store: store.put(("a",), "k", {}),
    "delete": lambda store: store.delete(("a",), "k"),
    "search": lambda store: store.search(("a",)),
    "list_namespaces": lambda store: store.list_namespaces(),
    "batch": lambda store: store.batch([GetOp(("a",), "k"), PutOp(("a",), "k", {})]),
    "sweep_ttl": lambda store: store.sweep_ttl(),
    "start_ttl_sweeper": lambda store: store.start_ttl_sweeper(),
}
SAVER_CALLS: dict[str, Call] = {
    "get": lambda saver: saver.get(THREAD),
    "get_tuple": lambda saver: saver.get_tuple(THREAD),
    "list": lambda saver: list(saver.list(THREAD)),
    "put": lambda saver: saver.put(THREAD, checkpoint(a=1), {}, {"a": "1"}),
    "put_writes": lambda saver: saver.put_writes(
        {"configurable": {**THREAD["configurable"], "checkpoint_id": "1"}}, [("a", 1)], "task"
    ),
    "delete_thread": lambda saver: saver.delete_thread("t"),
    "delete_for_runs": lambda saver: saver.delete_for_runs(["r"]),
    "copy_thread": lambda saver: saver.copy_thread("t", "u"),
    "prune": lambda saver: saver.prune(["t"]),
    "get_delta_channel_history": lambda saver: saver.get_delta_channel_history(config=THREAD, channels=["a"]),
}
# These neither read nor write: they open, close, describe, or make a value.
FREE = {
    MemoryStore: {
        "open", "close", "aclose", "closed", "checkpointer", "store", "join_steps", "draft_put", "draft_delete",
        "claims_of",
        "is_simple",
    },
    MemStateStore: {"from_conn_string", "setup", "stop_ttl_sweeper", "supports_ttl", "ttl_config"},
    MemStateCheckpointer: {
        "from_conn_string", "setup", "get_next_version", "with_allowlist", "config_specs", "serde",
        "head_of", "take_back",
    },
}  # fmt: skip


async def awaited(answer: Any) -> Any:
    """What a call leads to, whichever way it answers."""
    if hasattr(answer, "__aiter__"):
        return [one async for one in answer]
    return await answer if hasattr(answer, "__await__") else answer


class Twins:
    """An object whose methods are the async twins of another's."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, f"a{name}", None) or getattr(self._of, name)


def cases() -> Iterator[Any]:
    faces: list[tuple[Any, dict[str, Call], Call]] = [
        (MemoryStore, MEMORY_CALLS, lambda memory: memory),
        (MemStateStore, STORE_CALLS, lambda memory: memory.store),
        (MemStateCheckpointer, SAVER_CALLS, lambda memory: memory.checkpointer),
    ]
    for cls, calls, face in faces:
        for name, call in calls.items():
            yield pytest.param(face, call, False, id=f"{cls.__name__}.{name}")
            if hasattr(cls, f"a{name}"):
                # `list` of the saver is iterated where the call is made, its twin by `awaited`
                twin = (lambda saver: saver.list(THREAD)) if name == "list" else call
                yield pytest.param(face, twin, True, id=f"{cls.__name__}.a{name}")


@pytest.mark.parametrize(("face", "call", "twin"), list(cases()))
def test_a_closed_memory_says_so(filled: MemoryStore, database: Path, face: Call, call: Call, twin: bool) -> None:
    before = dump(database)
    filled.close()
    subject = face(filled)
    with pytest.raises(StorageClosedError, match="closed"):
        asyncio.run(awaited(call(Twins(subject) if twin else subject)))
    assert dump(database) == before


@pytest.mark.parametrize(
    ("cls", "calls"),
    [(MemoryStore, MEMORY_CALLS), (MemStateStore, STORE_CALLS), (MemStateCheckpointer, SAVER_CALLS)],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_no_public_method_was_forgotten_above(cls: Any, calls: dict[str, Call]) -> None:
    public = {name for name in dir(cls) if not name.startswith("_")}
    covered = {*calls, *(f"a{name}" for name in calls), *FREE[cls]}
    assert public - covered <= {"touch", "aopen"}  # given records, which only a read can make; opens another


def test_touching_on_a_closed_memory_says_so(filled: MemoryStore) -> None:
    record = filled.view().get(("users", "u1"), "k")
    assert record is not None
    filled.close()
    with pytest.raises(StorageClosedError):
        filled.touch([record])


def test_a_memory_closed_inside_a_transaction(filled: MemoryStore, database: Path) -> None:
    before = dump(database)

    def close_inside() -> None:
        with filled.transaction():
            filled.commit(Fact("note", {}))
            filled.close()

    with pytest.raises(StorageClosedError):
        close_inside()
    assert dump(database) == before


# -- values, namespaces and keys ------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


BAD_VALUES: list[tuple[Any, str]] = [
    ({"when": datetime.now(UTC)}, r"\$\.when is a datetime\.datetime"),
    ({"a": [0, math.nan]}, r"\$\.a\[1\] is nan"),
    ({"a": {"b": {1, 2}}}, r"\$\.a\.b is a builtins\.set"),
    ({"a": {1: "x"}}, r"\$\.a has the key 1"),
    ({"a": "\ud800"}, r"\$\.a is not valid Unicode"),
    (nested(100_000), r"\$\.in\.in.*nested deeper"),
    ({"a": 10**10_000}, r"\$\.a is an integer of \d+ bits"),
    ({"a": b"bytes"}, r"\$\.a is a builtins\.bytes"),
    ({"a": Anything()}, r"\$\.a is a .*Anything.*model_dump"),
    ([1, 2], "a value is a dict"),
]


def in_a_transaction(memory: MemoryStore, value: Any) -> None:
    with memory.transaction():
        memory.commit(Fact("good", {}))
        memory.commit(Fact("note", value, id="n1"))


WRITES: dict[str, Callable[[MemoryStore, Any], Any]] = {
    "put": lambda memory, value: memory.store.put(("users", "u1"), "k", value),
    "aput": lambda memory, value: asyncio.run(memory.store.aput(("users", "u1"), "k", value)),
    "batch": lambda memory, value: memory.store.batch([PutOp(("a",), "k", {}), PutOp(("users", "u1"), "k", value)]),
    "commit": lambda memory, value: memory.commit([Fact("good", {}), Fact("note", value, id="n1")]),
    "update": lambda memory, value: memory.update(("users", "u1"), "k", value),
    "transaction": in_a_transaction,
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(("value", "said"), BAD_VALUES, ids=[said[:20] for _, said in BAD_VALUES])
def test_a_value_that_cannot_be_stored(filled: MemoryStore, write: Callable[..., Any], value: Any, said: str) -> None:
    with pytest.raises(SerializationError, match=said):
        write(filled, value)


@pytest.mark.usefixtures("unchanged")
def test_state_that_cannot_be_stored(filled: MemoryStore) -> None:
    for value in (lambda: None, object(), {"deep": [open]}):
        with pytest.raises(SerializationError):
            put_checkpoint(filled, messages=["fine"], bad=value)
        config = filled.checkpointer.get_tuple(THREAD).config  # type: ignore[union-attr]
        with pytest.raises(SerializationError):
            filled.checkpointer.put_writes(config, [("messages", "fine"), ("bad", value)], "task")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("value", [nested(100_000), {"a": nested(100_000)}], ids=["rejected", "accepted"])
def test_a_value_too_deep_for_its_schema(filled: MemoryStore, value: Any) -> None:
    class Deep(BaseModel):
        a: dict[str, Any]

    filled.register_schema("deep", Deep)
    with pytest.raises((SchemaError, SerializationError)) as caught:
        filled.commit(Fact("deep", value))
    assert "Deep" in str(caught.value)
    assert len(str(caught.value)) < 2_000


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "namespace", [("",), ("a", ""), ("a", 1), ("a", None), (("a",),), ("\ud800",), {"a"}, 5], ids=repr
)
def test_an_invalid_namespace(filled: MemoryStore, namespace: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: filled.store.batch([PutOp(("a",), "k", {}), PutOp(namespace, "k", {})]),
        lambda: filled.commit([Fact("a", {}), Fact("a", {}, namespace=namespace)]),
        lambda: filled.delete(namespace, "k"),
        lambda: filled.get(namespace, "k"),
        lambda: filled.query(namespace),
        lambda: filled.history(namespace, "k"),
    ]
    if isinstance(namespace, tuple):
        calls += [lambda: filled.store.put(namespace, "k", {}), lambda: filled.store.get(namespace, "k")]
    for call in calls:
        with pytest.raises(NamespaceError):
            call()


@pytest.mark.usefixtures("unchanged")
def test_an_empty_namespace_holds_nothing(filled: MemoryStore) -> None:
    for call in (
        lambda: filled.store.put((), "k", {}),
        lambda: filled.store.batch([PutOp((), "k", {})]),
        lambda: filled.commit(Fact("a", {}, namespace=())),
        lambda: filled.delete((), "k"),
        lambda: filled.get((), "k"),
    ):
        with pytest.raises(NamespaceError):
            call()


@pytest.mark.usefixtures("unchanged")
def test_a_dot_is_refused_where_langgraph_refuses_it(filled: MemoryStore) -> None:
    with pytest.raises(NamespaceError, match="periods"):
        filled.store.put(("a.b",), "k", {})
    with pytest.raises(NamespaceError, match="periods"):
        asyncio.run(filled.store.aput(("a.b",), "k", {}))


def test_a_dot_confuses_nothing_where_it_gets_in(file_memory: MemoryStore) -> None:
    file_memory.store.batch([PutOp(("a.b",), "k", {"n": 1}), PutOp(("a", "b"), "k", {"n": 2})])
    file_memory.commit(Fact("profile.update", {"n": 3}, id="k"))
    found = [file_memory.get(namespace, "k") for namespace in [("a.b",), ("a", "b"), ("profile.update",)]]
    assert [fact and fact.payload["n"] for fact in found] == [1, 2, 3]
    assert file_memory.get(("profile", "update"), "k") is None


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("words", [{"actor": 5}, {"reason": "\ud800"}, {"thread_id": b"t"}])
def test_provenance_that_is_no_text(filled: MemoryStore, words: dict[str, Any]) -> None:
    with pytest.raises(KeyTypeError, match=next(iter(words))):
        filled.commit(Fact("note", {}), **words)
    with pytest.raises(KeyTypeError, match="type"):
        filled.commit(Fact(5, {}, namespace=("note",)))  # type: ignore[arg-type]
    with pytest.raises(KeyTypeError):
        filled.commit(Fact("note", {}, id=""))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("text", [5, b"t", "\ud800"])
def test_what_is_asked_for_is_no_text(filled: MemoryStore, text: Any) -> None:
    for name in ("thread_id", "actor", "key"):
        with pytest.raises(KeyTypeError, match=name):
            filled.log(**{name: text})
    with pytest.raises(KeyTypeError, match="thread_id"):
        filled.timeline(text)
    with pytest.raises(KeyTypeError, match="thread_id"):
        filled.forget(thread_id=text)
    with pytest.raises(MemStateError):
        filled.as_of(text)


@pytest.mark.usefixtures("unchanged")
def test_a_thread_that_cannot_be(filled: MemoryStore) -> None:
    with pytest.raises(KeyTypeError, match="thread_id"):
        filled.prune(["\ud800"])


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("fact", [None, "note", {"type": "note"}, [Fact("note", {}), {}]])
def test_a_fact_that_is_none(filled: MemoryStore, fact: Any) -> None:
    with pytest.raises(SerializationError, match="writes a Fact"):
        filled.commit(fact)


# -- models and dimensions ------------------------------------------------------------------------


@pytest.fixture
def indexed_database(database: Path) -> Path:
    with MemoryStore.open(database, index=INDEX, vectors=Shelf()) as memory:
        memory.commit(Fact("note", {"text": "hello"}, id="n1"))
    return database


@pytest.mark.parametrize(
    ("change", "said"),
    [({"dims": 3}, "dims=2"), ({"model": "other"}, "'other'"), ({"dims": 3, "model": "other"}, "model 'function'")],
)
def test_an_index_that_the_database_was_not_built_with(
    indexed_database: Path, change: dict[str, Any], said: str
) -> None:
    before = dump(indexed_database)
    with pytest.raises(IndexConfigError, match=said):
        MemoryStore.open(indexed_database, index={**INDEX, **change}, vectors=Shelf())
    assert dump(indexed_database) == before
    with MemoryStore.open(indexed_database, index=INDEX, vectors=Shelf()) as memory:
        assert memory.search("hello")[0].id == "n1"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0, 0.0, 0.0], "3 dimensions; the index has dims=2"),
        ([1.0], "1 dimensions"),
        ([math.nan, 1.0], "NaN"),
        (None, "no vector|shape"),
        ("x", "no vector|shape"),
    ],
)
def test_a_model_that_answers_nonsense(indexed_database: Path, answer: Any, said: str) -> None:
    before = dump(indexed_database)
    index = {**INDEX, "embed": lambda texts: [answer] * len(texts)}
    with MemoryStore.open(indexed_database, index=index, vectors=Shelf()) as memory:
        for call in (
            lambda: memory.commit([Fact("plain", {}), Fact("note", {"text": "new"})]),
            lambda: memory.store.put(("note",), "n1", {"text": "new"}),
            lambda: asyncio.run(memory.store.aput(("note",), "n1", {"text": "new"})),
            lambda: memory.search("new"),
        ):
            with pytest.raises(EmbeddingError, match=said):
                call()
        assert dump(indexed_database) == before


# -- a database that cannot be written ------------------------------------------------------------


def python(script: str, *arguments: object) -> Any:
    """Run a script in a process of its own; what it prints last is JSON."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def writer_of(memory: MemoryStore) -> sqlite3.Connection:
    writer = memory.storage._writer  # type: ignore[attr-defined]
    assert isinstance(writer, sqlite3.Connection)
    return writer


@pytest.mark.usefixtures("unchanged")
def test_a_database_that_became_read_only(filled: MemoryStore) -> None:
    writer_of(filled).execute("PRAGMA query_only=ON")
    for call in (
        lambda: filled.commit(Fact("note", {})),
        lambda: filled.store.put(("a",), "k", {}),
        lambda: asyncio.run(filled.store.aput(("a",), "k", {})),
        lambda: put_checkpoint(filled, messages=["more"]),
        lambda: filled.checkpointer.delete_thread("t"),
    ):
        with pytest.raises(ReadOnlyError, match="permissions"):
            call()
    assert filled.get("note", "n1") is not None  # reading goes on
    writer_of(filled).execute("PRAGMA query_only=OFF")


READ_ONLY = """
import json, os, sys
from langgraph_memstate import Fact, MemoryStore
if os.getuid() == 0:  # root may write anything
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    MemoryStore.open(sys.argv[1]).commit(Fact("note", {}))
    print(json.dumps(["nothing", ""]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o777, 0o444), (0o555, 0o444), (0o555, 0o666), (0o777, 0o000)])
def test_a_file_without_write_permission(database: Path, folder_mode: int, file_mode: int) -> None:
    with MemoryStore.open(database) as memory:
        memory.commit(Fact("note", {}))
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        path = Path(shutil.copy(database, folder))
        before = path.read_bytes()
        path.chmod(file_mode)
        folder.chmod(folder_mode)
        name, said = python(READ_ONLY, path)
        assert name in ("ReadOnlyError", "DatabaseOpenError")
        assert str(path) in said
        assert "permissions" in said
        folder.chmod(0o755)
        path.chmod(0o644)
        assert path.read_bytes() == before
    finally:
        shutil.rmtree(folder)


# -- a full disk ----------------------------------------------------------------------------------


def big(text: str, pages: int = 6) -> Fact:
    return Fact("note", {"text": text * (pages * 4_096)}, id="big")


def test_every_size_of_disk_is_too_small_until_one_is_enough(filled: MemoryStore, database: Path) -> None:
    before = dump(database)
    writer = writer_of(filled)
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    refused: list[str] = []
    for free in range(40):
        writer.execute(f"PRAGMA max_page_count={pages + free}")
        try:
            with filled.transaction():
                filled.commit(big("x"))
                filled.commit(Fact("note", {"text": "beside"}, id="beside"))
                filled.store.delete(("users", "u1"), "k")
            break
        except DiskFullError as error:
            refused.append(str(error))
            assert dump(database) == before
            assert filled.get("note", "big") is None
    assert len(refused) >= 6
    assert all("free space" in said for said in refused)
    assert filled.get("note", "big") == filled.query("note", filter={"text": {"$gt": "x"}})[0]
    assert [entry.seq for entry in filled.history("note", "big")] == [3]
    assert writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_a_full_disk_takes_no_vector(database: Path, vector_sync: Any) -> None:
    def facts() -> list[str]:
        tables = ('INSERT INTO "facts"', 'INSERT INTO "items"', 'INSERT INTO "vectors"')
        return [line for line in dump(database) if line.startswith(tables)]

    shelf = Shelf()
    with MemoryStore.open(database, index=INDEX, vectors=shelf, vector_sync=vector_sync) as memory:
        memory.commit(Fact("note", {"text": "hello"}, id="n1"))
        memory.flush()
        before, held = facts(), set(shelf.held)
        writer = writer_of(memory)
        (pages,) = writer.execute("PRAGMA page_count").fetchone()
        refused = 0
        for free in range(40):
            writer.execute(f"PRAGMA max_page_count={pages + free}")
            try:
                memory.commit([big("x"), Fact("note", {"text": "beside"}, id="beside")])
                break
            except DiskFullError:
                refused += 1
                assert facts() == before
                writer.execute("PRAGMA max_page_count=1000000")
                memory.flush()
                assert set(shelf.held) == held
                assert memory.verify().ok
        writer.execute("PRAGMA max_page_count=1000000")
        memory.flush()
        assert refused >= 6
        assert set(shelf.held) == {fact.version for fact in memory.query("note")}
        assert memory.stats()["prepared"] == 0
        assert memory.verify().ok


@pytest.mark.usefixtures("unchanged")
def test_a_full_disk_takes_no_checkpoint(filled: MemoryStore) -> None:
    writer = writer_of(filled)
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count={pages + 1}")
    incompressible = random.Random(1).randbytes(100_000).hex()
    with pytest.raises(DiskFullError):
        put_checkpoint(filled, messages=[incompressible])
    made = checkpoint(messages=[incompressible])
    with pytest.raises(DiskFullError):
        asyncio.run(filled.checkpointer.aput(THREAD, made, {}, made["channel_versions"]))
    writer.execute("PRAGMA max_page_count=1000000")


def test_a_commit_that_does_not_fit_leaves_its_group_alone(filled: MemoryStore) -> None:
    def append(key: str, size: int) -> tuple[Append, ...]:
        draft = Draft(new_version(), ("note",), key, "put", encode_value({"text": "x" * size}))
        return (Append((draft,)),)

    writer = writer_of(filled)
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count={pages + 2}")
    group = [append("a", 10), append("big", 100_000), append("b", 10)]
    outcomes = filled.storage.apply(group)
    assert [type(outcome) for outcome in outcomes] == [type(None), DiskFullError, type(None)]
    assert [fact.id for fact in filled.query("note")] == ["b", "a", "n1"]
    assert [entry.seq for key in ("a", "b") for entry in filled.history("note", key)] == [3, 4]


FULL = """
import json, resource, sys
from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import DiskFullError

def fact(id, size):
    return Fact("note", {"text": "x" * size}, id=id)

errors, acknowledged = [], []
memory = MemoryStore.open(sys.argv[1])
unlimited = resource.RLIM_INFINITY
for limit in range(40_000, 400_000, 9_001):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
    for id, size in ((f"{limit}-big", 100_000), (f"{limit}-small", 10)):
        try:
            with memory.transaction():
                memory.commit(fact(id, size))
                memory.commit(fact(f"{id}-twin", 10))
            acknowledged.append(id)
        except Exception as error:
            errors.append(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    memory.commit(fact(f"{limit}-after", 10))
    acknowledged.append(f"{limit}-after")
memory.close()
print(json.dumps([errors, acknowledged]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_file_that_may_not_grow(database: Path) -> None:
    errors, acknowledged = python(FULL, database)
    assert set(errors) == {"DiskFullError"}
    with MemoryStore.open(database) as memory:
        held = {fact.id for fact in memory.query("note", limit=10_000)}
        assert {id for id in held if not id.endswith("-twin")} == set(acknowledged)
        twins = {id.removesuffix("-twin") for id in held if id.endswith("-twin")}
        assert twins == {id for id in acknowledged if not id.endswith("-after")}
        assert writer_of(memory).execute("PRAGMA integrity_check").fetchone() == ("ok",)
        with memory.storage.snapshot() as reader:
            assert [entry.seq for entry in reader.log()] == list(range(1, len(held) + 1))


# -- a forked process -----------------------------------------------------------------------------

FORK = """
import asyncio, faulthandler, json, os, sys
from langgraph_memstate import Fact, MemoryStore

faulthandler.dump_traceback_later(20, exit=True)
memory = MemoryStore.open(sys.argv[1])
memory.commit(Fact("note", {}, id="parent"))
asyncio.run(memory.aget("note", "parent"))
store, saver = memory.store, memory.checkpointer
config = {"configurable": {"thread_id": "t"}}
reading, writing = os.pipe()
if os.fork() == 0:
    said = []
    for call in (
        lambda: memory.get("note", "parent"),
        lambda: memory.commit(Fact("note", {}, id="child")),
        lambda: asyncio.run(memory.acommit(Fact("note", {}, id="child"))),
        lambda: memory.transaction(),
        lambda: store.put(("a",), "k", {}),
        lambda: asyncio.run(store.asearch(("a",))),
        lambda: saver.get_tuple(config),
        lambda: saver.delete_thread("t"),
    ):
        try:
            call()
            said.append(["nothing", ""])
        except Exception as error:
            said.append([type(error).__name__, str(error)])
    memory.close()
    with MemoryStore.open(sys.argv[1]) as own:
        own.commit(Fact("note", {}, id="child's own"))
    os.write(writing, json.dumps(said).encode())
    os._exit(0)
os.wait()
said = json.loads(os.read(reading, 100_000))
memory.commit(Fact("note", {}, id="after"))
held = [fact.id for fact in memory.query("note")]
memory.close()
print(json.dumps([said, held]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_memory_does_not_cross_a_fork(database: Path) -> None:
    said, held = python(FORK, database)
    assert {name for name, _ in said} == {"StorageClosedError"}
    assert all("forked" in text and "open" in text for _, text in said)
    assert held == ["after", "child's own", "parent"]


# -- the tree -------------------------------------------------------------------------------------


def test_every_error_is_one_of_the_tree_and_of_the_builtin_it_means() -> None:
    assert issubclass(SerializationError, MemStateError)
    assert issubclass(SerializationError, TypeError)
    assert issubclass(NamespaceError, ValueError)
    assert issubclass(SchemaError, ValueError)
    assert issubclass(DiskFullError, StorageError)
    assert issubclass(ReadOnlyError, StorageError)


def test_a_storage_that_is_not_open_says_so(database: Path) -> None:
    storage = SQLiteStorage(database)
    for call in (lambda: storage.apply([()]), lambda: storage.snapshot().__enter__()):
        with pytest.raises(StorageClosedError):
            call()
    storage.close()
    assert not database.exists()


def test_a_store_is_a_langgraph_store() -> None:
    assert issubclass(MemStateStore, BaseStore)

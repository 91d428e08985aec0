"""The life of a database file: made, opened again, upgraded, shared, and refused when it is newer."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import DatabaseOpenError, NewerSchemaError, StorageError
from langgraph_memstate.storage import sqlite
from langgraph_memstate.storage.sqlite import APPLICATION_ID, MIGRATIONS


def ask(database: Path, query: str) -> list[tuple[object, ...]]:
    conn = sqlite3.connect(database)
    try:
        return conn.execute(query).fetchall()
    finally:
        conn.close()


def tell(database: Path, *statements: str) -> None:
    conn = sqlite3.connect(database, isolation_level=None)
    for statement in statements:
        conn.execute(statement)
    conn.close()


def dump(database: Path) -> list[str]:
    conn = sqlite3.connect(database)
    try:
        return [*conn.iterdump(), repr(conn.execute("PRAGMA user_version").fetchone())]
    finally:
        conn.close()


@pytest.fixture
def filled(database: Path) -> Path:
    with MemoryStore.open(database) as memory:
        memory.commit(Fact("note", {"text": "kept"}, id="n1"))
    return database


# -- a new file -----------------------------------------------------------------------------------


def test_a_new_file_says_whose_it_is(filled: Path) -> None:
    assert ask(filled, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert ask(filled, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    assert ask(filled, "PRAGMA journal_mode") == [("wal",)]
    assert filled.read_bytes()[68:72] == b"MemS"  # where `file` and other tools look


def test_every_table_is_strict(filled: Path) -> None:
    tables = ask(filled, "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'")
    ours = {name: strict for name, strict in tables if not str(name).startswith("sqlite_")}
    assert len(ours) >= 10
    assert set(ours.values()) == {1}


def test_durability_is_full(filled: Path) -> None:
    with MemoryStore.open(filled) as memory:
        writer = memory.storage._writer  # type: ignore[attr-defined]
        assert writer.execute("PRAGMA synchronous").fetchone() == (2,)
        assert writer.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_an_empty_file_becomes_a_database(database: Path) -> None:
    database.touch()
    with MemoryStore.open(database) as memory:
        memory.commit(Fact("note", {}, id="n1"))
    assert ask(database, "SELECT count(*) FROM facts") == [(1,)]


def test_opening_again_changes_nothing(filled: Path) -> None:
    before = dump(filled)
    with MemoryStore.open(filled) as memory:
        first = memory.store_id
    with MemoryStore.open(filled) as memory:
        assert memory.store_id == first
    assert dump(filled) == before


def test_every_database_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = set()
    for number in range(3):
        with MemoryStore.open(tmp_path / f"{number}.db") as memory:
            ids.add(memory.store_id)
    assert len(ids) == 3


# -- opened by many at once -----------------------------------------------------------------------


def test_many_threads_make_one_database(database: Path) -> None:
    ids: list[str] = []
    start = threading.Barrier(12)

    def make(number: int) -> None:
        start.wait()
        with MemoryStore.open(database) as memory:
            memory.commit(Fact("note", {}, id=str(number)))
            ids.append(memory.store_id)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 12
    assert len(set(ids)) == 1
    assert ask(database, "SELECT count(*), max(seq) FROM facts") == [(12, 12)]


MANY = """
import json, os, sys
from langgraph_memstate import Fact, MemoryStore

children = []
for number in range(8):  # forked before any thread or connection exists
    reading, writing = os.pipe()
    if os.fork() == 0:
        with MemoryStore.open(sys.argv[1]) as memory:
            memory.commit(Fact("note", {}, id=str(number)))
            os.write(writing, memory.store_id.encode())
        os._exit(0)
    children.append(reading)
statuses = [os.wait()[1] for _ in children]
print(json.dumps([statuses, [os.read(reading, 100).decode() for reading in children]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_many_processes_make_one_database(database: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MANY, str(database)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    statuses, ids = json.loads(result.stdout)
    assert statuses == [0] * 8
    assert len(set(ids)) == 1
    assert ask(database, "SELECT count(*), max(seq) FROM facts") == [(8, 8)]


# -- newer, older and broken ----------------------------------------------------------------------


@pytest.mark.parametrize("version", [len(MIGRATIONS) + 1, 999])
def test_a_newer_database_is_left_alone(filled: Path, version: int) -> None:
    tell(filled, f"PRAGMA user_version={version}", "CREATE TABLE from_the_future (a)")
    before = dump(filled)
    with pytest.raises(NewerSchemaError, match=rf"schema {version}.*knows {len(MIGRATIONS)}.*Upgrade") as caught:
        MemoryStore.open(filled)
    assert str(filled) in str(caught.value)
    assert dump(filled) == before


def test_a_newer_database_keeps_its_journal_mode(filled: Path) -> None:
    tell(filled, "PRAGMA user_version=999", "PRAGMA journal_mode=DELETE")
    before = filled.read_bytes()
    with pytest.raises(NewerSchemaError):
        MemoryStore.open(filled)
    assert filled.read_bytes() == before


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release with one more migration, whose script is the file returned."""
    scripts = tmp_path / "sql"
    scripts.mkdir()
    for name in MIGRATIONS:
        source = resources.files("langgraph_memstate.storage.sql").joinpath(name)
        (scripts / name).write_text(source.read_text())
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*MIGRATIONS, "sqlite_next.sql"))
    monkeypatch.setattr(sqlite, "resources", SimpleNamespace(files=lambda package: scripts))
    return scripts / "sqlite_next.sql"


def test_an_older_database_is_upgraded_with_what_it_holds(filled: Path, next_release: Path) -> None:
    next_release.write_text(
        "ALTER TABLE items ADD COLUMN extra TEXT; -- a comment; with semicolons\n"
        "CREATE TABLE more (\n  a TEXT NOT NULL\n) STRICT;\n"
        "INSERT INTO more SELECT key FROM items;\n"
    )
    tell(filled, "CREATE TABLE IF NOT EXISTS untouched (a)")
    with MemoryStore.open(filled) as memory:
        fact = memory.get("note", "n1")
        assert fact is not None
        assert fact.payload == {"text": "kept"}
    assert ask(filled, "PRAGMA user_version") == [(len(MIGRATIONS) + 1,)]
    assert ask(filled, "SELECT a FROM more") == [("n1",)]


def test_a_new_file_takes_every_migration(database: Path, next_release: Path) -> None:
    next_release.write_text("CREATE TABLE more (a TEXT) STRICT;\n")
    MemoryStore.open(database).close()
    assert ask(database, "PRAGMA user_version") == [(len(MIGRATIONS) + 1,)]
    assert ask(database, "SELECT count(*) FROM more") == [(0,)]


def test_a_migration_that_fails_half_way_leaves_the_database_as_it_was(
    filled: Path, next_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dump(filled)
    next_release.write_text("CREATE TABLE more (a TEXT) STRICT;\nDELETE FROM items;\nINSERT INTO nowhere VALUES (1);\n")
    with pytest.raises(StorageError, match="nowhere"):
        MemoryStore.open(filled)
    assert dump(filled) == before
    monkeypatch.undo()
    with MemoryStore.open(filled) as memory:  # the old release goes on
        memory.commit(Fact("note", {}, id="n2"))


def test_a_first_migration_that_fails_leaves_an_empty_file(
    database: Path, next_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_release.write_text("CREATE TABLE facts (a TEXT) STRICT;\n")
    with pytest.raises(StorageError, match="facts already exists"):
        MemoryStore.open(database)
    assert ask(database, "SELECT count(*) FROM sqlite_master") == [(0,)]
    monkeypatch.undo()
    with MemoryStore.open(database) as memory:
        memory.commit(Fact("note", {}, id="n1"))


def test_a_sqlite_that_is_too_old_says_so(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "OLDEST_SQLITE", (99, 0, 0))
    with pytest.raises(DatabaseOpenError, match=sqlite3.sqlite_version):
        MemoryStore.open(database)
    assert not database.exists()


# -- copies ---------------------------------------------------------------------------------------


def test_a_copy_made_with_sqlites_backup_is_a_memory(filled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    with MemoryStore.open(filled) as memory:
        memory.commit(Fact("note", {"text": "in the log"}, id="n2"))
        source, target = sqlite3.connect(filled), sqlite3.connect(copy)
        source.backup(target)
        source.close()
        target.close()
    with MemoryStore.open(copy) as memory:
        assert [fact.id for fact in memory.query("note")] == ["n2", "n1"]


def test_a_closed_database_is_one_file(filled: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(filled, tmp_path / "copy.db"))
    assert [path.name for path in filled.parent.glob(filled.name + "*")] == [filled.name]
    with MemoryStore.open(copy) as memory:
        assert memory.get("note", "n1") is not None

"""A memory's rows out of SQLite and into it, as `tables` describes them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from langgraph_memstate.storage.operations import Clear, Load
from langgraph_memstate.storage.rows import as_moved, as_stored, check_unfinished, column_names
from langgraph_memstate.storage.tables import META, MOVED, TABLES, UNFINISHED, Row


def dump(conn: sqlite3.Connection, table: str) -> Iterator[Row]:
    columns, key = column_names(TABLES[table])
    for row in conn.execute(f"SELECT {columns} FROM {table} ORDER BY {key}"):
        yield as_moved(table, row)


def load(conn: sqlite3.Connection, op: Load) -> None:
    if op.table != META:
        _check_unfinished(conn)
    columns, _ = column_names(TABLES[op.table])
    marks = ", ".join("?" * len(TABLES[op.table].columns))
    verb = "INSERT OR REPLACE" if op.table == META else "INSERT"
    rows = (as_stored(op.table, row) for row in op.rows)
    conn.executemany(f"{verb} INTO {op.table} ({columns}) VALUES ({marks})", rows)


def _check_unfinished(conn: sqlite3.Connection) -> None:
    check_unfinished(conn.execute("SELECT value FROM meta WHERE key = ?", (UNFINISHED,)).fetchone())


def clear(conn: sqlite3.Connection, op: Clear) -> None:
    _check_unfinished(conn)
    # The one deletion of the log there is: what goes is a copy that nobody was able to open.
    (guard,) = conn.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger' AND name = 'facts_stay'").fetchone()
    conn.execute("DROP TRIGGER facts_stay")
    for table in (*MOVED, "prepared"):
        conn.execute(f"DELETE FROM {table}")
    conn.execute(guard)

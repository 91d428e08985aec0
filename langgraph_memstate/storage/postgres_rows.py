"""A memory's rows out of PostgreSQL and into it, as `tables` describes them.

Where those name a thread, a row here has its number; where they have a type and bytes, one column here holds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph_memstate.storage.operations import Clear, Load
from langgraph_memstate.storage.postgres_link import Connection, run, run_rows
from langgraph_memstate.storage.postgres_packing import (
    head_of,
    value_of,
    with_time,
    with_type,
    write_of,
)
from langgraph_memstate.storage.postgres_values import THREAD, VALUE
from langgraph_memstate.storage.rows import (
    as_moved,
    as_stored,
    check_unfinished,
    column_names,
    moved_manifest,
    stored_manifest,
)
from langgraph_memstate.storage.tables import META, MOVED, TABLES, UNFINISHED, Row
from langgraph_memstate.storage.values import Blob

_NUMBERED = ("lists", "elements", "vectors", "outbox")  # by the database
# Of the tables that know threads: columns, their types and how a moved row has them, in its order.
_THREADED = {
    "checkpoints": "thread:number checkpoint_ns:text checkpoint_id:text parent_id:id run_id:text seq:bigint "
    "head:bytea manifest:text",
    "channel_values": "thread:number value_id:id value:bytea",
    "lists": "id:bigint thread:number value_id:id kind:text depth:int base:bigint keep:int elements:bytea",
    "elements": "id:bigint thread:number digest:bytea value:bytea",
    "writes": "thread:number checkpoint_ns:text checkpoint_id:id task_id:id idx:int task_path:text channel:text "
    "digest:bytea value:bytea",
}


def _columns(table: str) -> list[tuple[str, str]]:
    return [(name, type_) for name, _, type_ in (column.partition(":") for column in _THREADED[table].split())]


# -- out --------------------------------------------------------------------------------------------


def dump_query(table: str) -> str:
    columns, key = column_names(TABLES[table])
    if table in _THREADED:
        shown = [_shown(name, type_) for name, type_ in _columns(table)]
        if table == "writes":
            shown[-2:] = [VALUE]
        columns = ", ".join(shown)
    return f"SELECT {columns} FROM {table} ORDER BY {key}"


def _shown(name: str, type_: str) -> str:
    if type_ == "number":
        return f"{THREAD} AS thread_id"
    return f'id_text({name}) COLLATE "C" AS {name}' if type_ == "id" else name


def dumped(table: str, row: Sequence[Any]) -> Row:
    """A row that the query gives, as it moves."""
    if table == "checkpoints":
        *rest, stored, manifest = row
        ts, metadata, head = head_of(stored)
        return (*rest, ts, *head, metadata, moved_manifest(manifest))
    if table in _THREADED and table != "lists":
        return (*row[:-1], *value_of(row[-1]))
    return as_moved(table, tuple(row))


# -- in ---------------------------------------------------------------------------------------------


def load(conn: Connection, op: Load) -> None:
    """Runs outside of a pipeline, in which PostgreSQL copies nothing."""
    if op.table == META:
        run_rows(
            conn,
            "INSERT INTO meta SELECT * FROM {rows} AS notes ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value",
            "text text",
            op.rows,
        )
        return
    _check_unfinished(conn)
    if op.table in _THREADED:
        _load_threaded(conn, op)
    else:
        columns, _ = column_names(TABLES[op.table])
        with conn.cursor().copy(f"COPY {op.table} ({columns}) FROM STDIN".encode()) as copy:
            for row in op.rows:
                copy.write_row(as_stored(op.table, row))
    if op.table in _NUMBERED and op.rows:
        last = max(int(row[0] or 0) for row in op.rows)
        run(conn, "SELECT setval(pg_get_serial_sequence(%s, 'id'), %s::bigint)", op.table, last)


def _load_threaded(conn: Connection, op: Load) -> None:
    rows = [_stored(op.table, row) for row in op.rows]
    if op.table == "writes":
        rows = _with_elements(conn, rows)
    columns = _columns(op.table)
    names = ", ".join(name for name, _ in columns)
    made = {"number": "number_of({})", "id": "id_key({})"}
    run_rows(
        conn,
        f"INSERT INTO {op.table} ({names}) OVERRIDING SYSTEM VALUE SELECT "
        + ", ".join(made.get(type_, "{}").format(name) for name, type_ in columns)
        + f" FROM {{rows}} AS moved ({names})",
        " ".join("text" if type_ in made else type_ for _, type_ in columns),
        rows,
    )


def _stored(table: str, row: Sequence[Any]) -> tuple[Any, ...]:
    if table == "checkpoints":
        *rest, ts, type_, data, metadata, manifest = row
        return (*rest, with_time(ts, metadata, Blob(type_, data)), stored_manifest(manifest))
    if table == "lists":
        return as_stored(table, tuple(row))
    *rest, type_, data = row
    if table == "writes":
        stored, digest = write_of(rest[4], Blob(type_, data))
        return (*rest, digest, stored)
    return (*rest, with_type(Blob(type_, data)))


def _with_elements(conn: Connection, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Writes, whose values are stored first where they are to be elements."""
    elements = {(thread, digest): value for thread, *_, digest, value in rows if digest}
    run_rows(
        conn,
        "INSERT INTO elements (thread, digest, value) SELECT number_of(thread), digest, value "
        "FROM {rows} AS fresh (thread, digest, value) ON CONFLICT DO NOTHING",
        "text bytea bytea",
        [(*key, value) for key, value in elements.items()],
    )
    return [(*row[:-1], b"") if row[-2] else row for row in rows]


def _check_unfinished(conn: Connection) -> None:
    check_unfinished(run(conn, "SELECT value FROM meta WHERE key = %s", UNFINISHED).fetchone())


def clear(conn: Connection, op: Clear) -> None:
    _check_unfinished(conn)
    run(conn, f"TRUNCATE {', '.join((*MOVED, 'prepared', 'threads'))} RESTART IDENTITY")

"""A memory's rows out of PostgreSQL and into it, as `tables` describes them.

Where those name a thread, a row here has its number; where they have a type and bytes, one column here holds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph_memstate.storage.operations import Clear, Load
from langgraph_memstate.storage.postgres_link import Connection, run, run_rows
from langgraph_memstate.storage.postgres_packing import value_of, with_type, write_of
from langgraph_memstate.storage.postgres_values import THREAD, WRITTEN, dump_manifest, read_manifest
from langgraph_memstate.storage.rows import as_moved, as_stored, check_unfinished, column_names
from langgraph_memstate.storage.tables import META, MOVED, TABLES, UNFINISHED, Row
from langgraph_memstate.storage.tables import dump_manifest as moved_manifest
from langgraph_memstate.storage.tables import load_manifest as load_moved_manifest
from langgraph_memstate.storage.values import Blob

_NUMBERED = ("lists", "elements", "vectors", "outbox")  # by the database
_THREADED = ("checkpoints", "channel_values", "lists", "elements", "writes")
_VALUES = {"checkpoints": "head", "channel_values": "value", "elements": "value", "writes": "value"}


def dump_query(table: str) -> str:
    columns, key = column_names(TABLES[table])
    if table in _THREADED:
        sources = {"thread": f"{THREAD} AS thread_id"} | ({"value": WRITTEN} if table == "writes" else {})
        columns = ", ".join(sources.get(column, column) for column in _columns(table))
    return f"SELECT {columns} FROM {table} ORDER BY {key}"


def dumped(table: str, row: Sequence[Any]) -> Row:
    """A row that the query gives, as it moves."""
    if table not in _VALUES:
        return as_moved(table, tuple(row))
    place = _columns(table).index(_VALUES[table])
    rest = row[place + 1 :]
    if table == "checkpoints":
        metadata, manifest = rest
        channels = read_manifest(manifest)
        rest = (metadata, moved_manifest(list(channels), list(channels.values())))
    return (*row[:place], *value_of(row[place]), *rest)


def _columns(table: str) -> list[str]:
    """What the columns of a moved row are here."""
    columns = ["thread" if column == "thread_id" else column for column in TABLES[table].columns]
    if table in _VALUES:
        place = next(place for place, column in enumerate(columns) if column in ("type", "head_type"))
        columns[place : place + 2] = [_VALUES[table]]
    return columns


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
        columns, rows = _columns(op.table), _stored(conn, op.table, op.rows)
    else:
        columns, rows = list(TABLES[op.table].columns), [as_stored(op.table, row) for row in op.rows]
    if op.table == "writes":
        columns.append("digest")
        rows = _with_elements(conn, rows)
    with conn.cursor().copy(f"COPY {op.table} ({', '.join(columns)}) FROM STDIN".encode()) as copy:
        for row in rows:
            copy.write_row(row)
    if op.table in _NUMBERED and rows:
        last = max(int(row[0] or 0) for row in op.rows)
        run(conn, "SELECT setval(pg_get_serial_sequence(%s, 'id'), %s::bigint)", op.table, last)


def _stored(conn: Connection, table: str, rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Rows of a thread as they are here; the value of a write is still a value."""
    columns = _columns(table)
    thread = columns.index("thread")
    names = "SELECT name, number_of(name) FROM unnest(%s::text[]) AS name"
    numbers: dict[Any, int] = dict(run(conn, names, list({row[thread] for row in rows})).fetchall())
    stored = []
    for moved in rows:
        row: list[Any] = list(as_stored(table, moved) if table == "lists" else moved)
        row[thread] = numbers[row[thread]]
        if table in _VALUES:
            place = columns.index(_VALUES[table])
            value = Blob(*row[place : place + 2])
            row[place : place + 2] = [value if table == "writes" else with_type(value)]
        if table == "checkpoints":
            row[-1] = dump_manifest(load_moved_manifest(row[-1]))
        stored.append(tuple(row))
    return stored


def _with_elements(conn: Connection, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Writes as they are stored, and their digests. What they refer to is stored first."""
    columns = _columns("writes")
    thread, idx = columns.index("thread"), columns.index("idx")
    writes, elements = [], {}
    for *row, value in rows:
        stored, digest = write_of(row[idx], value)
        if digest:
            elements[row[thread], digest] = stored
        writes.append((*row, b"" if digest else stored, digest))
    run_rows(
        conn,
        "INSERT INTO elements (thread, digest, value) SELECT * FROM {rows} AS fresh ON CONFLICT DO NOTHING",
        "int bytea bytea",
        [(*key, stored) for key, stored in elements.items()],
    )
    return writes


def _check_unfinished(conn: Connection) -> None:
    check_unfinished(run(conn, "SELECT value FROM meta WHERE key = %s", UNFINISHED).fetchone())


def clear(conn: Connection, op: Clear) -> None:
    _check_unfinished(conn)
    run(conn, f"TRUNCATE {', '.join((*MOVED, 'prepared', 'threads'))} RESTART IDENTITY")

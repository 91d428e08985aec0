"""A memory's rows out of PostgreSQL and into it, as `tables` describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph_memstate.storage.operations import Clear, Load
from langgraph_memstate.storage.postgres_link import Connection, run, run_rows
from langgraph_memstate.storage.rows import as_moved, as_stored, check_unfinished, column_names
from langgraph_memstate.storage.tables import META, MOVED, TABLES, UNFINISHED, Row, dump_manifest, load_manifest

_NUMBERED = ("lists", "elements", "vectors", "outbox")  # by the database
_CHECKPOINT = TABLES["checkpoints"].columns[:-1]  # what follows is two columns here: `channels` and `value_ids`


def dump_query(table: str) -> str:
    columns, key = _columns(table)
    return f"SELECT {columns} FROM {table} ORDER BY {key}"


def dumped(table: str, row: Sequence[Any]) -> Row:
    """A row that the query gives, as it moves."""
    if table == "checkpoints":
        row = (*row[:-2], dump_manifest(*row[-2:]))
    return as_moved(table, tuple(row))


def load(conn: Connection, op: Load) -> None:
    """Runs outside of a pipeline, in which PostgreSQL copies nothing."""
    rows = [as_stored(op.table, row) for row in op.rows]
    if op.table == META:
        run_rows(
            conn,
            "INSERT INTO meta SELECT * FROM {rows} AS notes ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value",
            "text text",
            rows,
        )
        return
    _check_unfinished(conn)
    columns, _ = _columns(op.table)
    with conn.cursor().copy(f"COPY {op.table} ({columns}) FROM STDIN".encode()) as copy:
        for row in rows:
            copy.write_row(_stored(op.table, row))
    if op.table in _NUMBERED and rows:
        last = max(int(row[0] or 0) for row in rows)
        run(conn, "SELECT setval(pg_get_serial_sequence(%s, 'id'), %s::bigint)", op.table, last)


def _columns(table: str) -> tuple[str, str]:
    columns, key = column_names(TABLES[table])
    if table == "checkpoints":
        columns = f"{', '.join(_CHECKPOINT)}, channels, value_ids"
    return columns, key


def _stored(table: str, row: Row) -> Sequence[Any]:
    if table != "checkpoints":
        return row
    *rest, manifest = row
    channels = load_manifest(manifest)
    return (*rest, list(channels), list(channels.values()))


def _check_unfinished(conn: Connection) -> None:
    check_unfinished(run(conn, "SELECT value FROM meta WHERE key = %s", UNFINISHED).fetchone())


def clear(conn: Connection, op: Clear) -> None:
    _check_unfinished(conn)
    run(conn, f"TRUNCATE {', '.join((*MOVED, 'prepared'))} RESTART IDENTITY")

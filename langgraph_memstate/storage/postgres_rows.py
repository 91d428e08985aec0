"""A memory's rows out of PostgreSQL and into it, as `tables` describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph_memstate.storage.base import Clear, Load
from langgraph_memstate.storage.postgres_link import Connection, run, run_rows
from langgraph_memstate.storage.rows import as_moved, as_stored, column_names
from langgraph_memstate.storage.tables import META, MOVED, TABLES, Row, dump_manifest, load_manifest

_TYPES = {
    "meta": "text text",
    "facts": "bigint text bigint text text text text text text bigint float8 text float8 text int text text text text "
    "text text text text float8 float8",
    "items": "text text text bigint text text float8 float8 float8 float8",
    "channel_values": "text text text bytea",
    "lists": "bigint text text text int bigint int bytea",
    "elements": "bigint text bytea text bytea",
    "writes": "text text text text int text text text bytea",
    "staged": "text text text text int text text text text text",
    "indexes": "text text int bigint",
    "embeddings": "text bytea bytea",
    "vectors": "bigint text text int text bytea",
    "outbox": "bigint text text text text int float8 text",
}
_NUMBERED = ("lists", "elements", "vectors", "outbox")  # by the database
_CHECKPOINT = TABLES["checkpoints"].columns[:-1]  # what follows is two columns here: `channels` and `value_ids`


def dump_query(table: str) -> str:
    columns, key = column_names(TABLES[table])
    if table == "checkpoints":
        columns = f"{', '.join(_CHECKPOINT)}, channels, value_ids"
    return f"SELECT {columns} FROM {table} ORDER BY {key}"


def dumped(table: str, row: Sequence[Any]) -> Row:
    """A row that the query gives, as it moves."""
    if table == "checkpoints":
        row = (*row[:-2], dump_manifest(*row[-2:]))
    return as_moved(table, tuple(row))


def load(conn: Connection, op: Load) -> None:
    rows = [as_stored(op.table, row) for row in op.rows]
    if op.table == "checkpoints":
        _load_checkpoints(conn, rows)
        return
    columns, _ = column_names(TABLES[op.table])
    run_rows(
        conn,
        f"INSERT INTO {op.table} ({columns}) OVERRIDING SYSTEM VALUE SELECT * FROM {{rows}} AS moved"
        + (" ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value" if op.table == META else ""),
        _TYPES[op.table],
        rows,
    )
    if op.table in _NUMBERED and rows:
        last = max(int(row[0] or 0) for row in rows)
        run(conn, "SELECT setval(pg_get_serial_sequence(%s, 'id'), %s::bigint)", op.table, last)


def _load_checkpoints(conn: Connection, rows: Sequence[Row]) -> None:
    marks = ", ".join(["%s"] * (len(_CHECKPOINT) + 2))
    for *row, manifest in rows:  # an array of arrays would have to be a rectangle
        channels = load_manifest(manifest)
        run(
            conn,
            f"INSERT INTO checkpoints ({', '.join(_CHECKPOINT)}, channels, value_ids) VALUES ({marks})",
            *row, list(channels), list(channels.values()),
        )  # fmt: skip


def clear(conn: Connection, op: Clear) -> None:
    run(conn, f"TRUNCATE {', '.join((*MOVED, 'prepared'))} RESTART IDENTITY")

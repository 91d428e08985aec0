"""How SQLite appends to the log, binds vectors and keeps the outbox."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from langgraph_memstate.errors import CommitRaced, CorruptRowError
from langgraph_memstate.facts import Draft, encode_namespace, namespace_range
from langgraph_memstate.storage.operations import (
    Append,
    Forget,
    OutboxDone,
    OutboxFailed,
    Prepare,
    PutEmbeddings,
    PutIndexMeta,
    PutVectors,
    QueueIndex,
    RebuildIndex,
    Settle,
    Touch,
)
from langgraph_memstate.storage.rows import dump_json
from langgraph_memstate.storage.values import EXACT

_LOOK = (
    "WITH wanted (version, ns, key) AS (VALUES {}) SELECT wanted.version, "
    "EXISTS (SELECT 1 FROM facts WHERE facts.version = wanted.version), "
    "items.version, created_at, expires_at, EXISTS (SELECT 1 FROM vectors WHERE vectors.version = items.version) "
    "OR EXISTS (SELECT 1 FROM outbox WHERE outbox.version = items.version), "
    "(SELECT coalesce(max(seq), 0) FROM facts), EXISTS (SELECT 1 FROM indexes) "
    "FROM wanted LEFT JOIN items ON items.ns = wanted.ns AND items.key = wanted.key"
)
_AT_ONCE = 100  # lookups of a statement
_INSERT_FACT = f"INSERT INTO facts VALUES ({', '.join('?' * 25)})"
_PUT_ITEM = (
    "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (ns, key) DO UPDATE SET "
    "version = excluded.version, seq = excluded.seq, type = excluded.type, value = excluded.value, "
    "created_at = excluded.created_at, updated_at = excluded.updated_at, ttl = excluded.ttl, "
    "expires_at = excluded.expires_at"
)


class _Held(NamedTuple):
    """The item that a draft finds at its address."""

    version: str
    created_at: float
    expires_at: float | None
    has_vectors: bool
    """whether an index has any, or is to"""


class _Found(NamedTuple):
    """What the database holds before a draft is appended."""

    is_known: bool
    item: _Held | None
    last: int
    """the log's last sequence"""
    has_indexes: bool


def append(conn: sqlite3.Connection, ops: Sequence[Append], now: float) -> None:
    addresses: dict[str, tuple[str, str]] = {}
    for draft in (draft for op in ops for draft in op.drafts):
        addresses.setdefault(draft.version, (encode_namespace(draft.namespace), draft.key))
    before = _look(conn, [(version, *address) for version, address in addresses.items()])
    log: dict[str, tuple[Any, ...]] = {}  # by version
    held: dict[tuple[str, str], _Held | None] = {}  # by address, as these commits leave it
    items: dict[tuple[str, str], tuple[Any, ...]] = {}
    retired: list[str] = []
    to_embed: dict[str, tuple[str, ...]] = {}  # by version, the indexes that its process knows
    for op in ops:
        first = 0
        for draft in op.drafts:
            found, address = before[draft.version], addresses[draft.version]
            if found.is_known or draft.version in log:
                continue
            old = held.get(address, found.item)
            is_expired = old is not None and old.expires_at is not None and old.expires_at <= draft.ts
            if op.if_expired is not None and not (is_expired and old is not None and old.version in op.if_expired):
                continue
            seq = found.last + len(log) + 1
            first = first or seq
            created_at = draft.created_at or (draft.ts if old is None or is_expired else old.created_at)
            expires_at = None if draft.ttl is None else draft.ts + draft.ttl * 60
            log[draft.version] = _log_row((seq, first, now), address, draft, old, created_at)
            if old is not None and old.has_vectors:
                retired.append(old.version)
                to_embed.pop(old.version, None)
            items.pop(address, None)
            if draft.op == "delete":
                held[address] = None
                continue
            held[address] = _Held(draft.version, created_at, expires_at, has_vectors=True)
            items[address] = (
                *address, draft.version, seq, draft.type, draft.value, created_at, draft.ts, draft.ttl, expires_at,
            )  # fmt: skip
            if found.has_indexes and draft.index is not False:
                to_embed[draft.version] = op.indexes
    conn.executemany(_INSERT_FACT, log.values())
    conn.executemany(_PUT_ITEM, items.values())
    if gone := [address for address, item in held.items() if item is None]:
        conn.executemany("DELETE FROM items WHERE ns = ? AND key = ?", gone)
    if retired:
        _retire_vectors(conn, retired)
    if to_embed:
        _leave_to_embed(conn, to_embed)


def _look(conn: sqlite3.Connection, wanted: Sequence[tuple[str, str, str]]) -> dict[str, _Found]:
    """By version. `wanted`: version, namespace and key of every draft."""
    found: dict[str, _Found] = {}
    for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        query = _LOOK.format(", ".join(["(?, ?, ?)"] * len(some)))
        for version, is_known, old, created_at, expires_at, has_vectors, last, has_indexes in conn.execute(
            query, list(chain.from_iterable(some))
        ):
            item = None if old is None else _Held(old, created_at, expires_at, has_vectors)
            found[version] = _Found(is_known, item, last, has_indexes)
    return found


def _log_row(
    place: tuple[int, int, float],
    address: tuple[str, str],
    draft: Draft,
    old: _Held | None,
    created_at: float,
) -> tuple[Any, ...]:
    """`place`: sequence, the first sequence of the commit, and when that commits."""
    seq, commit_id, committed_at = place
    origin = draft.origin
    return (
        seq, draft.version, commit_id, *address, draft.op, draft.type, draft.value,
        None if old is None else old.version, draft.undoes, created_at if draft.op == "put" else None,
        dump_json(draft.index), draft.ttl,
        draft.schema, draft.schema_version, origin.thread_id, origin.checkpoint_ns, origin.checkpoint_id,
        origin.task_id, origin.node, origin.run_id, origin.actor, origin.reason, draft.ts, committed_at,
    )  # fmt: skip


def _retire_vectors(conn: sqlite3.Connection, versions: Sequence[str]) -> None:
    conn.executemany("DELETE FROM outbox WHERE version = ? AND op <> 'delete'", [(version,) for version in versions])
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) "
        "SELECT index_name, 'delete', vector_id, version, 0 FROM vectors WHERE version = ? AND index_name <> ? "
        "ORDER BY id",
        [(version, EXACT) for version in versions],
    )


def _leave_to_embed(conn: sqlite3.Connection, known: Mapping[str, tuple[str, ...]]) -> None:
    """Leave versions to the indexes that the process which commits them does not know."""
    names = [name for (name,) in conn.execute("SELECT name FROM indexes ORDER BY name")]
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) VALUES (?1, 'embed', ?2, ?2, 0)",
        [(name, version) for version, indexes in known.items() for name in names if name not in indexes],
    )


def forget(conn: sqlite3.Connection, op: Forget) -> None:
    where, parameters = "ns >= ? AND ns < ?", [*namespace_range(op.prefix)]
    for column in ("key", "thread_id"):
        if (wanted := getattr(op, column)) is not None:
            where += f" AND {column} = ?"
            parameters.append(wanted)
    conn.execute(f"DELETE FROM staged WHERE {where}", parameters)
    versions = f"(SELECT version FROM facts WHERE {where} UNION ALL SELECT value FROM json_each(?))"
    parameters.append(json.dumps(op.copies))
    conn.execute(f"DELETE FROM outbox WHERE op <> 'delete' AND version IN {versions}", parameters)
    conn.execute(
        "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) "
        "SELECT index_name, 'delete', vector_id, version, 0 FROM vectors "
        f"WHERE version IN {versions} AND index_name <> ? ORDER BY id",
        (*parameters, EXACT),
    )
    hashes = conn.execute(
        f"SELECT DISTINCT model, text_hash FROM vectors JOIN indexes ON name = index_name WHERE version IN {versions}",
        parameters,
    ).fetchall()
    conn.execute(f"DELETE FROM vectors WHERE version IN {versions}", parameters)
    conn.execute(
        "INSERT INTO meta VALUES ('erasures', '1') ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1"
    )
    conn.executemany(
        "DELETE FROM embeddings WHERE model = ?1 AND text_hash = ?2 AND NOT EXISTS ("
        "SELECT 1 FROM vectors JOIN indexes ON name = index_name WHERE text_hash = ?2 AND model = ?1)",
        hashes,
    )
    conn.execute(f"UPDATE facts SET value = NULL WHERE version IN {versions}", parameters)


def touch(conn: sqlite3.Connection, op: Touch) -> None:
    conn.executemany(
        "UPDATE items SET expires_at = max(expires_at, ? + ttl * 60) WHERE ns = ? AND key = ? AND ttl IS NOT NULL",
        [(op.now, encode_namespace(namespace), key) for namespace, key in op.addresses],
    )


# -- vectors ----------------------------------------------------------------------------------------


def put_embeddings(conn: sqlite3.Connection, op: PutEmbeddings) -> None:
    conn.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?, ?)", op.rows)


def put_vectors(conn: sqlite3.Connection, op: PutVectors) -> None:
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) SELECT ?1, 'upsert', ?2, ?3, 0 "
        "WHERE NOT EXISTS (SELECT 1 FROM vectors WHERE version = ?3 AND index_name = ?1 AND ord = ?4)",
        [(row.index_name, row.vector_id, row.version, row.ord) for row in op.rows if row.index_name in op.deferred],
    )
    conn.executemany(
        "INSERT OR IGNORE INTO vectors (version, index_name, ord, vector_id, text_hash) VALUES (?, ?, ?, ?, ?)",
        [(row.version, row.index_name, row.ord, row.vector_id, row.text_hash) for row in op.rows],
    )
    conn.executemany(
        "UPDATE outbox SET op = 'upsert', version = ?, retry_at = 0 "
        "WHERE vector_id = ? AND index_name = ? AND op = 'delete'",
        [(row.version, row.vector_id, row.index_name) for row in op.rows],
    )
    conn.executemany(
        "DELETE FROM outbox WHERE version = ? AND index_name = ? AND op = 'embed'",
        [(row.version, row.index_name) for row in op.rows],
    )


def prepare(conn: sqlite3.Connection, op: Prepare) -> None:
    row = op.row
    conn.execute(
        "INSERT INTO prepared VALUES (?, ?, ?, ?, ?)",
        (row.id, row.index_name, dump_json(row.vector_ids), row.owner, row.expires_at),
    )


def settle(conn: sqlite3.Connection, op: Settle) -> None:
    row = conn.execute("SELECT index_name, vector_ids FROM prepared WHERE id = ?", (op.id,)).fetchone()
    if row is None:
        raise CommitRaced(
            "the index was rebuilt meanwhile, or the commit took so long that its vectors were taken back"
        )
    conn.execute("DELETE FROM prepared WHERE id = ?", (op.id,))
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, retry_at) SELECT ?1, 'delete', ?2, 0 WHERE NOT EXISTS ("
        "SELECT 1 FROM vectors JOIN items USING (version) WHERE vector_id = ?2 AND index_name = ?1)",
        [(row[0], vector_id) for vector_id in _list(row[1])],
    )


def outbox_done(conn: sqlite3.Connection, op: OutboxDone) -> None:
    conn.executemany("DELETE FROM outbox WHERE id = ? AND op = ?", [(row.id, row.op) for row in op.rows])
    removed = [(row.index_name, row.vector_id) for row in op.rows if row.op == "delete"]
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) "
        "SELECT index_name, 'upsert', vector_id, version, 0 FROM vectors JOIN items USING (version) "
        "WHERE index_name = ? AND vector_id = ? ORDER BY id",
        removed,
    )
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, retry_at) SELECT ?1, 'delete', ?2, 0 WHERE EXISTS ("
        "SELECT 1 FROM prepared, json_each(vector_ids) WHERE index_name = ?1 AND json_each.value = ?2)",
        removed,
    )
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, retry_at) SELECT ?1, 'delete', ?2, 0 "
        "WHERE NOT EXISTS (SELECT 1 FROM vectors JOIN items USING (version) WHERE index_name = ?1 AND vector_id = ?2) "
        "AND NOT EXISTS (SELECT 1 FROM outbox WHERE index_name = ?1 AND vector_id = ?2)",
        [(row.index_name, row.vector_id) for row in op.rows if row.op == "upsert"],
    )


def outbox_failed(conn: sqlite3.Connection, op: OutboxFailed) -> None:
    conn.executemany(
        "UPDATE outbox SET attempts = attempts + 1, retry_at = ?, error = ? WHERE id = ?",
        [(op.retry_at, op.error, id_) for id_ in op.ids],
    )


def rebuild_index(conn: sqlite3.Connection, op: RebuildIndex) -> None:
    conn.execute("DELETE FROM prepared WHERE index_name = ?", (op.index,))
    conn.execute("DELETE FROM outbox WHERE index_name = ? AND op <> 'embed'", (op.index,))
    conn.execute(
        "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) "
        "SELECT index_name, 'upsert', vector_id, version, 0 FROM items JOIN vectors USING (version) "
        "WHERE index_name = ? ORDER BY items.seq, ord",
        (op.index,),
    )


def queue_index(conn: sqlite3.Connection, op: QueueIndex) -> None:
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) "
        "SELECT index_name, 'upsert', vector_id, version, 0 FROM vectors WHERE index_name = ? AND vector_id = ? "
        "ORDER BY id",
        [(op.index, vector_id) for vector_id in op.upserts],
    )
    conn.executemany(
        "INSERT INTO outbox (index_name, op, vector_id, retry_at) VALUES (?, 'delete', ?, 0)",
        [(op.index, vector_id) for vector_id in op.deletes],
    )


def put_index_meta(conn: sqlite3.Connection, op: PutIndexMeta) -> None:
    if not conn.execute("SELECT 1 FROM indexes WHERE name = ?", (op.index,)).fetchone():
        conn.execute(
            "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) "
            "SELECT ?, 'embed', version, version, 0 FROM items ORDER BY seq",
            (op.index,),
        )
    conn.execute("INSERT OR REPLACE INTO indexes VALUES (?, ?, ?, ?)", (op.index, op.model, op.dims, op.generation))


def _list(text: str) -> list[str]:
    try:
        return [str(entry) for entry in json.loads(text)]
    except (TypeError, ValueError) as error:
        raise CorruptRowError(f"a prepare record cannot be read: {error}") from error

"""How PostgreSQL appends to the log, binds vectors and keeps the outbox. Whole batches are one statement each.

What an append means, the database itself works out, draft by draft: see `append` in postgres_0002.sql.
"""

from __future__ import annotations

import time
from typing import Any

from langgraph_memstate.errors import CommitRaced
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
from langgraph_memstate.storage.postgres_claims import CLAIMED, RELEASE
from langgraph_memstate.storage.postgres_link import Connection, run, run_rows
from langgraph_memstate.storage.postgres_vectors import Places, fill, remove, retire
from langgraph_memstate.storage.rows import dump_json
from langgraph_memstate.storage.values import EXACT

_QUEUE = "INSERT INTO outbox (index_name, op, vector_id, version, retry_at) "
_DRAFT = (
    "version, ns, key, op, type, value, undoes, created_at, index_paths, ttl, schema, schema_version, thread_id, "
    "checkpoint_ns, checkpoint_id, task_id, node, run_id, actor, reason, ts"
)
_DRAFT_TYPES = (
    "text text text text text text bigint float8 text float8 text int text text text text text text text text float8"
)
# The database finds out what a draft supersedes, and its sequence; both have their place among the columns.
_APPEND = (
    "SELECT append(ROW(0, version, (SELECT coalesce(max(seq), 0) + 1 FROM facts), ns, key, op, type, value, NULL, "
    "undoes, created_at, index_paths, ttl, schema, schema_version, thread_id, checkpoint_ns, checkpoint_id, task_id, "
    "node, run_id, actor, reason, ts, %(now)s::float8)::facts, %(if_expired)s::text[], %(known)s::text[]) "
    f"FROM {{rows}} AS draft ({_DRAFT})"
)


def append(conn: Connection, op: Append) -> None:
    run_rows(
        conn, _APPEND, _DRAFT_TYPES, [_row(draft) for draft in op.drafts],
        now=time.time(), known=list(op.indexes), if_expired=None if op.if_expired is None else list(op.if_expired),
    )  # fmt: skip


def _row(draft: Draft) -> tuple[Any, ...]:
    origin = draft.origin
    return (
        draft.version, encode_namespace(draft.namespace), draft.key, draft.op, draft.type, draft.value, draft.undoes,
        (draft.created_at or None) if draft.op == "put" else None,
        dump_json(draft.index), draft.ttl,
        draft.schema, draft.schema_version, origin.thread_id, origin.checkpoint_ns, origin.checkpoint_id,
        origin.task_id, origin.node, origin.run_id, origin.actor, origin.reason, draft.ts,
    )  # fmt: skip


def forget(conn: Connection, op: Forget, places: Places) -> None:
    where = "ns >= %(low)s AND ns < %(high)s"
    bound: dict[str, Any] = {}
    bound["low"], bound["high"] = namespace_range(op.prefix)
    for column in ("key", "thread_id"):
        if (wanted := getattr(op, column)) is not None:
            where += f" AND {column} = %({column})s"
            bound[column] = wanted
    run(conn, f"DELETE FROM staged WHERE {where}", **bound)
    versions = f"(SELECT version FROM facts WHERE {where} UNION ALL SELECT unnest(%(copies)s::text[]))"
    bound["copies"] = list(op.copies)
    run(conn, f"DELETE FROM outbox WHERE op <> 'delete' AND version IN {versions} AND NOT {CLAIMED}", **bound)
    run(
        conn,
        _QUEUE + "SELECT index_name, 'delete', vector_id, version, 0 FROM vectors "
        f"WHERE version IN {versions} AND index_name <> ALL(%(without)s::text[]) ORDER BY id",
        without=[EXACT, *places.by_name], **bound,
    )  # fmt: skip
    if places.by_name:
        gone = run(conn, f"SELECT DISTINCT version FROM vectors WHERE version IN {versions}", **bound)
        retire(conn, [version for (version,) in gone.fetchall()], places)
    of_model = "vectors JOIN indexes ON name = index_name"
    hashes = run(
        conn, f"SELECT DISTINCT model, text_hash FROM {of_model} WHERE version IN {versions}", **bound
    ).fetchall()
    run(conn, f"DELETE FROM vectors WHERE version IN {versions}", **bound)
    run(
        conn,
        "INSERT INTO meta VALUES ('erasures', '1') "
        "ON CONFLICT (key) DO UPDATE SET value = (meta.value::bigint + 1)::text",
    )
    run_rows(
        conn,
        "DELETE FROM embeddings USING {rows} AS gone (model, text_hash) "
        "WHERE embeddings.model = gone.model AND embeddings.text_hash = gone.text_hash AND NOT EXISTS ("
        f"SELECT 1 FROM {of_model} WHERE vectors.text_hash = gone.text_hash AND indexes.model = gone.model)",
        "text bytea",
        hashes,
    )
    run(conn, f"UPDATE facts SET value = NULL WHERE version IN {versions}", **bound)


def touch(conn: Connection, op: Touch) -> None:
    run_rows(
        conn,
        "UPDATE items SET expires_at = greatest(expires_at, %(now)s + ttl * 60) FROM {rows} AS read (ns, key) "
        "WHERE items.ns = read.ns AND items.key = read.key AND ttl IS NOT NULL",
        "text text",
        list({(encode_namespace(namespace), key) for namespace, key in op.addresses}),
        now=float(op.now),
    )


# -- vectors ----------------------------------------------------------------------------------------


def put_embeddings(conn: Connection, op: PutEmbeddings) -> None:
    run_rows(
        conn, "INSERT INTO embeddings SELECT * FROM {rows} AS fresh ON CONFLICT DO NOTHING", "text bytea bytea", op.rows
    )


def put_vectors(conn: Connection, op: PutVectors) -> None:
    run_rows(
        conn,
        "WITH fresh AS (INSERT INTO vectors (version, index_name, ord, vector_id, text_hash) "
        "SELECT * FROM {rows} AS bound ON CONFLICT DO NOTHING RETURNING index_name, vector_id, version) "
        + _QUEUE
        + "SELECT index_name, 'upsert', vector_id, version, 0 FROM fresh WHERE index_name = ANY(%(deferred)s)",
        "text text int text bytea",
        [(row.version, row.index_name, row.ord, row.vector_id, row.text_hash) for row in op.rows],
        deferred=list(op.deferred),
    )
    rows = [(row.index_name, row.vector_id, row.version) for row in op.rows]
    run_rows(
        conn,
        "UPDATE outbox SET op = 'upsert', version = bound.version, retry_at = 0 "
        "FROM {rows} AS bound (name, id, version) "
        "WHERE outbox.vector_id = bound.id AND outbox.index_name = bound.name AND op = 'delete'",
        "text text text",
        rows,
    )
    run_rows(
        conn,
        "DELETE FROM outbox USING {rows} AS bound (name, id, version) "
        "WHERE outbox.version = bound.version AND outbox.index_name = bound.name AND op = 'embed'",
        "text text text",
        rows,
    )


def prepare(conn: Connection, op: Prepare) -> None:
    row = op.row
    run(
        conn,
        "INSERT INTO prepared VALUES (%s, %s, %s, %s, %s)",
        row.id, row.index_name, list(row.vector_ids), row.owner, float(row.expires_at),
    )  # fmt: skip


def settle(conn: Connection, op: Settle) -> None:
    row = run(conn, "DELETE FROM prepared WHERE id = %s RETURNING index_name, vector_ids", op.id).fetchone()
    if row is None:
        raise CommitRaced(
            "the index was rebuilt meanwhile, or the commit took so long that its vectors were taken back"
        )
    run(
        conn,
        _QUEUE + "SELECT %(name)s, 'delete', sent, NULL, 0 FROM unnest(%(ids)s::text[]) AS sent WHERE NOT EXISTS ("
        "SELECT 1 FROM vectors JOIN items USING (version) WHERE vector_id = sent AND index_name = %(name)s)",
        name=row[0], ids=row[1],
    )  # fmt: skip


def outbox_done(conn: Connection, op: OutboxDone) -> None:
    run_rows(
        conn,
        "DELETE FROM outbox USING {rows} AS done (id, op) WHERE outbox.id = done.id AND outbox.op = done.op",
        "bigint text",
        [(row.id, row.op) for row in op.rows],
    )
    removed = [(row.index_name, row.vector_id) for row in op.rows if row.op == "delete"]
    run_rows(
        conn,
        _QUEUE + "SELECT index_name, 'upsert', vector_id, version, 0 FROM {rows} AS removed (name, id) "
        "JOIN vectors ON index_name = name AND vector_id = removed.id JOIN items USING (version)",
        "text text",
        removed,
    )
    run_rows(
        conn,
        _QUEUE + "SELECT name, 'delete', removed.id, NULL, 0 FROM {rows} AS removed (name, id) WHERE EXISTS ("
        "SELECT 1 FROM prepared WHERE index_name = name AND removed.id = ANY(vector_ids))",
        "text text",
        removed,
    )
    run_rows(
        conn,
        _QUEUE + "SELECT name, 'delete', stored.id, NULL, 0 FROM {rows} AS stored (name, id) WHERE NOT EXISTS ("
        "SELECT 1 FROM vectors JOIN items USING (version) WHERE index_name = name AND vector_id = stored.id) "
        "AND NOT EXISTS (SELECT 1 FROM outbox WHERE index_name = name AND vector_id = stored.id)",
        "text text",
        [(row.index_name, row.vector_id) for row in op.rows if row.op == "upsert"],
    )
    run(conn, RELEASE + "id = ANY(%s::bigint[]) AND claimed_by IS NOT NULL", [row.id for row in op.rows])


def outbox_failed(conn: Connection, op: OutboxFailed) -> None:
    run(
        conn,
        "UPDATE outbox SET attempts = attempts + 1, retry_at = %s, error = %s, claimed_by = NULL, claimed_until = NULL "
        "WHERE id = ANY(%s::bigint[])",
        op.retry_at, op.error, list(op.ids),
    )  # fmt: skip


def rebuild_index(conn: Connection, op: RebuildIndex, places: Places) -> None:
    run(conn, "DELETE FROM prepared WHERE index_name = %s", op.index)
    run(conn, "DELETE FROM outbox WHERE index_name = %s AND op <> 'embed'", op.index)
    if op.index in places.by_name:
        return  # it was made of what is current
    run(
        conn,
        _QUEUE + "SELECT index_name, 'upsert', vector_id, version, 0 FROM items JOIN vectors USING (version) "
        "WHERE index_name = %s ORDER BY items.seq, vectors.id",
        op.index,
    )


def queue_index(conn: Connection, op: QueueIndex, places: Places) -> None:
    if (place := places.by_name.get(op.index)) is not None:
        fill(conn, op.index, place, list(op.upserts))
        remove(conn, place, op.deletes)
        return
    run(
        conn,
        _QUEUE + "SELECT index_name, 'upsert', vector_id, version, 0 FROM vectors "
        "WHERE index_name = %s AND vector_id = ANY(%s)",
        op.index, list(op.upserts),
    )  # fmt: skip
    run(
        conn,
        _QUEUE + "SELECT %s, 'delete', orphan, NULL, 0 FROM unnest(%s::text[]) AS orphan",
        op.index, list(op.deletes),
    )  # fmt: skip


def put_index_meta(conn: Connection, op: PutIndexMeta) -> None:
    run(
        conn,
        _QUEUE + "SELECT %(name)s, 'embed', version, version, 0 FROM items "
        "WHERE NOT EXISTS (SELECT 1 FROM indexes WHERE name = %(name)s) ORDER BY seq",
        name=op.index,
    )
    run(
        conn,
        "INSERT INTO indexes VALUES (%s, %s, %s, %s) ON CONFLICT (name) DO UPDATE SET "
        "model = EXCLUDED.model, dims = EXCLUDED.dims, generation = EXCLUDED.generation",
        op.index, op.model, op.dims, op.generation,
    )  # fmt: skip

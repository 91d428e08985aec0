"""Databases of LangGraph's `PostgresSaver` and `PostgresStore`, read only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from langgraph_memstate.errors import CorruptRowError, DatabaseOpenError, DeserializationError, MigrationError
from langgraph_memstate.graph import pregel, slices
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.graph.upstream import (
    Upstream,
    UpstreamCheckpoint,
    UpstreamItem,
    UpstreamWrite,
    blob_of,
    item_of,
    place_of,
)
from langgraph_memstate.storage.postgres_link import storage_error
from langgraph_memstate.storage.values import Blob, StepKey

_CHECKPOINTS = {"thread_id", "checkpoint_ns", "checkpoint_id", "parent_checkpoint_id", "checkpoint", "metadata"}
_STORE = {"prefix", "key", "value", "created_at", "updated_at"}
_PAGE = 50  # checkpoints whose values are in memory at once
_ITEMS = 1_000
_SENDS_MOVED = 4  # the version of checkpoints since which a task's sends are a value of a channel

_STEPS = "unnest(%s::text[], %s::text[], %s::text[]) AS wanted (thread, ns, id)"
_THESE = "thread_id = wanted.thread AND checkpoint_ns = wanted.ns"
_BLOBS = (
    "SELECT DISTINCT b.thread_id, b.checkpoint_ns, b.channel, b.version, b.type, b.blob "
    f"FROM {_STEPS} JOIN checkpoints c ON c.thread_id = wanted.thread AND c.checkpoint_ns = wanted.ns "
    "AND c.checkpoint_id = wanted.id CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v "
    "JOIN checkpoint_blobs b ON b.thread_id = wanted.thread AND b.checkpoint_ns = wanted.ns "
    "AND b.channel = v.key AND b.version = v.value"
)

Connection = psycopg.Connection[tuple[Any, ...]]


@contextmanager
def open_postgres(url: str) -> Iterator[Upstream]:
    try:
        conn = psycopg.connect(url, autocommit=True, prepare_threshold=None, client_encoding="utf8")
    except psycopg.Error as error:
        text = str(error).strip().partition("\n")[0]
        raise DatabaseOpenError(f"PostgreSQL cannot be reached, or refuses: {text}") from error
    try:
        with conn:
            conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield _Postgres(conn)
    except psycopg.Error as error:
        raise storage_error(error, "reading the source") from error
    finally:
        conn.close()


class _Postgres(Upstream):
    def __init__(self, conn: Connection) -> None:
        self.name = f"database {conn.info.dbname}"
        self._conn = conn
        self._has_checkpoints = self._columns("checkpoints") >= _CHECKPOINTS
        self._has_store = self._columns("store") >= _STORE
        if not self._has_checkpoints and not self._has_store:
            raise MigrationError(
                f"{self.name} has neither the checkpoints of a PostgresSaver nor the items of a PostgresStore where "
                "the URL leads (its search_path)"
            )

    def _columns(self, table: str) -> set[str]:
        query = (
            "SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 "
            "AND NOT attisdropped"
        )
        return {name for (name,) in self._conn.execute(query, (table,))}

    def counts(self) -> dict[str, int]:
        tables = {"checkpoints": ("checkpoints", self._has_checkpoints), "items": ("store", self._has_store)}
        return {what: self._count(table) for what, (table, is_there) in tables.items() if is_there}

    def _count(self, table: str) -> int:
        row = self._conn.execute("SELECT count(*) FROM " + table).fetchone()
        assert row is not None
        return int(row[0])

    def checkpoints(self) -> Iterator[UpstreamCheckpoint]:
        path = "task_path" if "task_path" in self._columns("checkpoint_writes") else "''"
        with self._conn.cursor("checkpoints_to_import") as cursor:
            cursor.execute(
                "SELECT thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint::text, "
                "metadata::text FROM checkpoints ORDER BY thread_id, checkpoint_ns, checkpoint_id"
            )
            while rows := cursor.fetchmany(_PAGE):
                yield from self._page(rows, path)

    def _page(self, rows: Sequence[tuple[Any, ...]], path: str) -> Iterator[UpstreamCheckpoint]:
        steps = [StepKey(*row[:3]) for row in rows]
        columns = [list(column) for column in zip(*steps, strict=True)]
        blobs = {
            tuple(key): (type_, blob) for *key, type_, blob in self._conn.execute(_BLOBS, columns) if type_ != "empty"
        }
        writes = self._writes(columns, path)
        for step, (*_, parent_id, text, metadata) in zip(steps, rows, strict=True):
            checkpoint = _load(step, text)
            plain = MemStateSerializer()
            values = {
                channel: Blob(*plain.dumps_typed(value))
                for channel, value in (checkpoint.get("channel_values") or {}).items()
            }
            for channel, version in checkpoint["channel_versions"].items():
                if (stored := blobs.get((*step[:2], channel, str(version)))) is not None:
                    values[channel] = blob_of(place_of(step, channel), *stored)
            if checkpoint["v"] < _SENDS_MOVED and parent_id:
                self._move_sends(step, parent_id, checkpoint, values, path)
            head = {name: part for name, part in checkpoint.items() if name not in ("id", "ts", "channel_values")}
            yield UpstreamCheckpoint(
                step, parent_id or None, checkpoint["ts"], Blob(*plain.dumps_typed(head)), values, metadata,
                writes.get(step, ()),
            )  # fmt: skip

    def _writes(self, columns: Sequence[list[str]], path: str) -> dict[StepKey, list[UpstreamWrite]]:
        found: dict[StepKey, list[UpstreamWrite]] = {}
        query = (
            f"SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, {path}, idx, channel, type, blob "
            f"FROM {_STEPS} JOIN checkpoint_writes ON {_THESE} AND checkpoint_id = wanted.id"
        )
        for *key, task_id, task_path, idx, channel, type_, blob in self._conn.execute(query, columns):
            step = StepKey(*key)
            value = blob_of(place_of(step, channel), type_, blob)
            found.setdefault(step, []).append(UpstreamWrite(task_id, task_path, idx, channel, value))
        return found

    def _move_sends(
        self, step: StepKey, parent_id: str, checkpoint: dict[str, Any], values: dict[str, Blob], path: str
    ) -> None:
        """What a step of an early LangGraph sent to its next one is taken from its writes, as upstream's saver does."""
        query = (
            "SELECT type, blob FROM checkpoint_writes WHERE thread_id = %s AND checkpoint_id = %s AND channel = %s "
            f"ORDER BY {path}, task_id, idx"
        )
        sends = self._conn.execute(query, (step.thread_id, parent_id, pregel.SENDS)).fetchall()
        if not sends:
            return
        if any(type_ != "msgpack" for type_, _ in sends):
            raise DeserializationError(f"{place_of(step, pregel.SENDS)} was written by another serializer")
        values[pregel.SENDS] = Blob("msgpack", slices.packed_array([blob for _, blob in sends]))
        versions = checkpoint["channel_versions"]
        if versions:
            versions[pregel.SENDS] = max(versions.values())

    def items(self) -> Iterator[UpstreamItem]:
        columns = self._columns("store")
        ttl = "ttl_minutes::float8" if "ttl_minutes" in columns else "NULL"
        expires_at = "extract(epoch FROM expires_at)::float8" if "expires_at" in columns else "NULL"
        with self._conn.cursor("items_to_import") as cursor:
            cursor.itersize = _ITEMS
            cursor.execute(
                "SELECT prefix, key, value::text, extract(epoch FROM created_at)::float8, "
                f"extract(epoch FROM updated_at)::float8, {ttl}, {expires_at} FROM store "
                "ORDER BY updated_at, prefix, key"
            )
            for row in cursor:
                yield item_of(*row)


def _load(step: StepKey, text: str) -> dict[str, Any]:
    checkpoint = json.loads(text)
    if not isinstance(checkpoint, dict) or not {"v", "ts", "channel_versions"} <= checkpoint.keys():
        raise CorruptRowError(f"thread {step.thread_id!r}, checkpoint {step.checkpoint_id}: it is no checkpoint")
    return checkpoint

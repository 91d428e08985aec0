"""What a SQLite snapshot answers. Every value is bound; rows that no writer of ours wrote raise `CorruptRowError`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from langgraph_memstate.errors import CorruptRowError
from langgraph_memstate.facts import (
    Draft,
    IndexPaths,
    LogEntry,
    Namespace,
    Record,
    decode_namespace,
    decode_value,
    encode_namespace,
    namespace_range,
)
from langgraph_memstate.storage import sqlite_values
from langgraph_memstate.storage.base import (
    AncestorWrite,
    Blob,
    OutboxRow,
    PreparedRow,
    PutIndexMeta,
    Reader,
    ScoredRow,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredList,
    StoredWrite,
)
from langgraph_memstate.storage.packing import unpacked
from langgraph_memstate.storage.sqlite_write import NOT_LANDED, THIS_STEP

_CHECKPOINT = "thread_id, checkpoint_ns, checkpoint_id, parent_id, head_type, head, metadata, manifest"
_ITEM = "items.ns, items.key, items.version, items.value, created_at, updated_at, items.seq, expires_at, ttl, type"
_LIVE = "(items.expires_at IS NULL OR items.expires_at > ?)"
_SCORED = (
    f"SELECT {_ITEM}, vectors.vector_id, vectors.ord, embeddings.vector FROM items "
    "JOIN vectors ON vectors.version = items.version AND vectors.index_name = ? "
    "JOIN embeddings ON embeddings.model = ? AND embeddings.text_hash = vectors.text_hash "
)
_LOG = (
    "seq, version, op, ns, key, value, supersedes, thread_id, checkpoint_ns, checkpoint_id, task_id, node, run_id, "
    "actor, reason, schema, schema_version, ts"
)


class SQLiteReader(Reader):
    """Reads of one open transaction."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn

    def _rows(self, query: str, *parameters: Any) -> Iterator[tuple[Any, ...]]:
        return iter(self._conn.execute(query, parameters))

    def _one(self, query: str, *parameters: Any) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._conn.execute(query, parameters).fetchone()
        return row

    # -- checkpoints --------------------------------------------------------------------------------

    def checkpoint(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> StoredCheckpoint | None:
        if checkpoint_id is not None:
            row = self._one(
                f"SELECT {_CHECKPOINT} FROM checkpoints WHERE {THIS_STEP}",
                thread_id, checkpoint_ns, checkpoint_id,
            )  # fmt: skip
        else:
            row = self._one(
                f"SELECT {_CHECKPOINT} FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ? "
                "ORDER BY checkpoint_id DESC LIMIT 1",
                thread_id, checkpoint_ns,
            )  # fmt: skip
        return None if row is None else self._stored(row)

    def checkpoints(
        self,
        *,
        thread_id: str | None,
        checkpoint_ns: str | None,
        checkpoint_id: str | None,
        before: tuple[str, str, str] | str | None,
        limit: int,
    ) -> list[StoredCheckpoint]:
        wanted = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
        where = [f"{column} = ?" for column, value in wanted.items() if value is not None]
        parameters: list[Any] = [value for value in wanted.values() if value is not None]
        if isinstance(before, tuple):
            where.append("(checkpoint_id, thread_id, checkpoint_ns) < (?, ?, ?)")
            parameters.extend(before)
        elif before is not None:
            where.append("checkpoint_id < ?")
            parameters.append(before)
        rows = self._conn.execute(
            f"SELECT {_CHECKPOINT} FROM checkpoints "
            + (f"WHERE {' AND '.join(where)} " if where else "")
            + "ORDER BY checkpoint_id DESC, thread_id DESC, checkpoint_ns DESC LIMIT ?",
            (*parameters, limit),
        ).fetchall()
        return [self._stored(row) for row in rows]

    def _stored(self, row: tuple[Any, ...]) -> StoredCheckpoint:
        step = StepKey(*row[:3])
        parent_id, head_type, head, metadata, manifest_text = row[3:]
        try:
            manifest: dict[str, str] = dict(json.loads(manifest_text))
        except (TypeError, ValueError) as error:
            raise CorruptRowError(f"checkpoint {step.checkpoint_id}: its manifest is not JSON") from error
        return StoredCheckpoint(
            step=step,
            parent_id=parent_id,
            head=Blob(head_type, _unpacked(step, head)),
            metadata=metadata,
            manifest=manifest,
            writes=self._writes(step),
        )

    def latest_id(self, thread_id: str, checkpoint_ns: str) -> str | None:
        row = self._one(
            "SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?",
            thread_id, checkpoint_ns,
        )  # fmt: skip
        return None if row is None else row[0]

    def values(self, thread_id: str, value_ids: Sequence[str]) -> dict[str, Blob]:
        return sqlite_values.read_values(self._conn, thread_id, value_ids)

    def list_chain(self, thread_id: str, value_id: str) -> list[StoredList]:
        return sqlite_values.read_list_chain(self._conn, thread_id, value_id)

    def digests(self, thread_id: str, ids: Sequence[int]) -> dict[int, bytes]:
        return sqlite_values.read_digests(self._conn, thread_id, ids)

    def elements(self, thread_id: str, ids: Sequence[int]) -> dict[int, Blob]:
        return sqlite_values.read_elements(self._conn, thread_id, ids)

    def ancestor_writes(self, step: StepKey, channels: Sequence[str]) -> list[AncestorWrite]:
        return sqlite_values.read_ancestor_writes(self._conn, step, channels)

    def _writes(self, step: StepKey) -> list[StoredWrite]:
        return [
            StoredWrite(task_id, task_path, channel, Blob(type_, _unpacked(step, data)))
            for task_id, task_path, channel, type_, data in self._rows(
                f"SELECT task_id, task_path, channel, type, data FROM writes WHERE {THIS_STEP} "
                "ORDER BY task_path, task_id, idx",
                *step,
            )
        ]

    def staged(self, step: StepKey) -> list[StagedDraft]:
        return [
            StagedDraft(task_id, task_path, Draft.loads(draft))
            for task_id, task_path, draft in self._rows(
                f"SELECT task_id, task_path, draft FROM staged WHERE {THIS_STEP} AND {NOT_LANDED} "
                "ORDER BY task_path, task_id, ord",
                *step,
            )
        ]

    # -- items and the log --------------------------------------------------------------------------

    def item(self, namespace: Namespace, key: str, now: float) -> Record | None:
        row = self._one(
            f"SELECT {_ITEM} FROM items WHERE ns = ? AND key = ? AND {_LIVE}",
            encode_namespace(namespace), key, now,
        )  # fmt: skip
        return None if row is None else _record(row)

    def items(self, prefix: Sequence[str], now: float) -> Iterator[Record]:
        for row in self._rows(
            f"SELECT {_ITEM} FROM items WHERE ns >= ? AND ns < ? AND {_LIVE} ORDER BY seq DESC",
            *namespace_range(prefix), now,
        ):  # fmt: skip
            yield _record(row)

    def namespaces(self, prefix: Sequence[str], now: float) -> list[Namespace]:
        rows = self._rows(
            f"SELECT DISTINCT ns FROM items WHERE ns >= ? AND ns < ? AND {_LIVE}",
            *namespace_range(prefix), now,
        )  # fmt: skip
        return sorted(decode_namespace(ns) for (ns,) in rows)

    def expired(self, now: float) -> list[Record]:
        return [_record(row) for row in self._rows(f"SELECT {_ITEM} FROM items WHERE expires_at <= ?", now)]

    def log(
        self,
        *,
        namespace: Namespace | None = None,
        key: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[LogEntry]:
        where, parameters = ["seq > ?"], [after]  # type: tuple[list[str], list[Any]]
        if namespace is not None:
            where.append("ns = ?")
            parameters.append(encode_namespace(namespace))
        if key is not None:
            where.append("key = ?")
            parameters.append(key)
        rows = self._conn.execute(
            f"SELECT {_LOG} FROM facts WHERE {' AND '.join(where)} ORDER BY seq LIMIT ?",
            (*parameters, -1 if limit is None else limit),
        )
        return [_log_entry(row) for row in rows]

    def last_seq(self) -> int:
        row = self._one("SELECT coalesce(max(seq), 0) FROM facts")
        return int(row[0]) if row else 0

    # -- vectors ------------------------------------------------------------------------------------

    def embeddings(self, model: str, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for text_hash in hashes:
            row = self._one("SELECT vector FROM embeddings WHERE model = ? AND text_hash = ?", model, text_hash)
            if row is not None:
                found[text_hash] = row[0]
        return found

    def vector_count(self, index: str, prefix: Sequence[str], ceiling: int) -> int:
        row = self._one(
            "SELECT count(*) FROM (SELECT 1 FROM items JOIN vectors "
            "ON vectors.version = items.version AND vectors.index_name = ? WHERE ns >= ? AND ns < ? LIMIT ?)",
            index, *namespace_range(prefix), ceiling,
        )  # fmt: skip
        return int(row[0]) if row else 0

    def vectors(self, index: str, model: str, prefix: Sequence[str], now: float) -> Iterator[ScoredRow]:
        for row in self._rows(
            f"{_SCORED} WHERE items.ns >= ? AND items.ns < ? AND {_LIVE}",
            index, model, *namespace_range(prefix), now,
        ):  # fmt: skip
            yield _scored(row)

    def vectors_by_id(self, index: str, model: str, ids: Sequence[str], now: float) -> list[ScoredRow]:
        return [
            _scored(row)
            for row in self._rows(
                f"{_SCORED} WHERE items.version IN (SELECT version FROM vectors WHERE index_name = ? "
                f"AND vector_id IN (SELECT value FROM json_each(?))) AND {_LIVE}",
                index, model, index, json.dumps(list(ids)), now,
            )
        ]  # fmt: skip

    def vector_ids(self, index: str, after: int = 0) -> Iterator[str]:
        for (vector_id,) in self._rows(
            "SELECT vectors.vector_id FROM items JOIN vectors "
            "ON vectors.version = items.version AND vectors.index_name = ? WHERE items.seq > ?",
            index, after,
        ):  # fmt: skip
            yield vector_id

    def unindexed(self, index: str) -> list[tuple[Record, IndexPaths]]:
        rows = self._rows(
            f"SELECT {_ITEM}, (SELECT index_paths FROM facts WHERE facts.version = items.version) FROM items "
            "WHERE NOT EXISTS (SELECT 1 FROM vectors WHERE vectors.version = items.version AND index_name = ?)",
            index,
        )
        return [(_record(row), _paths(row[10])) for row in rows]

    def outbox(self, index: str, *, due: float | None, limit: int) -> list[OutboxRow]:
        return [
            OutboxRow(*row)
            for row in self._rows(
                "SELECT id, index_name, op, vector_id, version, attempts FROM outbox "
                "WHERE index_name = ?1 AND op <> 'embed' AND (?2 IS NULL OR retry_at <= ?2) ORDER BY id LIMIT ?3",
                index, due, limit,
            )
        ]  # fmt: skip

    def pending_upserts(self, index: str) -> list[str]:
        rows = self._rows("SELECT vector_id FROM outbox WHERE index_name = ? AND op = 'upsert'", index)
        return [vector_id for (vector_id,) in rows]

    def pending_deletes(self, index: str) -> int:
        row = self._one("SELECT count(*) FROM outbox WHERE index_name = ? AND op = 'delete'", index)
        return int(row[0]) if row else 0

    def to_embed(self, index: str, limit: int) -> list[tuple[int, Record | None, IndexPaths]]:
        rows = self._rows(
            f"SELECT {_ITEM}, outbox.id, (SELECT index_paths FROM facts WHERE facts.version = outbox.version) "
            "FROM outbox LEFT JOIN items ON items.version = outbox.version "
            "WHERE outbox.index_name = ? AND outbox.op = 'embed' AND retry_at IS NOT NULL ORDER BY outbox.id LIMIT ?",
            index,
            limit,
        )
        return [(row[10], None if row[2] is None else _record(row), _paths(row[11])) for row in rows]

    def upsert_rows(self, index: str, model: str, ids: Sequence[str]) -> dict[str, ScoredRow]:
        wanted = set(ids)
        return {
            row.vector_id: row._replace(paths=self._index_paths(row.record.version))
            for row in self.vectors_by_id(index, model, ids, now=0.0)
            if row.vector_id in wanted
        }

    def _index_paths(self, version: str) -> IndexPaths:
        row = self._one("SELECT index_paths FROM facts WHERE version = ?", version)
        return None if row is None else _paths(row[0])

    def prepared(self) -> list[PreparedRow]:
        return [
            PreparedRow(id_, index, tuple(json.loads(vector_ids)), owner, expires_at)
            for id_, index, vector_ids, owner, expires_at in self._rows(
                "SELECT id, index_name, vector_ids, owner, expires_at FROM prepared"
            )
        ]

    def index_meta(self, index: str) -> PutIndexMeta | None:
        row = self._one("SELECT name, model, dims, generation FROM indexes WHERE name = ?", index)
        return None if row is None else PutIndexMeta(*row)

    def counts(self) -> dict[str, int]:
        tables = (
            "checkpoints", "channel_values", "lists", "elements", "writes", "staged", "facts", "items", "vectors",
            "embeddings", "outbox", "prepared",
        )  # fmt: skip
        found = {}
        for table in tables:
            row = self._one(f"SELECT count(*) FROM {table}")
            found[table] = int(row[0]) if row else 0
        return found


def _unpacked(step: StepKey, stored: object) -> bytes:
    try:
        return unpacked(stored)
    except CorruptRowError as error:
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: {error}") from error


def _paths(text: str | None) -> IndexPaths:
    paths = None if text is None else json.loads(text)
    return tuple(paths) if isinstance(paths, list) else paths


def _record(row: Sequence[Any]) -> Record:
    ns, key, version, value, created_at, updated_at, seq, expires_at, ttl, type_ = row[:10]
    return Record(
        namespace=decode_namespace(ns),
        key=key,
        version=version,
        value=value,
        created_at=created_at,
        updated_at=updated_at,
        seq=seq,
        expires_at=expires_at,
        ttl=ttl,
        type=type_,
    )


def _scored(row: Sequence[Any]) -> ScoredRow:
    return ScoredRow(_record(row), *row[10:13])


def _log_entry(row: Sequence[Any]) -> LogEntry:
    seq, version, op, ns, key, value, *provenance, ts = row
    names = (
        "supersedes", "thread_id", "checkpoint_ns", "checkpoint_id", "task_id", "node", "run_id", "actor", "reason",
        "schema", "schema_version",
    )  # fmt: skip
    return LogEntry(
        seq=seq,
        version=version,
        op=op,
        namespace=decode_namespace(ns),
        key=key,
        value=None if value is None else decode_value(value),
        ts=datetime.fromtimestamp(ts, UTC),
        **dict(zip(names, provenance, strict=True)),
    )

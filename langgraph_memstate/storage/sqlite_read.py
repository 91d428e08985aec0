"""What a SQLite snapshot answers. Every value is bound; rows that no writer of ours wrote raise `CorruptRowError`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from langgraph_memstate.errors import CorruptRowError, FilterError
from langgraph_memstate.facts import (
    Draft,
    IndexPaths,
    LogEntry,
    Namespace,
    Origin,
    Record,
    decode_namespace,
    decode_value,
    encode_namespace,
    namespace_range,
)
from langgraph_memstate.storage.base import (
    Blob,
    OutboxRow,
    PreparedRow,
    PutIndexMeta,
    Reader,
    ScoredRow,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredHead,
    StoredWrite,
)
from langgraph_memstate.storage.sqlite_write import NOT_LANDED, THIS_STEP

_HEAD = "thread_id, checkpoint_ns, checkpoint_id, parent_id, seq, ts, head_type, head, metadata, manifest"
_ITEM = "items.ns, items.key, items.version, items.value, created_at, updated_at, items.seq, expires_at, ttl, type"
_VECTOR = "vectors.vector_id, vectors.ord, embeddings.vector"
_LIVE = "(items.expires_at IS NULL OR items.expires_at > :now)"
_UNDER = "items.ns >= :low AND items.ns < :high"
_SCORES = (
    "JOIN vectors ON vectors.version = items.version AND vectors.index_name = :index "
    "JOIN embeddings ON embeddings.model = :model AND embeddings.text_hash = vectors.text_hash"
)
_LOG = (
    "seq, version, op, ns, key, value, ts, created_at, index_paths, commit_id, supersedes, thread_id, checkpoint_ns, "
    "checkpoint_id, task_id, node, run_id, actor, reason, schema, schema_version, type, ttl, undoes"
)
_ORIGIN = frozenset(field.name for field in fields(Origin))
_PAST = (
    "(SELECT ns, key, version, value, created_at, ts AS updated_at, seq, ts + ttl * 60 AS expires_at, ttl, type "
    "FROM facts WHERE seq <= :seq AND value IS NOT NULL AND NOT EXISTS (SELECT 1 FROM facts AS later "
    "WHERE later.ns = facts.ns AND later.key = facts.key AND later.seq > facts.seq AND later.seq <= :seq)) AS items"
)


class SQLiteReader(Reader):
    """Reads of one open transaction. With `seq`, items are those of that moment."""

    def __init__(self, conn: sqlite3.Connection, seq: int | None = None) -> None:
        self._conn = conn
        self._seq = seq
        self._items = "items" if seq is None else _PAST

    def as_of(self, seq: int) -> SQLiteReader:
        return SQLiteReader(self._conn, seq)

    def _item_rows(self, query: str, **parameters: Any) -> Iterator[tuple[Any, ...]]:
        return iter(self._conn.execute(query, {**parameters, "seq": self._seq}))

    def _rows(self, query: str, *parameters: Any) -> Iterator[tuple[Any, ...]]:
        return iter(self._conn.execute(query, parameters))

    def _one(self, query: str, *parameters: Any) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._conn.execute(query, parameters).fetchone()
        return row

    # -- checkpoints --------------------------------------------------------------------------------

    def checkpoint(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> StoredCheckpoint | None:
        if checkpoint_id is not None:
            row = self._one(
                f"SELECT {_HEAD} FROM checkpoints WHERE {THIS_STEP}",
                thread_id, checkpoint_ns, checkpoint_id,
            )  # fmt: skip
        else:
            row = self._one(
                f"SELECT {_HEAD} FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ? "
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
            f"SELECT {_HEAD} FROM checkpoints "
            + (f"WHERE {' AND '.join(where)} " if where else "")
            + "ORDER BY checkpoint_id DESC, thread_id DESC, checkpoint_ns DESC LIMIT ?",
            (*parameters, limit),
        ).fetchall()
        return [self._stored(row) for row in rows]

    def ancestors(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> Iterator[StoredHead]:
        wanted = checkpoint_id
        if wanted is None:
            row = self._one(
                "SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?",
                thread_id, checkpoint_ns,
            )  # fmt: skip
            wanted = row[0] if row else None
        while wanted is not None:
            row = self._one(f"SELECT {_HEAD} FROM checkpoints WHERE {THIS_STEP}", thread_id, checkpoint_ns, wanted)
            if row is None:
                return
            yield _head(row)
            wanted = row[3]

    def checkpoint_namespaces(self, thread_id: str) -> list[str]:
        rows = self._rows("SELECT DISTINCT checkpoint_ns FROM checkpoints WHERE thread_id = ?", thread_id)
        return sorted(ns for (ns,) in rows)

    def _stored(self, row: tuple[Any, ...]) -> StoredCheckpoint:
        head = _head(row)
        return StoredCheckpoint(
            **{field.name: getattr(head, field.name) for field in fields(StoredHead)},
            values=self._values(head.step, head.manifest),
            writes=self._writes(head.step),
        )

    def _values(self, step: StepKey, manifest: Mapping[str, str]) -> dict[str, Blob]:
        found = {
            value_id: Blob(type_, data)
            for value_id, type_, data in self._rows(
                "SELECT value_id, type, data FROM channel_values "
                "WHERE thread_id = ? AND value_id IN (SELECT value FROM json_each(?))",
                step.thread_id, json.dumps(list(manifest.values())),
            )
        }  # fmt: skip
        missing = [channel for channel, value_id in manifest.items() if value_id not in found]
        if missing:
            raise CorruptRowError(f"checkpoint {step.checkpoint_id} lost the value of {missing}")
        return {channel: found[value_id] for channel, value_id in manifest.items()}

    def _writes(self, step: StepKey) -> list[StoredWrite]:
        return [
            StoredWrite(task_id, task_path, channel, Blob(type_, data))
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
        rows = self._item_rows(
            f"SELECT {_ITEM} FROM {self._items} WHERE items.ns = :ns AND items.key = :key AND {_LIVE}",
            ns=encode_namespace(namespace), key=key, now=now,
        )  # fmt: skip
        return next(map(_record, rows), None)

    def items(self, prefix: Sequence[str], now: float) -> Iterator[Record]:
        yield from map(
            _record,
            self._item_rows(
                f"SELECT {_ITEM} FROM {self._items} WHERE {_UNDER} AND {_LIVE} ORDER BY items.seq DESC",
                now=now, **_range(prefix),
            ),
        )  # fmt: skip

    def namespaces(self, prefix: Sequence[str], now: float) -> list[Namespace]:
        rows = self._item_rows(
            f"SELECT DISTINCT items.ns FROM {self._items} WHERE {_UNDER} AND {_LIVE}", now=now, **_range(prefix)
        )
        return sorted(decode_namespace(ns) for (ns,) in rows)

    def expired(self, now: float) -> list[Record]:
        return [_record(row) for row in self._rows(f"SELECT {_ITEM} FROM items WHERE expires_at <= ?", now)]

    def log(
        self,
        *,
        prefix: Namespace = (),
        key: str | None = None,
        origin: Mapping[str, str] | None = None,
        after: int = 0,
        until: int | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[LogEntry]:
        equal = {**(origin or {})} if key is None else {"key": key, **(origin or {})}
        if unknown := equal.keys() - _ORIGIN - {"key"}:
            raise FilterError(f"the log has no {sorted(unknown)}; it can be asked for {sorted(_ORIGIN)}")
        rows = self._conn.execute(
            f"SELECT {_LOG} FROM facts WHERE seq > :after AND (:until IS NULL OR seq <= :until) "
            + ("AND ns >= :low AND ns < :high " if prefix else "")
            + "".join(f"AND {column} = :{column} " for column in equal)
            + f"ORDER BY seq {'DESC' if newest_first else 'ASC'} LIMIT :limit",
            {**equal, **_range(prefix), "after": after, "until": until, "limit": -1 if limit is None else limit},
        )
        yield from map(_log_entry, rows)

    def versions(self, namespace: Namespace, key: str) -> Iterator[LogEntry]:
        yield from map(
            _log_entry,
            self._rows(
                f"SELECT {_LOG} FROM facts WHERE ns = ? AND key = ? ORDER BY seq DESC", encode_namespace(namespace), key
            ),
        )

    def seq_at(self, ts: float) -> int:
        row = self._one("SELECT coalesce(max(seq), 0) FROM facts WHERE committed_at <= ?", ts)
        return int(row[0]) if row else 0

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
        yield from map(
            _scored,
            self._item_rows(
                f"SELECT {_ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {_UNDER} AND {_LIVE}",
                index=index, model=model, now=now, **_range(prefix),
            ),
        )  # fmt: skip

    def vectors_by_id(self, index: str, model: str, ids: Sequence[str], now: float) -> list[ScoredRow]:
        wanted = (
            "SELECT version FROM vectors WHERE index_name = :index AND vector_id IN (SELECT value FROM json_each(:ids))"
        )
        rows = self._item_rows(
            f"SELECT {_ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {_LIVE} AND items.version IN ({wanted})",
            index=index, model=model, ids=json.dumps(list(ids)), now=now,
        )  # fmt: skip
        return list(map(_scored, rows))

    def vector_ids(self, index: str, after: int = 0) -> Iterator[str]:
        for (vector_id,) in self._rows(
            "SELECT vectors.vector_id FROM items JOIN vectors "
            "ON vectors.version = items.version AND vectors.index_name = ? WHERE items.seq > ?",
            index, after,
        ):  # fmt: skip
            yield vector_id

    def vectors_of(self, versions: Sequence[str]) -> int:
        row = self._one(
            "SELECT count(*) FROM vectors WHERE version IN (SELECT value FROM json_each(?))", json.dumps(list(versions))
        )
        return int(row[0]) if row else 0

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
            "checkpoints", "channel_values", "writes", "staged", "facts", "items", "vectors", "embeddings",
            "outbox", "prepared",
        )  # fmt: skip
        found = {}
        for table in tables:
            row = self._one(f"SELECT count(*) FROM {table}")
            found[table] = int(row[0]) if row else 0
        return found


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
    seq, version, op, ns, key, value, ts, created_at, index_paths, *rest = row
    names = (
        "commit_id", "supersedes", "thread_id", "checkpoint_ns", "checkpoint_id", "task_id", "node", "run_id", "actor",
        "reason", "schema", "schema_version", "type", "ttl", "undoes",
    )  # fmt: skip
    return LogEntry(
        seq=seq,
        version=version,
        op=op,
        namespace=decode_namespace(ns),
        key=key,
        value=None if value is None else decode_value(value),
        ts=datetime.fromtimestamp(ts, UTC),
        created_at=None if created_at is None else datetime.fromtimestamp(created_at, UTC),
        index=_paths(index_paths),
        **dict(zip(names, rest, strict=True)),
    )


def _head(row: Sequence[Any]) -> StoredHead:
    step = StepKey(*row[:3])
    parent_id, seq, ts, head_type, head, metadata, manifest_text = row[3:]
    try:
        manifest: dict[str, str] = dict(json.loads(manifest_text))
    except (TypeError, ValueError) as error:
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: its manifest is not JSON") from error
    return StoredHead(step, parent_id, seq, ts, Blob(head_type, head), metadata, manifest)


def _range(prefix: Sequence[str]) -> dict[str, str]:
    low, high = namespace_range(prefix)
    return {"low": low, "high": high}

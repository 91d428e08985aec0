"""What a SQLite snapshot answers. Every value is bound; rows that no writer of ours wrote raise `CorruptRowError`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
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
    encode_namespace,
    namespace_range,
)
from langgraph_memstate.filters import Condition
from langgraph_memstate.storage import sqlite_rows, sqlite_values
from langgraph_memstate.storage.base import COUNTED, Reader
from langgraph_memstate.storage.checks import makes_claim
from langgraph_memstate.storage.operations import PutIndexMeta
from langgraph_memstate.storage.packing import unpacked
from langgraph_memstate.storage.rows import COLUMNS, ITEM, LOG, load_paths, log_entry_of, record_of, scored_of
from langgraph_memstate.storage.sqlite_checks import sought
from langgraph_memstate.storage.sqlite_write import NOT_LANDED, THIS_STEP
from langgraph_memstate.storage.tables import Row
from langgraph_memstate.storage.values import (
    AncestorWrite,
    Blob,
    Claim,
    OutboxRow,
    PreparedRow,
    ScoredRow,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredHead,
    StoredList,
    StoredWrite,
    VectorMark,
)

_HEAD = "thread_id, checkpoint_ns, checkpoint_id, parent_id, seq, ts, head_type, head, metadata, manifest"
_VECTOR = "vectors.vector_id, vectors.ord, embeddings.vector"
_LIVE = "(items.expires_at IS NULL OR items.expires_at > :now)"
_UNDER = "items.ns >= :low AND items.ns < :high"
_SCORES = (
    "JOIN vectors ON vectors.version = items.version AND vectors.index_name = :index "
    "JOIN embeddings ON embeddings.model = :model AND embeddings.text_hash = vectors.text_hash"
)
# Hops from one namespace to the next along the primary key, past all items between.
_NAMESPACES = (
    "WITH RECURSIVE found (ns) AS (SELECT min(ns) FROM items WHERE ns >= :low AND ns < :high UNION ALL "
    "SELECT (SELECT min(ns) FROM items WHERE ns > found.ns AND ns < :high) FROM found WHERE found.ns IS NOT NULL) "
    f"SELECT ns FROM found WHERE EXISTS (SELECT 1 FROM items WHERE items.ns = found.ns AND {_LIVE})"
)
_MANY = 2_000  # items of a prefix, from which on its latest are looked for before all of them are sorted
_RECENT = 50_000  # sequences that are looked through for that: some milliseconds, if it was in vain
_COMPARISONS = {"=": "=", ">=": ">=", "<=": "<="}
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

    def meta(self, key: str) -> str | None:
        """What the database says of itself."""
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else str(row[0])

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

    def heads(self, thread_id: str, checkpoint_ns: str) -> Iterator[StoredHead]:
        rows = self._rows(
            f"SELECT {_HEAD} FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ? ORDER BY checkpoint_id DESC",
            thread_id, checkpoint_ns,
        )  # fmt: skip
        yield from map(_head, rows)

    def checkpoint_namespaces(self, thread_id: str) -> list[str]:
        rows = self._rows("SELECT DISTINCT checkpoint_ns FROM checkpoints WHERE thread_id = ?", thread_id)
        return sorted(ns for (ns,) in rows)

    def _stored(self, row: tuple[Any, ...]) -> StoredCheckpoint:
        step = StepKey(*row[:3])
        return StoredCheckpoint(*_head_fields(row), writes=self._writes(step))

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
            StoredWrite(task_id, task_path, channel, Blob(type_, _unpacked(step, data)), idx)
            for task_id, task_path, channel, type_, data, idx in self._rows(
                f"SELECT task_id, task_path, channel, type, data, idx FROM writes WHERE {THIS_STEP} "
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
            f"SELECT {ITEM} FROM {self._items} WHERE items.ns = :ns AND items.key = :key AND {_LIVE}",
            ns=encode_namespace(namespace), key=key, now=now,
        )  # fmt: skip
        return next(map(record_of, rows), None)

    def items(self, prefix: Sequence[str], now: float, conditions: Sequence[Condition] = ()) -> Iterator[Record]:
        also, operands = _narrowed(conditions)
        wanted = f"{_UNDER} AND {_LIVE} {also}"
        recent = self._recent(prefix) if self._seq is None else None
        if recent is None:
            queries = [f"SELECT {ITEM} FROM {self._items} WHERE {wanted} ORDER BY items.seq DESC"]
        else:
            queries = [
                f"SELECT {ITEM} FROM items INDEXED BY items_by_seq WHERE items.seq > :recent AND {wanted} "
                "ORDER BY items.seq DESC",
                f"SELECT {ITEM} FROM items WHERE +items.seq <= :recent AND {wanted} ORDER BY +items.seq DESC",
            ]
        for query in queries:
            yield from map(record_of, self._item_rows(query, now=now, recent=recent, **_range(prefix), **operands))

    def _recent(self, prefix: Sequence[str]) -> int | None:
        """The sequence after which to look first for the latest items of a prefix that has many: all need sorting."""
        ((many, last),) = self._item_rows(
            f"SELECT (SELECT count(*) FROM (SELECT 1 FROM items WHERE {_UNDER} LIMIT {_MANY})) = {_MANY}, "
            "(SELECT max(seq) FROM items)", **_range(prefix),
        )  # fmt: skip
        return last - _RECENT if many else None

    def namespaces(self, prefix: Sequence[str], now: float) -> list[Namespace]:
        past = f"SELECT DISTINCT items.ns FROM {_PAST} WHERE {_UNDER} AND {_LIVE}"
        rows = self._item_rows(_NAMESPACES if self._seq is None else past, now=now, **_range(prefix))
        return sorted(decode_namespace(ns) for (ns,) in rows)

    def expired(self, now: float) -> list[Record]:
        return [record_of(row) for row in self._rows(f"SELECT {ITEM} FROM items WHERE expires_at <= ?", now)]

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
            f"SELECT {LOG} FROM facts WHERE seq > :after AND (:until IS NULL OR seq <= :until) "
            + ("AND ns >= :low AND ns < :high " if prefix else "")
            + "".join(f"AND {column} = :{column} " for column in equal)
            + f"ORDER BY seq {'DESC' if newest_first else 'ASC'} LIMIT :limit",
            {**equal, **_range(prefix), "after": after, "until": until, "limit": -1 if limit is None else limit},
        )
        yield from map(log_entry_of, rows)

    def versions(self, namespace: Namespace, key: str) -> Iterator[LogEntry]:
        yield from map(
            log_entry_of,
            self._rows(
                f"SELECT {LOG} FROM facts WHERE ns = ? AND key = ? ORDER BY seq DESC", encode_namespace(namespace), key
            ),
        )

    def seq_at(self, ts: float) -> int:
        row = self._one("SELECT coalesce(max(seq), 0) FROM facts WHERE committed_at <= ?", ts)
        return int(row[0]) if row else 0

    def draft(self, version: str) -> Draft | None:
        row = self._one(
            "SELECT ns, key, op, value, type, index_paths, ttl, schema, schema_version, ts, thread_id, checkpoint_ns, "
            "checkpoint_id, task_id, node, run_id, actor, reason FROM facts WHERE version = ?",
            version,
        )
        if row is None:
            return None
        ns, key, op, value, type_, paths, ttl, schema, number, ts, *origin = row
        return Draft(
            version, decode_namespace(ns), key, op, value, type=type_, index=load_paths(paths), ttl=ttl, schema=schema,
            schema_version=number, ts=ts, origin=Origin(*origin),
        )  # fmt: skip

    def holders(self, claim: Claim, now: float) -> list[Record]:
        where, bound = sought(claim, now)
        found = map(record_of, self._item_rows(f"SELECT {ITEM} FROM {self._items} WHERE {where}", **bound))
        return [record for record in found if makes_claim(claim, record.namespace, record.type, record.value)]

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
            scored_of,
            self._item_rows(
                f"SELECT {ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {_UNDER} AND {_LIVE}",
                index=index, model=model, now=now, **_range(prefix),
            ),
        )  # fmt: skip

    def vectors_by_id(self, index: str, model: str, ids: Sequence[str], now: float) -> list[ScoredRow]:
        wanted = (
            "SELECT version FROM vectors WHERE index_name = :index AND vector_id IN (SELECT value FROM json_each(:ids))"
        )
        rows = self._item_rows(
            f"SELECT {ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {_LIVE} AND items.version IN ({wanted})",
            index=index, model=model, ids=json.dumps(list(ids)), now=now,
        )  # fmt: skip
        return list(map(scored_of, rows))

    def vector_ids(self, index: str, after: int = 0) -> Iterator[str]:
        for (vector_id,) in self._rows(
            "SELECT vectors.vector_id FROM items JOIN vectors "
            "ON vectors.version = items.version AND vectors.index_name = ? WHERE items.seq > ?",
            index, after,
        ):  # fmt: skip
            yield vector_id

    def vector_mark(self) -> VectorMark:
        row = self._one(
            "SELECT (SELECT coalesce(max(seq), 0) FROM facts), (SELECT coalesce(max(id), 0) FROM vectors), "
            "(SELECT CAST(coalesce(max(value), 0) AS INTEGER) FROM meta WHERE key = 'erasures')"
        )
        assert row is not None
        return VectorMark(*row)

    def vector_bytes(self, index: str, model: str, ceiling: int) -> int:
        row = self._one("SELECT dims * 4 FROM indexes WHERE name = ? AND model = ?", index, model)
        each = int(row[0]) if row else 4
        return each * self.vector_count(index, (), ceiling // each + 1)

    def new_vectors(self, index: str, model: str, after: int) -> Iterator[tuple[str, str, bytes]]:
        return self._rows(
            "SELECT items.ns, items.version, embeddings.vector FROM vectors "
            "JOIN items ON items.version = vectors.version "
            "JOIN embeddings ON embeddings.model = ? AND embeddings.text_hash = vectors.text_hash "
            "WHERE vectors.index_name = ? AND vectors.id > ?",
            model, index, after,
        )  # fmt: skip

    def superseded(self, after: int) -> Iterator[str]:
        rows = self._rows("SELECT supersedes FROM facts WHERE seq > ? AND supersedes IS NOT NULL", after)
        return (version for (version,) in rows)

    def records(self, versions: Sequence[str], now: float) -> list[Record]:
        rows = self._item_rows(
            f"SELECT {ITEM} FROM {self._items} WHERE {_LIVE} "
            "AND items.version IN (SELECT value FROM json_each(:versions))",
            versions=json.dumps(list(versions)), now=now,
        )  # fmt: skip
        return list(map(record_of, rows))

    def vectors_of(self, versions: Sequence[str]) -> int:
        row = self._one(
            "SELECT count(*) FROM vectors WHERE version IN (SELECT value FROM json_each(?))", json.dumps(list(versions))
        )
        return int(row[0]) if row else 0

    def unindexed(self, index: str) -> list[tuple[Record, IndexPaths]]:
        rows = self._rows(
            f"SELECT {ITEM}, (SELECT index_paths FROM facts WHERE facts.version = items.version) FROM items "
            "WHERE NOT EXISTS (SELECT 1 FROM vectors WHERE vectors.version = items.version AND index_name = ?)",
            index,
        )
        return [(record_of(row), load_paths(row[COLUMNS])) for row in rows]

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
            f"SELECT {ITEM}, outbox.id, (SELECT index_paths FROM facts WHERE facts.version = outbox.version) "
            "FROM outbox LEFT JOIN items ON items.version = outbox.version "
            "WHERE outbox.index_name = ? AND outbox.op = 'embed' AND retry_at IS NOT NULL ORDER BY outbox.id LIMIT ?",
            index,
            limit,
        )
        return [
            (id_, None if row[2] is None else record_of(row), load_paths(paths))
            for row, id_, paths in ((row[:COLUMNS], *row[COLUMNS:]) for row in rows)
        ]

    def upsert_rows(self, index: str, model: str, ids: Sequence[str]) -> dict[str, ScoredRow]:
        wanted = set(ids)
        return {
            row.vector_id: row._replace(paths=self._index_paths(row.record.version))
            for row in self.vectors_by_id(index, model, ids, now=0.0)
            if row.vector_id in wanted
        }

    def _index_paths(self, version: str) -> IndexPaths:
        row = self._one("SELECT index_paths FROM facts WHERE version = ?", version)
        return None if row is None else load_paths(row[0])

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
        return {table: self._number(f"SELECT count(*) FROM {table}") for table in COUNTED}

    def sizes(self) -> dict[str, int]:
        found = {}
        for table in COUNTED:
            columns = (name for (name,) in self._rows("SELECT name FROM pragma_table_info(?)", table))
            lengths = " + ".join(f'coalesce(length(CAST("{column}" AS BLOB)), 0)' for column in columns)
            found[table] = self._number(f"SELECT coalesce(sum({lengths}), 0) FROM {table}")
        found["total"] = self._number("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
        return found

    def _number(self, query: str) -> int:
        row = self._one(query)
        return int(row[0]) if row else 0

    def dump(self, table: str) -> Iterator[Row]:
        return sqlite_rows.dump(self._conn, table)


def _unpacked(step: StepKey, stored: object) -> bytes:
    try:
        return unpacked(stored)
    except CorruptRowError as error:
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: {error}") from error


def _head(row: Sequence[Any]) -> StoredHead:
    return StoredHead(*_head_fields(row))


def _head_fields(row: Sequence[Any]) -> tuple[StepKey, str | None, int, str, Blob, str, dict[str, str]]:
    step = StepKey(*row[:3])
    parent_id, seq, ts, head_type, head, metadata, manifest_text = row[3:]
    try:
        manifest: dict[str, str] = dict(json.loads(manifest_text))
    except (TypeError, ValueError) as error:
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: its manifest is not JSON") from error
    return step, parent_id, seq, ts, Blob(head_type, _unpacked(step, head)), metadata, manifest


def _narrowed(conditions: Sequence[Condition]) -> tuple[str, dict[str, Any]]:
    """The conditions in SQL, in which neither a path nor an operand is part of the text, and what is bound to it."""
    clauses: list[str] = []
    operands: dict[str, Any] = {}
    for number, (path, operator, operand) in enumerate(conditions):
        clauses.append(f"AND json_extract(items.value, :path{number}) {_COMPARISONS[operator]} :operand{number}")
        operands[f"path{number}"] = "$" + "".join(f'."{field}"' for field in path)
        operands[f"operand{number}"] = operand
    return " ".join(clauses), operands


def _range(prefix: Sequence[str]) -> dict[str, str]:
    low, high = namespace_range(prefix)
    return {"low": low, "high": high}

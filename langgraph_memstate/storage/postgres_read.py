"""What a PostgreSQL snapshot answers. Every value is bound; rows that no writer of ours wrote raise `CorruptRowError`.

Answers that may be long come through a cursor of the server, in chunks that grow, so that a reader who stops early
pays for little, and one who wants everything does not wait for every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import count
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
from langgraph_memstate.storage import postgres_rows
from langgraph_memstate.storage import postgres_values as values
from langgraph_memstate.storage.base import COUNTED, Reader
from langgraph_memstate.storage.checks import makes_claim
from langgraph_memstate.storage.operations import PutIndexMeta
from langgraph_memstate.storage.packing import unpacked
from langgraph_memstate.storage.postgres_checks import narrowed, sought
from langgraph_memstate.storage.postgres_claims import HELD
from langgraph_memstate.storage.postgres_link import Connection, Cursor, run
from langgraph_memstate.storage.postgres_vectors import VectorTables, neighbours
from langgraph_memstate.storage.postgres_write import NOT_LANDED, THIS_STEP
from langgraph_memstate.storage.rows import COLUMNS, ITEM, LOG, load_paths, log_entry_of, record_of, scored_of
from langgraph_memstate.storage.tables import Row
from langgraph_memstate.storage.values import (
    AncestorWrite,
    Blob,
    Claim,
    Nearest,
    Neighbours,
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

_HEAD = "thread_id, checkpoint_ns, checkpoint_id, parent_id, seq, ts, head_type, head, metadata, channels, value_ids"
_WRITES, _BY_TASK = (
    "SELECT task_id, task_path, channel, type, data, idx FROM writes WHERE ",
    " ORDER BY task_path, task_id, idx",
)
_STAGED, _BY_TASK_ORD = (
    f"SELECT task_id, task_path, draft FROM staged WHERE {NOT_LANDED} AND ",
    " ORDER BY task_path, task_id, ord",
)
_VECTOR = "vectors.vector_id, vectors.ord, embeddings.vector"
_LIVE = "(items.expires_at IS NULL OR items.expires_at > %(now)s)"
_UNDER = "items.ns >= %(low)s AND items.ns < %(high)s"
_SCORES = (
    "JOIN vectors ON vectors.version = items.version AND vectors.index_name = %(index)s "
    "JOIN embeddings ON embeddings.model = %(model)s AND embeddings.text_hash = vectors.text_hash"
)
# Hops from one namespace to the next along the primary key, past all items between.
_NAMESPACES = (
    "WITH RECURSIVE found (ns) AS (SELECT min(ns) FROM items WHERE ns >= %(low)s AND ns < %(high)s UNION ALL "
    "SELECT (SELECT min(ns) FROM items WHERE ns > found.ns AND ns < %(high)s) FROM found WHERE found.ns IS NOT NULL) "
    f"SELECT ns FROM found WHERE EXISTS (SELECT 1 FROM items WHERE items.ns = found.ns AND {_LIVE})"
)
_ORIGIN = frozenset(field.name for field in fields(Origin))
_PAST = (
    "(SELECT ns, key, version, value, created_at, ts AS updated_at, seq, ts + ttl * 60 AS expires_at, ttl, type, "
    "CASE WHEN position('\\u0000' IN value) > 0 THEN NULL ELSE value::jsonb END AS doc "
    "FROM facts WHERE seq <= %(seq)s AND value IS NOT NULL AND NOT EXISTS (SELECT 1 FROM facts AS later "
    "WHERE later.ns = facts.ns AND later.key = facts.key AND later.seq > facts.seq AND later.seq <= %(seq)s)) AS items"
)
_FIRST_CHUNK, _LARGEST_CHUNK = 50, 5_000  # rows
_MOVED_CHUNK = 500  # of any size
_MOST_ROWS = 2**62

_cursors = count(1)


class PostgresReader(Reader):
    """Reads of one open transaction. With `seq`, items are those of that moment."""

    def __init__(self, conn: Connection, tables: VectorTables, me: str, seq: int | None = None) -> None:
        self._conn = conn
        self._tables = tables
        self._me = me
        self._seq = seq
        self._staged: tuple[StepKey, Cursor] | None = None  # asked for already
        self._items = "items" if seq is None else _PAST

    def as_of(self, seq: int) -> PostgresReader:
        return PostgresReader(self._conn, self._tables, self._me, seq)

    def _item_rows(self, query: str, **parameters: Any) -> Iterator[tuple[Any, ...]]:
        return iter(run(self._conn, query, **parameters, seq=self._seq))

    def _rows(self, query: str, *parameters: Any) -> Iterator[tuple[Any, ...]]:
        return iter(run(self._conn, query, *parameters))

    def _one(self, query: str, *parameters: Any) -> tuple[Any, ...] | None:
        return run(self._conn, query, *parameters).fetchone()

    def _stream(self, query: str, largest: int = _LARGEST_CHUNK, /, **parameters: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query that may have many, in chunks."""
        name = f"rows_{next(_cursors)}"
        chunk = _FIRST_CHUNK
        run(self._conn, f"DECLARE {name} NO SCROLL CURSOR FOR {query}", **parameters)
        rows = run(self._conn, f"FETCH {chunk} FROM {name}").fetchall()
        while True:
            yield from rows
            if len(rows) < chunk:
                run(self._conn, f"CLOSE {name}")
                return
            chunk = min(chunk * 4, largest)
            rows = run(self._conn, f"FETCH {chunk} FROM {name}").fetchall()

    # -- checkpoints --------------------------------------------------------------------------------

    def checkpoint(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> StoredCheckpoint | None:
        step: tuple[str, ...] = (thread_id, checkpoint_ns)
        of_step = "thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = "
        if checkpoint_id is not None:
            step, of_step = (*step, checkpoint_id), of_step + "%s"
        else:
            of_step += (
                "(SELECT max(checkpoint_id) FROM checkpoints AS every "
                "WHERE every.thread_id = %s AND every.checkpoint_ns = %s)"
            )
            step *= 2
        found = run(self._conn, f"SELECT {_HEAD} FROM checkpoints WHERE {of_step}", *step)
        writes = run(self._conn, _WRITES + of_step + _BY_TASK, *step)
        staged = run(self._conn, _STAGED + of_step + _BY_TASK_ORD, *step)  # who goes on from here asks for it next
        if (row := found.fetchone()) is None:
            return None
        head = _head(row)
        self._staged = (head.step, staged)
        return _with_writes(head, writes)

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
        where = [f"{column} = %s" for column, value in wanted.items() if value is not None]
        parameters: list[Any] = [value for value in wanted.values() if value is not None]
        if isinstance(before, tuple):
            where.append("(checkpoint_id, thread_id, checkpoint_ns) < (%s, %s, %s)")
            parameters.extend(before)
        elif before is not None:
            where.append("checkpoint_id < %s")
            parameters.append(before)
        rows = self._rows(
            f"SELECT {_HEAD} FROM checkpoints "
            + (f"WHERE {' AND '.join(where)} " if where else "")
            + "ORDER BY checkpoint_id DESC, thread_id DESC, checkpoint_ns DESC LIMIT %s",
            *parameters,
            _rows_at_most(limit),
        )
        heads = [_head(row) for row in rows]
        writes = [run(self._conn, _WRITES + THIS_STEP + _BY_TASK, *head.step) for head in heads]
        return [_with_writes(head, asked) for head, asked in zip(heads, writes, strict=True)]

    def ancestors(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> Iterator[StoredHead]:
        wanted = checkpoint_id
        if wanted is None:
            row = self._one(
                "SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s",
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
        rows = self._stream(
            f"SELECT {_HEAD} FROM checkpoints WHERE thread_id = %(thread)s AND checkpoint_ns = %(ns)s "
            "ORDER BY checkpoint_id DESC",
            thread=thread_id, ns=checkpoint_ns,
        )  # fmt: skip
        yield from map(_head, rows)

    def checkpoint_namespaces(self, thread_id: str) -> list[str]:
        rows = self._rows("SELECT DISTINCT checkpoint_ns FROM checkpoints WHERE thread_id = %s", thread_id)
        return sorted(ns for (ns,) in rows)

    def latest_id(self, thread_id: str, checkpoint_ns: str) -> str | None:
        row = self._one(
            "SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s",
            thread_id, checkpoint_ns,
        )  # fmt: skip
        return None if row is None else row[0]

    def values(self, thread_id: str, value_ids: Sequence[str]) -> dict[str, Blob]:
        return values.read_values(self._conn, thread_id, value_ids)

    def list_chain(self, thread_id: str, value_id: str) -> list[StoredList]:
        return values.read_list_chain(self._conn, thread_id, value_id)

    def digests(self, thread_id: str, ids: Sequence[int]) -> dict[int, bytes]:
        return values.read_digests(self._conn, thread_id, ids)

    def elements(self, thread_id: str, ids: Sequence[int]) -> dict[int, Blob]:
        return values.read_elements(self._conn, thread_id, ids)

    def ancestor_writes(self, step: StepKey, channels: Sequence[str]) -> list[AncestorWrite]:
        return values.read_ancestor_writes(self._conn, step, channels)

    def staged(self, step: StepKey) -> list[StagedDraft]:
        asked, rows = self._staged or (None, None)
        if rows is None or asked != step:
            rows = run(self._conn, _STAGED + THIS_STEP + _BY_TASK_ORD, *step)
        self._staged = None
        return [StagedDraft(task_id, task_path, Draft.loads(draft)) for task_id, task_path, draft in rows]

    # -- items and the log --------------------------------------------------------------------------

    def item(self, namespace: Namespace, key: str, now: float) -> Record | None:
        rows = self._item_rows(
            f"SELECT {ITEM} FROM {self._items} WHERE items.ns = %(ns)s AND items.key = %(key)s AND {_LIVE}",
            ns=encode_namespace(namespace), key=key, now=now,
        )  # fmt: skip
        return next(map(record_of, rows), None)

    def items(self, prefix: Sequence[str], now: float, conditions: Sequence[Condition] = ()) -> Iterator[Record]:
        also, bound = narrowed(conditions)
        rows = self._stream(
            f"SELECT {ITEM} FROM {self._items} WHERE {_UNDER} AND {_LIVE} {also} ORDER BY items.seq DESC",
            now=now, seq=self._seq, **_range(prefix), **bound,
        )  # fmt: skip
        yield from map(record_of, rows)

    def namespaces(self, prefix: Sequence[str], now: float) -> list[Namespace]:
        past = f"SELECT DISTINCT items.ns FROM {_PAST} WHERE {_UNDER} AND {_LIVE}"
        rows = self._item_rows(_NAMESPACES if self._seq is None else past, now=now, **_range(prefix))
        return sorted(decode_namespace(ns) for (ns,) in rows)

    def expired(self, now: float) -> list[Record]:
        return [record_of(row) for row in self._rows(f"SELECT {ITEM} FROM items WHERE expires_at <= %s", now)]

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
        where = ["seq > %(after)s", *(f"{column} = %({column})s" for column in equal)]
        if until is not None:
            where.append("seq <= %(until)s")
        if prefix:
            where.append("ns >= %(low)s AND ns < %(high)s")
        rows = self._stream(
            f"SELECT {LOG} FROM facts WHERE {' AND '.join(where)} ORDER BY seq {'DESC' if newest_first else 'ASC'} "
            "LIMIT %(limit)s",
            **equal, **_range(prefix), after=after, until=until, limit=None if limit is None else _rows_at_most(limit),
        )  # fmt: skip
        yield from map(log_entry_of, rows)

    def versions(self, namespace: Namespace, key: str) -> Iterator[LogEntry]:
        rows = self._stream(
            f"SELECT {LOG} FROM facts WHERE ns = %(ns)s AND key = %(key)s ORDER BY seq DESC",
            ns=encode_namespace(namespace), key=key,
        )  # fmt: skip
        yield from map(log_entry_of, rows)

    def seq_at(self, ts: float) -> int:
        row = self._one("SELECT coalesce(max(seq), 0) FROM facts WHERE committed_at <= %s", ts)
        return int(row[0]) if row else 0

    def draft(self, version: str) -> Draft | None:
        row = self._one(
            "SELECT ns, key, op, value, type, index_paths, ttl, schema, schema_version, ts, thread_id, checkpoint_ns, "
            "checkpoint_id, task_id, node, run_id, actor, reason FROM facts WHERE version = %s",
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
        query = "SELECT text_hash, vector FROM embeddings WHERE model = %s AND text_hash = ANY(%s::bytea[])"
        return dict(run(self._conn, query, model, list(hashes)).fetchall())

    def vector_count(self, index: str, prefix: Sequence[str], ceiling: int) -> int:
        row = self._one(
            "SELECT count(*) FROM (SELECT 1 FROM items JOIN vectors "
            "ON vectors.version = items.version AND vectors.index_name = %s "
            "WHERE ns >= %s AND ns < %s LIMIT %s) AS found",
            index, *namespace_range(prefix), ceiling,
        )  # fmt: skip
        return int(row[0]) if row else 0

    def vectors(self, index: str, model: str, prefix: Sequence[str], now: float) -> Iterator[ScoredRow]:
        yield from map(
            scored_of,
            self._stream(
                f"SELECT {ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {_UNDER} AND {_LIVE}",
                index=index, model=model, now=now, seq=self._seq, **_range(prefix),
            ),
        )  # fmt: skip

    def vectors_by_id(self, index: str, model: str, ids: Sequence[str], now: float) -> list[ScoredRow]:
        wanted = "SELECT version FROM vectors WHERE index_name = %(index)s AND vector_id = ANY(%(ids)s::text[])"
        rows = self._item_rows(
            f"SELECT {ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {_LIVE} AND items.version IN ({wanted})",
            index=index, model=model, ids=list(ids), now=now,
        )  # fmt: skip
        return list(map(scored_of, rows))

    def nearest(self, question: Nearest) -> Neighbours | None:
        return neighbours(self._conn, self._tables, question) if self._seq is None else None

    def vector_ids(self, index: str, after: int = 0) -> Iterator[str]:
        rows = self._stream(
            "SELECT vectors.vector_id FROM items JOIN vectors "
            "ON vectors.version = items.version AND vectors.index_name = %(index)s WHERE items.seq > %(after)s",
            index=index, after=after,
        )  # fmt: skip
        return (vector_id for (vector_id,) in rows)

    def vector_mark(self) -> VectorMark:
        row = self._one(
            "SELECT (SELECT coalesce(max(seq), 0) FROM facts), (SELECT coalesce(max(id), 0) FROM vectors), "
            "(SELECT coalesce(max(value), '0')::bigint FROM meta WHERE key = 'erasures')"
        )
        assert row is not None
        return VectorMark(*row)

    def vector_bytes(self, index: str, model: str, ceiling: int) -> int:
        row = self._one("SELECT dims * 4 FROM indexes WHERE name = %s AND model = %s", index, model)
        each = int(row[0]) if row else 4
        return each * self.vector_count(index, (), ceiling // each + 1)

    def new_vectors(self, index: str, model: str, after: int) -> Iterator[tuple[str, str, bytes]]:
        yield from self._stream(
            "SELECT items.ns, items.version, embeddings.vector FROM vectors "
            "JOIN items ON items.version = vectors.version "
            "JOIN embeddings ON embeddings.model = %(model)s AND embeddings.text_hash = vectors.text_hash "
            "WHERE vectors.index_name = %(index)s AND vectors.id > %(after)s",
            index=index, model=model, after=after,
        )  # fmt: skip

    def superseded(self, after: int) -> Iterator[str]:
        rows = self._rows("SELECT supersedes FROM facts WHERE seq > %s AND supersedes IS NOT NULL", after)
        return (version for (version,) in rows)

    def records(self, versions: Sequence[str], now: float) -> list[Record]:
        rows = self._item_rows(
            f"SELECT {ITEM} FROM {self._items} WHERE {_LIVE} "
            "AND items.version = ANY(%(versions)s::text[])",
            versions=list(versions), now=now,
        )  # fmt: skip
        return list(map(record_of, rows))

    def vectors_of(self, versions: Sequence[str]) -> int:
        row = self._one("SELECT count(*) FROM vectors WHERE version = ANY(%s::text[])", list(versions))
        return int(row[0]) if row else 0

    def unindexed(self, index: str) -> list[tuple[Record, IndexPaths]]:
        rows = self._rows(
            f"SELECT {ITEM}, (SELECT index_paths FROM facts WHERE facts.version = items.version) FROM items "
            "WHERE NOT EXISTS (SELECT 1 FROM vectors WHERE vectors.version = items.version AND index_name = %s)",
            index,
        )
        return [(record_of(row), load_paths(row[COLUMNS])) for row in rows]

    def outbox(self, index: str, *, due: float | None, limit: int) -> list[OutboxRow]:
        rows = run(
            self._conn,
            f"SELECT id, index_name, op, vector_id, version, attempts, {HELD} FROM outbox WHERE index_name = %(index)s "
            "AND op <> 'embed' AND (%(due)s::float8 IS NULL OR retry_at <= %(due)s) ORDER BY id LIMIT %(limit)s",
            index=index, due=due, limit=_rows_at_most(limit), me=self._me,
        )  # fmt: skip
        return [OutboxRow(*row) for row in rows]

    def pending_upserts(self, index: str) -> list[str]:
        rows = self._rows("SELECT vector_id FROM outbox WHERE index_name = %s AND op = 'upsert'", index)
        return [vector_id for (vector_id,) in rows]

    def pending_deletes(self, index: str) -> int:
        row = self._one("SELECT count(*) FROM outbox WHERE index_name = %s AND op = 'delete'", index)
        return int(row[0]) if row else 0

    def to_embed(self, index: str, limit: int) -> list[tuple[int, Record | None, IndexPaths]]:
        rows = self._rows(
            f"SELECT {ITEM}, outbox.id, (SELECT index_paths FROM facts WHERE facts.version = outbox.version) "
            "FROM outbox LEFT JOIN items ON items.version = outbox.version "
            "WHERE outbox.index_name = %s AND outbox.op = 'embed' AND retry_at IS NOT NULL ORDER BY outbox.id LIMIT %s",
            index,
            limit,
        )
        return [
            (id_, None if row[2] is None else record_of(row), load_paths(paths))
            for row, id_, paths in ((row[:COLUMNS], *row[COLUMNS:]) for row in rows)
        ]

    def upsert_rows(self, index: str, model: str, ids: Sequence[str]) -> dict[str, ScoredRow]:
        wanted = set(ids)
        found = [row for row in self.vectors_by_id(index, model, ids, now=0.0) if row.vector_id in wanted]
        query = "SELECT version, index_paths FROM facts WHERE version = ANY(%s::text[])"
        paths: dict[str, str | None] = dict(run(self._conn, query, [row.record.version for row in found]).fetchall())
        return {row.vector_id: row._replace(paths=load_paths(paths[row.record.version])) for row in found}

    def prepared(self) -> list[PreparedRow]:
        return [
            PreparedRow(id_, index, tuple(vector_ids), owner, expires_at)
            for id_, index, vector_ids, owner, expires_at in self._rows(
                "SELECT id, index_name, vector_ids, owner, expires_at FROM prepared"
            )
        ]

    def index_meta(self, index: str) -> PutIndexMeta | None:
        row = self._one("SELECT name, model, dims, generation FROM indexes WHERE name = %s", index)
        return None if row is None else PutIndexMeta(*row)

    def counts(self) -> dict[str, int]:
        row = self._one("SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in COUNTED))
        assert row is not None
        return dict(zip(COUNTED, row, strict=True))

    def sizes(self) -> dict[str, int]:
        each = [f"(SELECT coalesce(sum(pg_column_size({table}.*)), 0)::bigint FROM {table})" for table in COUNTED]
        each.append("(" + " + ".join(f"pg_total_relation_size('{table}')" for table in COUNTED) + ")")
        row = self._one("SELECT " + ", ".join(each))
        assert row is not None
        return dict(zip((*COUNTED, "total"), row, strict=True))

    def dump(self, table: str) -> Iterator[Row]:
        for row in self._stream(postgres_rows.dump_query(table), _MOVED_CHUNK):
            yield postgres_rows.dumped(table, row)


def _unpacked(step: StepKey, stored: object) -> bytes:
    try:
        return unpacked(stored)
    except CorruptRowError as error:
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: {error}") from error


def _head(row: Sequence[Any]) -> StoredHead:
    step = StepKey(*row[:3])
    parent_id, seq, ts, head_type, head, metadata, channels, value_ids = row[3:]
    if len(channels) != len(value_ids):
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: its manifest has channels without values")
    manifest = dict(zip(channels, value_ids, strict=True))
    return StoredHead(step, parent_id, seq, ts, Blob(head_type, _unpacked(step, head)), metadata, manifest)


def _with_writes(head: StoredHead, writes: Cursor) -> StoredCheckpoint:
    return StoredCheckpoint(
        **{field.name: getattr(head, field.name) for field in fields(StoredHead)},
        writes=[
            StoredWrite(task_id, task_path, channel, Blob(type_, _unpacked(head.step, data)), idx)
            for task_id, task_path, channel, type_, data, idx in writes
        ],
    )


def _rows_at_most(limit: int) -> int | None:
    """A limit as SQL takes it; a negative one is none."""
    return None if limit < 0 else min(limit, _MOST_ROWS)


def _range(prefix: Sequence[str]) -> dict[str, str]:
    low, high = namespace_range(prefix)
    return {"low": low, "high": high}

"""What a snapshot of a SQL database answers, as far as every dialect asks alike.

A query names what is bound to it as `:name`; `:seq` is the moment of the snapshot, where it is one of the past. Every
value is bound, and rows that no writer of ours wrote raise `CorruptRowError`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from langgraph_memstate.storage.base import COUNTED, Reader
from langgraph_memstate.storage.checks import makes_claim
from langgraph_memstate.storage.operations import PutIndexMeta
from langgraph_memstate.storage.rows import (
    COLUMNS,
    ITEM,
    LOG,
    NOT_LANDED,
    load_paths,
    log_entry_of,
    record_of,
    scored_of,
)
from langgraph_memstate.storage.values import (
    Blob,
    Claim,
    ScoredRow,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredHead,
    StoredWrite,
    VectorMark,
)

LIVE = "(items.expires_at IS NULL OR items.expires_at > :now)"
UNDER = "items.ns >= :low AND items.ns < :high"
OF_THREAD = "thread_id = :thread_id"
IN_NAMESPACE = "checkpoint_ns = :checkpoint_ns"
IN_STEP = f"{IN_NAMESPACE} AND checkpoint_id = :checkpoint_id"
OF_STEP = f"{OF_THREAD} AND {IN_STEP}"

STAGED_WHERE = (
    f"SELECT task_id, task_path, draft FROM staged WHERE {NOT_LANDED} AND {{}} ORDER BY task_path, task_id, ord"
)
STAGED = STAGED_WHERE.format(OF_STEP)
_VECTOR = "vectors.vector_id, vectors.ord, embeddings.vector"
_SCORES = (
    "JOIN vectors ON vectors.version = items.version AND vectors.index_name = :index "
    "JOIN embeddings ON embeddings.model = :model AND embeddings.text_hash = vectors.text_hash"
)
_INDEXED = "items JOIN vectors ON vectors.version = items.version AND vectors.index_name = :index"
# Hops from one namespace to the next along the primary key, past all items between, and no further than is asked for.
_NAMESPACES = (
    "WITH RECURSIVE found (ns) AS (SELECT min(ns) FROM items WHERE ns >= :low AND ns < :high UNION ALL "
    "SELECT (SELECT min(ns) FROM items WHERE ns > found.ns AND ns < :high) FROM found WHERE found.ns IS NOT NULL) "
    f"SELECT ns FROM found WHERE (SELECT 1 FROM items WHERE items.ns = found.ns AND {LIVE} LIMIT 1) = 1 LIMIT :limit"
)
_MOST_ROWS = 2**62  # larger numbers do not fit a parameter
_ORIGIN = frozenset(field.name for field in fields(Origin))

SqlRow = tuple[Any, ...]


class SQLReader(Reader):
    """Reads of one open transaction. With `seq`, items are those of that moment: the rows of `past`."""

    thread = "thread_id"
    """the thread of a checkpoint, in SQL"""
    of_thread = OF_THREAD
    """that a checkpoint is of the thread that is bound"""
    head: str
    """the columns of a checkpoint: its key, what it is based on, its sequence, and what else `_head` takes"""
    written: str
    """the columns of a write: task, path, channel, index, and what `_value` takes"""
    writes_of_step = OF_STEP
    """that a write is one of the step that is bound"""
    past: str
    """the items as they were at `:seq`, in SQL"""

    def __init__(self, seq: int | None) -> None:
        self._seq = seq
        self._items = "items" if seq is None else self.past

    # -- asking -------------------------------------------------------------------------------------

    @abstractmethod
    def _rows(self, query: str, **bound: Any) -> Iterator[SqlRow]:
        """The rows of a query, asked for at once. `seq` is bound as well."""

    def _stream(self, query: str, **bound: Any) -> Iterator[SqlRow]:
        """The rows of a query that may have many."""
        return self._rows(query, **bound)

    @abstractmethod
    def _is_one(self, column: str, name: str) -> str:
        """That a column is one of the texts that are bound to a name, as `_texts` makes them."""

    @abstractmethod
    def _texts(self, texts: Sequence[str]) -> Any:
        """Texts as one value to bind."""

    @abstractmethod
    def _head(self, step: StepKey, parent_id: str | None, seq: int, *columns: Any) -> StoredHead:
        """A checkpoint. Raises CorruptRowError."""

    @abstractmethod
    def _value(self, *columns: Any) -> Blob:
        """A serialised value. Raises CorruptRowError."""

    def _one(self, query: str, **bound: Any) -> SqlRow | None:
        return next(self._rows(query, **bound), None)

    def _number(self, query: str, **bound: Any) -> int:
        row = self._one(query, **bound)
        return int(row[0]) if row else 0

    # -- checkpoints --------------------------------------------------------------------------------

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
        bound: dict[str, Any] = {column: value for column, value in wanted.items() if value is not None}
        where = [self.of_thread if column == "thread_id" else f"{column} = :{column}" for column in bound]
        if isinstance(before, tuple):
            where.append(f"(checkpoint_id, {self.thread}, checkpoint_ns) < (:before_id, :before_thread, :before_ns)")
            bound |= zip(("before_id", "before_thread", "before_ns"), before, strict=True)
        elif before is not None:
            where.append("checkpoint_id < :before")
            bound["before"] = before
        rows = self._rows(
            f"SELECT {self.head} FROM checkpoints "
            + (f"WHERE {' AND '.join(where)} " if where else "")
            + f"ORDER BY checkpoint_id DESC, {self.thread} DESC, checkpoint_ns DESC LIMIT :limit",
            limit=at_most(limit), **bound,
        )  # fmt: skip
        heads = list(map(self._head_of, rows))
        writes = [self._writes(self.writes_of_step, **head.step._asdict()) for head in heads]
        return [self._with_writes(head, asked) for head, asked in zip(heads, writes, strict=True)]

    def ancestors(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> Iterator[StoredHead]:
        wanted = self.latest_id(thread_id, checkpoint_ns) if checkpoint_id is None else checkpoint_id
        while wanted is not None:
            step = StepKey(thread_id, checkpoint_ns, wanted)
            query = f"SELECT {self.head} FROM checkpoints WHERE {self.of_thread} AND {IN_STEP}"
            row = self._one(query, **step._asdict())
            if row is None:
                return
            yield self._head_of(row)
            wanted = row[3]

    def heads(self, thread_id: str, checkpoint_ns: str) -> Iterator[StoredHead]:
        rows = self._stream(
            f"SELECT {self.head} FROM checkpoints WHERE {self.of_thread} AND {IN_NAMESPACE} "
            "ORDER BY checkpoint_id DESC",
            thread_id=thread_id, checkpoint_ns=checkpoint_ns,
        )  # fmt: skip
        yield from map(self._head_of, rows)

    def checkpoint_namespaces(self, thread_id: str) -> list[str]:
        query = f"SELECT DISTINCT checkpoint_ns FROM checkpoints WHERE {self.of_thread}"
        return sorted(ns for (ns,) in self._rows(query, thread_id=thread_id))

    def latest_id(self, thread_id: str, checkpoint_ns: str) -> str | None:
        query = f"SELECT max(checkpoint_id) FROM checkpoints WHERE {self.of_thread} AND {IN_NAMESPACE}"
        row = self._one(query, thread_id=thread_id, checkpoint_ns=checkpoint_ns)
        return None if row is None else row[0]

    def _head_of(self, row: SqlRow) -> StoredHead:
        step = StepKey(*row[:3])
        try:
            return self._head(step, *row[3:])
        except CorruptRowError as error:
            raise CorruptRowError(f"checkpoint {step.checkpoint_id}: {error}") from error

    def _writes(self, where: str, **bound: Any) -> Iterator[SqlRow]:
        """What `_with_writes` takes."""
        return self._rows(f"SELECT {self.written} FROM writes WHERE {where} ORDER BY task_path, task_id, idx", **bound)

    def _with_writes(self, head: StoredHead, rows: Iterable[SqlRow]) -> StoredCheckpoint:
        try:
            return head.with_writes(
                [
                    StoredWrite(task_id, task_path, channel, self._value(*value), idx)
                    for task_id, task_path, channel, idx, *value in rows
                ]
            )
        except CorruptRowError as error:
            raise CorruptRowError(f"checkpoint {head.step.checkpoint_id}: {error}") from error

    # -- items and the log --------------------------------------------------------------------------

    def item(self, namespace: Namespace, key: str, now: float) -> Record | None:
        row = self._one(
            f"SELECT {ITEM} FROM {self._items} WHERE items.ns = :ns AND items.key = :key AND {LIVE}",
            ns=encode_namespace(namespace), key=key, now=now,
        )  # fmt: skip
        return None if row is None else record_of(row)

    def namespaces(self, prefix: Sequence[str], now: float, limit: int | None = None) -> list[Namespace]:
        past = f"SELECT DISTINCT items.ns FROM {self._items} WHERE {UNDER} AND {LIVE} ORDER BY items.ns LIMIT :limit"
        query = _NAMESPACES if self._seq is None else past
        rows = self._rows(query, now=now, limit=at_most(limit), **range_of(prefix))
        return [decode_namespace(ns) for (ns,) in rows]

    def expired(self, now: float) -> list[Record]:
        return list(map(record_of, self._rows(f"SELECT {ITEM} FROM items WHERE expires_at <= :now", now=now)))

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
        where = ["seq > :after", *(f"{column} = :{column}" for column in equal)]
        if until is not None:
            where.append("seq <= :until")
        if prefix:
            where.append("ns >= :low AND ns < :high")
        rows = self._stream(
            f"SELECT {LOG} FROM facts WHERE {' AND '.join(where)} ORDER BY seq {'DESC' if newest_first else 'ASC'} "
            "LIMIT :limit",
            **equal, **range_of(prefix), after=after, until=until, limit=at_most(limit),
        )  # fmt: skip
        yield from map(log_entry_of, rows)

    def versions(self, namespace: Namespace, key: str) -> Iterator[LogEntry]:
        query = f"SELECT {LOG} FROM facts WHERE ns = :ns AND key = :key ORDER BY seq DESC"
        yield from map(log_entry_of, self._stream(query, ns=encode_namespace(namespace), key=key))

    def seq_at(self, ts: float) -> int:
        return self._number("SELECT coalesce(max(seq), 0) FROM facts WHERE committed_at <= :ts", ts=ts)

    def last_seq(self) -> int:
        return self._number("SELECT coalesce(max(seq), 0) FROM facts")

    def draft(self, version: str) -> Draft | None:
        row = self._one(
            "SELECT ns, key, op, value, type, index_paths, ttl, schema, schema_version, ts, thread_id, checkpoint_ns, "
            "checkpoint_id, task_id, node, run_id, actor, reason FROM facts WHERE version = :version",
            version=version,
        )
        if row is None:
            return None
        ns, key, op, value, type_, paths, ttl, schema, number, ts, *origin = row
        return Draft(
            version, decode_namespace(ns), key, op, value, type=type_, index=load_paths(paths), ttl=ttl, schema=schema,
            schema_version=number, ts=ts, origin=Origin(*origin),
        )  # fmt: skip

    @abstractmethod
    def _sought(self, claim: Claim, now: float) -> tuple[str, dict[str, Any]]:
        """A condition on items that those which make a claim meet, and few others, and what is bound to it."""

    def holders(self, claim: Claim, now: float) -> list[Record]:
        where, bound = self._sought(claim, now)
        found = map(record_of, self._rows(f"SELECT {ITEM} FROM {self._items} WHERE {where}", **bound))
        return [record for record in found if makes_claim(claim, record.namespace, record.type, record.value)]

    def records(self, versions: Sequence[str], now: float) -> list[Record]:
        rows = self._rows(
            f"SELECT {ITEM} FROM {self._items} WHERE {LIVE} AND {self._is_one('items.version', 'versions')}",
            versions=self._texts(versions), now=now,
        )  # fmt: skip
        return list(map(record_of, rows))

    def superseded(self, after: int) -> Iterator[str]:
        rows = self._rows("SELECT supersedes FROM facts WHERE seq > :after AND supersedes IS NOT NULL", after=after)
        return (version for (version,) in rows)

    # -- vectors ------------------------------------------------------------------------------------

    def vector_count(self, index: str, prefix: Sequence[str], ceiling: int) -> int:
        return self._number(
            f"SELECT count(*) FROM (SELECT 1 FROM {_INDEXED} WHERE {UNDER} LIMIT :ceiling) AS found",
            index=index, ceiling=ceiling, **range_of(prefix),
        )  # fmt: skip

    def vectors(self, index: str, model: str, prefix: Sequence[str], now: float) -> Iterator[ScoredRow]:
        rows = self._stream(
            f"SELECT {ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {UNDER} AND {LIVE}",
            index=index, model=model, now=now, **range_of(prefix),
        )  # fmt: skip
        yield from map(scored_of, rows)

    def vectors_by_id(self, index: str, model: str, ids: Sequence[str], now: float) -> list[ScoredRow]:
        wanted = f"SELECT version FROM vectors WHERE index_name = :index AND {self._is_one('vector_id', 'ids')}"
        rows = self._rows(
            f"SELECT {ITEM}, {_VECTOR} FROM {self._items} {_SCORES} WHERE {LIVE} AND items.version IN ({wanted})",
            index=index, model=model, ids=self._texts(ids), now=now,
        )  # fmt: skip
        return list(map(scored_of, rows))

    def vector_ids(self, index: str, after: int = 0) -> Iterator[str]:
        query = f"SELECT vectors.vector_id FROM {_INDEXED} WHERE items.seq > :after"
        return (vector_id for (vector_id,) in self._stream(query, index=index, after=after))

    def vector_mark(self) -> VectorMark:
        row = self._one(
            "SELECT (SELECT coalesce(max(seq), 0) FROM facts), (SELECT coalesce(max(id), 0) FROM vectors), "
            "(SELECT CAST(coalesce(max(value), '0') AS bigint) FROM meta WHERE key = 'erasures')"
        )
        assert row is not None
        return VectorMark(*row)

    def vector_bytes(self, index: str, model: str, ceiling: int) -> int:
        query = "SELECT dims * 4 FROM indexes WHERE name = :index AND model = :model"
        each = self._number(query, index=index, model=model) or 4
        return each * self.vector_count(index, (), ceiling // each + 1)

    def new_vectors(self, index: str, model: str, after: int) -> Iterator[tuple[str, str, bytes]]:
        rows = self._stream(
            "SELECT items.ns, items.version, embeddings.vector FROM vectors "
            "JOIN items ON items.version = vectors.version "
            "JOIN embeddings ON embeddings.model = :model AND embeddings.text_hash = vectors.text_hash "
            "WHERE vectors.index_name = :index AND vectors.id > :after",
            index=index, model=model, after=after,
        )  # fmt: skip
        return ((ns, version, vector) for ns, version, vector in rows)

    def vectors_of(self, versions: Sequence[str]) -> int:
        query = f"SELECT count(*) FROM vectors WHERE {self._is_one('version', 'versions')}"
        return self._number(query, versions=self._texts(versions))

    def unindexed(self, index: str) -> list[tuple[Record, IndexPaths]]:
        rows = self._rows(
            f"SELECT {ITEM}, (SELECT index_paths FROM facts WHERE facts.version = items.version) FROM items "
            "WHERE NOT EXISTS (SELECT 1 FROM vectors WHERE vectors.version = items.version AND index_name = :index)",
            index=index,
        )
        return [(record_of(row), load_paths(row[COLUMNS])) for row in rows]

    def pending_upserts(self, index: str) -> list[str]:
        rows = self._rows("SELECT vector_id FROM outbox WHERE index_name = :index AND op = 'upsert'", index=index)
        return [vector_id for (vector_id,) in rows]

    def pending_deletes(self, index: str) -> int:
        return self._number("SELECT count(*) FROM outbox WHERE index_name = :index AND op = 'delete'", index=index)

    def to_embed(self, index: str, limit: int) -> list[tuple[int, Record | None, IndexPaths]]:
        rows = self._rows(
            f"SELECT {ITEM}, outbox.id, (SELECT index_paths FROM facts WHERE facts.version = outbox.version) "
            "FROM outbox LEFT JOIN items ON items.version = outbox.version WHERE outbox.index_name = :index "
            "AND outbox.op = 'embed' AND retry_at IS NOT NULL ORDER BY outbox.id LIMIT :limit",
            index=index, limit=limit,
        )  # fmt: skip
        return [
            (id_, None if row[2] is None else record_of(row), load_paths(paths))
            for row, id_, paths in ((row[:COLUMNS], *row[COLUMNS:]) for row in rows)
        ]

    def upsert_rows(self, index: str, model: str, ids: Sequence[str]) -> dict[str, ScoredRow]:
        wanted = set(ids)
        found = [row for row in self.vectors_by_id(index, model, ids, now=0.0) if row.vector_id in wanted]
        query = f"SELECT version, index_paths FROM facts WHERE {self._is_one('version', 'versions')}"
        paths: dict[str, str | None] = dict(
            self._rows(query, versions=self._texts([row.record.version for row in found]))
        )
        return {row.vector_id: row._replace(paths=load_paths(paths[row.record.version])) for row in found}

    def index_meta(self, index: str) -> PutIndexMeta | None:
        row = self._one("SELECT name, model, dims, generation FROM indexes WHERE name = :index", index=index)
        return None if row is None else PutIndexMeta(*row)

    def counts(self) -> dict[str, int]:
        row = self._one("SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in COUNTED))
        assert row is not None
        return dict(zip(COUNTED, row, strict=True))


def staged_of(rows: Iterable[SqlRow]) -> list[StagedDraft]:
    return [StagedDraft(task_id, task_path, Draft.loads(draft)) for task_id, task_path, draft in rows]


def at_most(limit: int | None) -> int:
    """A limit as every database takes it; None, or less than 0, for none."""
    return _MOST_ROWS if limit is None or limit < 0 else min(limit, _MOST_ROWS)


def range_of(prefix: Sequence[str]) -> dict[str, str]:
    """What `UNDER` needs."""
    low, high = namespace_range(prefix)
    return {"low": low, "high": high}

"""What a PostgreSQL snapshot answers in its own way.

Answers that may be long come through a cursor of the server, in chunks that grow, so that a reader who stops early
pays for little, and one who wants everything does not wait for every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from langgraph_memstate.facts import Record
from langgraph_memstate.filters import Condition
from langgraph_memstate.storage import postgres_rows
from langgraph_memstate.storage import postgres_values as values
from langgraph_memstate.storage.base import COUNTED
from langgraph_memstate.storage.postgres_checks import narrowed, sought
from langgraph_memstate.storage.postgres_claims import HELD
from langgraph_memstate.storage.postgres_link import Connection, marked, run
from langgraph_memstate.storage.postgres_packing import head_of, value_of
from langgraph_memstate.storage.postgres_vectors import VectorTables, neighbours
from langgraph_memstate.storage.rows import ITEM, load_ids, read_manifest, record_of
from langgraph_memstate.storage.sql_read import (
    IN_NAMESPACE,
    LIVE,
    OF_THREAD,
    STAGED,
    STAGED_WHERE,
    UNDER,
    SQLReader,
    SqlRow,
    at_most,
    range_of,
    staged_of,
)
from langgraph_memstate.storage.tables import Row
from langgraph_memstate.storage.values import (
    AncestorWrite,
    Blob,
    Claim,
    Nearest,
    Neighbours,
    OutboxRow,
    PreparedRow,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredHead,
    StoredList,
)

_OF_THREAD = "thread = (SELECT threads.id FROM threads WHERE threads.thread_id = :thread_id)"
_HEAD = "checkpoint_ns, checkpoint_id, id_text(parent_id), seq, manifest, head"
_FIRST_CHUNK, _LARGEST_CHUNK = 50, 5_000  # rows
_MOVED_CHUNK = 500  # of any size

_cursors = count(1)


class PostgresReader(SQLReader):
    thread = values.THREAD
    of_thread = _OF_THREAD
    head = f"{thread}, {_HEAD}"
    written = values.WRITTEN
    writes_of_step = f"{of_thread} AND {IN_NAMESPACE} AND checkpoint_id = id_key(:checkpoint_id)"
    past = (
        "(SELECT ns, key, version, value, created_at, ts AS updated_at, seq, ts + ttl * 60 AS expires_at, ttl, type, "
        "CASE WHEN position('\\u0000' IN value) > 0 THEN NULL ELSE value::jsonb END AS doc "
        "FROM facts WHERE seq <= :seq AND value IS NOT NULL AND NOT EXISTS (SELECT 1 FROM facts AS later "
        "WHERE later.ns = facts.ns AND later.key = facts.key AND later.seq > facts.seq AND later.seq <= :seq)) AS items"
    )

    def __init__(self, conn: Connection, tables: VectorTables, me: str, seq: int | None = None) -> None:
        super().__init__(seq)
        self._conn = conn
        self._tables = tables
        self._me = me
        self._staged: tuple[StepKey, Iterator[SqlRow]] | None = None  # asked for already

    def as_of(self, seq: int) -> PostgresReader:
        return PostgresReader(self._conn, self._tables, self._me, seq)

    def _rows(self, query: str, **bound: Any) -> Iterator[SqlRow]:
        return iter(run(self._conn, marked(query), **bound, seq=self._seq))

    def _stream(self, query: str, **bound: Any) -> Iterator[SqlRow]:
        return self._in_chunks(query, bound, _LARGEST_CHUNK)

    def _in_chunks(self, query: str, bound: Mapping[str, Any], largest: int) -> Iterator[SqlRow]:
        name = f"rows_{next(_cursors)}"
        chunk = _FIRST_CHUNK
        run(self._conn, f"DECLARE {name} NO SCROLL CURSOR FOR {marked(query)}", **bound, seq=self._seq)
        rows = run(self._conn, f"FETCH {chunk} FROM {name}").fetchall()
        while True:
            yield from rows
            if len(rows) < chunk:
                run(self._conn, f"CLOSE {name}")
                return
            chunk = min(chunk * 4, largest)
            rows = run(self._conn, f"FETCH {chunk} FROM {name}").fetchall()

    def _is_one(self, column: str, name: str) -> str:
        return f"{column} = ANY(:{name}::text[])"

    def _texts(self, texts: Sequence[str]) -> list[str]:
        return list(texts)

    def _head(self, step: StepKey, parent_id: str | None, seq: int, *columns: Any) -> StoredHead:
        manifest, head = columns
        ts, metadata, blob = head_of(head)
        return StoredHead(step, parent_id, seq, ts, blob, metadata, read_manifest(manifest))

    def _value(self, *columns: Any) -> Blob:
        return value_of(*columns)

    # -- checkpoints --------------------------------------------------------------------------------

    def checkpoint(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> StoredCheckpoint | None:
        here = f"{_OF_THREAD} AND {IN_NAMESPACE}"
        id_, which = ":checkpoint_id", "AND checkpoint_id = :checkpoint_id"
        if checkpoint_id is None:
            id_ = f"(SELECT max(checkpoint_id) FROM checkpoints WHERE {here})"
            which = "ORDER BY checkpoint_id DESC LIMIT 1"
        step = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
        found = self._rows(f"SELECT :thread_id::text, {_HEAD} FROM checkpoints WHERE {here} {which}", **step)
        writes = self._writes(f"{here} AND checkpoint_id = id_key({id_})", **step)
        waiting = STAGED_WHERE.format(f"{OF_THREAD} AND {IN_NAMESPACE} AND checkpoint_id = {id_}")
        staged = self._rows(waiting, **step)  # who goes on from here asks for it next
        if (row := next(found, None)) is None:
            return None
        head = self._head_of(row)
        self._staged = (head.step, staged)
        return self._with_writes(head, writes)

    def staged(self, step: StepKey) -> list[StagedDraft]:
        asked, rows = self._staged or (None, None)
        if rows is None or asked != step:
            rows = self._rows(STAGED, **step._asdict())
        self._staged = None
        return staged_of(rows)

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

    # -- items --------------------------------------------------------------------------------------

    def items(self, prefix: Sequence[str], now: float, conditions: Sequence[Condition] = ()) -> Iterator[Record]:
        also, bound = narrowed(conditions)
        query = f"SELECT {ITEM} FROM {self._items} WHERE {UNDER} AND {LIVE} {also} ORDER BY items.seq DESC"
        yield from map(record_of, self._stream(query, now=now, **range_of(prefix), **bound))

    def _sought(self, claim: Claim, now: float) -> tuple[str, dict[str, Any]]:
        return sought(claim, now)

    # -- vectors ------------------------------------------------------------------------------------

    def embeddings(self, model: str, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        query = "SELECT text_hash, vector FROM embeddings WHERE model = :model AND text_hash = ANY(:hashes::bytea[])"
        return dict(self._rows(query, model=model, hashes=list(hashes)))

    def nearest(self, question: Nearest) -> Neighbours | None:
        return neighbours(self._conn, self._tables, question) if self._seq is None else None

    def outbox(self, index: str, *, due: float | None, limit: int) -> list[OutboxRow]:
        rows = self._rows(
            f"SELECT id, index_name, op, vector_id, version, attempts, {HELD} FROM outbox WHERE index_name = :index "
            "AND op <> 'embed' AND (:due::float8 IS NULL OR retry_at <= :due) ORDER BY id LIMIT :limit",
            index=index, due=due, limit=at_most(limit), me=self._me,
        )  # fmt: skip
        return [OutboxRow(*row) for row in rows]

    def prepared(self) -> list[PreparedRow]:
        return [
            PreparedRow(id_, index, tuple(vector_ids), owner, expires_at)
            for id_, index, vector_ids, owner, expires_at in self._rows(
                "SELECT id, index_name, vector_ids, owner, expires_at FROM prepared"
            )
        ]

    # -- the database -------------------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        each = [f"(SELECT coalesce(sum(pg_column_size({table}.*)), 0)::bigint FROM {table})" for table in COUNTED]
        each.append("(" + " + ".join(f"pg_total_relation_size('{table}')" for table in values.GROWING) + ")")
        row = self._one("SELECT " + ", ".join(each))
        assert row is not None
        return dict(zip((*COUNTED, "total"), row, strict=True))

    def dump(self, table: str) -> Iterator[Row]:
        rows = self._in_chunks(postgres_rows.dump_query(table), {}, _MOVED_CHUNK)
        listed = self._listed() if table == "elements" else None
        for row in rows:
            if listed is None or row[0] in listed:
                yield postgres_rows.dumped(table, row)

    def _listed(self) -> set[int]:
        """Elements that are of a list: what only writes refer to moves with them."""
        rows = self._stream("SELECT elements FROM lists")
        return {id_ for (elements,) in rows for id_ in load_ids(elements)}

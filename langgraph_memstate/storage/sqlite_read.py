"""What a SQLite snapshot answers in its own way."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from langgraph_memstate.facts import Record
from langgraph_memstate.filters import Condition
from langgraph_memstate.storage import sqlite_rows, sqlite_values
from langgraph_memstate.storage.base import COUNTED
from langgraph_memstate.storage.packing import unpacked
from langgraph_memstate.storage.rows import ITEM, read_manifest, record_of
from langgraph_memstate.storage.sql_read import (
    IN_NAMESPACE,
    LIVE,
    OF_STEP,
    OF_THREAD,
    STAGED,
    UNDER,
    SQLReader,
    SqlRow,
    range_of,
    staged_of,
)
from langgraph_memstate.storage.sqlite_checks import sought
from langgraph_memstate.storage.tables import Row
from langgraph_memstate.storage.values import (
    AncestorWrite,
    Blob,
    Claim,
    OutboxRow,
    PreparedRow,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredHead,
    StoredList,
)

_HEAD = "thread_id, checkpoint_ns, checkpoint_id, parent_id, seq, ts, head_type, head, metadata, manifest"
_STEP = f"SELECT {_HEAD} FROM checkpoints WHERE {OF_STEP}"
_LATEST = f"SELECT {_HEAD} FROM checkpoints WHERE {OF_THREAD} AND {IN_NAMESPACE} ORDER BY checkpoint_id DESC LIMIT 1"
_LATEST_ITEMS = (
    f"SELECT {ITEM} FROM items INDEXED BY items_by_seq WHERE items.seq > :above AND items.seq <= :until "
    f"AND {UNDER} AND {LIVE} {{}} ORDER BY items.seq DESC"
)
_ITEMS = f"SELECT {ITEM} FROM items WHERE +items.seq <= :until AND {UNDER} AND {LIVE} {{}} ORDER BY +items.seq DESC"
# Where to look for the latest items of a prefix before all of them are sorted: if there are so many, in so many of the
# latest sequences, where so many were found until then. In vain, the first look takes some hundredths of a millisecond.
_LOOKS = ((100, 200, 0), (100, 1_000, 1), (2_000, 50_000, 0))
_COMPARISONS = {"=": "=", ">=": ">=", "<=": "<="}


class SQLiteReader(SQLReader):
    head = _HEAD
    written = "task_id, task_path, channel, idx, type, data"
    past = (
        "(SELECT ns, key, version, value, created_at, ts AS updated_at, seq, ts + ttl * 60 AS expires_at, ttl, type "
        "FROM facts WHERE seq <= :seq AND value IS NOT NULL AND NOT EXISTS (SELECT 1 FROM facts AS later "
        "WHERE later.ns = facts.ns AND later.key = facts.key AND later.seq > facts.seq AND later.seq <= :seq)) AS items"
    )

    _past_items = f"SELECT {ITEM} FROM {past} WHERE {UNDER} AND {LIVE} {{}} ORDER BY items.seq DESC"

    def __init__(self, conn: sqlite3.Connection, seq: int | None = None) -> None:
        super().__init__(seq)
        self._conn = conn

    def as_of(self, seq: int) -> SQLiteReader:
        return SQLiteReader(self._conn, seq)

    def _rows(self, query: str, **bound: Any) -> Iterator[SqlRow]:
        return iter(self._conn.execute(query, {**bound, "seq": self._seq}))

    def _is_one(self, column: str, name: str) -> str:
        return f"{column} IN (SELECT value FROM json_each(:{name}))"

    def _texts(self, texts: Sequence[str]) -> str:
        return json.dumps(list(texts))

    def _head(self, step: StepKey, parent_id: str | None, seq: int, *columns: Any) -> StoredHead:
        ts, type_, head, metadata, manifest = columns
        return StoredHead(step, parent_id, seq, ts, Blob(type_, unpacked(head)), metadata, read_manifest(manifest))

    def _value(self, *columns: Any) -> Blob:
        type_, data = columns
        return Blob(type_, unpacked(data))

    def meta(self, key: str) -> str | None:
        """What the database says of itself."""
        row = self._one("SELECT value FROM meta WHERE key = :key", key=key)
        return None if row is None else str(row[0])

    # -- checkpoints --------------------------------------------------------------------------------

    def checkpoint(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> StoredCheckpoint | None:
        row = self._one(
            _LATEST if checkpoint_id is None else _STEP,
            thread_id=thread_id, checkpoint_ns=checkpoint_ns, checkpoint_id=checkpoint_id,
        )  # fmt: skip
        if row is None:
            return None
        head = self._head_of(row)
        return self._with_writes(head, self._writes(OF_STEP, **head.step._asdict()))

    def staged(self, step: StepKey) -> list[StagedDraft]:
        return staged_of(self._rows(STAGED, **step._asdict()))

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

    # -- items --------------------------------------------------------------------------------------

    def items(self, prefix: Sequence[str], now: float, conditions: Sequence[Condition] = ()) -> Iterator[Record]:
        also, operands = _narrowed(conditions)
        bound = {"now": now, **range_of(prefix), **operands, "until": 2**62}
        found = 0
        for many, reach, least in _LOOKS if self._seq is None else ():
            if found < least:
                continue
            if not self._has(many, prefix):
                break
            above = self._number("SELECT coalesce(max(seq), 0) FROM items") - reach
            for row in self._rows(_LATEST_ITEMS.format(also), above=above, **bound):
                found += 1
                yield record_of(row)
            bound["until"] = above
        query = (_ITEMS if self._seq is None else self._past_items).format(also)
        yield from map(record_of, self._rows(query, **bound))

    def _has(self, many: int, prefix: Sequence[str]) -> bool:
        """Whether there are so many items under a prefix."""
        query = f"SELECT count(*) FROM (SELECT 1 FROM items WHERE {UNDER} LIMIT {many})"
        return self._number(query, **range_of(prefix)) == many

    def _sought(self, claim: Claim, now: float) -> tuple[str, dict[str, Any]]:
        return sought(claim, now)

    # -- vectors ------------------------------------------------------------------------------------

    def embeddings(self, model: str, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        query = "SELECT vector FROM embeddings WHERE model = :model AND text_hash = :text_hash"
        for text_hash in hashes:
            row = self._one(query, model=model, text_hash=text_hash)
            if row is not None:
                found[text_hash] = row[0]
        return found

    def outbox(self, index: str, *, due: float | None, limit: int) -> list[OutboxRow]:
        rows = self._rows(
            "SELECT id, index_name, op, vector_id, version, attempts FROM outbox WHERE index_name = :index "
            "AND op <> 'embed' AND (:due IS NULL OR retry_at <= :due) ORDER BY id LIMIT :limit",
            index=index, due=due, limit=limit,
        )  # fmt: skip
        return [OutboxRow(*row) for row in rows]

    def prepared(self) -> list[PreparedRow]:
        return [
            PreparedRow(id_, index, tuple(json.loads(vector_ids)), owner, expires_at)
            for id_, index, vector_ids, owner, expires_at in self._rows(
                "SELECT id, index_name, vector_ids, owner, expires_at FROM prepared"
            )
        ]

    # -- the database -------------------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        found = {}
        for table in COUNTED:
            columns = (name for (name,) in self._rows("SELECT name FROM pragma_table_info(:table)", table=table))
            lengths = " + ".join(f'coalesce(length(CAST("{column}" AS BLOB)), 0)' for column in columns)
            found[table] = self._number(f"SELECT coalesce(sum({lengths}), 0) FROM {table}")
        found["total"] = self._number("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
        return found

    def dump(self, table: str) -> Iterator[Row]:
        return sqlite_rows.dump(self._conn, table)


def _narrowed(conditions: Sequence[Condition]) -> tuple[str, dict[str, Any]]:
    """The conditions in SQL, in which neither a path nor an operand is part of the text, and what is bound to it."""
    clauses: list[str] = []
    operands: dict[str, Any] = {}
    for number, (path, operator, operand) in enumerate(conditions):
        clauses.append(f"AND json_extract(items.value, :path{number}) {_COMPARISONS[operator]} :operand{number}")
        operands[f"path{number}"] = "$" + "".join(f'."{field}"' for field in path)
        operands[f"operand{number}"] = operand
    return " ".join(clauses), operands

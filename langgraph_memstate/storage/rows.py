"""Rows as values of the seam, for every storage that keeps them in SQL: what a query names, and in what order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from typing import Any

from langgraph_memstate.errors import CommitRaced, CorruptRowError
from langgraph_memstate.facts import IndexPaths, LogEntry, Record, decode_namespace, decode_value
from langgraph_memstate.storage import tables
from langgraph_memstate.storage.packing import packed, unpacked
from langgraph_memstate.storage.tables import TABLES, Row, Table
from langgraph_memstate.storage.values import ScoredRow, StoredList

ITEM = (
    "items.ns, items.key, items.version, items.value, created_at, updated_at, items.seq, expires_at, ttl, type, "
    "(SELECT coalesce(schema_version, 1) || ' ' || schema FROM facts WHERE facts.seq = items.seq)"  # one lookup a row
)
COLUMNS = 11  # of an item; what a query adds comes after them
LOG = (
    "seq, version, op, ns, key, value, ts, created_at, index_paths, commit_id, supersedes, thread_id, checkpoint_ns, "
    "checkpoint_id, task_id, node, run_id, actor, reason, schema, schema_version, type, ttl, undoes"
)

NOT_LANDED = "NOT EXISTS (SELECT 1 FROM facts WHERE facts.version = staged.version)"  # a copied thread landed it first


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dump_json(value: object) -> str | None:
    """The text of a column that may be empty."""
    return None if value is None else _JSON.encode(value)


def escaped(text: str) -> str:
    """A text without NUL, where a database ends it or refuses it."""
    return text.replace("\1", "\1\2").replace("\0", "\1\1")


def unescaped(text: str) -> str:
    return text.replace("\1\1", "\0").replace("\1\2", "\1") if "\1" in text else text


def dump_manifest(manifest: Mapping[str, str]) -> str:
    """JSON for the database to look into, so its texts are escaped."""
    return _JSON.encode({escaped(channel): escaped(value_id) for channel, value_id in manifest.items()})


def read_manifest(text: str) -> dict[str, str]:
    """What `dump_manifest` was given.

    Raises:
        CorruptRowError: this is no JSON object.
    """
    manifest = tables.load_manifest(text)
    if "\\u0001" in text:
        manifest = {unescaped(channel): unescaped(value_id) for channel, value_id in manifest.items()}
    return manifest


def load_paths(text: str | None) -> IndexPaths:
    paths = None if text is None else json.loads(text)
    return tuple(paths) if isinstance(paths, list) else paths


def record_of(row: Sequence[Any]) -> Record:
    ns, key, version, value, created_at, updated_at, seq, expires_at, ttl, type_, schema = row[:COLUMNS]
    number, _, name = (schema or "").partition(" ")
    return Record(
        decode_namespace(ns), key, version, value, created_at, updated_at, seq, expires_at, ttl, type_, name or None,
        int(number) if number else None,
    )  # fmt: skip


def scored_of(row: Sequence[Any]) -> ScoredRow:
    return ScoredRow(record_of(row), *row[COLUMNS:])


def log_entry_of(row: Sequence[Any]) -> LogEntry:
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
        index=load_paths(index_paths),
        **dict(zip(names, rest, strict=True)),
    )


def dump_ids(ids: Sequence[int]) -> bytes:
    """Elements are numbered as they come, so that differences are small and repeat."""
    return packed(json.dumps([after - before for before, after in pairwise((0, *ids))]).encode())


def load_ids(elements: object) -> tuple[int, ...]:
    """The ids that a row of `lists` adds to its base."""
    try:
        return tuple(accumulate(map(int, json.loads(unpacked(elements)))))
    except (TypeError, ValueError, RecursionError) as error:
        raise CorruptRowError(f"the elements of a list cannot be read: {error}") from error


def list_chain(rows: Sequence[tuple[str, str, int, int | None, int, bytes]]) -> list[StoredList]:
    if rows and rows[-1][3] is not None:
        raise CorruptRowError("a list lost the version it is based on")
    return [
        StoredList(value_id, kind, depth, keep, load_ids(elements)) for value_id, kind, depth, _, keep, elements in rows
    ]


def flattened(chain: Sequence[StoredList]) -> tuple[int, ...]:
    """The ids of a whole list."""
    ids: tuple[int, ...] = ()
    for version in reversed(chain):
        ids = ids[: version.keep] + version.tail
    return ids


# -- rows that move ---------------------------------------------------------------------------------

_PACKED = {"head", "data"}


def _dump_elements(stored: object) -> str:
    return json.dumps(load_ids(stored), separators=(",", ":"))


def _load_elements(text: str) -> bytes:
    return dump_ids(json.loads(text))


def moved_manifest(stored: str) -> str:
    return tables.dump_manifest(read_manifest(stored))


def stored_manifest(text: str) -> str:
    return dump_manifest(tables.load_manifest(text))


_Convert = Callable[[Any], Any]


def _converted(table: str, packing: _Convert, listing: _Convert, naming: _Convert) -> Mapping[int, _Convert]:
    """Which columns of a table are stored otherwise than they move, and how they are converted."""
    found: dict[int, _Convert] = {}
    for place, column in enumerate(TABLES[table].columns):
        if column in _PACKED:
            found[place] = packing
        elif (table, column) == ("lists", "elements"):
            found[place] = listing
        elif column == "manifest":
            found[place] = naming
    return found


_DUMPED = {table: _converted(table, unpacked, _dump_elements, moved_manifest) for table in TABLES}
_LOADED = {table: _converted(table, packed, _load_elements, stored_manifest) for table in TABLES}


def as_moved(table: str, row: Row) -> Row:
    """A stored row as it moves."""
    return _with(row, _DUMPED[table])


def as_stored(table: str, row: Row) -> Row:
    """A row that came from another storage, as it is stored."""
    return _with(row, _LOADED[table])


def _with(row: Row, converted: Mapping[int, Callable[[Any], Any]]) -> Row:
    if not converted:
        return row
    changed = list(row)
    for place, convert in converted.items():
        changed[place] = convert(row[place])
    return tuple(changed)


def column_names(table: Table) -> tuple[str, str]:
    """All columns of a table, and those of its key, in SQL."""
    return ", ".join(table.columns), ", ".join(table.columns[: table.key])


def check_unfinished(row: Sequence[Any] | None) -> None:
    """Given what `meta` says about it: a memory that is open to others takes no rows but by its commits."""
    if row is None or not row[0]:
        raise CommitRaced("the database is finished: it takes no rows from elsewhere any more")

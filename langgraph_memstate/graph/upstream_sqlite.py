"""Files of LangGraph's `SqliteSaver` and `SqliteStore`, read only."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from langgraph_memstate.errors import CorruptRowError, DeserializationError, MigrationError
from langgraph_memstate.graph import slices
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
from langgraph_memstate.storage.sqlite import storage_error
from langgraph_memstate.storage.values import Blob, StepKey

_CHECKPOINTS = {"thread_id", "checkpoint_ns", "checkpoint_id", "parent_checkpoint_id", "type", "checkpoint", "metadata"}
_STORE = {"prefix", "key", "value", "created_at", "updated_at"}


@contextmanager
def open_sqlite(path: Path) -> Iterator[Upstream]:
    if not os.path.isfile(path):
        raise MigrationError(f"{path} is not there; name a file of a SqliteSaver or SqliteStore")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as conn:
            conn.execute("BEGIN")
            yield _SQLite(path, conn)
    except sqlite3.Error as error:
        raise storage_error(error, f"reading {path}") from error


class _SQLite(Upstream):
    def __init__(self, path: Path, conn: sqlite3.Connection) -> None:
        self.name = str(path.absolute())
        self._conn = conn
        self._has_checkpoints = self._columns("checkpoints") >= _CHECKPOINTS
        self._has_store = self._columns("store") >= _STORE
        if not self._has_checkpoints and not self._has_store:
            raise MigrationError(
                f"{path} has neither the checkpoints of a SqliteSaver nor the items of a SqliteStore; a memory of this "
                "package is moved by migrate"
            )

    def _columns(self, table: str) -> set[str]:
        return {name for (name,) in self._conn.execute("SELECT name FROM pragma_table_info(?)", (table,))}

    def counts(self) -> dict[str, int]:
        tables = {"checkpoints": ("checkpoints", self._has_checkpoints), "items": ("store", self._has_store)}
        return {
            what: int(self._conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
            for what, (table, is_there) in tables.items()
            if is_there
        }

    def checkpoints(self) -> Iterator[UpstreamCheckpoint]:
        path = "task_path" if "task_path" in self._columns("writes") else "''"
        query = (
            f"SELECT task_id, {path}, idx, channel, type, value FROM writes "
            "WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"
        )
        for *key, parent_id, type_, content, metadata in self._conn.execute(
            "SELECT thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata "
            "FROM checkpoints ORDER BY thread_id, checkpoint_ns, checkpoint_id"
        ):
            step = StepKey(*key)
            ts, head, values = _taken_apart(step, type_, content)
            writes = [
                UpstreamWrite(task_id, task_path, idx, channel, blob_of(place_of(step, channel), kind, value))
                for task_id, task_path, idx, channel, kind, value in self._conn.execute(query, step)
            ]
            yield UpstreamCheckpoint(step, parent_id or None, ts, head, values, _text(metadata or b"{}"), writes)

    def items(self) -> Iterator[UpstreamItem]:
        columns = self._columns("store")
        ttl = "ttl_minutes" if "ttl_minutes" in columns else "NULL"
        expires_at = "expires_at" if "expires_at" in columns else "NULL"
        for prefix, key, value, created_at, updated_at, minutes, until in self._conn.execute(
            f"SELECT prefix, key, value, created_at, updated_at, {ttl}, {expires_at} FROM store "
            "ORDER BY updated_at, rowid"
        ):
            until = None if until is None else _seconds(until)
            yield item_of(prefix, key, _text(value), _seconds(created_at), _seconds(updated_at), minutes, until)


def _taken_apart(step: StepKey, type_: str | None, content: bytes) -> tuple[str, Blob, dict[str, Blob]]:
    """The time, the head and the channel values of a checkpoint that was serialised as a whole."""
    if type_ == "msgpack":
        parts = slices.entries(content)
        ts, packed = slices.text_of(parts.get("ts", b"\xc0")), parts.get("channel_values", b"\x80")
        head = {name: part for name, part in parts.items() if name not in ("id", "ts", "channel_values")}
        blobs = {channel: Blob("msgpack", part) for channel, part in slices.entries(packed).items()}
        return ts, Blob("msgpack", slices.packed_map(head)), blobs
    if type_ == "json":  # before LangGraph wrote msgpack
        whole: dict[str, Any] = json.loads(_text(content))
        plain = {name: part for name, part in whole.items() if name not in ("id", "ts", "channel_values")}
        blobs = {
            channel: Blob("json", json.dumps(value).encode()) for channel, value in whole["channel_values"].items()
        }
        return str(whole["ts"]), Blob(*MemStateSerializer().dumps_typed(plain)), blobs
    raise DeserializationError(
        f"thread {step.thread_id!r}, checkpoint {step.checkpoint_id}: it is of type {type_!r}: encrypted, or of a "
        "serializer of your own; from SQLite, only what LangGraph's default one wrote can be imported"
    )


def _text(value: str | bytes) -> str:
    try:
        return value if isinstance(value, str) else bytes(value).decode()
    except UnicodeDecodeError as error:
        raise CorruptRowError(f"a row is not UTF-8: {error}") from error


def _seconds(time: str) -> float:
    """SQLite's `CURRENT_TIMESTAMP`, or what Python's driver makes of a datetime: UTC where it does not say."""
    try:
        moment = datetime.fromisoformat(time)
    except (TypeError, ValueError) as error:
        raise CorruptRowError(f"{time!r} is no time") from error
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()

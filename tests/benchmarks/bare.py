"""The least that a saver on SQLite can do: a row a call, durable before it returns, and one lock.

It has no history, no memory and no error messages. What it needs, no saver that keeps what it is told can undercut by
much; what another needs beyond it is the price of what that does. One that trusts shows the price of being sure: it
takes a longer list for the one before with more behind it, and hands out the very list it was given.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)

_TABLES = """
CREATE TABLE checkpoints (thread_id, ns, id, parent_id, type, checkpoint, metadata, PRIMARY KEY (thread_id, ns, id))
WITHOUT ROWID;
CREATE TABLE writes (thread_id, ns, id, task_id, writes, PRIMARY KEY (thread_id, ns, id, task_id)) WITHOUT ROWID;
"""


class BareSaver(BaseCheckpointSaver[str]):
    def __init__(self, conn: sqlite3.Connection) -> None:
        super().__init__()
        self._conn = conn
        self._lock = threading.Lock()

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        thread_id, ns, parent_id = _place(config)
        typed = self.serde.dumps_typed(self._kept(checkpoint))
        row = (thread_id, ns, checkpoint["id"], parent_id, *typed, json.dumps(metadata))
        with self._lock:
            self._conn.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return _config(thread_id, ns, checkpoint["id"])

    def _kept(self, checkpoint: Checkpoint) -> Checkpoint:
        """What is stored of it."""
        return checkpoint

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        row = (*_place(config), task_id, ormsgpack.packb([(name, self.serde.dumps_typed(it)) for name, it in writes]))
        with self._lock:
            self._conn.execute("INSERT OR REPLACE INTO writes VALUES (?, ?, ?, ?, ?)", row)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        thread_id, ns, _ = _place(config)
        with self._lock:
            found = self._conn.execute(
                "SELECT id, parent_id, metadata, type, checkpoint FROM checkpoints WHERE thread_id = ? AND ns = ? "
                "ORDER BY id DESC LIMIT 1",
                (thread_id, ns),
            ).fetchone()
            if found is None:
                return None
            rows = self._conn.execute(
                "SELECT task_id, writes FROM writes WHERE thread_id = ? AND ns = ? AND id = ?",
                (thread_id, ns, found[0]),
            ).fetchall()
        id_, parent_id, metadata, *checkpoint = found
        return CheckpointTuple(
            _config(thread_id, ns, id_),
            self.serde.loads_typed((checkpoint[0], checkpoint[1])),
            json.loads(metadata),
            None if parent_id is None else _config(thread_id, ns, parent_id),
            [
                (task_id, channel, self.serde.loads_typed(tuple(value)))
                for task_id, packed in rows
                for channel, value in ormsgpack.unpackb(packed)
            ],
        )


class TrustingSaver(BareSaver):
    """Of one thread, whose lists in `messages` only grow and which nobody changes in place."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        super().__init__(conn)
        self._messages: list[Any] = []

    def _kept(self, checkpoint: Checkpoint) -> Checkpoint:
        values = dict(checkpoint["channel_values"])
        if "messages" in values:
            known, self._messages = len(self._messages), values["messages"]
            values["messages"] = self._messages[known:]
        return {**checkpoint, "channel_values": values}

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        found = super().get_tuple(config)
        if found is not None and self._messages:
            found.checkpoint["channel_values"]["messages"] = self._messages
        return found


def _place(config: RunnableConfig) -> tuple[str, str, str | None]:
    place = config["configurable"]
    return place["thread_id"], place.get("checkpoint_ns", ""), place.get("checkpoint_id")


def _config(thread_id: str, ns: str, checkpoint_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}}


@contextmanager
def bare(path: Path, kind: type[BareSaver] = BareSaver) -> Iterator[BareSaver]:
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as conn:
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("PRAGMA synchronous=FULL")
        conn.executescript(_TABLES)
        yield kind(conn)

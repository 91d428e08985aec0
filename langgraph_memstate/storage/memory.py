"""The SQLite storage on `:memory:`: the same promises but for durability, gone when closed."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from langgraph_memstate.storage.operations import Commit
from langgraph_memstate.storage.sqlite import SQLiteStorage, storage_error
from langgraph_memstate.storage.sqlite_read import SQLiteReader


class InMemoryStorage(SQLiteStorage):
    """A private in-memory database, for tests and short-lived agents."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        # One connection holds the database, so a snapshot and a transaction take turns.
        self._turn = threading.RLock()

    @property
    def location(self) -> Path | None:
        return None

    def exists(self) -> bool:
        return False

    def _make_parent(self) -> None:
        return

    def _use_wal(self, conn: sqlite3.Connection) -> None:
        return

    def scrub(self) -> None:
        return  # there is no file

    def vacuum(self) -> None:
        with self._turn:
            self._open_writer().execute("VACUUM")

    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        with self._turn:
            return super().apply(commits)

    @contextmanager
    def snapshot(self) -> Iterator[SQLiteReader]:
        with self._turn:
            conn = self._open_writer()
            try:
                yield SQLiteReader(conn)
            except sqlite3.Error as error:
                raise storage_error(error, "reading") from error

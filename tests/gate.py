"""A storage whose commits wait until a test lets them through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from langgraph_memstate import SQLiteStorage
from langgraph_memstate.storage.operations import Commit


class Gate(SQLiteStorage):
    """Holds groups of commits back until it is opened, and does to each what a test wants first."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.groups: list[int] = []
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.strike: Callable[[], None] = lambda: None

    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        self.groups.append(len(commits))
        self.entered.set()
        assert self.opened.wait(30)
        self.strike()
        return self.land(commits)

    def land(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        return super().apply(commits)

    def landed(self) -> list[str]:
        with self.snapshot() as reader:
            return [entry.key for entry in reader.log()]

    def commit_ids(self) -> list[int]:
        """The commits by which the log's entries came."""
        with self.snapshot() as reader:
            return [entry.commit_id for entry in reader.log()]

"""The contenders on real files, opened as their documentation says; the stores of LangGraph in WAL mode besides."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.store.sqlite import SqliteStore
from langgraph.store.sqlite.aio import AsyncSqliteStore

from langgraph_memstate import MemoryStore

WAL = "PRAGMA journal_mode=WAL"


@dataclass(frozen=True)
class Peer:
    """A checkpointer and a store, with the journal mode of the file of each."""

    saver: Any
    store: Any
    saver_journal: str
    store_journal: str

    @property
    def saver_name(self) -> str:
        return type(self.saver).__name__

    @property
    def store_name(self) -> str:
        return type(self.store).__name__

    @property
    def name(self) -> str:
        return f"{self.saver_name} + {self.store_name}"

    @property
    def journal(self) -> str:
        return " + ".join(dict.fromkeys((self.saver_journal, self.store_journal)))


@contextmanager
def ours(folder: Path) -> Iterator[Peer]:
    folder.mkdir(exist_ok=True)
    path = folder / "memory.db"
    with MemoryStore.open(path) as memory:
        yield Peer(memory.checkpointer, memory.store, _journal(path), _journal(path))


@contextmanager
def upstream(folder: Path, *, wal: bool = False) -> Iterator[Peer]:
    """LangGraph's sync pair, a file each. The saver sets WAL by itself; the store, only with `wal`."""
    folder.mkdir(exist_ok=True)
    checkpoints, items = folder / "checkpoints.db", folder / "store.db"
    with (
        SqliteSaver.from_conn_string(str(checkpoints)) as saver,
        SqliteStore.from_conn_string(str(items)) as store,
    ):
        saver.setup()
        if wal:
            store.conn.execute(WAL)
        store.setup()
        yield Peer(saver, store, _journal(checkpoints), _journal(items))


@contextmanager
def upstream_async(folder: Path, runner: asyncio.Runner, *, wal: bool = False) -> Iterator[Peer]:
    """LangGraph's async pair, living in the loop of `runner`."""
    folder.mkdir(exist_ok=True)
    checkpoints, items = folder / "checkpoints.db", folder / "store.db"
    with ExitStack() as stack:
        saver = _enter(stack, runner, AsyncSqliteSaver.from_conn_string(str(checkpoints)))
        store = _enter(stack, runner, AsyncSqliteStore.from_conn_string(str(items)))
        runner.run(saver.setup())
        if wal:
            runner.run(_execute(store, WAL))
        runner.run(store.setup())
        yield Peer(saver, store, _journal(checkpoints), _journal(items))


def _enter(stack: ExitStack, runner: asyncio.Runner, opening: Any) -> Any:
    opened = runner.run(opening.__aenter__())
    stack.callback(lambda: runner.run(opening.__aexit__(None, None, None)))
    return opened


async def _execute(store: AsyncSqliteStore, statement: str) -> None:
    await store.conn.execute(statement)


def _journal(path: Path) -> str:
    with closing(sqlite3.connect(path)) as conn:
        (mode,) = conn.execute("PRAGMA journal_mode").fetchone()
    return str(mode).upper()

"""What a call costs in write transactions and syncs: counted, so that it is the same on every machine."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from langgraph_memstate import MemoryStore, MemStateCheckpointer
from langgraph_memstate.hooks.base import VectorRecord
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from tests.benchmarks.work import SENTENCE, State

_CHANGES = ("INSERT", "UPDATE", "DELETE", "REPLACE", "CREATE", "DROP", "ALTER")
END = "end"


class Ledger:
    """Counts the write transactions of every connection that is opened through `sqlite3` inside its context.

    A write transaction is one that commits and took the write lock: by ``BEGIN IMMEDIATE`` or by a change.
    """

    def __init__(self) -> None:
        self.writes = 0
        self._lock = threading.Lock()
        self._connect = sqlite3.connect

    def __enter__(self) -> Ledger:
        def connect(*args: Any, **options: Any) -> sqlite3.Connection:
            conn = self._connect(*args, **options)
            conn.set_trace_callback(_Follower(self))
            return conn

        sqlite3.connect = connect
        return self

    def __exit__(self, *exc: object) -> None:
        sqlite3.connect = self._connect

    def add(self) -> None:
        with self._lock:
            self.writes += 1


class _Follower:
    """Follows the statements of one connection."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._inside = self._locked = False

    def __call__(self, statement: str) -> None:
        words = statement.upper().split(None, 2)
        match words[0].rstrip(";"):
            case "BEGIN":
                self._inside, self._locked = True, "IMMEDIATE" in words[1:2]
            case "COMMIT" | "END":
                if self._locked:
                    self._ledger.add()
                self._inside = self._locked = False
            case "ROLLBACK" if words[1:2] != ["TO"]:
                self._inside = self._locked = False
            case verb if verb in _CHANGES:
                if self._inside:
                    self._locked = True
                else:
                    self._ledger.add()  # a statement of its own


class Counter:
    """Write transactions by call. With `marks`, a file is synced before and after each, for a trace to show."""

    def __init__(self, ledger: Ledger, marks: Path | None = None) -> None:
        self.found: defaultdict[str, list[int]] = defaultdict(list)
        self._ledger = ledger
        self._marks = marks
        self._turn = threading.Lock()

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """One call at a time, so that none is counted for another or shares its transaction."""
        with self._turn:
            before = self._ledger.writes
            self._mark(name)
            yield
            self._mark(END)
            self.found[name].append(self._ledger.writes - before)

    def _mark(self, name: str) -> None:
        if self._marks is not None:
            with open(self._marks / name.replace("/", "-"), "w") as file:
                os.fsync(file.fileno())


class CountedCheckpointer(MemStateCheckpointer):
    """Counts what its calls cost, from inside a running graph. `kind` says what is in the checkpoint that lands."""

    def __init__(self, memory: MemoryStore, counter: Counter, kind: str) -> None:
        super().__init__(memory)
        self._counter = counter
        self._kind = kind

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        kind = self._kind if metadata["step"] == LANDS_AT else "plain"
        with self._counter.call(f"put, {kind}"):
            return super().put(config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        with self._counter.call(f"put_writes, {self._kind}"):
            super().put_writes(config, writes, task_id, task_path)


class HeldHook(ChromaSyncHook):
    """A Chroma that is given its work, but waits until it is let go."""

    def __init__(self, path: Path) -> None:
        super().__init__(path=path)
        self.let_go = threading.Event()

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        self.let_go.wait(60)
        super().apply(upserts, deletes)


LANDS_AT = 1  # the step in which the node of `one_node` runs


def one_node(memory: MemoryStore, saver: MemStateCheckpointer, *, memory_writes: int) -> CompiledStateGraph:
    """A graph whose one node writes so many memories."""

    def remember(state: State) -> dict[str, Any]:
        for number in range(memory_writes):
            memory.store.put(("users", "u1"), f"{state['run']}-{number}", {"text": f"{SENTENCE} {state['run']}"})
        return {"messages": ["done"]}

    graph = StateGraph(State)
    graph.add_node("remember", remember)
    graph.add_edge(START, "remember")
    return graph.compile(checkpointer=saver, store=memory.store)


def words(texts: Sequence[str]) -> list[list[float]]:
    """A model that costs nothing: letter counts."""
    return [[float(text.count(letter)) + 0.1 for letter in "aeiounrt"] for text in texts]


INDEX = {"dims": 8, "embed": words, "fields": ["text"]}

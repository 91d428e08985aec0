"""What the machine itself charges, and what the call that pays it takes here: what is left to gain."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.store.base import PutOp

from langgraph_memstate import MemoryStore, SQLiteStorage
from tests.benchmarks.chat import text
from tests.benchmarks.measure import Contender, Row, Session, race, timed
from tests.benchmarks.vectors import Vectors
from tests.benchmarks.work import checkpoint_chain

CASE = "limits"
KB = 1024
MESSAGES = 1_000
VECTORS = 10_000

Call = Callable[[], object]


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds = session.pick(40, 10)
    rows = []
    with ExitStack() as stack:
        for what, calls, limits, paid in (
            (f"{KB} bytes, on disk", session.pick(20, 10), *_disk(stack, folder)),
            (f"{MESSAGES:,} messages", session.pick(3, 2), *_messages(stack, folder)),
            (f"nearest of {VECTORS:,} vectors", session.pick(20, 10), *_vectors(stack, folder)),
        ):
            first, *others = [Contender(name, "", timed(call)) for name, call in {**paid, **limits}.items()]
            rows += race(session, CASE, what, first, others, rounds=rounds, calls=calls)
    return rows


@contextmanager
def appending(path: Path) -> Iterator[Call]:
    """A call that appends 1 kB to a file and waits until it is on disk."""
    block = os.urandom(KB)
    with open(path, "ab", buffering=0) as file:

        def append() -> None:
            file.write(block)
            os.fsync(file.fileno())

        yield append


def _disk(stack: ExitStack, folder: Path) -> tuple[dict[str, Call], dict[str, Call]]:
    conn = stack.enter_context(_plain_sqlite(folder / "plain.db"))
    memory = stack.enter_context(MemoryStore.open(folder / "memory.db"))
    block = os.urandom(KB)
    value = text(random.Random(1)) * 2

    def commit() -> None:
        conn.execute("INSERT INTO rows VALUES (?, ?)", (uuid4().bytes, block))

    limits: dict[str, Call] = {
        "append and fsync": stack.enter_context(appending(folder / "appended")),
        "SQLite: commit of a row": commit,
        "blake2b": lambda: blake2b(block).digest(),
    }
    return limits, {"MemStateStore.put": lambda: memory.store.put(("limits",), uuid4().hex, {"text": value})}


@contextmanager
def _plain_sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    """A table in WAL mode; every statement is a commit, which waits for the disk."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("PRAGMA synchronous=FULL")
        conn.execute("CREATE TABLE rows (id BLOB PRIMARY KEY, value BLOB)")
        yield conn


def _messages(stack: ExitStack, folder: Path) -> tuple[dict[str, Call], dict[str, Call]]:
    serializer = JsonPlusSerializer()
    messages = conversation(MESSAGES)
    dumped = serializer.dumps_typed(messages)
    memory = stack.enter_context(MemoryStore.open(folder / "messages.db"))
    config, checkpoint, _, _ = next(checkpoint_chain("limits"))
    checkpoint["channel_values"] = {"messages": messages}
    checkpoint["channel_versions"] = {"messages": f"{1:032}.0"}
    latest = memory.checkpointer.put(config, checkpoint, {"source": "loop", "step": 0}, checkpoint["channel_versions"])

    def read() -> Any:
        with MemoryStore.open(folder / "messages.db") as opened:  # nothing is remembered from before
            return opened.checkpointer.get_tuple(latest)

    limits: dict[str, Call] = {
        "dumps_typed": lambda: serializer.dumps_typed(messages),
        "loads_typed": lambda: serializer.loads_typed(dumped),
        "blake2b": lambda: blake2b(dumped[1]).digest(),
    }
    return limits, {"MemStateCheckpointer: open, get_tuple": read}


def conversation(count: int) -> list[AnyMessage]:
    dice = random.Random(1)
    kinds = (HumanMessage, AIMessage)
    return [kinds[place % 2](text(dice), id=str(UUID(int=dice.getrandbits(128)))) for place in range(count)]


def _vectors(stack: ExitStack, folder: Path) -> tuple[dict[str, Call], dict[str, Call]]:
    vectors = Vectors(VECTORS)
    query = vectors.queries[0]
    memory = stack.enter_context(MemoryStore(SQLiteStorage(folder / "vectors.db"), index=vectors.index))
    memory.store.batch([PutOp(("limits",), str(number), {"text": str(number)}) for number in range(VECTORS)])

    def nearest() -> object:
        scores = vectors.rows @ query
        return np.argpartition(scores, -10)[-10:]

    limits: dict[str, Call] = {"numpy: matrix @ vector": lambda: vectors.rows @ query, "and its ten largest": nearest}
    return limits, {"MemStateStore.search": lambda: memory.store.search(("limits",), query="query 0", limit=10)}

"""Semantic search in clustered vectors of 384 dimensions: wide, with a filter, in a namespace, and what it misses."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from langgraph.store.base import PutOp
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import SqliteStore

from langgraph_memstate import MemoryStore, SQLiteStorage
from tests.benchmarks.measure import Contender, Row, Session, race
from tests.benchmarks.vectors import DIMS, QUERIES, Vectors

CASE = "search"
USERS = 50
FOUND = 10
_BATCH = 1_000
_CHROMA_UP_TO = 10_000  # it takes minutes to build a larger one
_IN_MEMORY_UP_TO = 10_000  # it takes seconds to answer from a larger one

ROLES = ("preference", *["note"] * 9)


@dataclass(frozen=True)
class Question:
    what: str
    namespace: tuple[str, ...]
    filter: dict[str, Any] | None
    fits: Callable[[int], bool]
    """Which rows may be found"""


QUESTIONS = (
    Question("wide", ("users",), None, lambda row: True),
    Question("1 in 10 matches", ("users",), {"role": "preference"}, lambda row: _role(row) == "preference"),
    Question("1 in 50 in the namespace", ("users", "u7"), None, lambda row: row % USERS == 7),
)


def _role(row: int) -> str:
    return ROLES[row // USERS % len(ROLES)]


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rows: list[Row] = []
    for count in (1_000, 5_000) if session.quick else (10_000, 100_000):
        with ExitStack() as stack:
            vectors, place = Vectors(count), folder / str(count)
            place.mkdir()
            rows += searched(session, stack, CASE, _contenders(place, vectors, count, large=session.large), vectors)
    if not hasattr(sqlite3.Connection, "enable_load_extension"):
        missing = "the sqlite3 of this Python loads no extensions"
        rows.append(Row(CASE, f"{DIMS} dimensions", "SqliteStore, sqlite-vec", notes={"not measured": missing}))
    return rows


def searched(
    session: Session,
    stack: ExitStack,
    case: str,
    contenders: Iterable[tuple[str, str, Any]],
    vectors: Vectors,
    settle: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Every question to stores that hold all vectors.

    `contenders`: names, journals, and what opens them. `settle`: what a server does by itself some time after it was
    filled.
    """
    count = len(vectors.rows)
    stores: dict[str, Any] = {}
    journals: dict[str, str] = {}
    built: dict[str, float] = {}
    for name, journal, opening in contenders:
        session.tell(f"{case}: {count:,} for {name}")
        journals[name] = journal
        start = time.perf_counter()
        stores[name] = stack.enter_context(opening)
        _fill(stores[name], count)
        built[name] = time.perf_counter() - start
    settle()
    rows = []
    calls, rounds = (1, 5) if count > 10_000 else (4, session.pick(10, 3))
    for question in QUESTIONS:
        first, *others = [Contender(name, journals[name], _asked(store, question)) for name, store in stores.items()]
        what = f"{count:,}: {question.what}"
        raced = race(session, case, what, first, others, rounds=rounds, calls=calls)
        for row, (name, store) in zip(raced, stores.items(), strict=True):
            notes: dict[str, float | str] = {
                "recall@10": _recall(store, vectors, question, queries=calls + rounds),
                "built in s": built[name],
            }
            rows.append(replace(row, notes=notes))
    return rows


def _contenders(folder: Path, vectors: Vectors, count: int, *, large: bool) -> Iterator[tuple[str, str, Any]]:
    yield "MemStateStore, exact", "WAL", _ours(folder / "exact.db", vectors)
    if find_spec("faiss"):
        from langgraph_memstate.hooks.faiss import FaissSyncHook

        hook = FaissSyncHook(folder / "faiss")
        yield "MemStateStore, FAISS", "WAL", _ours(folder / "faiss.db", vectors, hook)
    if count <= _CHROMA_UP_TO or large:
        from langgraph_memstate.hooks.chroma import ChromaSyncHook

        hook = ChromaSyncHook(path=folder / "chroma")
        yield "MemStateStore, Chroma", "WAL", _ours(folder / "chroma.db", vectors, hook)
    if hasattr(sqlite3.Connection, "enable_load_extension"):
        yield "SqliteStore, sqlite-vec", "WAL", _upstream(folder / "upstream.db", vectors)
    if count <= _IN_MEMORY_UP_TO:
        yield "InMemoryStore", "", _in_memory(vectors)


@contextmanager
def _ours(path: Path, vectors: Vectors, hook: Any = None) -> Iterator[Any]:
    with MemoryStore(SQLiteStorage(path), index=vectors.index) as memory:
        if hook is not None:
            memory.add_hook(hook)
        yield memory.store


@contextmanager
def _upstream(path: Path, vectors: Vectors) -> Iterator[Any]:
    index: Any = {**vectors.index, "text_fields": ["text"]}  # the name it reads
    with SqliteStore.from_conn_string(str(path), index=index) as store:
        store.conn.execute("PRAGMA journal_mode=WAL")
        store.setup()
        yield store


@contextmanager
def _in_memory(vectors: Vectors) -> Iterator[Any]:
    yield InMemoryStore(index=vectors.index)


def _fill(store: Any, count: int) -> None:
    for start in range(0, count, _BATCH):
        rows = range(start, min(start + _BATCH, count))
        store.batch(
            [PutOp(("users", f"u{row % USERS}"), str(row), {"text": str(row), "role": _role(row)}) for row in rows]
        )


def _ask(store: Any, question: Question, number: int) -> list[int]:
    found = store.search(question.namespace, query=f"query {number}", filter=question.filter, limit=FOUND)
    return [int(item.key) for item in found]


def _asked(store: Any, question: Question) -> Callable[[int], float]:
    """Each call asks the next query."""
    numbers = itertools.cycle(range(QUERIES))

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            _ask(store, question, next(numbers))
        return (time.perf_counter() - start) / calls

    return sample


def _recall(store: Any, vectors: Vectors, question: Question, queries: int) -> float:
    """The share of the ten nearest by numpy that the store finds too."""
    fitting = np.array([row for row in range(len(vectors.rows)) if question.fits(row)])
    hits = 0
    for number in range(queries):
        scores = vectors.rows[fitting] @ vectors.queries[number]
        nearest = fitting[np.argsort(-scores)[:FOUND]]
        hits += len(set(nearest.tolist()) & set(_ask(store, question, number)))
    return hits / (queries * FOUND)

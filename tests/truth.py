"""What must hold of a memory with an index: search says what SQL holds, and the index holds what SQL says."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from langgraph_memstate import MemoryStore, search
from langgraph_memstate.facts import Draft
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from langgraph_memstate.testing.faults import FaultyHook
from langgraph_memstate.testing.texts import (  # noqa: F401, tests take them from here
    DIMS,
    QUERIES,
    Words,
    cosine,
    note,
    notes,
    vector_of,
)

ROOT = Path(__file__).parents[1]


def commit(memory: MemoryStore, texts: Mapping[str, str]) -> None:
    memory.commit([note(key, text) for key, text in texts.items()])


def open_memory(database: Path, *, model: Words | None = None, **options: Any) -> MemoryStore:
    """A memory on a file with an embedded Chroma of its own, whose hook is a `FaultyHook`."""
    vectors = options.pop("vectors", None) or faulty_chroma(database)
    index = {"dims": DIMS, "embed": model or Words(), "fields": ["text"]}
    return MemoryStore.open(database, index=index, vectors=vectors, **options)


def faulty_chroma(database: Path, collection_name: str = "memory", **options: Any) -> FaultyHook:
    return FaultyHook(ChromaSyncHook(path=directory(database), collection_name=collection_name, **options))


def directory(database: Path) -> Path:
    return database.with_name(database.name + ".chroma")


def hook_of(memory: MemoryStore, number: int = 0) -> FaultyHook:
    hook = memory._outbox.indexes[number].hook
    assert isinstance(hook, FaultyHook)
    return hook


def drafts_of(memory: MemoryStore, texts: Mapping[str, str]) -> list[Draft]:
    return [memory.draft_put(("note",), key, {"text": text}, type="note") for key, text in texts.items()]


def collection_of(memory: MemoryStore) -> Any:
    chroma = hook_of(memory).inner
    assert isinstance(chroma, ChromaSyncHook)
    return chroma._collection


def drop_collection(memory: MemoryStore) -> None:
    """Lose the vectors behind the memory's back."""
    chroma = hook_of(memory).inner
    assert isinstance(chroma, ChromaSyncHook)
    chroma._client.delete_collection("memory")


def command(script: str, *arguments: object) -> list[str]:
    """Runs a script in a process of its own, with the names of this module at hand."""
    return [sys.executable, "-c", _PRELUDE + script, *map(str, arguments)]


def python(script: str, *arguments: object, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


_PRELUDE = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from truth import *
database = Path(sys.argv[1])
"""


# -- what must hold ---------------------------------------------------------------------------------


@contextmanager
def exact_below(candidates: int, floor: int = 3) -> Iterator[None]:
    """Have search scan SQL for so few candidates, and ask the index for at least `floor` where there are more."""
    usual = search.EXACT_BELOW, search._FLOOR
    search.EXACT_BELOW, search._FLOOR = candidates, floor
    try:
        yield
    finally:
        search.EXACT_BELOW, search._FLOOR = usual


def check_search(memory: MemoryStore, texts: Mapping[str, str], queries: Iterable[str] = QUERIES) -> None:
    """Search finds exactly these notes, the nearest first, with their exact cosine: by the index, and by a scan."""
    for candidates in (2, 2_000):
        with exact_below(candidates):
            _check_search(memory, texts, queries)


def _check_search(memory: MemoryStore, texts: Mapping[str, str], queries: Iterable[str]) -> None:
    for query in queries:
        scores = {key: cosine(query, text) for key, text in texts.items()}
        best = sorted(scores.values(), reverse=True)
        for limit in (3, len(texts) + 5):
            found = memory.search(query, limit=limit)
            assert [fact.score for fact in found] == pytest.approx(best[:limit], abs=1e-6)
            assert {fact.id: fact.payload["text"] for fact in found}.items() <= texts.items()
            assert [fact.score for fact in found] == pytest.approx([scores[fact.id] for fact in found], abs=1e-6)
            assert len({fact.id for fact in found}) == len(found)


def wanted_ids(database: Path, index: str = "chroma:memory") -> set[str]:
    """Ids of the vectors of every current version, as SQL has them."""
    query = "SELECT vector_id FROM vectors JOIN items USING (version) WHERE index_name = ?"
    return {row[0] for row in rows(database, query, index)}


def held_ids(memory: MemoryStore, number: int = 0) -> set[str]:
    """Ids that the vector database holds, whatever faults its hook has."""
    return set(hook_of(memory, number).inner.ids())


def check_settled(memory: MemoryStore, database: Path) -> None:
    """Nothing waits, and every index holds exactly what is current."""
    for number, index in enumerate(memory._outbox.indexes):
        assert held_ids(memory, number) == wanted_ids(database, index.name)
    assert rows(database, "SELECT * FROM outbox") == []
    assert rows(database, "SELECT * FROM prepared") == []
    assert memory.verify().ok


def dump(database: Path, *, without: Sequence[str] = ()) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'sqlite_sequence'"
    names = [name for (name,) in rows(database, tables)]
    return {name: sorted(rows(database, f"SELECT * FROM {name}"), key=repr) for name in names if name not in without}


def rows(database: Path, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query, parameters).fetchall()


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until something is the case that a background thread or another process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)

"""What a call costs: counted in write transactions, which are the syncs that a caller waits for.

SQLite's trace callback sees every statement of every connection, so none of them can commit unnoticed.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import PutOp

from langgraph_memstate import MemoryStore, SQLiteStorage
from langgraph_memstate.storage.operations import Commit

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.benchmarks.counting import INDEX, CountedCheckpointer, Counter, HeldHook, Ledger, one_node
from tests.benchmarks.work import checkpoint_chain, new_run, pending_writes

CALLERS = 16


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger() as opened:
        yield opened


@contextmanager
def opened(folder: Path, vectors: str) -> Iterator[MemoryStore]:
    """A memory without an index, or one whose vectors are stored in a mode."""
    path = folder / "memory.db"
    if vectors == "none":
        with MemoryStore.open(path) as memory:
            yield memory
    elif vectors == "atomic":
        with MemoryStore.open(path, index=INDEX) as memory:
            yield memory
    else:  # what the outbox does afterwards waits, so that it is not counted for the commit
        hook = HeldHook(folder / "held.chroma")
        with MemoryStore.open(path, index=INDEX, vectors=hook, vector_sync="deferred") as memory:
            yield memory
            hook.let_go.set()


def run_counted(memory: MemoryStore, ledger: Ledger, face: str, memory_writes: int) -> dict[str, list[int]]:
    """Write transactions of each call of the checkpointer in a run of a graph with one node."""
    counter = Counter(ledger)
    graph = one_node(memory, CountedCheckpointer(memory, counter, "remembering"), memory_writes=memory_writes)
    if face == "sync":
        graph.invoke(*new_run(), durability="sync")
    else:
        asyncio.run(graph.ainvoke(*new_run(), durability="sync"))
    assert len(memory.query(("users", "u1"))) == memory_writes
    return dict(counter.found)


@pytest.mark.parametrize("face", ["sync", "async"])
@pytest.mark.parametrize(
    ("vectors", "memory_writes", "landing"),
    [
        pytest.param("none", 0, 1, id="no memory write"),
        pytest.param("atomic", 0, 1, id="no memory write, with an index"),
        pytest.param("none", 3, 1, id="memory writes without vectors"),
        pytest.param("deferred", 3, 1, id="memory writes, vectors deferred"),
        pytest.param("atomic", 3, 2, id="memory writes, vectors atomic"),
    ],
)
def test_transactions_of_a_step(
    tmp_path: Path, ledger: Ledger, face: str, vectors: str, memory_writes: int, landing: int
) -> None:
    with opened(tmp_path, vectors) as memory:
        counts = run_counted(memory, ledger, face, memory_writes)
    assert counts == {
        "put, plain": [1, 1],  # the input, and the step that starts the node
        "put, remembering": [landing],
        "put_writes, remembering": [1, 1],  # of the start and of the node
    }


@pytest.mark.parametrize("vectors", ["none", "deferred", "atomic"])
def test_a_store_write_outside_a_step_costs_what_its_step_would(tmp_path: Path, ledger: Ledger, vectors: str) -> None:
    with opened(tmp_path, vectors) as memory:
        before = ledger.writes
        memory.store.batch([PutOp(("users", "u1"), f"k{number}", {"text": f"text {number}"}) for number in range(20)])
        assert ledger.writes - before == (2 if vectors == "atomic" else 1)


def test_reading_takes_no_write_transaction(tmp_path: Path, ledger: Ledger) -> None:
    with opened(tmp_path, "atomic") as memory:
        memory.store.put(("users", "u1"), "k", {"text": "a text", "role": "note"})
        config = memory.checkpointer.put(*next(checkpoint_chain("t")))
        before = ledger.writes
        assert memory.store.get(("users", "u1"), "k") is not None
        assert len(memory.store.search(("users",), filter={"role": "note"})) == 1
        assert len(memory.store.search(("users",), query="a text")) == 1
        assert memory.store.list_namespaces() == [("users", "u1")]
        assert memory.checkpointer.get_tuple(config) is not None
        assert len(list(memory.checkpointer.list(None))) == 1
        assert ledger.writes == before


class Turnstile(SQLiteStorage):
    """Notes how many commits come in together, and holds them back until it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.groups: list[int] = []
        self.open_for_all = threading.Event()

    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        self.groups.append(len(commits))
        assert self.open_for_all.wait(60)
        return super().apply(commits)


@pytest.mark.parametrize("call", ["put", "put_writes"])
@pytest.mark.parametrize("face", ["threads", "tasks"])
def test_callers_that_wait_together_share_a_transaction(tmp_path: Path, ledger: Ledger, face: str, call: str) -> None:
    storage = Turnstile(tmp_path / "memory.db")
    with MemoryStore(storage) as memory:
        saver, before = memory.checkpointer, ledger.writes
        arguments = [_arguments(call, number) for number in range(CALLERS)]
        opener = threading.Thread(target=_open_once_all_wait, args=(memory, storage))
        opener.start()
        if face == "threads":
            with ThreadPoolExecutor(CALLERS) as pool:
                list(pool.map(lambda one: getattr(saver, call)(*one), arguments))
        else:
            asyncio.run(_gather(getattr(saver, f"a{call}"), arguments))
        opener.join()
        # The writer does not wait for company: the first commit or two go alone, and the rest finds it busy.
        assert sum(storage.groups) == CALLERS
        assert ledger.writes - before == len(storage.groups) <= 2
        stored = memory.stats()
        assert (stored["checkpoints"], stored["writes"]) == ((CALLERS, 0) if call == "put" else (0, 2 * CALLERS))


def _arguments(call: str, number: int) -> Any:
    if call == "put":
        return next(checkpoint_chain(f"thread {number}"))
    return next(
        pending_writes({"configurable": {"thread_id": f"t{number}", "checkpoint_ns": "", "checkpoint_id": "c"}})
    )


async def _gather(call: Any, arguments: list[Any]) -> None:
    await asyncio.gather(*(call(*one) for one in arguments))


def _open_once_all_wait(memory: MemoryStore, storage: Turnstile) -> None:
    deadline = time.monotonic() + 30
    while sum(storage.groups) + len(memory._writer._queue) < CALLERS and time.monotonic() < deadline:
        time.sleep(0.005)
    storage.open_for_all.set()

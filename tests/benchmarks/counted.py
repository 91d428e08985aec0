"""The process whose transactions and syncs `transactions` counts: ``python -m tests.benchmarks.counted FOLDER``."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from langgraph_memstate import MemoryStore
from tests.benchmarks.counting import INDEX, CountedCheckpointer, Counter, HeldHook, Ledger, one_node
from tests.benchmarks.peers import ours, upstream, upstream_async
from tests.benchmarks.work import SENTENCE, checkpoint_chain, new_run, pending_writes

CALLS = 10


def main(folder: Path) -> None:
    marks = folder / "marks"
    marks.mkdir()
    with Ledger() as ledger:
        counter = Counter(ledger, marks)
        with MemoryStore.open(folder / "plain.db") as memory:
            _steps(memory, counter, "no vectors")
        with MemoryStore.open(folder / "atomic.db", index=INDEX) as memory:
            _steps(memory, counter, "atomic vectors")
        hook = HeldHook(folder / "deferred.chroma")
        with MemoryStore.open(folder / "deferred.db", index=INDEX, vectors=hook, vector_sync="deferred") as memory:
            _steps(memory, counter, "deferred vectors")
            hook.let_go.set()
        with ours(folder / "ours") as peer:
            _count(counter, f"{peer.store_name}.put", peer.store.put, _items())
        _count_upstream(counter, folder)
    json.dump(counter.found, sys.stdout)


def _steps(memory: MemoryStore, counter: Counter, vectors: str) -> None:
    """Runs of a graph that writes two memories in one step; the first commits of a file cost more."""
    one_node(memory, memory.checkpointer, memory_writes=1).invoke(*new_run())
    for writes in (0, 2):
        kind = f"with memory writes, {vectors}" if writes else "plain"
        graph = one_node(memory, CountedCheckpointer(memory, counter, kind), memory_writes=writes)
        for _ in range(CALLS):
            graph.invoke(*new_run(), durability="sync")


def _count_upstream(counter: Counter, folder: Path) -> None:
    for wal in (False, True):
        with upstream(folder / f"sync-{wal}", wal=wal) as peer:
            _count(counter, f"{peer.store_name}.put ({peer.store_journal})", peer.store.put, _items())
            if wal:
                chain = checkpoint_chain(uuid4().hex)
                config = peer.saver.put(*next(chain))
                _count(counter, f"{peer.saver_name}.put", peer.saver.put, chain)
                _count(counter, f"{peer.saver_name}.put_writes", peer.saver.put_writes, pending_writes(config))
        with asyncio.Runner() as runner, upstream_async(folder / f"async-{wal}", runner, wal=wal) as peer:
            aput = _run_in(runner, peer.store.aput)
            _count(counter, f"{peer.store_name}.aput ({peer.store_journal})", aput, _items())
            if wal:
                chain = checkpoint_chain(uuid4().hex)
                config = runner.run(peer.saver.aput(*next(chain)))
                _count(counter, f"{peer.saver_name}.aput", _run_in(runner, peer.saver.aput), chain)
                put_writes = _run_in(runner, peer.saver.aput_writes)
                _count(counter, f"{peer.saver_name}.aput_writes", put_writes, pending_writes(config))


def _run_in(runner: asyncio.Runner, call: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    async def awaited(*args: Any) -> Any:
        return await call(*args)

    return lambda *args: runner.run(awaited(*args))


def _count(counter: Counter, name: str, call: Callable[..., Any], arguments: Any) -> None:
    call(*next(arguments))
    for _ in range(CALLS):
        with counter.call(name):
            call(*next(arguments))


def _items() -> Any:
    while True:
        yield ("users", "u1"), uuid4().hex, {"text": SENTENCE}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Random trees of functions that call each other, fail, wait and are resumed: what they return is what is remembered.

Every call writes before and after what it calls, each time under a name of its own, which is part of what it returns.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.func import entrypoint, task
from langgraph.types import Command, interrupt

sys.path.insert(0, str(Path(__file__).parent))
from small import NOTES, Trouble

from langgraph_memstate import MemoryStore, MemStateCheckpointer

THREAD: dict[str, Any] = {"configurable": {"thread_id": "t"}, "max_concurrency": 64}


class Late(MemStateCheckpointer):
    """Saves after a while, at random."""

    def put(self, *args: Any) -> Any:
        time.sleep(random.choice([0, 0.002, 0.008]))
        return super().put(*args)

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        time.sleep(random.choice([0, 0.001, 0.008]))
        super().put_writes(config, writes, task_id, task_path)


@dataclass(frozen=True)
class Call:
    """A function, and what it calls after it has perhaps asked a question."""

    calls: tuple[Call, ...] = ()
    asks: bool = False


calls = st.recursive(
    st.builds(Call, asks=st.booleans()),
    lambda inner: st.builds(Call, st.lists(inner, max_size=3).map(tuple), st.booleans()),
    max_leaves=6,
)


class Play:
    """An application that calls trees one after the other. `parallel`: each call makes its own calls at once."""

    def __init__(self, memory: MemoryStore, ids: Any, broken: set[int], *, parallel: bool) -> None:
        self.memory = memory
        self._ids = ids
        self._broken = broken
        self._parallel = parallel

    def _write(self) -> str:
        name = f"{next(self._ids):03}"
        if int(name) in self._broken:  # it fails once, since the next write has another name
            raise Trouble(name)
        self.memory.store.put(NOTES, name, {})
        return name

    def _read(self, done: Sequence[str]) -> None:
        seen = {item.key for item in self.memory.store.search(NOTES, limit=1000)}
        assert seen >= set(done), "what has returned is read"

    def sync(self, trees: Sequence[Call]) -> Any:
        @task
        def run(call: Call) -> list[str]:
            done = [self._write()]
            if call.asks:
                interrupt(done)
            if self._parallel:
                futures = [run(one) for one in call.calls]
                done += itertools.chain(*(one.result() for one in futures))
            else:
                for one in call.calls:
                    done += run(one).result()
            return [*done, self._write()]

        @entrypoint(checkpointer=Late(self.memory), store=self.memory.store)
        def flow(_: Any) -> list[str]:
            done = [self._write()]
            for tree in trees:
                done += run(tree).result()
            self._read(done)
            return [*done, self._write()]

        return flow

    def awaited(self, trees: Sequence[Call]) -> Any:
        @task
        async def run(call: Call) -> list[str]:
            done = [self._write()]
            if call.asks:
                interrupt(done)
            if self._parallel:
                done += itertools.chain(*await asyncio.gather(*map(run, call.calls)))
            else:
                for one in call.calls:
                    done += await run(one)
            return [*done, self._write()]

        @entrypoint(checkpointer=Late(self.memory), store=self.memory.store)
        async def flow(_: Any) -> list[str]:
            done = [self._write()]
            for tree in trees:
                done += await run(tree)
            self._read(done)
            return [*done, self._write()]

        return flow


def step(flow: Any, given: Any, durability: str, use_async: bool) -> Any:
    if use_async:
        return asyncio.run(flow.ainvoke(given, THREAD, durability=durability))
    return flow.invoke(given, THREAD, durability=durability)


@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    trees=st.lists(calls, min_size=1, max_size=2),
    parallel=st.booleans(),
    broken=st.sets(st.integers(0, 25), max_size=4),
    durabilities=st.lists(st.sampled_from(["sync", "async", "exit"]), min_size=1, max_size=5),
    restarts=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_what_is_returned_is_remembered_once(
    use_async: bool, trees: list[Call], parallel: bool, broken: set[int], durabilities: list[str], restarts: list[bool]
) -> None:
    ids = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.db"
        memory = MemoryStore.open(path)
        try:
            given, returned, lives = 1, None, 0
            for durability, restarts_now in zip(itertools.cycle(durabilities), itertools.cycle(restarts), strict=False):
                play = Play(memory, ids, broken, parallel=parallel)
                flow = (play.awaited if use_async else play.sync)(trees)
                lives += 1
                assert lives < 60
                try:
                    returned = step(flow, given, durability, use_async)
                except Trouble:
                    state = flow.get_state(THREAD)
                    given = None if state.next or state.values else 1
                else:
                    if not isinstance(returned, dict) or "__interrupt__" not in returned:
                        break
                    given = Command(resume={one.id: "yes" for one in returned["__interrupt__"]})
                if restarts_now:
                    memory.close()
                    memory = MemoryStore.open(path)
            with memory.storage.snapshot() as reader:
                written = [entry.key for entry in reader.log()]
            assert sorted(written) == sorted(returned)
            if lives == 1 and not parallel:
                assert written == returned, "in the order in time"
        finally:
            memory.close()

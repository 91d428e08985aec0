"""Calls that tasks of an event loop make at the same moment share a thread and a transaction, and nothing else."""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.store.base import GetOp, Op, PutOp, Result
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent))
from gate import Gate

from langgraph_memstate import MemoryStore, MemStateCheckpointer, MemStateStore, SQLiteStorage
from langgraph_memstate.errors import (
    CommitRaced,
    DiskFullError,
    NamespaceError,
    SchemaError,
    SerializationError,
    StorageClosedError,
)
from langgraph_memstate.storage.operations import Append, Commit

NOTES = ("notes",)
TASKS = 50


class Refusing(Gate):
    """Lets commits through from the first, but for what a test names."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.opened.set()
        self.refusals: dict[str, BaseException] = {}
        """by key; each strikes once"""

    def land(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        refused = [self._refusal(commit) for commit in commits]
        outcomes = iter(super().land([one for one, error in zip(commits, refused, strict=True) if error is None]))
        return [next(outcomes) if error is None else error for error in refused]

    def _refusal(self, commit: Commit) -> BaseException | None:
        keys = [draft.key for op in commit if isinstance(op, Append) for draft in op.drafts]
        return next((self.refusals.pop(key) for key in keys if key in self.refusals), None)


@pytest.fixture
def gate(database: Path) -> Refusing:
    return Refusing(database)


@pytest.fixture
def memory(gate: Refusing) -> Iterator[MemoryStore]:
    with MemoryStore(gate) as opened:
        yield opened
        gate.opened.set()


async def at_once(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """What each call returned or raised."""
    async with asyncio.timeout(30):
        return await asyncio.gather(*calls, return_exceptions=True)


@asynccontextmanager
async def busy(memory: MemoryStore) -> AsyncIterator[None]:
    """Every thread of the memory is taken, so that calls are collected until the end of the block."""
    released = threading.Event()
    taken = [asyncio.create_task(memory.run(released.wait, 30)) for _ in range(64)]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        released.set()
        await asyncio.gather(*taken)


async def started(call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(call)
    await asyncio.sleep(0)
    return task


# -- puts -----------------------------------------------------------------------------------------------


async def test_puts_of_a_moment_are_commits_of_one_transaction(memory: MemoryStore, gate: Refusing) -> None:
    async with busy(memory):
        puts = [await started(memory.store.aput(NOTES, str(n), {"n": n})) for n in range(TASKS)]
    assert await at_once(puts) == [None] * TASKS
    assert gate.groups == [TASKS]
    assert gate.landed() == [str(n) for n in range(TASKS)]
    assert len({entry.commit_id for entry in memory.log()}) == TASKS
    for n in range(TASKS):
        item = await memory.store.aget(NOTES, str(n))
        assert item is not None
        assert item.value == {"n": n}


async def test_a_burst_takes_several_transactions(memory: MemoryStore, gate: Refusing) -> None:
    async with busy(memory):
        puts = [await started(memory.store.aput(NOTES, str(n), {})) for n in range(1000)]
    assert await at_once(puts) == [None] * 1000
    assert gate.groups == [256, 256, 256, 232]
    assert len(set(gate.landed())) == 1000


async def test_each_batch_has_its_own_results(memory: MemoryStore) -> None:
    memory.store.put(NOTES, "old", {"n": 0})
    batches: list[list[Op]] = [
        [],
        [PutOp(NOTES, "a", {})],
        [PutOp(NOTES, "b", {}), PutOp(NOTES, "b", {"last": True}), PutOp(NOTES, "old", None)],
        [GetOp(NOTES, "missing"), PutOp(NOTES, "c", {})],
    ]
    assert await at_once(memory.store.abatch(iter(ops)) for ops in batches) == [[], [None], [None] * 3, [None] * 2]
    found = [await memory.store.aget(NOTES, key) for key in ("a", "b", "c", "old")]
    assert [None if item is None else item.value for item in found] == [{}, {"last": True}, {}, None]


async def test_what_is_invalid_fails_alone(memory: MemoryStore, gate: Refusing) -> None:
    puts = [memory.store.abatch([PutOp(NOTES, str(n), {"n": n})]) for n in range(10)]
    puts[3:3] = [memory.store.abatch([PutOp(("",), "k", {})]), memory.store.aput(NOTES, "k", {"set": {1}})]
    outcomes = await at_once(puts)
    assert [type(outcome) for outcome in outcomes[3:5]] == [NamespaceError, SerializationError]
    assert outcomes[:3] + outcomes[5:] == [[None]] * 10
    assert sorted(gate.landed()) == [str(n) for n in range(10)]


async def test_a_commit_that_is_refused_fails_alone(memory: MemoryStore, gate: Refusing) -> None:
    gate.refusals["4"] = DiskFullError("no space left")
    outcomes = await at_once(memory.store.aput(NOTES, str(n), {}) for n in range(10))
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 4 + [DiskFullError] + [type(None)] * 5
    assert sorted(gate.landed()) == [str(n) for n in range(10) if n != 4]


async def test_a_commit_that_lost_a_race_is_prepared_anew(memory: MemoryStore, gate: Refusing) -> None:
    gate.refusals["4"] = CommitRaced("somebody was faster")
    assert await at_once(memory.store.aput(NOTES, str(n), {}) for n in range(10)) == [None] * 10
    assert gate.landed()[-1] == "4"


async def test_puts_of_a_task_land_in_their_order(memory: MemoryStore, gate: Refusing) -> None:
    async def write(task: int) -> None:
        for n in range(20):
            await memory.store.aput(NOTES, f"{task}.{n}", {})

    await at_once(write(task) for task in range(8))
    for task in range(8):
        mine = [key for key in gate.landed() if key.startswith(f"{task}.")]
        assert mine == [f"{task}.{n}" for n in range(20)]


async def test_the_last_put_of_a_key_in_the_log_is_what_is_read(memory: MemoryStore) -> None:
    for _ in range(10):
        await at_once(memory.store.aput(NOTES, "k", {"n": n}) for n in range(TASKS))
        item = await memory.store.aget(NOTES, "k")
        assert item is not None
        assert item.value == memory.log()[-1].value


# -- cancelled, closed ----------------------------------------------------------------------------------


async def test_cancelling_one_that_is_collected_disturbs_no_other(memory: MemoryStore, gate: Refusing) -> None:
    async with busy(memory):
        puts = [await started(memory.store.aput(NOTES, key, {})) for key in "abc"]
        puts[1].cancel()
    outcomes = await at_once(puts)
    assert [type(outcome) for outcome in outcomes] == [type(None), asyncio.CancelledError, type(None)]
    assert gate.landed() == ["a", "b", "c"]


async def test_cancelling_one_that_is_being_written_disturbs_no_other(memory: MemoryStore, gate: Refusing) -> None:
    gate.opened.clear()
    async with busy(memory):
        puts = [await started(memory.store.aput(NOTES, key, {})) for key in "abc"]
    assert await asyncio.to_thread(gate.entered.wait, 30)
    puts[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await puts[1]
    gate.opened.set()
    assert await at_once([puts[0], puts[2]]) == [None, None]
    assert gate.landed() == ["a", "b", "c"]
    assert gate.groups == [3]


async def test_what_is_being_written_when_the_memory_closes(
    memory: MemoryStore, gate: Refusing, database: Path
) -> None:
    gate.opened.clear()
    puts = [await started(memory.store.aput(NOTES, key, {})) for key in "ab"]
    assert await asyncio.to_thread(gate.entered.wait, 30)
    await asyncio.wait_for(closing(memory, gate.opened.set), 30)
    for outcome in await at_once(puts):
        assert outcome is None or isinstance(outcome, StorageClosedError)
    with MemoryStore.open(database) as again:
        assert "a" in {entry.key for entry in again.log()}


async def test_what_is_collected_when_the_memory_closes(memory: MemoryStore, database: Path) -> None:
    async with asyncio.TaskGroup() as group:
        async with busy(memory):
            puts = [await started(memory.store.aput(NOTES, key, {})) for key in "ab"]
            begun = threading.Event()
            group.create_task(closing(memory, begun.set))
            assert await asyncio.to_thread(begun.wait, 30)
        outcomes = await at_once([*puts, memory.store.aput(NOTES, "c", {})])
    assert [type(outcome) for outcome in outcomes] == [StorageClosedError] * 3
    with MemoryStore.open(database) as again:
        assert again.log() == []


async def closing(memory: MemoryStore, then: Callable[[], None]) -> None:
    """Close the memory, and do something as soon as it takes nothing more."""
    memory.at_close(then)
    await memory.aclose()


# -- event loops ----------------------------------------------------------------------------------------


def test_loops_of_several_threads(memory: MemoryStore, gate: Refusing) -> None:
    async def write(loop: int) -> list[Any]:
        return [
            outcome
            for turn in range(10)
            for outcome in await at_once(memory.store.aput(NOTES, f"{loop}.{turn}.{n}", {}) for n in range(10))
        ]

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda loop: asyncio.run(write(loop)), range(4)))
    assert outcomes == [[None] * 100] * 4
    assert len(set(gate.landed())) == 400


def test_one_loop_after_another(memory: MemoryStore, gate: Refusing) -> None:
    async def write(turn: int) -> weakref.ref[asyncio.AbstractEventLoop]:
        await at_once(memory.store.aput(NOTES, f"{turn}.{n}", {}) for n in range(10))
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(write(turn)) for turn in range(3)]
    assert len(gate.landed()) == 30
    memory.close()  # which waits for its threads
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3


def test_a_loop_that_is_closed_meanwhile(memory: MemoryStore, gate: Refusing) -> None:
    async def leave() -> weakref.ref[asyncio.AbstractEventLoop]:
        await started(memory.store.aput(NOTES, "before", {}))
        assert await asyncio.to_thread(gate.entered.wait, 30)
        return weakref.ref(asyncio.get_running_loop())

    gate.opened.clear()
    left = asyncio.run(leave())
    gate.opened.set()
    asyncio.run(memory.store.aput(NOTES, "after", {}))
    assert gate.landed() == ["before", "after"]
    memory.close()  # which waits for its threads
    gc.collect()
    assert left() is None


# -- what a call sees, and who takes it -----------------------------------------------------------------


async def test_each_call_has_the_context_of_its_caller(memory: MemoryStore) -> None:
    caller: ContextVar[int] = ContextVar("caller")
    seen: dict[int, tuple[int, int]] = {}

    async def call(number: int) -> None:
        caller.set(number)

        def begin() -> None:
            seen[number] = caller.get(), threading.get_ident()
            caller.set(-1)  # in a copy

        await memory.land_together(begin)
        assert caller.get() == number

    async with busy(memory):
        calls = [await started(call(number)) for number in range(TASKS)]
    assert await at_once(calls) == [None] * TASKS
    assert {number: found for number, (found, _) in seen.items()} == {number: number for number in range(TASKS)}
    (thread,) = {thread for _, thread in seen.values()}
    assert thread != threading.get_ident()


async def test_whatever_a_call_raises_reaches_its_caller(memory: MemoryStore) -> None:
    def begin(error: BaseException) -> None:
        raise error

    errors = [ValueError("one"), StopIteration()]
    outcomes = await at_once(memory.land_together(functools.partial(begin, error)) for error in errors)
    assert outcomes[0] is errors[0]
    assert isinstance(outcomes[1], RuntimeError)  # what a coroutine makes of it
    await memory.store.aput(NOTES, "after", {})


async def test_a_store_that_overrides_batch_is_asked(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Loud(MemStateStore):
        def batch(self, ops: Iterable[Op]) -> list[Result]:
            calls.append("override")
            return super().batch(ops)

    await at_once([Loud(memory).aput(NOTES, "a", {}), memory.store.aput(NOTES, "b", {})])
    assert calls == ["override"]
    batch = MemStateStore.batch
    monkeypatch.setattr(MemStateStore, "batch", lambda self, ops: calls.append("wrapped") or batch(self, ops))
    await memory.store.aput(NOTES, "c", {})
    assert calls == ["override", "wrapped"]


async def test_a_memory_that_overrides_write_is_asked(database: Path) -> None:
    written: list[str] = []

    class Loud(MemoryStore):
        def write(self, drafts: Any, before: Any = ()) -> Any:
            written.extend(draft.key for draft in drafts)
            return super().write(drafts, before)

    with Loud.open(database) as memory:
        await memory.store.aput(NOTES, "a", {})
    assert written == ["a"]


class Note(BaseModel):
    text: str


async def test_what_is_more_than_a_commit_goes_its_own_way(memory: MemoryStore, gate: Refusing) -> None:
    assert memory.is_simple
    async with memory.transaction():
        assert not memory.is_simple
        await at_once(memory.store.aput(NOTES, key, {"text": key}) for key in "ab")
        assert gate.landed() == []
    assert gate.groups == [1]
    memory.register_schema(NOTES, Note)
    assert not memory.is_simple
    outcomes = await at_once([memory.store.aput(NOTES, "c", {"text": "c"}), memory.store.aput(NOTES, "d", {})])
    assert outcomes[0] is None
    assert isinstance(outcomes[1], SchemaError)
    assert sorted(gate.landed()) == ["a", "b", "c"]


async def test_an_index_embeds_puts_of_a_moment(database: Path) -> None:
    def embed(texts: list[str]) -> list[list[float]]:
        return [[1.0, float(len(text))] for text in texts]

    with MemoryStore(SQLiteStorage(database), index={"dims": 2, "embed": embed, "fields": ["text"]}) as memory:
        assert not memory.is_simple
        await at_once(memory.store.aput(NOTES, str(n), {"text": "x" * n}) for n in range(1, 5))
        found = await memory.store.asearch(NOTES, query="xx")
    assert sorted(item.key for item in found) == ["1", "2", "3", "4"]
    assert all(item.score is not None for item in found)


async def test_a_schema_that_comes_meanwhile(memory: MemoryStore, gate: Refusing) -> None:
    async with busy(memory):
        puts = [await started(memory.store.aput(NOTES, key, {"text": text})) for key, text in [("a", "a"), ("b", 5)]]
        memory.register_schema(NOTES, Note)
    outcomes = await at_once(puts)
    assert outcomes[0] is None
    assert isinstance(outcomes[1], SchemaError)
    assert gate.landed() == ["a"]


# -- the writes of tasks --------------------------------------------------------------------------------


def saved(saver: MemStateCheckpointer) -> Any:
    thread: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    return saver.put(thread, empty_checkpoint(), {"source": "loop", "step": 0}, {})


async def test_writes_of_many_tasks(memory: MemoryStore, gate: Refusing) -> None:
    saver = memory.checkpointer
    config = saved(saver)
    gate.groups.clear()
    calls = [saver.aput_writes(config, [("n", n)], f"task-{n:02}") for n in range(TASKS)]
    calls.insert(7, saver.aput_writes(config, [("n", object())], "bad"))
    async with busy(memory):
        tasks = [await started(call) for call in calls]
    outcomes = await at_once(tasks)
    assert isinstance(outcomes.pop(7), SerializationError)
    assert outcomes == [None] * TASKS
    assert gate.groups == [TASKS]
    found = await saver.aget_tuple(config)
    assert found is not None
    assert sorted(found.pending_writes or ()) == [(f"task-{n:02}", "n", n) for n in range(TASKS)]


async def test_a_saver_that_overrides_put_writes_is_asked(memory: MemoryStore) -> None:
    asked: list[str] = []

    class Loud(MemStateCheckpointer):
        def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
            asked.append(task_id)
            super().put_writes(config, writes, task_id, task_path)

    saver = Loud(memory)
    config = saved(saver)
    await saver.aput_writes(config, [("n", 1)], "one")
    plain = MemStateCheckpointer(memory)
    plain.put_writes = lambda config, writes, task_id, task_path="": asked.append(task_id)  # type: ignore[method-assign]
    await plain.aput_writes(config, [("n", 1)], "two")
    assert asked == ["one", "two"]


async def test_another_serializer_holds_nobody_up(memory: MemoryStore) -> None:
    together = threading.Barrier(2, timeout=30)

    class Waiting(JsonPlusSerializer):
        def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
            if obj == "wait":
                together.wait()
            return super().dumps_typed(obj)

    saver = MemStateCheckpointer(memory, serde=Waiting())
    config = saved(saver)
    calls = [saver.aput_writes(config, [("a", "wait")], task) for task in ("one", "two")]
    assert await at_once(calls) == [None, None]

"""What is cut off, poisoned or half finished: it is whole or absent, and its neighbours do not notice."""

from __future__ import annotations

import asyncio
import operator
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from audit import audit
from journal_hook import INDEX, JournalHook
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore, PutOp

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate.errors import MemStateError
from langgraph_memstate.storage.operations import PutCheckpoint, PutWrites, Settle
from langgraph_memstate.storage.values import Blob, StepKey, WriteRow
from langgraph_memstate.testing.faults import FaultyStorage

TRIES = 60


def open_memory(path: Path) -> MemoryStore:
    memory = MemoryStore(SQLiteStorage(path / "memory.db"), index=INDEX)
    memory.add_hook(JournalHook(path / "index.journal"))
    return memory


async def cancel_after(call: Any, seconds: float) -> None:
    running = asyncio.create_task(call)
    await asyncio.sleep(seconds)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_a_cancelled_put_is_whole_or_absent(quick_path: Path) -> None:
    dice = random.Random(1)
    values = {"log": list(range(100)), "name": "x" * 5000}
    async with open_memory(quick_path) as memory:
        for n in range(TRIES):
            checkpoint = {**empty_checkpoint(), "channel_values": values, "channel_versions": {"log": "1", "name": "1"}}
            config: Any = {"configurable": {"thread_id": f"t{n}", "checkpoint_ns": ""}}
            put = memory.checkpointer.aput(config, checkpoint, {"source": "loop", "step": 0}, {"log": "1", "name": "1"})
            await cancel_after(put, dice.choice((0.0, dice.uniform(0.0, 0.004))))
    async with open_memory(quick_path) as memory:
        found = [await memory.checkpointer.aget_tuple({"configurable": {"thread_id": f"t{n}"}}) for n in range(TRIES)]
    whole = [one for one in found if one is not None]
    assert all(one.checkpoint["channel_values"] == values for one in whole)
    assert 0 < len(whole) < TRIES
    assert audit(quick_path / "memory.db", settled=True) == []


async def test_a_cancelled_batch_is_whole_or_absent(quick_path: Path) -> None:
    dice = random.Random(2)
    async with open_memory(quick_path) as memory:
        for n in range(TRIES):
            batch = [PutOp((f"batch{n}",), str(key), {"text": f"memory {n} {key}"}) for key in range(4)]
            await cancel_after(memory.store.abatch(batch), dice.choice((0.0, dice.uniform(0.0, 0.008))))
    async with open_memory(quick_path) as memory:
        sizes = [len(await memory.store.asearch((f"batch{n}",))) for n in range(TRIES)]
        assert (await memory.averify()).ok
    assert set(sizes) == {0, 4}
    assert audit(quick_path / "memory.db", settled=True) == []


STEP = StepKey("t", "", "c1")
POISON: dict[str, Any] = {
    "a number that is too large": PutWrites(STEP, "task", "", (WriteRow(2**70, "log", Blob("null", b"")),)),
    "a value that SQLite cannot hold": PutWrites(STEP, "task", "", (WriteRow(0, "log", Blob("null", object())),)),  # type: ignore[arg-type]
    "a lone surrogate": PutWrites(STEP, "task", "", (WriteRow(0, "\ud800", Blob("null", b"")),)),
    "a constraint that fails": PutCheckpoint(STEP, None, "now", Blob("null", b""), None, None, {}, {}),  # type: ignore[arg-type]
    "a record that is gone": Settle("no such record"),
    "no operation at all": object(),
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_one_poisoned_commit_does_not_hurt_its_group(poison: Any, quick_path: Path) -> None:
    gate, waiting = threading.Event(), threading.Event()
    armed = False

    def point() -> None:
        if armed and threading.current_thread() is threads[0]:
            waiting.set()
            gate.wait(30)

    threads: list[threading.Thread] = []
    outcomes: dict[int, BaseException | None] = {}
    with MemoryStore(FaultyStorage(SQLiteStorage(quick_path / "memory.db"), point)) as memory:

        def commit(n: int) -> None:
            try:
                if n == 3:
                    memory.land((), (poison,))
                else:
                    memory.commit([Fact(type="note", id=f"{n}.{i}", payload={"n": n}) for i in range(2)])
                outcomes[n] = None
            except BaseException as error:
                outcomes[n] = error

        armed = True
        threads += [threading.Thread(target=commit, args=(n,)) for n in range(7)]
        threads[0].start()
        assert waiting.wait(30)  # the writer is busy with the first one, so the others make one group
        for thread in threads[1:]:
            thread.start()
        while len(memory._writer._queue) < len(threads) - 1:
            time.sleep(0.001)
        gate.set()
        for thread in threads:
            thread.join()
        assert isinstance(outcomes.pop(3), MemStateError)
        assert outcomes == dict.fromkeys((0, 1, 2, 4, 5, 6))
        assert len(memory.query("note", limit=100)) == 12
    assert audit(quick_path / "memory.db") == []


# -- a task that LangGraph takes for finished -------------------------------------------------------


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


def after_its_output(failing: Callable[[], bool]) -> StateGraph[Any]:
    """A node that has left its output when its branch fails. LangGraph applies that output when it resumes."""

    def remember(state: State, *, store: BaseStore) -> dict[str, Any]:
        store.put(("memories",), "a", {"text": "memory a"})
        return {"log": ["a"]}

    def branch(state: State) -> str:
        if failing():
            raise RuntimeError("the branch fails")
        return "last"

    graph = StateGraph(State)
    graph.add_node("remember", remember)
    graph.add_node("last", lambda state: {"log": ["last"]})
    graph.add_edge(START, "remember")
    graph.add_conditional_edges("remember", branch, ["last"])
    return graph


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_task_whose_output_is_applied_keeps_its_memory(durability: Any, quick_path: Path) -> None:
    config: Any = {"configurable": {"thread_id": "t"}}
    with open_memory(quick_path) as memory:
        graph = after_its_output(lambda: True).compile(checkpointer=memory.checkpointer, store=memory.store)
        with pytest.raises(RuntimeError, match="the branch fails"):
            graph.invoke({"log": []}, config, durability=durability)
        assert memory.get(("memories",), "a") is None
    with open_memory(quick_path) as memory:
        graph = after_its_output(lambda: False).compile(checkpointer=memory.checkpointer, store=memory.store)
        log = graph.invoke(None, config, durability=durability)["log"]
        assert (memory.get(("memories",), "a") is not None) is ("a" in log)
        assert "a" in log

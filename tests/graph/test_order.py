"""Subgraphs save after the graphs around them, where those save in the background and late."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore

sys.path.insert(0, str(Path(__file__).parent))
from small import NOTES, THREAD, State

from langgraph_memstate import MemoryStore, MemStateCheckpointer


class Late(MemStateCheckpointer):
    """Saves the checkpoints of the root graph late, or not at all."""

    def __init__(self, memory: MemoryStore, *, seconds: float = 0.05, fails_at: int | None = None) -> None:
        super().__init__(memory)
        self._seconds = seconds
        self._fails_at = fails_at

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        is_root = not config["configurable"]["checkpoint_ns"]
        if is_root:
            time.sleep(self._seconds)
        if is_root and metadata["step"] == self._fails_at:
            checkpoint = {**checkpoint, "channel_values": {"log": object()}}  # cannot be stored
        return super().put(config, checkpoint, metadata, new_versions)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(tmp_path / "memory.db") as memory:
        yield memory


def noting(name: str) -> Any:
    def node(state: State, *, store: BaseStore) -> State:
        store.put(NOTES, name, {})
        return {"log": [name]}

    return node


def line(**nodes: Any) -> StateGraph[Any]:
    graph = StateGraph(State)
    for (name, node), before in zip(nodes.items(), [START, *nodes], strict=False):
        graph.add_node(name, node).add_edge(before, name)
    return graph


def graph_on(saver: Any, middle: Any = None) -> Any:
    """A node, then a subgraph of one node, or of one inside another."""
    inner = line(inner=noting("inner")).compile()
    return line(first=noting("first"), sub=inner if middle is None else middle(inner)).compile(
        checkpointer=saver, store=saver.memory.store
    )


def nested(inner: Any) -> Any:
    return line(middle=noting("middle"), nest=inner).compile()


def called(inner: Any) -> Any:
    return lambda state: {"log": inner.invoke({"log": []})["log"]}


def called_async(inner: Any) -> Any:
    async def node(state: State) -> State:
        return {"log": (await inner.ainvoke({"log": []}))["log"]}

    return node


def blocking(inner: Any) -> Any:
    async def node(state: State) -> State:
        return {"log": inner.invoke({"log": []})["log"]}  # on the event loop

    return node


def run(graph: Any, use_async: bool, **options: Any) -> Any:
    given = {"log": []}
    return asyncio.run(graph.ainvoke(given, THREAD, **options)) if use_async else graph.invoke(given, THREAD, **options)


def keys_as_of_each(memory: MemoryStore) -> list[list[str]]:
    saved = reversed(list(memory.checkpointer.list({"configurable": {"thread_id": "t", "checkpoint_ns": ""}})))
    return [sorted(item.key for item in memory.as_of(one.config).search(NOTES)) for one in saved]


@pytest.mark.parametrize(
    ("middle", "use_async"),
    [(None, False), (None, True), (nested, False), (nested, True), (called, False), (called, True),
     (called_async, True)],
)  # fmt: skip
def test_a_subgraph_saves_after_the_step_before_it(memory: MemoryStore, middle: Any, use_async: bool) -> None:
    run(graph_on(Late(memory), middle), use_async)
    *before, last = keys_as_of_each(memory)
    assert before == [[], [], ["first"]]
    assert last == (["first", "inner", "middle"] if middle is nested else ["first", "inner"])


def test_a_sync_graph_called_on_an_event_loop_keeps_the_order(memory: MemoryStore) -> None:
    """As in a notebook."""

    async def cell() -> None:
        run(graph_on(Late(memory)), use_async=False)

    asyncio.run(cell())
    assert keys_as_of_each(memory) == [[], [], ["first"], ["first", "inner"]]


def test_a_subgraph_that_blocks_the_loop_of_the_graph_around_it_does_not_wait(memory: MemoryStore) -> None:
    start = time.monotonic()
    run(graph_on(Late(memory, seconds=0), blocking), use_async=True)
    assert time.monotonic() - start < 0.9
    assert keys_as_of_each(memory)[-1] == ["first", "inner"]


@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
def test_what_fails_around_a_subgraph_fails_the_subgraph(memory: MemoryStore, use_async: bool) -> None:
    graph = graph_on(Late(memory, fails_at=1))
    with pytest.raises(TypeError):
        run(graph, use_async)
    assert memory.query(NOTES) == []
    run(graph_on(memory.checkpointer), use_async)  # anew
    assert sorted(item.key for item in memory.store.search(NOTES)) == ["first", "inner"]


@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
def test_a_save_that_nobody_begins_is_waited_for_once(memory: MemoryStore, use_async: bool) -> None:
    class Never(Late):
        def put(self, config: Any, *args: Any) -> Any:
            if config["configurable"]["checkpoint_ns"] or args[1]["step"] < 1:
                return super().put(config, *args)
            return config

    start = time.monotonic()
    run(graph_on(Never(memory), nested), use_async)
    assert 0.9 < time.monotonic() - start < 1.9
    assert {"inner", "middle"} <= {item.key for item in memory.store.search(NOTES)}


def test_a_graph_that_saves_elsewhere_is_not_waited_for(memory: MemoryStore, tmp_path: Path) -> None:
    start = time.monotonic()
    inner = line(inner=noting("inner")).compile(checkpointer=memory.checkpointer, store=memory.store)
    line(first=noting("first"), sub=inner).compile(store=memory.store).invoke({"log": []}, THREAD)
    with MemoryStore.open(tmp_path / "other.db") as other:
        graph = line(first=noting("first"), sub=inner).compile(checkpointer=other.checkpointer, store=memory.store)
        graph.invoke({"log": []}, THREAD)
    assert time.monotonic() - start < 0.9


def test_a_run_that_saves_at_exit_saves_a_subgraph_that_keeps_its_state_first(memory: MemoryStore) -> None:
    inner = line(inner=noting("inner")).compile(checkpointer=True)
    graph = line(first=noting("first"), sub=inner).compile(checkpointer=memory.checkpointer, store=memory.store)
    run(graph, use_async=False, durability="exit")
    assert [entry.key for entry in memory.log()] == ["inner", "first"]


def test_a_subgraph_lands_before_the_step_that_runs_it(memory: MemoryStore) -> None:
    def writes(by: str) -> None:
        memory.store.put(NOTES, "x", {"by": by})

    def inner(state: State) -> State:
        writes("inner")
        return {}

    sub = line(inner=inner).compile()

    def outer(state: State) -> State:
        writes("outer")
        sub.invoke({"log": []})
        return {"log": [str(memory.store.get(NOTES, "x"))]}

    log = run(line(outer=outer).compile(checkpointer=memory.checkpointer, store=memory.store), use_async=False)["log"]
    assert [entry.value for entry in memory.log()] == [{"by": "inner"}, {"by": "outer"}]
    assert "'by': 'outer'" in log[0]


class Lingering(MemStateCheckpointer):
    """What a subgraph saves last takes its time; whoever waits for `begun` knows that it is on its way."""

    def __init__(self, memory: MemoryStore) -> None:
        super().__init__(memory)
        self.loop, self.begun, self.ended = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        is_last = bool(config["configurable"]["checkpoint_ns"]) and metadata["step"] == 1
        if is_last:
            self.loop.call_soon_threadsafe(self.begun.set)
            time.sleep(0.05)
        saved = super().put(config, checkpoint, metadata, new_versions)
        if is_last:
            self.ended.set()
        return saved

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        if ("log", ["inner"]) in writes:
            time.sleep(0.05)
        super().put_writes(config, writes, task_id, task_path)


@pytest.mark.parametrize("ends", ["a sibling fails", "the run is cancelled"])
def test_what_a_subgraph_finished_lands_though_the_run_ends_meanwhile(memory: MemoryStore, ends: str) -> None:
    async def lives() -> None:
        saver = Lingering(memory)

        async def sibling(state: State) -> State:
            await saver.begun.wait()
            if ends == "a sibling fails":
                raise ValueError
            await asyncio.sleep(10)
            return {}

        inner = line(inner=noting("inner")).compile()
        graph = StateGraph(State).add_node("sub", inner).add_node("sibling", sibling)
        compiled = graph.add_edge(START, "sub").add_edge(START, "sibling").compile(
            checkpointer=saver, store=memory.store
        )  # fmt: skip
        run = asyncio.create_task(compiled.ainvoke({"log": []}, THREAD))
        if ends == "the run is cancelled":
            await saver.begun.wait()
            run.cancel()
        with pytest.raises((ValueError, asyncio.CancelledError)):
            await run
        assert await asyncio.to_thread(saver.ended.wait, 5)

    asyncio.run(lives())
    saved = memory.checkpointer.list(None)
    assert {done for one in saved for done in one.checkpoint["channel_values"].get("log", [])} == {"inner"}
    assert [item.key for item in memory.store.search(NOTES)] == ["inner"]

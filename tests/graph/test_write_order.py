"""Which of several writes of one key counts: the same for a node that reads, for the log, and after a resume."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore

sys.path.insert(0, str(Path(__file__).parent))
from small import DURABILITIES, NOTES, THREAD, State, Trouble

from langgraph_memstate import Fact, MemoryStore, MemStateCheckpointer


class Late(MemStateCheckpointer):
    """Its checkpoints take their time, so that what comes next reads what is staged."""

    def put(self, *args: Any) -> Any:
        time.sleep(0.03)
        return super().put(*args)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(tmp_path / "memory.db") as memory:
        yield memory


def puts(memory: MemoryStore, *values: str) -> None:
    for value in values:
        memory.store.put(NOTES, "x", {"by": value})


def held(memory: MemoryStore) -> str:
    item = memory.store.get(NOTES, "x")
    assert item is not None
    return str(item.value["by"])


def logged(memory: MemoryStore) -> list[str]:
    return [entry.value["by"] for entry in memory.log() if entry.value is not None]


def reads(memory: MemoryStore) -> Callable[[State], State]:
    def node(state: State) -> State:
        return {"log": [held(memory)]}

    return node


def forked(memory: MemoryStore, saver: Any, read: Any, **writers: Any) -> Any:
    """Nodes beside each other, then one that reads; in a graph whose checkpoints come late."""
    graph = StateGraph(State).add_node("read", read)
    for name, node in writers.items():
        graph.add_node(name, node).add_edge(START, name)
    graph.add_edge(list(writers), "read")
    return graph.compile(checkpointer=saver, store=memory.store)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_parallel_tasks_are_read_as_they_land(memory: MemoryStore, durability: Any) -> None:
    """By path, whichever was first."""
    wrote = threading.Event()

    def first_by_path(state: State) -> State:
        assert wrote.wait(5)
        puts(memory, "a")
        return {}

    def last_by_path(state: State) -> State:
        puts(memory, "b")
        wrote.set()
        return {}

    graph = forked(memory, Late(memory), reads(memory), a=first_by_path, b=last_by_path)
    assert graph.invoke({"log": []}, THREAD, durability=durability)["log"] == ["b"]
    assert logged(memory) == ["a", "b"]
    assert held(memory) == "b"


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("fails", ["a", "b"])
def test_a_resume_reads_what_was_saved_in_its_place(memory: MemoryStore, fails: str, durability: Any) -> None:
    broken, done = {fails}, threading.Event()

    def writer(name: str) -> Any:
        def node(state: State) -> State:
            if name in broken:
                assert done.wait(5)
                broken.discard(name)
                raise Trouble
            puts(memory, name)
            done.set()
            return {}

        return node

    graph = forked(memory, Late(memory), reads(memory), a=writer("a"), b=writer("b"))
    with pytest.raises(Trouble):
        graph.invoke({"log": []}, THREAD, durability=durability)
    assert graph.invoke(None, THREAD, durability=durability)["log"] == ["b"]
    assert logged(memory) == ["a", "b"]


@pytest.mark.parametrize("durability", DURABILITIES)
def test_parallel_updates_are_all_read(memory: MemoryStore, durability: Any) -> None:
    memory.commit(Fact("note", {"n": 0}, id="x", namespace=NOTES))

    def updates(name: str) -> Any:
        def node(state: State) -> State:
            memory.update(NOTES, "x", {name: 1, "n": None})
            return {}

        return node

    def read(state: State) -> State:
        (fact,) = memory.query(NOTES)
        return {"log": sorted(fact.payload)}

    graph = forked(memory, Late(memory), read, a=updates("a"), b=updates("b"))
    assert graph.invoke({"log": []}, THREAD, durability=durability)["log"] == ["a", "b"]
    (fact,) = memory.query(NOTES)
    assert fact.payload == {"a": 1, "b": 1}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_an_update_of_what_a_parallel_task_deleted_reads_as_deleted(memory: MemoryStore, durability: Any) -> None:
    memory.store.put(NOTES, "x", {"by": "us"})

    def deletes(state: State) -> State:
        memory.store.delete(NOTES, "x")
        return {}

    def updates(state: State) -> State:
        memory.update(NOTES, "x", {"more": 1})
        return {}

    def read(state: State) -> State:
        return {"log": [str(memory.store.get(NOTES, "x"))]}

    graph = forked(memory, Late(memory), read, a=deletes, b=updates)
    assert graph.invoke({"log": []}, THREAD, durability=durability)["log"] == ["None"]
    assert memory.store.get(NOTES, "x") is None


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_node_with_a_timeout_reads_what_a_resumed_step_had_done(memory: MemoryStore, durability: Any) -> None:
    broken, done = [True], asyncio.Event()

    async def fails(state: State) -> State:
        if broken:
            await done.wait()
            broken.clear()
            raise Trouble
        return {}

    async def writes(state: State, *, store: BaseStore) -> State:
        await store.aput(NOTES, "x", {"by": "us"})
        done.set()
        return {}

    async def read(state: State, *, store: BaseStore) -> State:
        item = await store.aget(NOTES, "x")
        return {"log": [item.value["by"] if item else "nothing"]}

    async def runs() -> Any:
        graph = StateGraph(State)
        graph.add_node("read", read, timeout=timedelta(seconds=5))
        graph.add_node("fails", fails).add_edge(START, "fails")
        graph.add_node("writes", writes).add_edge(START, "writes")
        graph.add_edge(["fails", "writes"], "read")
        compiled = graph.compile(checkpointer=Late(memory), store=memory.store)
        with pytest.raises(Trouble):
            await compiled.ainvoke({"log": []}, THREAD, durability=durability)
        return await compiled.ainvoke(None, THREAD, durability=durability)

    assert asyncio.run(runs())["log"] == ["us"]


def calling(memory: MemoryStore) -> Any:
    """A function that writes before and after it calls one that writes."""

    @task
    def deeper() -> None:
        puts(memory, "deeper")

    @task
    def call() -> None:
        puts(memory, "call")
        deeper().result()
        puts(memory, "call again")

    return call


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_task_that_calls_another_has_the_last_word(memory: MemoryStore, durability: Any) -> None:
    call = calling(memory)

    @entrypoint(checkpointer=memory.checkpointer, store=memory.store)
    def flow(_: int) -> list[str]:
        puts(memory, "flow")
        call().result()
        found = held(memory)
        puts(memory, "flow again")
        return [found, held(memory)]

    assert flow.invoke(1, THREAD, durability=durability) == ["call again", "flow again"]
    assert logged(memory) == ["flow", "call", "deeper", "call again", "flow again"]


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_call_that_is_not_run_again_comes_before_what_is(memory: MemoryStore, durability: Any) -> None:
    broken = [True]

    @task
    def call() -> None:
        puts(memory, "call")

    @entrypoint(checkpointer=memory.checkpointer, store=memory.store)
    def flow(_: int) -> str:
        puts(memory, "flow")
        call().result()
        if broken:
            broken.clear()
            raise Trouble
        return held(memory)

    with pytest.raises(Trouble):
        flow.invoke(1, THREAD, durability=durability)
    assert flow.invoke(None, THREAD, durability=durability) == "flow"
    assert logged(memory) == ["call", "flow"]


@pytest.mark.parametrize("durability", DURABILITIES)
def test_calls_keep_their_order_over_a_resume(memory: MemoryStore, durability: Any) -> None:
    broken = [True]

    call = calling(memory)

    @entrypoint(checkpointer=memory.checkpointer, store=memory.store)
    def flow(_: int) -> str:
        call().result()
        if broken:
            broken.clear()
            raise Trouble
        return held(memory)

    with pytest.raises(Trouble):
        flow.invoke(1, THREAD, durability=durability)
    assert flow.invoke(None, THREAD, durability=durability) == "call again"
    assert logged(memory) == ["call", "deeper", "call again"]


@pytest.mark.parametrize(("checkpointer", "durability"), [(False, "async"), (False, "exit"), (None, "exit")])
def test_a_node_that_runs_a_graph_which_lands_with_it_has_the_last_word(
    memory: MemoryStore, checkpointer: Any, durability: Any
) -> None:
    def inner(state: State) -> State:
        puts(memory, "inner")
        return {}

    def last(state: State) -> State:
        puts(memory, "last")
        return {}

    graph = StateGraph(State).add_node("inner", inner).add_node("last", last)
    sub = graph.add_edge(START, "inner").add_edge("inner", "last").compile(checkpointer=checkpointer)

    def outer(state: State) -> State:
        puts(memory, "outer")
        sub.invoke({"log": []})
        found = held(memory)
        puts(memory, "outer again")
        return {"log": [found, held(memory)]}

    whole = StateGraph(State).add_node("outer", outer).add_edge(START, "outer")
    compiled = whole.compile(checkpointer=memory.checkpointer, store=memory.store)
    assert compiled.invoke({"log": []}, THREAD, durability=durability)["log"] == ["last", "outer again"]
    assert logged(memory) == ["outer", "inner", "last", "outer again"]

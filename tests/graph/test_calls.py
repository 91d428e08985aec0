"""Functions that a task calls (functional API): whose memory counts when the task is retried, and who reads it."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import CachePolicy, RetryPolicy, interrupt

sys.path.insert(0, str(Path(__file__).parent))
from small import DURABILITIES, NOTES, THREAD, State, Trouble

from langgraph_memstate import MemoryStore, MemStateCheckpointer
from langgraph_memstate.errors import CorruptRowError

RETRIED = RetryPolicy(initial_interval=0.001, jitter=False, retry_on=Trouble, max_attempts=3)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(tmp_path / "memory.db") as memory:
        yield memory


def put(memory: MemoryStore, key: str) -> str:
    memory.store.put(NOTES, key, {})
    return key


def keys(memory: MemoryStore) -> list[str]:
    return sorted(item.key for item in memory.store.search(NOTES, limit=100))


class Agent:
    """Calls a function that remembers, under a number of its own each time, and fails the first times."""

    def __init__(self, memory: MemoryStore, failures: int, *, nested: bool) -> None:
        self.memory = memory
        self.failures = failures
        self.numbers = itertools.count(1)
        self._nested = nested

    def run(self) -> list[str]:
        @task
        def remember() -> str:
            return put(self.memory, f"note {next(self.numbers)}")

        @task
        def through() -> str:
            done: str = remember().result()
            return done

        done = (through if self._nested else remember)().result()
        if self.failures:
            self.failures -= 1
            raise Trouble
        return [done]

    def node(self) -> Any:
        graph = StateGraph(State).add_node("node", lambda state: {"log": self.run()}, retry_policy=RETRIED)
        return graph.add_edge(START, "node").compile(checkpointer=self.memory.checkpointer)

    def flow(self) -> Any:
        @entrypoint(checkpointer=self.memory.checkpointer, retry_policy=RETRIED)
        def flow(_: Any) -> dict[str, list[str]]:
            return {"log": self.run()}

        return flow


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("shape", ["node", "flow"])
@pytest.mark.parametrize("nested", [False, True], ids=["call", "nested call"])
def test_what_a_retried_task_had_called_is_not_remembered(
    memory: MemoryStore, nested: bool, shape: str, durability: Any
) -> None:
    graph = getattr(Agent(memory, 2, nested=nested), shape)()
    done = graph.invoke({"log": []}, THREAD, durability=durability)["log"]
    assert keys(memory) == done == ["note 3"]


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("nested", [False, True], ids=["call", "nested call"])
def test_a_task_that_failed_for_good_finds_what_it_called_first(tmp_path: Path, nested: bool, durability: Any) -> None:
    """A rerun counts its calls from the first one, and LangGraph hands it that result."""
    with MemoryStore.open(tmp_path / "memory.db") as memory:
        with pytest.raises(Trouble):
            Agent(memory, 3, nested=nested).node().invoke({"log": []}, THREAD, durability=durability)
        assert keys(memory) == []
    with MemoryStore.open(tmp_path / "memory.db") as memory:
        done = Agent(memory, 0, nested=nested).node().invoke(None, THREAD, durability=durability)["log"]
        assert keys(memory) == done == ["note 1"]
        assert memory.stats()["staged"] == 0


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("nested", [False, True], ids=["call", "nested call"])
def test_a_retry_after_a_resume_remembers_what_it_returns(memory: MemoryStore, nested: bool, durability: Any) -> None:
    agent = Agent(memory, 4, nested=nested)  # all attempts of the first run, and one of the second
    with pytest.raises(Trouble):
        agent.node().invoke({"log": []}, THREAD, durability=durability)
    (done,) = agent.node().invoke(None, THREAD, durability=durability)["log"]
    assert done in keys(memory)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_what_a_failed_node_had_called_lands_with_its_handler(memory: MemoryStore, durability: Any) -> None:
    agent = Agent(memory, 3, nested=False)
    graph = StateGraph(State).add_node(
        "node",
        lambda state: {"log": agent.run()},
        retry_policy=RETRIED,
        error_handler=lambda state: {"log": ["handled"]},
    )
    compiled = graph.add_edge(START, "node").compile(checkpointer=memory.checkpointer)
    assert compiled.invoke({"log": []}, THREAD, durability=durability)["log"] == ["handled"]
    assert len(keys(memory)) == 1


@pytest.mark.parametrize("durability", DURABILITIES)
def test_calls_read_what_returned_calls_wrote_however_deep(memory: MemoryStore, durability: Any) -> None:
    @task
    def deep() -> str:
        return put(memory, "deep")

    @task
    def remember() -> str:
        done: str = deep().result()
        return done

    @task
    def tool() -> list[str]:
        return keys(memory)

    @task
    def agent() -> list[str]:
        put(memory, "agent")
        found: list[str] = tool().result()
        return found

    @entrypoint(checkpointer=memory.checkpointer)
    def flow(_: Any) -> list[list[str]]:
        remember().result()
        return [keys(memory), agent().result()]

    assert flow.invoke(1, THREAD, durability=durability) == [["deep"], ["agent", "deep"]]


def test_a_call_does_not_read_what_a_running_one_has_called(memory: MemoryStore) -> None:
    wrote, read = asyncio.Event(), asyncio.Event()

    @task
    async def deep() -> None:
        await memory.store.aput(NOTES, "deep", {})

    @task
    async def writes() -> None:
        await deep()
        wrote.set()
        await read.wait()

    @task
    async def reads() -> list[str]:
        await wrote.wait()
        found = [item.key for item in await memory.store.asearch(NOTES)]
        read.set()
        return found

    @entrypoint(checkpointer=memory.checkpointer)
    async def flow(_: Any) -> list[str]:
        _, found = await asyncio.gather(writes(), reads())
        return [*found, "then", *(item.key for item in await memory.store.asearch(NOTES))]

    assert asyncio.run(flow.ainvoke(1, THREAD)) == ["then", "deep"]


def noting(memory: MemoryStore, name: str) -> Any:
    def inner(state: State) -> State:
        return {"log": [put(memory, name)]}

    return StateGraph(State).add_node("inner", inner).add_edge(START, "inner").compile()


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_subgraphs_of_a_node_of_its_call_and_of_its_handler_do_not_wait_for_each_other(
    memory: MemoryStore, durability: Any
) -> None:
    first, second = noting(memory, "first"), noting(memory, "second")

    @task
    def call() -> None:
        second.invoke({"log": []})

    def calls(state: State) -> State:
        first.invoke({"log": []})
        call().result()
        return {}

    def fails(state: State) -> State:
        first.invoke({"log": []})
        raise Trouble

    def handles(state: State) -> State:
        second.invoke({"log": []})
        return {}

    graph = StateGraph(State).add_node("calls", calls).add_node("fails", fails, error_handler=handles)
    compiled = graph.add_edge(START, "calls").add_edge("calls", "fails").compile(checkpointer=memory.checkpointer)
    start = time.monotonic()
    compiled.invoke({"log": []}, THREAD, durability=durability)
    assert time.monotonic() - start < 0.9
    assert keys(memory) == ["first", "second"]


def test_a_subgraph_does_not_fail_for_one_that_ran_before_it(memory: MemoryStore) -> None:
    class Refusing(MemStateCheckpointer):
        def put(self, config: Any, *args: Any) -> Any:
            if config["configurable"]["checkpoint_ns"] and not refused:
                refused.append(config)
                raise CorruptRowError("refused")
            return super().put(config, *args)

    refused: list[Any] = []
    first, second = noting(memory, "first"), noting(memory, "second")

    @task
    def call() -> None:
        second.invoke({"log": []})

    def calls(state: State) -> State:
        with pytest.raises(CorruptRowError):
            first.invoke({"log": []})
        call().result()
        return {}

    graph = StateGraph(State).add_node("calls", calls).add_edge(START, "calls").compile(checkpointer=Refusing(memory))
    graph.invoke({"log": []}, THREAD)
    assert "second" in keys(memory)


@pytest.mark.parametrize("saver", [None, InMemorySaver()], ids=["no saver", "another saver"])
def test_a_graph_that_saves_elsewhere_needs_nothing_of_us(memory: MemoryStore, saver: Any) -> None:
    """Also inside of a node of ours, under a thread of its own."""
    leaf = StateGraph(State).add_node("leaf", noting(memory, "leaf")).add_edge(START, "leaf")
    foreign = leaf.compile(checkpointer=saver)
    foreign.invoke({"log": []}, THREAD)
    assert keys(memory) == ["leaf"]
    memory.store.delete(NOTES, "leaf")

    def node(state: State) -> State:
        foreign.invoke({"log": []}, {"configurable": {"thread_id": "other"}})
        return {"log": keys(memory)}

    graph = StateGraph(State).add_node("node", node).add_edge(START, "node").compile(checkpointer=memory.checkpointer)
    assert graph.invoke({"log": []}, THREAD)["log"] == ["leaf"]


def test_a_late_error_of_a_cancelled_run_takes_nothing_from_the_next(memory: MemoryStore) -> None:
    class Late(MemStateCheckpointer):
        def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
            if any(isinstance(value, asyncio.CancelledError) for _, value in writes):
                time.sleep(0.2)
            super().put_writes(config, writes, task_id, task_path)

    async def a(state: State) -> State:
        await memory.store.aput(NOTES, "a", {})
        if run == 0:
            await asyncio.sleep(10)
        return {"log": ["a"]}

    async def b(state: State) -> State:
        await asyncio.sleep(10 if run == 0 else 0.03)
        if run == 1:
            raise Trouble
        return {"log": ["b"]}

    graph = StateGraph(State).add_node("a", a).add_node("b", b).add_edge(START, "a").add_edge(START, "b")
    compiled = graph.compile(checkpointer=Late(memory), store=memory.store)

    async def lives() -> Any:
        nonlocal run
        first = asyncio.create_task(compiled.ainvoke({"log": []}, THREAD))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        run = 1
        with pytest.raises(Trouble):
            await compiled.ainvoke(None, THREAD)
        await asyncio.sleep(0.4)
        run = 2
        return await compiled.ainvoke(None, THREAD)

    run = 0
    assert asyncio.run(lives())["log"] == ["a", "b"]
    assert keys(memory) == ["a"]


def test_a_cached_output_outlives_the_memory_of_a_step_that_never_landed(memory: MemoryStore) -> None:
    """The cache is LangGraph's, which fills it as soon as a node has finished."""
    broken = [True]

    def learns(state: State) -> State:
        return {"log": [put(memory, "learned")]}

    def fails(state: State) -> State:
        time.sleep(0.05)
        if broken:
            raise Trouble
        return {}

    graph = StateGraph(State).add_node("learns", learns, cache_policy=CachePolicy()).add_node("fails", fails)
    compiled = graph.add_edge(START, "learns").add_edge(START, "fails").compile(
        checkpointer=memory.checkpointer, cache=InMemoryCache()
    )  # fmt: skip
    with pytest.raises(Trouble):
        compiled.invoke({"log": []}, THREAD)
    broken.clear()
    assert compiled.invoke({"log": []}, {"configurable": {"thread_id": "other"}})["log"] == ["learned"]
    assert keys(memory) == []
    compiled.invoke(None, THREAD)
    assert keys(memory) == ["learned"]


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "finished"])
def test_an_update_that_ends_a_step_lands_calls_with_the_task_that_made_them(
    memory: MemoryStore, waits: bool, durability: Any
) -> None:
    """LangGraph applies what finished tasks wrote then, and drops what one that waits had called."""

    @task
    def remember() -> str:
        return put(memory, "called")

    def calls(state: State) -> State:
        done = remember().result()
        if waits:
            interrupt("calls")
        return {"log": [done, put(memory, "written")]}

    builder = StateGraph(State).add_node(calls).add_node("ask", lambda state: interrupt("ask"))
    builder.add_edge(START, "calls").add_edge(START, "ask")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"log": []}, THREAD, durability=durability)
    assert keys(memory) == []

    graph.update_state(THREAD, None, as_node=END)

    state = graph.get_state(THREAD)
    assert keys(memory) == state.values["log"] == ([] if waits else ["called", "written"])
    assert state.next == ()

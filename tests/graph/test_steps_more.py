"""Steps in odd company: no store, many threads, two runs at once, runs cancelled at any moment."""

from __future__ import annotations

import asyncio
import operator
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import uuid4

import pytest
from langgraph.errors import GraphDrained, GraphRecursionError
from langgraph.graph import START, StateGraph
from langgraph.runtime import RunControl
from langgraph.store.base import BaseStore

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import StagingError

NOTES = ("notes",)
DURABILITIES = ("sync", "async", "exit")


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(tmp_path / "memory.db") as memory:
        yield memory


def thread(name: str) -> dict[str, Any]:
    return {"configurable": {"thread_id": name}}


def noting(memory: MemoryStore, name: str) -> Any:
    """A node that commits a fact of its own and logs the fact's id."""

    def node(state: State) -> State:
        (fact,) = memory.commit([Fact("note", {"by": name}, id=f"{name}-{uuid4().hex}", namespace=NOTES)])
        assert fact.id is not None
        return {"log": [fact.id]}

    return node


def line(*nodes: tuple[str, Any]) -> StateGraph[Any]:
    graph = StateGraph(State)
    for (name, node), before in zip(nodes, [START, *(name for name, _ in nodes)], strict=False):
        graph.add_node(name, node).add_edge(before, name)
    return graph


def remembered(memory: MemoryStore) -> Counter[str]:
    return Counter(fact.id.split("-")[0] for fact in memory.query(NOTES, limit=1000) if fact.id)


def ids(memory: MemoryStore) -> set[str | None]:
    return {fact.id for fact in memory.query(NOTES, limit=1000)}


def test_a_replayed_subgraph_of_a_graph_without_a_store(memory: MemoryStore) -> None:
    inner = line(("inner", noting(memory, "inner"))).compile()
    graph = line(("sub", inner), ("outer", noting(memory, "outer"))).compile(checkpointer=memory.checkpointer)
    graph.invoke({"log": []}, thread("t"))
    (before,) = [state for state in graph.get_state_history(thread("t")) if state.next == ("sub",)]
    graph.invoke(None, before.config)
    assert remembered(memory) == {"inner": 2, "outer": 2}
    asyncio.run(graph.ainvoke(None, before.config))
    assert remembered(memory) == {"inner": 3, "outer": 3}


def test_a_subgraph_without_checkpoints_and_store_is_refused_with_advice(memory: MemoryStore) -> None:
    inner = line(("inner", noting(memory, "inner"))).compile(checkpointer=False)
    without_store = line(("sub", inner)).compile(checkpointer=memory.checkpointer)
    with pytest.raises(StagingError, match=r"store=memory\.store"):
        without_store.invoke({"log": []}, thread("t"))
    assert remembered(memory) == {}
    line(("sub", inner)).compile(checkpointer=memory.checkpointer, store=memory.store).invoke({"log": []}, thread("u"))
    assert remembered(memory) == {"inner": 1}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_one_graph_on_many_threads_at_once(memory: MemoryStore, durability: Any) -> None:
    graph = line(("a", noting(memory, "a")), ("b", noting(memory, "b"))).compile(checkpointer=memory.checkpointer)
    with ThreadPoolExecutor(8) as pool:
        runs = pool.map(lambda n: graph.invoke({"log": []}, thread(str(n)), durability=durability), range(8))
        logs = [done for run in runs for done in run["log"]]

    async def more() -> list[str]:
        calls = [graph.ainvoke({"log": []}, thread(f"async {n}"), durability=durability) for n in range(8)]
        return [done for run in await asyncio.gather(*calls) for done in run["log"]]

    logs += asyncio.run(more())
    assert len(logs) == 32
    assert ids(memory) == set(logs)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_two_runs_of_one_thread_at_once(memory: MemoryStore, durability: Any) -> None:
    """The branches are LangGraph's affair; the memory of each lands once."""
    graph = line(("a", noting(memory, "a")), ("b", noting(memory, "b"))).compile(checkpointer=memory.checkpointer)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: graph.invoke({"log": []}, thread("t"), durability=durability), range(2)))
    assert remembered(memory) == {"a": 2, "b": 2}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_run_cancelled_at_any_moment_and_resumed(memory: MemoryStore, durability: Any) -> None:
    graph = line(("a", noting(memory, "a")), ("b", noting(memory, "b"))).compile(checkpointer=memory.checkpointer)

    async def live(name: str, moment: float) -> None:
        run = asyncio.create_task(graph.ainvoke({"log": []}, thread(name), durability=durability))
        await asyncio.sleep(moment)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        saved = memory.checkpointer.get_tuple(thread(name))
        await graph.ainvoke({"log": []} if saved is None else None, thread(name), durability=durability)

    async def lives() -> None:
        for n in range(10):
            await live(str(n), 0.002 * n)

    asyncio.run(lives())
    states = [one.checkpoint["channel_values"] for one in memory.checkpointer.list(None)]
    in_state = {done for state in states for done in state.get("log", [])}
    assert len(in_state) >= 20
    assert ids(memory) == in_state


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_run_that_is_drained_or_runs_out_of_steps(memory: MemoryStore, durability: Any) -> None:
    control = RunControl()

    def drain(state: State, *, store: BaseStore) -> State:
        store.put(NOTES, "drain-1", {})
        control.request_drain("enough")
        return {"log": ["drain-1"]}

    graph = line(("drain", drain), ("b", noting(memory, "b")))
    graph.add_conditional_edges("b", lambda state: "b")
    compiled = graph.compile(checkpointer=memory.checkpointer, store=memory.store)
    with pytest.raises(GraphDrained):
        compiled.invoke({"log": []}, thread("t"), durability=durability, control=control)
    assert remembered(memory) == {"drain": 1}
    with pytest.raises(GraphRecursionError):
        compiled.invoke(None, {**thread("t"), "recursion_limit": 3}, durability=durability)
    log = compiled.get_state(thread("t")).values["log"]
    assert len(log) > 3
    assert ids(memory) == set(log)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_thread_that_a_node_starts_belongs_to_its_step_with_the_nodes_context(
    memory: MemoryStore, durability: Any
) -> None:
    def starts(state: State, *, store: BaseStore) -> State:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(copy_context().run, store.put, NOTES, "joined-1", {}).result()
            pool.submit(store.put, NOTES, "alone-1", {}).result()
        raise ValueError

    graph = line(("starts", starts)).compile(checkpointer=memory.checkpointer, store=memory.store)
    with pytest.raises(ValueError):  # noqa: PT011
        graph.invoke({"log": []}, thread("t"), durability=durability)
    assert remembered(memory) == {"alone": 1}


def test_the_state_of_threads_is_read_and_updated_inside_a_node(memory: MemoryStore) -> None:
    def looks(state: State, *, store: BaseStore) -> State:
        store.put(NOTES, "looks-1", {})
        assert graph.get_state(thread("t")).values["log"] == state["log"]
        assert list(graph.get_state_history(thread("t")))
        graph.update_state(thread("other"), {"log": ["by hand"]}, as_node="a")
        assert remembered(memory) == {"a": 1, "looks": 1}
        return {"log": ["looks-1"]}

    builder = line(("a", noting(memory, "a")), ("looks", looks), ("b", noting(memory, "b")))
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"log": []}, thread("t"), durability="sync")
    assert remembered(memory) == {"a": 1, "looks": 1, "b": 1}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_transaction_around_a_run_is_not_of_its_nodes(memory: MemoryStore, durability: Any) -> None:
    tries = iter(range(3))

    def fails_once(state: State) -> State:
        done = f"node-{next(tries)}"
        memory.store.put(NOTES, done, {})
        assert done in ids(memory)
        if done == "node-0":
            raise ValueError
        return {"log": [done]}

    graph = line(("node", fails_once)).compile(checkpointer=memory.checkpointer)
    with memory.transaction():
        memory.store.put(NOTES, "around-1", {})
        with pytest.raises(ValueError):  # noqa: PT011
            graph.invoke({"log": []}, thread("t"), durability=durability)
        assert ids(memory) == set()
        graph.invoke({"log": []}, thread("t"), durability=durability)
        assert ids(memory) == {"node-1"}
    assert ids(memory) == {"node-1", "around-1"}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_transaction_in_a_node_is_not_of_the_graph_it_runs(memory: MemoryStore, durability: Any) -> None:
    inner = line(("inner", noting(memory, "inner"))).compile()

    def node(state: State) -> State:
        with memory.transaction():
            memory.store.put(NOTES, "node-1", {})
            done = inner.invoke({"log": []})["log"]
            memory.store.put(NOTES, "node-2", {})
        return {"log": [*done, "node-1", "node-2"]}

    graph = line(("node", node)).compile(checkpointer=memory.checkpointer, store=memory.store)
    done = graph.invoke({"log": []}, thread("t"), durability=durability)["log"]
    assert ids(memory) == set(done)
    assert len(done) == 3

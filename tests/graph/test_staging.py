"""How memory writes join a step: the parts that the scenarios do not show from outside."""

from __future__ import annotations

import gc
import operator
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.runtime import RunControl
from langgraph.store.base import BaseStore, PutOp
from langgraph.types import Send

from langgraph_memstate import Fact, MemoryStore, MemStateCheckpointer
from langgraph_memstate.errors import StagingError
from langgraph_memstate.graph import pregel

THREAD = {"configurable": {"thread_id": "t"}}
NAMESPACE = ("n",)


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(tmp_path / "memory.db") as memory:
        yield memory


def compile_line(memory: MemoryStore, saver: Any, *nodes: Any, **options: Any) -> Any:
    graph = StateGraph(State)
    names = [node.__name__ for node in nodes]
    for node in nodes:
        graph.add_node(node.__name__, node, **options)
    for before, after in zip([START, *names], names, strict=False):
        graph.add_edge(before, after)
    return graph.compile(checkpointer=saver, store=memory.store)


def first(state: State, *, store: BaseStore) -> State:
    store.put(NAMESPACE, "first", {"n": 1})
    return {"log": ["first"]}


def second(state: State, *, store: BaseStore) -> State:
    assert store.get(NAMESPACE, "first") is not None
    store.put(NAMESPACE, "second", {"n": 2})
    return {"log": ["second"]}


@pytest.mark.parametrize("late", ["put", "put_writes"])
def test_put_and_put_writes_in_either_order(memory: MemoryStore, late: str) -> None:
    order: list[str] = []

    class Delayed(MemStateCheckpointer):
        def put(self, *args: Any) -> Any:
            time.sleep(0.05 if late == "put" else 0)
            result = super().put(*args)
            order.append("put")
            return result

        def put_writes(self, *args: Any) -> None:
            time.sleep(0.05 if late == "put_writes" else 0)
            super().put_writes(*args)
            order.append("put_writes")

    saver = Delayed(memory)
    compile_line(memory, saver, first, second).invoke({"log": []}, THREAD, durability="async")
    assert order[-1] == late
    assert {item.key for item in memory.store.search(NAMESPACE)} == {"first", "second"}
    assert len(memory.history(NAMESPACE, "first")) == len(memory.history(NAMESPACE, "second")) == 1
    assert memory.stats()["staged"] == 0


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_fact_committed_in_a_node_joins_the_step(memory: MemoryStore, durability: str) -> None:
    def commits_and_fails(state: State) -> State:
        memory.commit(Fact("note", {"text": "ghost"}, id="1"), actor="node")
        assert memory.get("note", "1") is not None
        if not state["log"]:
            raise ValueError
        return {"log": ["done"]}

    graph = compile_line(memory, memory.checkpointer, commits_and_fails)
    with pytest.raises(ValueError):  # noqa: PT011
        graph.invoke({"log": []}, THREAD, durability=durability)
    assert memory.get("note", "1") is None
    graph.invoke({"log": ["again"]}, THREAD, durability=durability)
    (entry,) = memory.history("note", "1")
    assert (entry.actor, entry.node, entry.thread_id) == ("node", "commits_and_fails", "t")
    assert entry.checkpoint_id == graph.get_state(THREAD).config["configurable"]["checkpoint_id"]


def test_the_log_is_in_task_path_order(memory: MemoryStore) -> None:
    def remember(item: int, *, store: BaseStore) -> State:
        time.sleep(0.02 * (3 - item))  # the last one finishes first
        store.put(NAMESPACE, str(item), {"n": item})
        return {}

    graph = StateGraph(State)
    graph.add_node("remember", remember)
    graph.add_conditional_edges(START, lambda state: [Send("remember", n) for n in range(4)], ["remember"])
    graph.compile(checkpointer=memory.checkpointer, store=memory.store).invoke({"log": []}, THREAD)
    with memory.storage.snapshot() as reader:
        assert [entry.key for entry in reader.log()] == ["0", "1", "2", "3"]


def test_no_marker_is_ever_stored(memory: MemoryStore, tmp_path: Path) -> None:
    def fails(state: State, *, store: BaseStore) -> State:
        store.put(NAMESPACE, "lost", {"n": 0})
        raise ValueError

    def silent(state: State, *, store: BaseStore) -> None:
        store.put(NAMESPACE, "kept", {"n": 0})

    with pytest.raises(ValueError):  # noqa: PT011
        compile_line(memory, memory.checkpointer, first, silent, fails).invoke({"log": []}, THREAD, durability="sync")
    with sqlite3.connect(tmp_path / "memory.db") as conn:
        writes = conn.execute("SELECT channel, data FROM writes").fetchall()
    assert writes
    assert not [data for _, data in writes if b"memstate:" in data]
    conn.close()
    state = memory.checkpointer.get_tuple(THREAD)
    assert state is not None
    assert [channel for _, channel, _ in state.pending_writes or ()] == ["__error__"]


def test_outside_a_step_a_write_commits_at_once(memory: MemoryStore) -> None:
    def writes_and_fails(state: State, *, store: BaseStore) -> State:
        store.put(NAMESPACE, "kept", {"n": 1})
        raise ValueError

    for saver in (InMemorySaver(), None):
        with pytest.raises(ValueError):  # noqa: PT011
            compile_line(memory, saver, writes_and_fails).invoke({"log": []}, THREAD)
        assert memory.get(NAMESPACE, "kept") is not None
        memory.delete(NAMESPACE, "kept")


def test_a_graph_of_another_memory_is_no_step_of_this_one(memory: MemoryStore) -> None:
    with MemoryStore.open(":memory:") as other:

        def writes_and_fails(state: State) -> State:
            memory.commit(Fact("note", {}, id="here"))
            other.commit(Fact("note", {}, id="there"))
            raise ValueError

        graph = StateGraph(State).add_node(writes_and_fails).add_edge(START, "writes_and_fails")
        with pytest.raises(ValueError):  # noqa: PT011
            graph.compile(checkpointer=other.checkpointer).invoke({"log": []}, THREAD)
        assert memory.get("note", "here") is not None
        assert other.get("note", "there") is None


def test_a_finished_or_abandoned_run_leaves_no_trace_in_the_process(memory: MemoryStore) -> None:
    graph = compile_line(memory, memory.checkpointer, first, second)
    staging: Any = memory.checkpointer._staging
    graph.invoke({"log": []}, THREAD)
    stream = graph.stream({"log": []}, {"configurable": {"thread_id": "u"}}, stream_mode="tasks")
    next(stream)
    assert staging._runs
    del stream
    gc.collect()
    assert not staging._runs


def test_one_run_control_for_two_runs(memory: MemoryStore) -> None:
    control = RunControl()
    graph = compile_line(memory, memory.checkpointer, first, second)
    for thread in ("a", "b"):
        graph.invoke({"log": []}, {"configurable": {"thread_id": thread}}, control=control)
        gc.collect()
    assert len(memory.history(NAMESPACE, "second")) == 2


def test_a_batch_in_a_node_is_one_entry_and_the_last_write_of_a_key_wins(memory: MemoryStore) -> None:
    def batches(state: State, *, store: BaseStore) -> State:
        store.batch([PutOp(NAMESPACE, "k", {"n": 1}), PutOp(NAMESPACE, "k", {"n": 2})])
        store.delete(NAMESPACE, "gone")
        return {"log": ["x"]}

    compile_line(memory, memory.checkpointer, batches).invoke({"log": []}, THREAD)
    (entry,) = memory.history(NAMESPACE, "k")
    assert entry.value == {"n": 2}


def test_a_release_of_langgraph_that_hides_the_write_set_is_refused(memory: MemoryStore) -> None:
    """Not guessed at: the first write says what is missing."""
    config = {"__pregel_task_id": "1", "__pregel_read": lambda: None, "__pregel_send": lambda: None}
    for more, missing in (({"__pregel_checkpointer": memory.checkpointer}, "another shape"), ({}, "who saves")):
        token = var_child_runnable_config.set({"configurable": config | more})
        try:
            with pytest.raises(StagingError, match=missing):
                memory.store.put(NAMESPACE, "k", {})
        finally:
            var_child_runnable_config.reset(token)
    assert memory.get(NAMESPACE, "k") is None


def test_without_tokens_keeps_a_finished_task_finished_and_a_failed_one_failed() -> None:
    token = pregel.new_token()
    error = ValueError()
    assert pregel.without_tokens([("__no_writes__", token)]) == [("__no_writes__", None)]
    assert pregel.without_tokens([("__no_writes__", token), ("log", 1)]) == [("log", 1)]
    assert pregel.without_tokens([("__no_writes__", token), ("__error__", error)]) == [("__error__", error)]
    assert pregel.without_tokens([("__no_writes__", None)]) == [("__no_writes__", None)]

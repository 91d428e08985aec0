"""A run from an earlier checkpoint, with memory kept as it is or taken along."""

from __future__ import annotations

import asyncio
import operator
import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.types import Command, interrupt

sys.path.insert(0, str(Path(__file__).parents[1]))
from truth import Words, check_search, check_settled, open_memory

from langgraph_memstate import MemoryStore, MemStateCheckpointer
from langgraph_memstate.errors import RollbackError

DURABILITIES = ("sync", "async", "exit")
T: Any = {"configurable": {"thread_id": "t"}}
U: Any = {"configurable": {"thread_id": "u"}}


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    saw: Annotated[list[list[str]], operator.add]


class Agent:
    """Three steps a turn; each notes which facts it sees, and writes one of its own and one that all change."""

    def __init__(self, memory: MemoryStore, time_travel: Any = "rewind") -> None:
        self.memory = memory
        self.saver = MemStateCheckpointer(memory, time_travel=time_travel)
        builder = StateGraph(State)
        before = START
        for name in ("a", "b", "c"):
            builder.add_node(name, self._node(name))
            builder.add_edge(before, name)
            before = name
        builder.add_edge("c", END)
        self.graph = builder.compile(checkpointer=self.saver, store=memory.store)

    def _node(self, name: str) -> Any:
        def run(state: State, *, store: BaseStore) -> State:
            saw = sorted(f"{item.key}={item.value['text']}" for item in store.search(("note",), limit=1000))
            text = f"{state['log'][0]} {name}"
            store.put(("note",), text, {"text": text})
            store.put(("note",), "every", {"text": text})
            if name == "c":
                store.delete(("note",), f"{state['log'][0]} a")
            return {"log": [text], "saw": [saw]}

        return run

    def run(self, value: Any, config: Any = T, *, sync: bool = True, durability: Any = "sync") -> Any:
        if sync:
            return self.graph.invoke(value, config, durability=durability)
        return asyncio.run(self.graph.ainvoke(value, config, durability=durability))

    def at(self, steps: int, config: Any = T) -> Any:
        """The snapshot so many checkpoints before the head."""
        return list(self.graph.get_state_history(config))[steps]


def facts(memory: MemoryStore) -> dict[str, str]:
    return {fact.id: fact.payload["text"] for fact in memory.query("note", limit=1000)}


def past(memory: MemoryStore, moment: Any) -> dict[str, str]:
    return {item.key: item.value["text"] for item in memory.as_of(moment).search(("note",), limit=1000)}


def lines(held: dict[str, str]) -> list[str]:
    return sorted(f"{key}={text}" for key, text in held.items())


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("back", range(1, 4))
def test_a_replay_sees_and_leaves_memory_as_it_was_then(
    file_memory: MemoryStore, durability: str, sync: bool, back: int
) -> None:
    memory = file_memory
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    agent.run({"log": ["two"]})
    final, state = facts(memory), agent.graph.get_state(T).values
    start = agent.at(back)
    held = past(memory, start.config)
    found = agent.run(None, start.config, sync=sync, durability=durability)
    assert found["saw"][len(start.values.get("saw", []))] == lines(held)
    assert found == state
    assert facts(memory) == final
    assert agent.graph.get_state(T).values == state


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("back", [0, 2, 4, 5, 8, 14])
def test_new_input_on_an_earlier_checkpoint(file_memory: MemoryStore, durability: str, sync: bool, back: int) -> None:
    memory = file_memory
    agent = Agent(memory)
    for name in ("one", "two", "three"):
        agent.run({"log": [name]})
    start = agent.at(back)
    held = past(memory, start.config)
    found = agent.run({"log": ["four"]}, start.config, sync=sync, durability=durability)
    assert found["saw"][len(start.values.get("saw", []))] == lines(held)
    first = found["log"][0]  # the graph names its facts by the first input of the branch
    wanted = {**held, f"{first} a": "", f"{first} b": f"{first} b", f"{first} c": f"{first} c", "every": f"{first} c"}
    del wanted[f"{first} a"]
    assert facts(memory) == wanted
    again = agent.run({"log": ["five"]}, sync=sync, durability=durability)
    assert again["saw"][-3] == lines(wanted)  # the branch is the thread now


def test_keep_leaves_memory_alone(memory: MemoryStore) -> None:
    agent = Agent(memory, "keep")
    agent.run({"log": ["one"]})
    held = facts(memory)
    found = agent.run({"log": ["x"]}, agent.at(3).config)
    assert found["saw"][0] == lines(held)
    assert set(held) <= set(facts(memory)) | {"x a"}


def test_what_is_no_way_to_travel(memory: MemoryStore) -> None:
    with pytest.raises(RollbackError, match="keep"):
        MemStateCheckpointer(memory, time_travel="forward")  # type: ignore[arg-type]


@pytest.mark.parametrize("back", range(8))
def test_an_update_of_an_earlier_checkpoint(memory: MemoryStore, back: int) -> None:
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    agent.run({"log": ["two"]})
    start = agent.at(back)
    held = past(memory, start.config)
    agent.graph.update_state(start.config, {"log": ["edited"]}, as_node="a")
    assert facts(memory) == held
    assert agent.graph.get_state(T).next == ("b",)
    state = agent.run(None)
    assert state["saw"][len(start.values.get("saw", []))] == lines(held)


@pytest.mark.parametrize("back", range(8))
def test_a_copy_of_an_earlier_checkpoint(memory: MemoryStore, back: int) -> None:
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    agent.run({"log": ["two"]})
    start = agent.at(back)
    held = past(memory, start.config)
    agent.graph.update_state(start.config, None, as_node="__copy__")
    assert facts(memory) == held
    assert agent.graph.get_state(T).values == start.values
    if start.next:
        state = agent.run(None)
        assert state["saw"][len(start.values.get("saw", []))] == lines(held)


def test_back_to_the_branch_that_was_left(memory: MemoryStore) -> None:
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    left = agent.graph.get_state(T)
    whole = facts(memory)
    agent.graph.update_state(agent.at(3).config, {"log": ["other"]}, as_node="c")
    assert facts(memory) == {}
    state = agent.run({"log": ["two"]}, left.config)
    assert state["saw"][-3] == lines(whole)
    agent.graph.update_state(left.config, {"log": ["once more"]})
    assert facts(memory) == whole


def test_other_threads_keep_what_they_have(memory: MemoryStore) -> None:
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    start = agent.at(2)
    memory.store.put(("note",), "every", {"text": "theirs"})
    agent.run({"log": ["u"]}, U)
    memory.store.put(("note",), "every", {"text": "theirs"})
    agent.run(None, start.config)
    held = facts(memory)
    assert {"u b", "u c"} <= set(held)
    assert {"one b", "one c"} <= set(held)
    saw = agent.graph.get_state(T).values["saw"]
    assert "every=theirs" in saw[1]


def test_a_run_that_fails_before_it_commits_undoes_nothing(memory: MemoryStore) -> None:
    """The first commit of a branch is what leaves the other one."""
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    before = facts(memory)
    start = agent.at(2)
    put = agent.saver.put

    def refused(*args: Any) -> Any:
        raise ConnectionError("no")

    agent.saver.put = refused  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        agent.run(None, start.config)
    agent.saver.put = put  # type: ignore[method-assign]
    assert facts(memory) == before
    agent.graph.get_state(start.config)
    assert facts(memory) == before


def test_an_abandoned_stream_undoes_what_it_committed_and_no_more(memory: MemoryStore) -> None:
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    start = agent.at(3)
    stream = agent.graph.stream({"log": ["x"]}, start.config, durability="sync")
    next(stream)
    stream.close()
    state = agent.graph.get_state(T)
    assert lines(facts(memory)) == lines(past(memory, state.config))


def test_an_interrupt_of_a_branch_is_answered(memory: MemoryStore) -> None:
    def ask(state: State, *, store: BaseStore) -> State:
        answer = interrupt("well?")
        store.put(("note",), "answer", {"text": answer})
        return {"log": [answer]}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    saver = MemStateCheckpointer(memory, time_travel="rewind")
    graph = builder.compile(checkpointer=saver, store=memory.store)
    graph.invoke({"log": []}, T)
    graph.invoke(Command(resume="yes"), T)
    assert facts(memory) == {"answer": "yes"}
    start = list(graph.get_state_history(T))[1]
    assert graph.invoke(None, start.config)["__interrupt__"]
    graph.invoke(Command(resume="no"), T)
    assert facts(memory) == {"answer": "no"}
    assert [entry.value for entry in memory.history("note", "answer")] == [{"text": "yes"}, None, {"text": "no"}]


def test_a_rollback_and_time_travel_together(memory: MemoryStore) -> None:
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    one = facts(memory)
    agent.run({"log": ["two"]})
    two, head = facts(memory), agent.graph.get_state(T)
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == one
    agent.graph.update_state(head.config, {"log": ["back"]})  # the head that the rollback left
    assert facts(memory) == two
    memory.rollback(1, thread_id="t")
    assert facts(memory) == two
    assert agent.graph.get_state(T).values == head.values


def test_vectors_follow_the_branch(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        agent = Agent(memory)
        agent.run({"log": ["green tea"]})
        agent.run({"log": ["trains to berlin"]})
        asked = len(model.texts)
        agent.graph.update_state(agent.at(4).config, None, as_node="__copy__")
        assert len(model.texts) == asked
        check_search(memory, facts(memory))
        agent.run({"log": ["a cat"]})
        check_search(memory, facts(memory))
        memory.flush()
        check_settled(memory, database)


def test_reads_of_the_past_do_not_travel(memory: MemoryStore) -> None:
    agent = Agent(memory)
    agent.run({"log": ["one"]})
    before, count = facts(memory), len(memory.log())
    for snapshot in agent.graph.get_state_history(T):
        agent.graph.get_state(snapshot.config)
    list(agent.saver.list(T))
    assert (facts(memory), len(memory.log())) == (before, count)


def test_subgraphs_go_along(memory: MemoryStore) -> None:
    def write(state: State, *, store: BaseStore) -> State:
        saw = sorted(item.key for item in store.search(("note",)))
        store.put(("note",), f"inner{len(state['log'])}", {"text": "inner"})
        return {"log": ["inner"], "saw": [saw]}

    inner = StateGraph(State)
    inner.add_node("write", write)
    inner.add_edge(START, "write")
    outer = StateGraph(State)
    outer.add_node("sub", inner.compile())
    outer.add_edge(START, "sub")
    saver = MemStateCheckpointer(memory, time_travel="rewind")
    graph = outer.compile(checkpointer=saver, store=memory.store)
    graph.invoke({"log": ["in"]}, T)
    start = graph.get_state(T)
    graph.invoke({"log": ["in"]}, T)
    held = set(facts(memory))
    assert len(held) == 2
    state = graph.invoke({"log": ["in", "in"]}, start.config)
    assert state["saw"][-1] == ["inner1"]
    assert set(facts(memory)) != held
    assert "inner1" in facts(memory)
    assert len(facts(memory)) == 2

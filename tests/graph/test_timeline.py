"""A thread's timeline: its steps, branches and rollbacks, what each remembered, and the picture of it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Annotated, Any
from xml.etree import ElementTree

import pytest
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore
from typing_extensions import TypedDict

from langgraph_memstate import MemoryStore

THREAD: Any = {"configurable": {"thread_id": "<t & co>"}}


class State(TypedDict):
    log: Annotated[list[str], operator.add]


def note(state: State, *, store: BaseStore) -> State:
    store.put(("notes",), f"<{len(state['log'])}>", {"n": len(state["log"])})
    return {"log": ["noted"]}


@pytest.fixture
def memory() -> Iterator[MemoryStore]:
    with MemoryStore.open(":memory:") as memory:
        yield memory


def graph(memory: MemoryStore) -> Any:
    workflow = StateGraph(State).add_node("note", note).add_edge(START, "note")
    return workflow.compile(checkpointer=memory.checkpointer, store=memory.store)


def test_steps_rollbacks_and_branches(memory: MemoryStore) -> None:
    agent = graph(memory)
    for _ in range(2):
        agent.invoke({"log": ["in"]}, THREAD)
    report = memory.rollback(turns=1, thread_id="<t & co>")
    agent.invoke({"log": ["again"]}, THREAD)
    steps = memory.timeline("<t & co>").steps
    first = ["input", "loop", "loop"]
    assert [one.source for one in steps] == [*first, *first, "rollback", *first]
    assert [one.lane for one in steps] == [0] * 6 + [1] * 4
    assert [one.current for one in steps] == [True, True, False, False, False, False, True, True, True, True]
    (rollback,) = [one for one in steps if one.rolled_back is not None]
    assert (rollback.checkpoint_id, rollback.rolled_back) == (report.head, report.undone)
    written = [[(entry.op, entry.key, entry.undoes is not None) for entry in one.facts] for one in steps]
    assert [facts for facts in written if facts] == [
        [("put", "<1>", False)], [("put", "<3>", False)], [("delete", "<3>", True)], [("put", "<3>", False)],
    ]  # fmt: skip


def test_the_picture_is_well_formed_and_has_every_step_and_fact(memory: MemoryStore) -> None:
    agent = graph(memory)
    agent.invoke({"log": ["in"]}, THREAD)
    memory.rollback(1, thread_id="<t & co>")
    timeline = memory.timeline("<t & co>")
    picture = ElementTree.fromstring(timeline._repr_html_())
    tags = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert tags.count("circle") == len(timeline.steps)
    assert tags.count("rect") == sum(len(one.facts) for one in timeline.steps) == 2
    assert tags.count("path") == 4, "to each parent, and from what was undone"
    assert str(timeline).count("\n") == len(timeline.steps)


def test_metadata_of_the_callers_own_is_no_rollback(memory: MemoryStore) -> None:
    agent = graph(memory)
    for own in ("mine", {"from": "x"}, None):
        agent.invoke({"log": ["in"]}, {**THREAD, "metadata": {"rollback": own}})
    timeline = memory.timeline("<t & co>")
    assert {one.source for one in timeline.steps} == {"input", "loop"}
    assert not any(one.rolled_back for one in timeline.steps)


def test_a_thread_without_checkpoints_has_none(memory: MemoryStore) -> None:
    assert memory.timeline("nobody").steps == ()
    assert ElementTree.fromstring(memory.timeline("nobody")._repr_html_()) is not None

"""Kill -9 at every SQL statement of a rollback: thread state, facts and vectors are the old ones or the new ones.

A thread of some turns is made once. Then a process goes back and forth on a copy of it and is killed at one point after
another; what it leaves must be one of the moments between two of its calls.
"""

from __future__ import annotations

import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import uuid4

from audit import audit, journal_ids, untrue_search, vector_ids
from census import THREAD, frozen_outbox
from forks import KILLED, KillSwitch, in_child
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from writers import Setup, opened

from langgraph_memstate import Fact, MemoryStore, RollbackNode

TURNS = 2
Moment = tuple[Any, ...]
"""the head's log and attempts, and the facts"""


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    attempts: int


def agent(memory: MemoryStore, *, goes_back: bool = False) -> Any:
    """Two steps a turn, which write a fact each, change one that all share and delete one; then perhaps a way back."""

    def node(name: str) -> Callable[..., Any]:
        def run(state: State, *, store: BaseStore) -> State:
            key = f"{name}{len(state['log'])}"
            store.put(("memories",), key, {"text": f"memory {key}"})
            store.put(("memories",), "shared", {"text": f"memory shared by {key}"})
            store.delete(("memories",), f"hear{len(state['log']) - 1}")
            return {"log": [key], "attempts": state.get("attempts", 0) + 1}

        return run

    def after(state: State) -> str:
        return "back" if goes_back and state["attempts"] < 2 * TURNS + 4 else END

    builder = StateGraph(State)
    builder.add_node("hear", node("hear"))
    builder.add_node("say", node("say"))
    builder.add_node("back", RollbackNode(2, keep=("attempts",), goto="hear"))
    builder.add_edge(START, "hear")
    builder.add_edge("hear", "say")
    builder.add_conditional_edges("say", after, ["back", END])
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


def prepare(setup: Setup, path: Path) -> None:
    with opened(setup, path) as memory:
        memory.commit(Fact("loose", {"text": "memory loose"}, id="one"))
        for _ in range(TURNS):
            agent(memory).invoke({"log": ["in"]}, THREAD, durability="sync")
        memory.commit(Fact("loose", {"text": "memory loose again"}, id="one"))


# -- what is done, and killed -----------------------------------------------------------------------


def there_and_back(memory: MemoryStore) -> Sequence[Callable[[], object]]:
    """A thread goes back a step, then a turn, then all of it is taken back; a commit is undone beside it."""
    head = memory.checkpointer.get_tuple(THREAD)
    assert head is not None
    return (
        lambda: memory.rollback(1, thread_id="t"),
        lambda: memory.rollback(turns=1, thread_id="t"),
        lambda: memory.rollback(to=head.config),
        lambda: memory.rollback(1),
    )


def by_a_node(memory: MemoryStore) -> Sequence[Callable[[], object]]:
    """A turn whose rollback node takes its first attempt back."""
    graph = agent(memory, goes_back=True)
    steps = graph.stream({"log": ["in"]}, THREAD, stream_mode="values", durability="sync")
    return tuple(lambda: next(steps, None) for _ in range(9))


SCRIPTS: dict[str, Callable[[MemoryStore], Sequence[Callable[[], object]]]] = {
    "rollback": there_and_back,
    "node": by_a_node,
}


def moment(memory: MemoryStore) -> Moment:
    found = memory.checkpointer.get_tuple(THREAD)
    assert found is not None
    values = found.checkpoint["channel_values"]
    return _shown(values, memory.query(limit=100))


def _shown(values: Mapping[str, Any], facts: Sequence[Fact]) -> Moment:
    held = tuple(sorted((fact.namespace, fact.id, fact.payload["text"]) for fact in facts))
    return tuple(values.get("log", ())), values.get("attempts"), held


def moments(setup: Setup, path: Path, script: str) -> list[Moment]:
    """What a run without a death shows between its calls, and at every checkpoint."""
    with opened(setup, path) as memory:
        found = [moment(memory)]
        for call in SCRIPTS[script](memory):
            call()
            found.append(moment(memory))
        for stored in memory.checkpointer.list(THREAD) if script == "node" else ():
            items = memory.as_of(stored.config).search((), limit=100)
            facts = [Fact("", item.value, id=item.key, namespace=item.namespace) for item in items]
            found.insert(0, _shown(stored.checkpoint["channel_values"], facts))
    return found


def play(setup: Setup, path: Path, script: str, at: int) -> None:
    switch = KillSwitch(at)
    switch.watch_sqlite()
    with opened(setup, path, switch.point) as memory:
        calls = SCRIPTS[script](memory)
        switch.armed = True
        for call in calls:
            call()


def examine(setup: Setup, path: Path, allowed: Sequence[Moment]) -> list[str]:
    """As the death left it, and with the index settled."""
    wrong: list[str] = []
    with frozen_outbox(), opened(setup, path) as memory:
        found = moment(memory)
        if found not in allowed:
            wrong.append(f"neither before nor after: {found}")
        wrong += [f"before replay: {what}" for what in untrue_search(memory)]
    wrong += audit(path / "memory.db")
    with opened(setup, path) as memory:
        memory.flush()
        report = memory.verify()
        if not report.ok:
            wrong.append(f"verify: {report}")
        if moment(memory) != found:
            wrong.append("replaying changed what is there")
        wrong += [f"after replay: {what}" for what in untrue_search(memory)]
        wrong += _goes_on(memory)
    wrong += audit(path / "memory.db", settled=True)
    held, wanted = journal_ids(path / "index.journal"), vector_ids(path / "memory.db")
    if held != wanted:
        wrong.append(f"index: {len(held - wanted)} too many, {len(wanted - held)} missing")
    return wrong


def _goes_on(memory: MemoryStore) -> list[str]:
    """The thread can be run further and rolled back, whatever state the death left it in."""
    graph = agent(memory)
    before = moment(memory)
    graph.invoke({"log": ["more"]}, THREAD)
    memory.rollback(turns=1, thread_id="t")
    after = moment(memory)
    memory.flush()
    same = (before[0], before[2]) == (after[0], after[2])
    return [] if same else [f"a turn more and back again is {after}, not {before}"]


def kill_everywhere(root: str, setup: Setup, script: str, first: int = 1, stride: int = 1) -> tuple[int, list[str]]:
    """How many points there were, and what was wrong after a death at each."""
    start = Path(root) / uuid4().hex
    start.mkdir(parents=True)
    in_child(prepare, setup, start)
    trial = Path(root) / uuid4().hex
    shutil.copytree(start, trial)
    allowed = in_child(moments, setup, trial, script)
    violations: list[str] = []
    for deaths, at in enumerate(count(first, stride)):
        path = Path(root) / uuid4().hex
        shutil.copytree(start, path)
        killed = in_child(play, setup, path, script, at) is KILLED
        wrong = in_child(examine, setup, path, allowed if killed else allowed[-1:])
        violations += [f"{script}, {setup.vector_sync}, killed at {at}: {what}" for what in wrong]
        shutil.rmtree(path)
        if not killed:
            return deaths, violations
    raise AssertionError

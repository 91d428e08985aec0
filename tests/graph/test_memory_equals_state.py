"""One invariant over random lives of a thread: what memory holds is what the stored checkpoints say was done.

Every execution of a node has an id of its own, which it appends to the state and writes to the store. Whatever fails,
is retried, interrupted, resumed, forked, replayed or restarted: an id is in memory if and only if it is in the state
of some checkpoint of the thread, and it is there once.
"""

import asyncio
import itertools
import operator
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, RetryPolicy, interrupt

from langgraph_memstate import MemoryStore, MemStateCheckpointer

THREAD: dict[str, Any] = {"configurable": {"thread_id": "t"}}
NOTES = ("done",)


def extend(state: list[str], writes: Sequence[Any]) -> list[str]:
    return [*state, *(text for write in writes for text in write)]


class State(TypedDict):
    log: Annotated[list[str], operator.add]
    delta: Annotated[list[str], DeltaChannel(extend, snapshot_frequency=3)]
    rounds: int


class Plain(TypedDict):
    log: Annotated[list[str], operator.add]
    rounds: int


class Trouble(RuntimeError):
    """A node that fails after it wrote."""


@dataclass(frozen=True)
class Life:
    """Which graph to build."""

    delta: bool = True
    subgraph: str = ""
    gate: bool = False
    inner_gate: bool = False
    rounds: int = 1

    def build(self, saver: BaseCheckpointSaver[Any], store: BaseStore, broken: set[str], ids: Any) -> Any:
        """`broken` names nodes that fail once, after they wrote; each leaves it as it fails."""

        def execute(name: str, store: BaseStore) -> list[str]:
            done = f"{name}-{next(ids)}"
            store.put(NOTES, done, {"by": name})
            if name in broken:
                broken.discard(name)
                raise Trouble(name)
            return [done]

        def update(done: list[str], **more: Any) -> dict[str, Any]:
            return {"log": done, **({"delta": done} if self.delta else {}), **more}

        def node(name: str) -> Callable[..., Any]:
            def run(state: Any, *, store: BaseStore) -> dict[str, Any]:
                return update(execute(name, store))

            return run

        def plan(state: Any, *, store: BaseStore) -> dict[str, Any]:
            return update(execute("plan", store), rounds=state.get("rounds", 0) + 1)

        def gate(state: Any, *, store: BaseStore) -> dict[str, Any]:
            done = execute("gate", store)
            if self.gate:
                interrupt("gate")
            return update(done)

        def go_round(state: Any) -> str:
            if "edge" in broken:  # the node has left its output: LangGraph takes it for finished
                broken.discard("edge")
                raise Trouble("edge")
            return "plan" if state.get("rounds", 0) % self.rounds else END

        inner = self._subgraph(node, execute) if self.subgraph else None

        def around(state: Any, *, store: BaseStore) -> dict[str, Any]:
            done = execute("around", store)
            if inner is not None:
                result = inner.invoke({"log": [], "rounds": 0})
                done = [*done, *(one for one in result["log"] if one not in state["log"])]
            return update(done + execute("after", store))

        builder = StateGraph(State if self.delta else Plain)
        builder.add_node("plan", plan)
        builder.add_node("left", node("left"))
        builder.add_node("right", node("right"), retry_policy=RetryPolicy(initial_interval=0.001, retry_on=Trouble))
        builder.add_node("gate", gate)
        builder.add_node("around", around)
        builder.add_edge(START, "plan")
        for name in ("left", "right", "gate"):
            builder.add_edge("plan", name)
            builder.add_edge(name, "around")
        builder.add_conditional_edges("around", go_round)
        return builder.compile(checkpointer=saver, store=store)

    def _subgraph(self, node: Callable[[str], Any], execute: Callable[..., list[str]]) -> Any:
        def ask(state: Any, *, store: BaseStore) -> dict[str, Any]:
            done = execute("ask", store)
            if self.inner_gate:
                interrupt("inner")
            return {"log": done}

        def first(state: Any, *, store: BaseStore) -> dict[str, Any]:
            return {"log": execute("first", store)}

        builder = StateGraph(Plain)
        builder.add_node("first", first)
        builder.add_node("ask", ask)
        builder.add_edge(START, "first")
        builder.add_edge("first", "ask")
        return builder.compile(checkpointer=True if self.subgraph == "own" else None)


@dataclass(frozen=True)
class Do:
    what: str
    breaks: str = ""
    at: int = 0
    durability: str = "async"
    use_async: bool = False

    def run(self, graph: Any, broken: set[str]) -> str:
        broken.clear()
        broken.update({self.breaks} - {""})
        try:
            self._run(graph)
        except Exception as error:
            return type(error).__name__
        return "interrupted" if graph.get_state(THREAD).next else "finished"

    def _run(self, graph: Any) -> None:
        history = list(graph.get_state_history(THREAD))
        past = history[self.at % len(history)].config if history else THREAD
        match self.what:
            case "invoke":
                self._invoke(graph, {"log": []}, THREAD)
            case "resume":
                self._invoke(graph, Command(resume="yes"), THREAD)
            case "go_on":
                self._invoke(graph, None, THREAD)
            case "update":
                graph.update_state(THREAD, {"log": []}, as_node="plan")
            case "end":
                graph.update_state(THREAD, None, as_node=END)
            case "copy":
                graph.update_state(past, None, as_node="__copy__")
            case "fork":
                graph.update_state(past, {"log": []}, as_node="plan")
                self._invoke(graph, None, THREAD)
            case "replay":
                self._invoke(graph, None, past)
            case "rerun":
                self._invoke(graph, {"log": []}, past)

    def _invoke(self, graph: Any, value: Any, config: dict[str, Any]) -> None:
        if self.use_async:
            asyncio.run(graph.ainvoke(value, config, durability=self.durability))
        else:
            graph.invoke(value, config, durability=self.durability)


def done_in_state(saver: BaseCheckpointSaver[Any]) -> set[str]:
    """The ids in any checkpoint of the thread, those of its subgraphs included."""
    found = saver.list({"configurable": {"thread_id": "t"}})
    return {done for one in found for done in one.checkpoint["channel_values"].get("log", [])}


def check(memory: MemoryStore) -> None:
    state = done_in_state(memory.checkpointer)
    facts = [fact.id for fact in memory.query(NOTES, limit=10_000)]
    assert sorted(facts) == sorted(state), {"ghosts": set(facts) - state, "lost": state - set(facts)}
    with memory.storage.snapshot() as reader:
        written = Counter(entry.key for entry in reader.log())
    assert set(written.values()) <= {1}, "written once each"


def live(life: Life, script: Sequence[Do]) -> list[str]:
    """Play a script and check the invariant after every operation; return how each ended."""
    ids, broken = itertools.count(), set[str]()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.db"
        memory = MemoryStore.open(path)
        try:
            graph = life.build(memory.checkpointer, memory.store, broken, ids)
            for do in script:
                if do.what == "restart":
                    memory.close()
                    memory = MemoryStore.open(path)
                    graph = life.build(memory.checkpointer, memory.store, broken, ids)
                else:
                    outcomes.append(do.run(graph, broken))
                check(memory)
        finally:
            memory.close()
    return outcomes


class Slow(MemStateCheckpointer):
    """A saver that takes its time at random, and so does its root graph now and then for long."""

    def put(self, config: Any, *args: Any) -> Any:
        time.sleep(random.choice([0, 0, 0.003, 0.02]) * random.random())
        return super().put(config, *args)

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        time.sleep(0.003 * random.random())
        super().put_writes(config, writes, task_id, task_path)


def check_the_past(memory: MemoryStore) -> None:
    """Memory as of a checkpoint is what the state says that was saved by then. The ids of checkpoints sort by time."""
    done: set[str] = set()
    for saved in reversed(list(memory.checkpointer.list(THREAD))):
        done.update(saved.checkpoint["channel_values"].get("log", []))
        then = {item.key for item in memory.as_of(saved.config).search(NOTES, limit=1000)}
        assert then == done, {"too early": then - done, "too late": done - then, "metadata": saved.metadata}


lives = st.builds(
    Life,
    delta=st.booleans(),
    subgraph=st.sampled_from(["", "inherits", "own"]),
    gate=st.booleans(),
    inner_gate=st.booleans(),
    rounds=st.integers(1, 2),
)
operations = st.builds(
    Do,
    what=st.sampled_from(
        ["invoke", "invoke", "resume", "resume", "go_on", "update", "end", "copy", "fork", "replay", "rerun",
         "restart", "restart"]
    ),
    breaks=st.sampled_from(["", "", "", "plan", "left", "right", "gate", "around", "after", "edge", "first", "ask"]),
    at=st.integers(0, 20),
    durability=st.sampled_from(["sync", "async", "exit"]),
    use_async=st.booleans(),
)  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(life=lives, script=st.lists(operations, min_size=2, max_size=7))
def test_memory_equals_state_over_random_lives(life: Life, script: list[Do]) -> None:
    live(life, [Do("invoke"), *script])


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    life=lives,
    breaks=st.lists(st.sampled_from(["", "", "plan", "left", "after", "first", "ask"]), min_size=1, max_size=4),
    use_async=st.booleans(),
)
def test_memory_as_of_any_checkpoint_equals_its_state(life: Life, breaks: list[str], use_async: bool) -> None:
    """In a thread without branches, whose checkpoints are saved in the background and late."""
    broken = set[str]()
    with MemoryStore.open(":memory:") as memory:
        graph = life.build(Slow(memory), memory.store, broken, itertools.count())
        outcome = ""
        for breaking in breaks:
            what = {"interrupted": "resume", "Trouble": "go_on"}.get(outcome, "invoke")
            outcome = Do(what, breaking, use_async=use_async).run(graph, broken)
        check_the_past(memory)


@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_memory_equals_state_over_one_rich_life(delta: bool, durability: str, use_async: bool) -> None:
    def do(what: str, breaks: str = "", at: int = 0) -> Do:
        return Do(what, breaks, at, durability, use_async)

    outcomes = live(
        Life(delta, "inherits", gate=True, inner_gate=True, rounds=2),
        [
            do("invoke", "left"), do("restart"), do("go_on", "right"), do("restart"), do("resume", "first"),
            do("resume", "ask"), do("go_on"), do("restart"), do("resume", "after"), do("go_on"), do("resume"),
            do("resume"), do("invoke", "plan"), do("go_on"), do("fork", "around", 6), do("replay", "", 9),
            do("rerun", "gate", 4), do("go_on"), do("resume"), do("invoke"), do("resume"), do("resume", "edge"),
            do("go_on"),
        ],
    )  # fmt: skip
    assert {"Trouble", "interrupted", "finished"} <= set(outcomes)


def test_a_run_that_saves_at_exit_tells_new_input_from_a_resume_after_a_fork() -> None:
    """A fork is marked as resumed from the start, which must not pass for a resume of the step that new input drops."""
    fork = Do("replay", durability="sync")
    new_input, resume = Do("invoke", durability="exit"), Do("resume", durability="exit")
    outcomes = live(Life(gate=True), [Do("invoke"), fork, new_input, resume, Do("invoke"), fork, resume])
    assert outcomes == ["interrupted"] * 3 + ["finished"] + ["interrupted"] * 2 + ["finished"]


def test_an_update_that_snapshots_a_delta_channel_does_not_end_the_step() -> None:
    """LangGraph moves the versions that nodes have seen then, as the end of a step does."""
    outcomes = live(Life(gate=True), [Do("invoke"), Do("fork", at=1), Do("update"), Do("go_on"), Do("resume")])
    assert outcomes[-2:] == ["interrupted", "finished"]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("goes_on", [True, False], ids=["resumed", "new input"])
def test_an_entrypoint_that_was_forked_at_its_input(memory: MemoryStore, goes_on: bool, durability: str) -> None:
    """The call that finished before the failure lands with a resume, and is dropped by new input."""
    ids, broken = itertools.count(), [True]

    @task
    def remember(about: str, *, store: BaseStore) -> str:
        store.put(NOTES, f"{about} {next(ids)}", {"about": about})
        return about

    @entrypoint(checkpointer=memory.checkpointer, store=memory.store)
    def workflow(about: str, *, store: BaseStore) -> str:
        done: str = remember(about, store=store).result()
        if broken:
            raise Trouble("workflow")
        return done

    with pytest.raises(Trouble):
        workflow.invoke("first", THREAD, durability="sync")
    (failed,) = workflow.get_state_history(THREAD)
    with pytest.raises(Trouble):
        workflow.invoke(None, failed.config, durability="sync")
    broken.clear()

    result = workflow.invoke(None if goes_on else "second", THREAD, durability=durability)
    assert result == ("first" if goes_on else "second")
    assert [fact.id for fact in memory.query(NOTES)] == (["first 1"] if goes_on else ["second 2"])


def test_the_invariant_fails_on_a_saver_and_a_store_that_commit_apart() -> None:
    """A node that fails after it wrote leaves a ghost in a store of its own."""
    ids, broken = itertools.count(), {"left"}
    store = InMemoryStore()
    with SqliteSaver.from_conn_string(":memory:") as saver:
        graph = Life(delta=False).build(saver, store, broken, ids)
        with pytest.raises(Trouble):
            graph.invoke({"log": []}, THREAD)
        facts = {item.key for item in store.search(NOTES, limit=100)}
        assert facts - done_in_state(saver), "ghosts"

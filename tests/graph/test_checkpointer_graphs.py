"""Real graphs on `MemStateCheckpointer`: time travel, forks, interrupts, subgraphs and delta channels.

Most tests run a script of operations on two copies of a graph, one on LangGraph's `InMemorySaver` and one on ours, and
compare everything a user can see after each operation.
"""

import asyncio
import operator
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.types import Command, Send, StateSnapshot, interrupt

from langgraph_memstate import MemoryStore

Graph = Any
Config = dict[str, Any]
THREAD: Config = {"configurable": {"thread_id": "t"}}


def extend(state: list[str], writes: Sequence[Any]) -> list[str]:
    """A delta reducer whose result depends on the order of the writes."""
    return [*state, *(text for write in writes for text in write)]


def state_type(snapshot_frequency: int) -> type:
    class State(TypedDict):
        log: Annotated[list[str], operator.add]
        delta: Annotated[list[str], DeltaChannel(extend, snapshot_frequency=snapshot_frequency)]
        untouched: Annotated[list[str], DeltaChannel(extend)]
        last: str
        count: int

    return State


def note(name: str) -> Callable[[Any], dict[str, Any]]:
    def node(state: Any) -> dict[str, Any]:
        text = f"{name}{state.get('count', 0)}"
        return {"log": [text], "delta": [text]}

    return node


@dataclass(frozen=True)
class Shape:
    """Which graph to build."""

    rounds: int = 1
    snapshot_frequency: int = 3
    gate: bool = False
    subgraph: str = ""  # "inherits", "own" or none
    inner_gate: bool = False
    sends: int = 0
    pause_before: str = ""
    join: bool = False
    """Wait for both branches with a barrier. LangGraph goes on filling the set that it gave the saver: the barrier of
    a checkpoint that is saved in the background (``async``) is right on no saver; such runs cannot be compared."""

    def build(self, saver: BaseCheckpointSaver[Any]) -> Graph:
        state = state_type(self.snapshot_frequency)

        def plan(state: Any) -> dict[str, Any]:
            count = state.get("count", 0) + 1
            return {"log": [f"plan{count}"], "delta": [f"plan{count}"], "count": count, "last": "plan"}

        def gate(state: Any) -> dict[str, Any]:
            answer = interrupt(f"gate{state['count']}") if self.gate else "open"
            return {"log": [f"gate {answer}"], "delta": [f"gate {answer}"], "last": "gate"}

        def fan_out(state: Any) -> list[Any]:
            return ["left", "right", *(Send("sent", {**state, "count": number}) for number in range(self.sends))]

        builder = StateGraph(state)
        builder.add_node("plan", plan)
        for name in ("left", "right", "sent"):
            builder.add_node(name, note(name))
        builder.add_node("gate", gate)
        builder.add_node("inner", self._subgraph(state) if self.subgraph else note("inner"))
        builder.add_edge(START, "plan")
        builder.add_conditional_edges("plan", fan_out, ["left", "right", "sent"])
        if self.join:
            builder.add_edge(["left", "right"], "gate")
        else:
            builder.add_edge("left", "gate")
            builder.add_edge("right", "gate")
        builder.add_edge("gate", "inner")
        builder.add_conditional_edges("inner", lambda state: END if state["count"] % self.rounds == 0 else "plan")
        return builder.compile(checkpointer=saver, interrupt_before=[self.pause_before] if self.pause_before else None)

    def _subgraph(self, state: type) -> Graph:
        def ask(state: Any) -> dict[str, Any]:
            answer = interrupt("inner") if self.inner_gate else "open"
            return {"delta": [f"ask {answer}"], "last": f"ask {answer}"}

        class Inner(TypedDict):
            delta: Annotated[list[str], DeltaChannel(extend, snapshot_frequency=2)]
            last: str

        builder = StateGraph(Inner)
        builder.add_node("first", lambda state: {"delta": ["first"], "last": "first"})
        builder.add_node("ask", ask)
        builder.add_edge(START, "first")
        builder.add_edge("first", "ask")
        inner = builder.compile(checkpointer=True if self.subgraph == "own" else None)

        def run(state: Any) -> dict[str, Any]:
            result = inner.invoke({"delta": [], "last": state["last"]})
            return {"log": [f"inner {result['last']}"], "delta": result["delta"][-2:], "last": result["last"]}

        return run


# -- what a user can see ------------------------------------------------------------------------------------


def seen_task(task: Any, order: dict[str, int]) -> Any:
    inner = seen_snapshot(task.state, order) if isinstance(task.state, StateSnapshot) else None
    return task.name, task.path, repr(task.error), [one.value for one in task.interrupts], task.result, inner


def seen_snapshot(snapshot: StateSnapshot, order: dict[str, int]) -> Any:
    def position(config: Config | None) -> int | None:
        return None if config is None else order.get(config["configurable"].get("checkpoint_id", ""))

    metadata = {name: value for name, value in (snapshot.metadata or {}).items() if name in ("source", "step")}
    counters = (snapshot.metadata or {}).get("counters_since_delta_snapshot") or {}
    metadata["counters"] = {channel: tuple(counts) for channel, counts in counters.items()}
    return {
        "values": snapshot.values,
        "next": snapshot.next,
        "metadata": metadata,
        "at": position(snapshot.config),
        "parent": position(snapshot.parent_config),
        "tasks": [seen_task(task, order) for task in snapshot.tasks],
        "interrupts": [one.value for one in snapshot.interrupts],
    }


def seen(graph: Graph, config: Config = THREAD) -> Any:
    """The whole history and the latest state with its subgraphs; checkpoint ids become positions in time."""
    history = list(graph.get_state_history(config))
    ids = sorted(one.config["configurable"]["checkpoint_id"] for one in history)
    order = {checkpoint_id: position for position, checkpoint_id in enumerate(ids)}
    return {
        "history": [seen_snapshot(one, order) for one in history],
        "latest": seen_snapshot(graph.get_state(config, subgraphs=True), order),
    }


# -- operations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Do:
    """One operation: invoke, resume, go_on, update, fork, replay, rerun, copy, or restart (ours only)."""

    what: str
    text: str = "x"
    at: int = 0
    durability: str = "async"
    use_async: bool = False
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def run(self, graph: Graph) -> Any:
        try:
            return self._run(graph)
        except Exception as error:
            return type(error).__name__

    def _run(self, graph: Graph) -> Any:
        history = list(graph.get_state_history(THREAD))
        past = history[self.at % len(history)].config if history else THREAD
        update = {"log": [self.text], "delta": [self.text]}
        match self.what:
            case "invoke":
                return self._invoke(graph, update, THREAD)
            case "resume":
                return self._invoke(graph, Command(resume=self.text), THREAD)
            case "go_on":
                return self._invoke(graph, None, THREAD)
            case "update":
                return self._update(graph, THREAD, update, "plan")
            case "fork":
                self._update(graph, past, update, "plan")
                return self._invoke(graph, None, THREAD)
            case "fork_inferred":
                return self._update(graph, past, update, None)
            case "replay":
                return self._invoke(graph, None, past)
            case "rerun":
                return self._invoke(graph, update, past)
            case "copy":
                return self._update(graph, past, None, "__copy__")
        raise AssertionError(self.what)

    def _invoke(self, graph: Graph, value: Any, config: Config) -> Any:
        if self.use_async:
            return asyncio.run(graph.ainvoke(value, config, durability=self.durability))
        return graph.invoke(value, config, durability=self.durability)

    def _update(self, graph: Graph, config: Config, value: Any, as_node: str | None) -> None:
        if self.use_async:
            asyncio.run(graph.aupdate_state(config, value, as_node))
        else:
            graph.update_state(config, value, as_node)


def interrupts_by_value(result: Any) -> Any:
    """A result without the ids of its interrupts, which are hashes of checkpoint ids."""
    if isinstance(result, dict) and "__interrupt__" in result:
        return {**result, "__interrupt__": [one.value for one in result["__interrupt__"]]}
    return result


def same_on_both(shape: Shape, script: Sequence[Do]) -> list[Any]:
    """Run a script on LangGraph's saver and on ours; return what each operation did."""
    theirs = shape.build(InMemorySaver())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.db"
        memory = MemoryStore.open(path)
        try:
            ours = shape.build(memory.checkpointer)
            results = []
            for do in script:
                if do.what == "restart":
                    memory.close()
                    memory = MemoryStore.open(path)
                    ours = shape.build(memory.checkpointer)
                    continue
                expected, result = (interrupts_by_value(do.run(graph)) for graph in (theirs, ours))
                assert result == expected, do
                assert seen(ours) == seen(theirs), do
                results.append(result)
            return results
        finally:
            memory.close()


# -- tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_life_of_a_thread(durability: str, use_async: bool) -> None:
    """Interrupt, restart, resume, fork, replay, rerun, copy: as LangGraph's own saver has it."""

    def do(what: str, text: str = "x", at: int = 0) -> Do:
        return Do(what, text, at, durability, use_async)

    shape = Shape(rounds=2, gate=True, subgraph="inherits", inner_gate=True, sends=2, join=durability != "async")
    results = same_on_both(
        shape,
        [
            do("invoke", "in1"), do("restart"), do("resume", "yes"), do("restart"), do("resume", "ok"),
            do("resume", "again"), do("resume", "fine"), do("invoke", "in2"), do("fork", "edit", 3), do("resume", "f"),
            do("restart"), do("replay", at=5), do("rerun", "in3", 4), do("copy", at=2), do("update", "manual"),
            do("go_on"),
        ],
    )  # fmt: skip
    assert results[0]["__interrupt__"] == ["gate1"]
    assert results[1]["__interrupt__"] == ["inner"]
    assert results[2]["__interrupt__"] == ["gate2"]
    finished = results[4]
    fan = ["left1", "right1", "sent0", "sent1"]
    assert finished["log"][:6] == ["in1", "plan1", *fan]
    assert finished["delta"] == [
        "in1", "plan1", *fan, "gate yes", "first", "ask ok",
        "plan2", "left2", "right2", "sent0", "sent1", "gate again", "first", "ask fine",
    ]  # fmt: skip


shapes = st.builds(
    Shape,
    rounds=st.integers(1, 2),
    snapshot_frequency=st.sampled_from([1, 2, 5, 1000]),
    gate=st.booleans(),
    subgraph=st.sampled_from(["", "inherits", "own"]),
    inner_gate=st.booleans(),
    sends=st.integers(0, 2),
    pause_before=st.sampled_from(["", "", "gate", "left"]),
)
operations = st.builds(
    Do,
    what=st.sampled_from(
        ["invoke", "invoke", "resume", "resume", "go_on", "update", "fork", "fork_inferred", "replay", "rerun", "copy",
         "restart"]
    ),
    text=st.sampled_from(["x", "y", "z"]),
    at=st.integers(0, 20),
    durability=st.sampled_from(["sync", "async", "exit"]),
    use_async=st.booleans(),
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=shapes, script=st.lists(operations, min_size=2, max_size=7))
def test_random_graphs_and_scripts_as_on_langgraphs_own_saver(shape: Shape, script: list[Do]) -> None:
    same_on_both(shape, [Do("invoke", "start"), *script])


def test_the_comparison_sees_a_saver_that_forgets_one_write() -> None:
    """A saver that drops a task's last pending write must not pass for equal."""

    class Forgetful(InMemorySaver):
        def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
            super().put_writes(config, writes[:-1] if len(writes) > 1 else writes, task_id, task_path)

    shape = Shape(gate=True, snapshot_frequency=1000)
    graphs = shape.build(InMemorySaver()), shape.build(Forgetful())
    for graph in graphs:
        Do("invoke", "start", durability="sync").run(graph)
    assert seen(graphs[0]) != seen(graphs[1])


def history_of(graph: Graph, thread_id: str) -> list[StateSnapshot]:
    return list(graph.get_state_history({"configurable": {"thread_id": thread_id}}))


def test_get_state_history_filters_and_limits(memory: MemoryStore) -> None:
    graph = Shape(rounds=3).build(memory.checkpointer)
    graph.invoke({"log": ["in"], "delta": ["in"]}, {**THREAD, "metadata": {"user": "ann"}})
    graph.update_state(THREAD, {"log": ["edit"], "delta": []}, as_node="gate")
    everything = history_of(graph, "t")
    assert len(everything) > 10

    assert [one.config for one in graph.get_state_history(THREAD, limit=2)] == [one.config for one in everything[:2]]
    middle = everything[4].config
    assert [one.config for one in graph.get_state_history(THREAD, before=middle)] == [
        one.config for one in everything[5:]
    ]
    updates = list(graph.get_state_history(THREAD, filter={"source": "update"}))
    assert [one.config for one in updates] == [everything[0].config]
    assert len(list(graph.get_state_history(THREAD, filter={"user": "ann", "source": "loop"}))) == len(everything) - 2
    for one in everything:
        assert graph.get_state(one.config).values == one.values


@pytest.mark.parametrize("durability", ["sync", "exit"])
@pytest.mark.parametrize("snapshot_frequency", [1, 2, 1000])
def test_prune_keeps_the_state_of_delta_channels(memory: MemoryStore, snapshot_frequency: int, durability: str) -> None:
    """The latest checkpoint of a delta channel holds nothing of it; what it is rebuilt from must stay."""
    graph = Shape(rounds=2, snapshot_frequency=snapshot_frequency, subgraph="own").build(memory.checkpointer)
    for number in range(4):
        graph.invoke({"log": [f"in{number}"], "delta": [f"in{number}"]}, THREAD, durability=durability)
        before = graph.get_state(THREAD, subgraphs=True)
        held = memory.stats()["checkpoints"]
        memory.checkpointer.prune(["t"])

        after = graph.get_state(THREAD, subgraphs=True)
        assert (after.values, after.next, after.config) == (before.values, before.next, before.config)
        assert memory.stats()["checkpoints"] <= held
    values = graph.get_state(THREAD).values
    assert values["log"][-1].startswith("inner")
    assert [text for text in values["delta"] if text.startswith("in") and text != "inner"] == [
        "in0", "in1", "in2", "in3",
    ]  # fmt: skip
    if snapshot_frequency == 1:
        assert len(history_of(graph, "t")) <= 2, "every write has a snapshot: nothing older is needed"


def test_prune_is_not_held_back_by_a_delta_channel_that_was_never_written(memory: MemoryStore) -> None:
    """Its counter grows with every step, and there is nothing to rebuild it from."""

    class State(TypedDict):
        last: str
        never: Annotated[list[str], DeltaChannel(extend)]

    builder = StateGraph(State)
    builder.add_node("only", lambda state: {"last": "done"})
    builder.add_edge(START, "only")
    graph = builder.compile(checkpointer=memory.checkpointer)
    for _ in range(3):
        graph.invoke({"last": "go"}, THREAD)
    assert graph.get_state(THREAD).metadata["counters_since_delta_snapshot"]["never"][1] > 0
    memory.checkpointer.prune(["t"])
    assert len(history_of(graph, "t")) == 1
    assert graph.get_state(THREAD).values["last"] == "done"


def test_prune_in_the_middle_of_an_interrupt_keeps_it_resumable(memory: MemoryStore) -> None:
    shape = Shape(gate=True, subgraph="inherits", inner_gate=True, snapshot_frequency=1000)
    graph = shape.build(memory.checkpointer)
    graph.invoke({"log": ["in"], "delta": ["in"]}, THREAD)
    memory.checkpointer.prune(["t"])
    result = graph.invoke(Command(resume="yes"), THREAD)
    assert [one.value for one in result["__interrupt__"]] == ["inner"]
    memory.checkpointer.prune(["t"])
    result = graph.invoke(Command(resume="ok"), THREAD)
    assert result["delta"] == ["in", "plan1", "left1", "right1", "gate yes", "first", "ask ok"]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_copied_thread_continues_like_its_source(memory: MemoryStore, durability: str) -> None:
    """Copied in the middle of an interrupt; then both go on, and neither sees the other."""
    shape = Shape(gate=True, subgraph="inherits", snapshot_frequency=1000)
    graph = shape.build(memory.checkpointer)
    graph.invoke({"log": ["in"], "delta": ["in"]}, THREAD, durability=durability)
    memory.checkpointer.copy_thread("t", "copy")
    copy: Config = {"configurable": {"thread_id": "copy"}}

    results = [
        graph.invoke(Command(resume=answer), config, durability=durability)
        for answer, config in (("theirs", THREAD), ("ours", copy))
    ]
    start = ["in", "plan1", "left1", "right1"]
    assert [result["delta"] for result in results] == [
        [*start, f"gate {answer}", "first", "ask open"] for answer in ("theirs", "ours")
    ]
    memory.checkpointer.delete_thread("t")
    assert graph.get_state(copy).values["delta"] == results[1]["delta"]
    again = graph.invoke({"log": ["in2"], "delta": ["in2"]}, copy, durability=durability)
    assert [one.value for one in again["__interrupt__"]] == ["gate2"]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("resumed", [("copy",), ("t", "copy"), ("copy", "t")], ids="-".join)
def test_a_copied_thread_lands_the_memory_of_its_finished_tasks_once(
    memory: MemoryStore, resumed: Sequence[str], durability: str
) -> None:
    """The copied state says that the task has finished, so its memory write must not be lost with the source."""

    class State(TypedDict):
        log: Annotated[list[str], operator.add]

    def writer(state: State, *, store: BaseStore) -> dict[str, list[str]]:
        store.put(("notes",), "k", {"text": "written once"})
        return {"log": ["wrote"]}

    builder = StateGraph(State)
    builder.add_node("asker", lambda state: {"log": [interrupt("?")]})
    builder.add_node("writer", writer)
    builder.add_edge(START, "asker")
    builder.add_edge(START, "writer")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"log": []}, THREAD, durability=durability)
    memory.checkpointer.copy_thread("t", "copy")
    assert memory.store.get(("notes",), "k") is None
    if "t" not in resumed:
        memory.checkpointer.delete_thread("t")

    for thread_id in resumed:
        config = {"configurable": {"thread_id": thread_id}}
        assert graph.invoke(Command(resume="answer"), config, durability=durability)["log"] == ["answer", "wrote"]
    assert [entry.thread_id for entry in memory.history(("notes",), "k")] == ["t"], "the thread whose task wrote it"
    assert memory.stats()["staged"] == 0


def test_delta_history_of_a_channel(memory: MemoryStore) -> None:
    """Writes oldest to newest in task path order, down to the nearest stored value; other branches stay out."""
    graph = Shape(rounds=1, snapshot_frequency=5, sends=2).build(memory.checkpointer)
    saver = memory.checkpointer
    graph.invoke({"log": ["in"], "delta": ["in"]}, THREAD)
    full = InMemorySaver()
    upstream = Shape(rounds=1, snapshot_frequency=5, sends=2).build(full)
    upstream.invoke({"log": ["in"], "delta": ["in"]}, THREAD)

    for mine, theirs in zip(history_of(graph, "t"), history_of(upstream, "t"), strict=True):
        histories = [
            one.get_delta_channel_history(config=config, channels=["delta", "untouched"])
            for one, config in ((saver, mine.config), (full, theirs.config))
        ]
        found, expected = (
            {channel: (entry.get("seed"), [value for _, _, value in entry["writes"]]) for channel, entry in one.items()}
            for one in histories
        )
        assert found == expected
        awaited = asyncio.run(saver.aget_delta_channel_history(config=mine.config, channels=["delta", "untouched"]))
        assert awaited == histories[0]
    assert saver.get_delta_channel_history(config=THREAD, channels=[]) == {}

"""RollbackNode: a step that undoes the steps before it, state and memory together."""

from __future__ import annotations

import asyncio
import operator
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.channels.topic import Topic
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from truth import Words, check_search, check_settled, open_memory

from langgraph_memstate import MemoryStore, RollbackNode
from langgraph_memstate.errors import RollbackConflict, RollbackError

T: Any = {"configurable": {"thread_id": "t"}}
SAVING = ("sync", "async")


def extend(held: list[str], writes: Sequence[list[str]]) -> list[str]:
    return [*held, *(text for write in writes for text in write)]


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    delta: Annotated[list[str], DeltaChannel(extend, snapshot_frequency=3)]
    total: Annotated[int, operator.add]
    tags: Annotated[set[str], operator.or_]
    last: str
    late: str
    attempts: int


def facts(memory: MemoryStore) -> dict[str, str]:
    return {fact.id: fact.payload["text"] for fact in memory.query("note", limit=10_000)}


class Agent:
    """`plan`, then `try_it` until it is right; `check` sends a wrong attempt to the rollback node."""

    def __init__(self, memory: MemoryStore, right_at: int, node: RollbackNode, **options: Any) -> None:
        self.tries = 0
        self.right_at = right_at
        self.memory = memory
        self.before: Any = None
        self.seen: list[dict[str, Any]] = []
        builder = StateGraph(State)
        builder.add_node("plan", self.plan)
        builder.add_node("try_it", self.try_it)
        builder.add_node("check", self.check)
        builder.add_node("back", node, **options)
        builder.add_node("give_up", lambda state: {"last": "gave up"})
        builder.add_edge(START, "plan")
        builder.add_edge("plan", "try_it")
        builder.add_edge("try_it", "check")
        self.graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)

    def plan(self, state: State, *, store: BaseStore) -> State:
        store.put(("note",), "plan", {"text": "plan"})
        store.put(("note",), "shared", {"text": "planned"})
        return {"log": ["plan"], "delta": ["plan"], "total": 1, "tags": {"plan"}, "last": "plan", "attempts": 0}

    def try_it(self, state: State, *, store: BaseStore) -> State:
        self.tries += 1
        self.seen.append(dict(state))
        name = f"try{self.tries}"
        store.put(("note",), name, {"text": name})
        store.put(("note",), "shared", {"text": name})
        return {"log": [name], "delta": [name], "total": 10, "tags": {name}, "last": name, "late": name,
                "attempts": state["attempts"] + 1}  # fmt: skip

    def check(self, state: State, *, store: BaseStore) -> Command[Any]:
        store.delete(("note",), "plan")
        return Command(goto=END if self.tries >= self.right_at else "back")

    def run(self, sync: bool = True, durability: Any = "sync", value: Any = None) -> dict[str, Any]:
        value = {"log": ["in"]} if value is None else value
        if sync:
            return self.graph.invoke(value, T, durability=durability)  # type: ignore[return-value]
        return asyncio.run(self.graph.ainvoke(value, T, durability=durability))  # type: ignore[return-value]


@pytest.mark.parametrize("durability", SAVING)
@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
def test_state_and_memory_are_as_if_the_attempts_had_not_been(memory: MemoryStore, sync: bool, durability: str) -> None:
    agent = Agent(memory, 3, RollbackNode(2, goto="try_it"))
    state = agent.run(sync, durability)
    wanted = {"log": ["in", "plan", "try3"], "delta": ["plan", "try3"], "total": 11, "tags": {"plan", "try3"},
              "last": "try3", "late": "try3", "attempts": 1}  # fmt: skip
    assert state == wanted
    assert agent.graph.get_state(T).values == wanted
    assert facts(memory) == {"try3": "try3", "shared": "try3"}
    assert [one["log"] for one in agent.seen] == [["in", "plan"]] * 3
    assert [one["delta"] for one in agent.seen] == [["plan"]] * 3
    assert [one.get("late") for one in agent.seen] == [None] * 3  # it cannot be unset


def test_every_checkpoint_agrees_with_memory(memory: MemoryStore) -> None:
    """The attempts are in the state exactly as long as they are in the memory."""
    agent = Agent(memory, 3, RollbackNode(2, goto="try_it"))
    agent.run()
    for snapshot in agent.graph.get_state_history(T):
        past = memory.as_of(snapshot.config)
        held = {item.key for item in past.search(("note",), limit=100) if item.key.startswith("try")}
        assert held == {name for name in snapshot.values.get("log", []) if name.startswith("try")}
        assert held == {name for name in snapshot.values.get("tags", set()) if name.startswith("try")}


def test_keep_and_update(memory: MemoryStore) -> None:
    def advise(state: dict[str, Any]) -> dict[str, Any]:
        return {"last": f"{state['last']} after {state['attempts']}", "log": [f"hint{state['attempts']}"]}

    node = RollbackNode(2, goto="try_it", keep=("attempts",), update=advise)
    agent = Agent(memory, 3, node)
    state = agent.run()
    assert state["attempts"] == 3
    assert [one["last"] for one in agent.seen] == ["plan", "plan after 1", "plan after 1 after 2"]
    assert agent.seen[2]["log"] == ["in", "plan", "hint1", "hint2"]
    assert state["log"] == ["in", "plan", "hint1", "hint2", "try3"]


def test_an_update_of_a_channel_that_did_not_change(memory: MemoryStore) -> None:
    class More(State, total=False):
        hints: Annotated[list[str], operator.add]

    builder = StateGraph(More)
    builder.add_node("write", lambda state: {"last": "written"})
    builder.add_node("back", RollbackNode(1, update={"hints": ["a hint"]}))
    builder.add_edge(START, "write")
    builder.add_edge("write", "back")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    assert graph.invoke({"last": "first", "hints": ["old"]}, T)["hints"] == ["old", "a hint"]
    assert graph.get_state(T).values["last"] == "first"


@pytest.mark.parametrize("durability", SAVING)
def test_after_so_many_it_gives_up(memory: MemoryStore, durability: str) -> None:
    agent = Agent(memory, 99, RollbackNode(2, goto="try_it", max_rollbacks=2, otherwise="give_up"))
    state = agent.run(durability=durability)
    assert agent.tries == 3
    assert state["last"] == "gave up"
    assert state["log"] == ["in", "plan", "try3"]
    assert facts(memory) == {"try3": "try3", "shared": "try3"}
    agent.run(durability=durability)
    assert agent.tries == 6  # a new turn has its own


def test_without_otherwise_it_raises_and_nothing_is_undone(memory: MemoryStore) -> None:
    agent = Agent(memory, 99, RollbackNode(2, goto="try_it", max_rollbacks=1))
    with pytest.raises(RollbackError, match="max_rollbacks"):
        agent.run()
    assert agent.tries == 2
    assert agent.graph.get_state(T).values["log"] == ["in", "plan", "try2"]
    assert facts(memory) == {"try2": "try2", "shared": "try2"}


def test_it_counts_when_it_is_sent_to(memory: MemoryStore) -> None:
    """A `Send` runs a node without a trigger of its own."""
    runs = 0

    def attempt(state: State) -> Command[Any]:
        nonlocal runs
        runs += 1
        return Command(update={"last": f"{runs}"}, goto=[Send("back", {})])

    builder = StateGraph(State)
    builder.add_node("attempt", attempt)
    builder.add_node("back", RollbackNode(1, goto="attempt", max_rollbacks=2, otherwise=END))
    builder.add_edge(START, "attempt")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    assert graph.invoke({"last": "in"}, {**T, "recursion_limit": 20})["last"] == "3"
    assert runs == 3


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"max_rollbacks": 0}, {"keep": "attempts"}])
def test_nonsense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RollbackError):
        RollbackNode(**arguments)


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
def test_exit_saves_nothing_to_go_back_to(memory: MemoryStore, sync: bool) -> None:
    agent = Agent(memory, 2, RollbackNode(2, goto="try_it"))
    with pytest.raises(RollbackError, match='durability="exit"'):
        agent.run(sync, "exit")


def test_another_checkpointer_is_refused(memory: MemoryStore) -> None:
    builder = StateGraph(State)
    builder.add_node("back", RollbackNode())
    builder.add_edge(START, "back")
    with pytest.raises(RollbackError, match=r"memory\.checkpointer"):
        builder.compile(checkpointer=InMemorySaver()).invoke({"last": "in"}, T)
    with pytest.raises(RollbackError, match="memory"):
        builder.compile().invoke({"last": "in"})
    with pytest.raises(RollbackError, match="node"):
        RollbackNode()({})


def test_more_steps_than_there_are(memory: MemoryStore) -> None:
    agent = Agent(memory, 2, RollbackNode(20, goto="try_it"))
    with pytest.raises(RollbackError, match="20"):
        agent.run()
    assert facts(memory) == {"try1": "try1", "shared": "try1"}


# -- saving in the background -----------------------------------------------------------------------


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
def test_it_waits_for_a_checkpoint_that_is_still_being_saved(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    put = type(memory.checkpointer).put

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(0.15)
        return put(self, *args)

    monkeypatch.setattr(type(memory.checkpointer), "put", slow)
    state = Agent(memory, 3, RollbackNode(2, goto="try_it")).run(sync, "async")
    assert state["log"] == ["in", "plan", "try3"]
    assert facts(memory) == {"try3": "try3", "shared": "try3"}


def test_a_checkpoint_that_is_never_saved_is_told(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.graph.rollback_node._PATIENCE", 0.05)
    put, gate = type(memory.checkpointer).put, threading.Event()

    def held(self: Any, config: Any, checkpoint: Any, metadata: Any, versions: Any) -> Any:
        if metadata["step"] == 3:
            threading.Timer(0.5, gate.set).start()
            gate.wait(5)
        return put(self, config, checkpoint, metadata, versions)

    monkeypatch.setattr(type(memory.checkpointer), "put", held)
    agent = Agent(memory, 2, RollbackNode(2, goto="try_it"))
    with pytest.raises(RollbackError, match="was not saved within"):
        agent.run(True, "async")


# -- kinds of state ---------------------------------------------------------------------------------


@dataclass
class DataState:
    log: Annotated[list[str], operator.add] = field(default_factory=list)
    last: str = ""
    score: float | None = None


class ModelState(BaseModel):
    log: Annotated[list[str], operator.add] = []
    last: str = ""
    score: float | None = None


@pytest.mark.parametrize("schema", [DataState, ModelState])
def test_dataclass_and_pydantic_state(memory: MemoryStore, schema: Any) -> None:
    tries: list[Any] = []

    def attempt(state: Any, *, store: BaseStore) -> dict[str, Any]:
        tries.append((list(state.log), state.last, state.score))
        store.put(("note",), f"try{len(tries)}", {"text": "try"})
        return {"log": [f"try{len(tries)}"], "last": f"try{len(tries)}", "score": 0.5}

    builder = StateGraph(schema)
    builder.add_node("attempt", attempt)
    builder.add_node("back", RollbackNode(1, goto="attempt"))
    builder.add_edge(START, "attempt")
    builder.add_conditional_edges("attempt", lambda state: END if len(tries) == 3 else "back", ["back", END])
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    state = graph.invoke(schema(log=["in"], last="in"), T)
    assert tries == [(["in"], "in", None)] * 3
    assert (state["log"], state["last"]) == (["in", "try3"], "try3")
    assert set(facts(memory)) == {"try3"}


def test_channels_of_other_branches_and_private_ones(memory: MemoryStore) -> None:
    class Private(TypedDict, total=False):
        secret: str
        notes: Annotated[list[str], operator.add]

    tries: list[Any] = []

    def first(state: State) -> Private:
        return {"secret": "first", "notes": ["first"]}

    def attempt(state: Private) -> Any:
        tries.append((state.get("secret"), list(state.get("notes", []))))
        return {"secret": f"try{len(tries)}", "notes": [f"try{len(tries)}"], "last": f"try{len(tries)}"}

    builder = StateGraph(State)
    builder.add_node("first", first)
    builder.add_node("attempt", attempt, input_schema=Private)
    builder.add_node("back", RollbackNode(1, goto="attempt"))
    builder.add_edge(START, "first")
    builder.add_edge("first", "attempt")
    builder.add_conditional_edges("attempt", lambda state: END if len(tries) == 3 else "back", ["back", END])
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"last": "in"}, T)
    assert tries == [("first", ["first"])] * 3


def test_a_delta_channel_of_text(memory: MemoryStore) -> None:
    class Grows(TypedDict, total=False):
        word: Annotated[str, DeltaChannel(lambda held, writes: held + "".join(writes), snapshot_frequency=100)]

    builder = StateGraph(Grows)
    builder.add_node("write", lambda state: {"word": "more"})
    builder.add_node("back", RollbackNode(1))
    builder.add_edge(START, "write")
    builder.add_edge("write", "back")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"word": "in"}, T)
    assert graph.get_state(T).values["word"] == "in"


def test_a_channel_that_only_grows_is_told(memory: MemoryStore) -> None:
    class Grows(TypedDict, total=False):
        words: Annotated[list[str], Topic(str, accumulate=True)]
        last: str

    for keep, wanted in (((), None), (("words",), ["in", "more"])):
        builder = StateGraph(Grows)
        builder.add_node("write", lambda state: {"words": ["more"], "last": "written"})
        builder.add_node("back", RollbackNode(1, keep=keep))
        builder.add_edge(START, "write")
        builder.add_edge("write", "back")
        graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
        config: Any = {"configurable": {"thread_id": str(keep)}}
        if wanted is None:
            with pytest.raises(RollbackError, match="only added to"):
                graph.invoke({"words": ["in"], "last": "in"}, config)
        else:
            assert graph.invoke({"words": ["in"], "last": "in"}, config) == {"words": wanted, "last": "in"}


# -- with other things LangGraph does ---------------------------------------------------------------


def siblings(memory: MemoryStore, fails: Callable[[], bool] = lambda: False) -> Any:
    """`write`, then the rollback node beside a node that writes as well."""

    def write(state: State, *, store: BaseStore) -> State:
        store.put(("note",), "written", {"text": "written"})
        store.put(("note",), "changed", {"text": "written"})
        return {"log": ["written"], "last": "written"}

    def beside(state: State, *, store: BaseStore) -> State:
        if fails():
            raise RuntimeError("beside")
        store.put(("note",), "beside", {"text": "beside"})
        return {"tags": {"beside"}}

    builder = StateGraph(State)
    builder.add_node("write", write)
    builder.add_node("back", RollbackNode(1))
    builder.add_node("beside", beside)
    builder.add_edge(START, "write")
    builder.add_edge("write", "back")
    builder.add_edge("write", "beside")
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


@pytest.mark.parametrize("durability", SAVING)
def test_a_sibling_of_the_same_step_keeps_what_it_writes(memory: MemoryStore, durability: Any) -> None:
    memory.store.put(("note",), "changed", {"text": "before"})
    graph = siblings(memory)
    state = graph.invoke({"log": ["in"], "last": "in"}, T, durability=durability)
    assert (state["log"], state["last"], state["tags"]) == (["in"], "in", {"beside"})
    assert facts(memory) == {"changed": "before", "beside": "beside"}


@pytest.mark.parametrize("durability", SAVING)
def test_a_sibling_that_fails_leaves_nothing_undone_until_the_step_lands(database: Path, durability: Any) -> None:
    with MemoryStore.open(database) as memory:
        with pytest.raises(RuntimeError, match="beside"):
            siblings(memory, lambda: True).invoke({"log": ["in"], "last": "in"}, T, durability=durability)
        assert facts(memory) == {"written": "written", "changed": "written"}
        assert memory.checkpointer.get_tuple(T).checkpoint["channel_values"]["last"] == "written"  # type: ignore[union-attr]
    with MemoryStore.open(database) as memory:  # as another process would
        state = siblings(memory).invoke(None, T, durability=durability)
        assert (state["log"], state["last"], state["tags"]) == (["in"], "in", {"beside"})
        assert facts(memory) == {"beside": "beside"}


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("durability", SAVING)
def test_after_an_interrupt_in_a_new_process(database: Path, durability: Any, sync: bool) -> None:
    def build(memory: MemoryStore) -> Any:
        def write(state: State, *, store: BaseStore) -> State:
            n = len(memory.history("note", "tried")) + 1
            store.put(("note",), "tried", {"text": f"{n}"})
            return {"log": [f"try{n}"], "last": f"try{n}"}

        def ask(state: State, *, store: BaseStore) -> Command[Any]:
            verdict = interrupt(state["last"])
            store.put(("note",), "verdict", {"text": verdict})
            return Command(goto=END if verdict == "good" else "back")

        builder = StateGraph(State)
        builder.add_node("write", write)
        builder.add_node("ask", ask)
        builder.add_node("back", RollbackNode(2, goto="write"))
        builder.add_edge(START, "write")
        builder.add_edge("write", "ask")
        return builder.compile(checkpointer=memory.checkpointer, store=memory.store)

    def invoke(value: Any) -> dict[str, Any]:
        with MemoryStore.open(database) as memory:
            graph = build(memory)
            if sync:
                return graph.invoke(value, T, durability=durability)  # type: ignore[no-any-return]
            return asyncio.run(graph.ainvoke(value, T, durability=durability))

    assert invoke({"log": ["in"]})["__interrupt__"][0].value == "try1"
    again = invoke(Command(resume="bad"))["__interrupt__"][0].value
    assert again.startswith("try")
    assert again != "try1"
    assert invoke(Command(resume="good"))["log"] == ["in", again]
    with MemoryStore.open(database) as memory:
        assert facts(memory) == {"tried": again.removeprefix("try"), "verdict": "good"}


def test_a_retried_rollback_lands_once(memory: MemoryStore) -> None:
    class Fragile(RollbackNode):
        runs = 0

        def __call__(self, state: Any) -> Command[Any]:
            found = super().__call__(state)
            Fragile.runs += 1
            if Fragile.runs == 1:
                raise ConnectionError("after all was staged")
            return found

    retry = RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=3)
    agent = Agent(memory, 2, Fragile(2, goto="try_it"), retry_policy=retry)
    state = agent.run()
    assert Fragile.runs == 2
    assert state["log"] == ["in", "plan", "try2"]
    assert facts(memory) == {"try2": "try2", "shared": "try2"}
    assert [entry.op for entry in memory.history("note", "try1")] == ["put", "delete"]


def test_a_rollback_node_that_fails_undoes_nothing(memory: MemoryStore) -> None:
    class Broken(RollbackNode):
        def __call__(self, state: Any) -> Command[Any]:
            super().__call__(state)
            raise RuntimeError("broken")

    agent = Agent(memory, 2, Broken(2, goto="try_it"))
    with pytest.raises(RuntimeError, match="broken"):
        agent.run()
    assert facts(memory) == {"try1": "try1", "shared": "try1"}
    assert agent.graph.get_state(T).values["log"] == ["in", "plan", "try1"]
    assert all(entry.undoes is None for entry in memory.log())


def test_reads_after_it_in_the_same_step_see_the_undone_memory(memory: MemoryStore) -> None:
    class Looks(RollbackNode):
        seen: Any = None

        def __call__(self, state: Any) -> Command[Any]:
            found = super().__call__(state)
            Looks.seen = facts(memory)
            return found

    Agent(memory, 2, Looks(2, goto="try_it")).run()
    assert Looks.seen == {"plan": "plan", "shared": "planned"}


def test_the_undo_of_a_turn_takes_its_rollbacks_along(memory: MemoryStore) -> None:
    agent = Agent(memory, 3, RollbackNode(2, goto="try_it"))
    agent.run()
    report = memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {}
    memory.rollback(to=report.undone, thread_id="t")
    assert facts(memory) == {"try3": "try3", "shared": "try3"}


# -- conflicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_conflict", ["raise", "keep", "overwrite"])
def test_what_another_thread_changed_meanwhile(memory: MemoryStore, on_conflict: Any) -> None:
    def attempt(state: State, *, store: BaseStore) -> State:
        store.put(("note",), "shared", {"text": "ours"})
        store.put(("note",), "own", {"text": "ours"})
        return {"last": "ours"}

    def elsewhere(state: State) -> State:
        thread = threading.Thread(target=memory.store.put, args=(("note",), "shared", {"text": "theirs"}))
        thread.start()
        thread.join()
        return {}

    builder = StateGraph(State)
    builder.add_node("attempt", attempt)
    builder.add_node("elsewhere", elsewhere)
    builder.add_node("back", RollbackNode(2, on_conflict=on_conflict))
    builder.add_edge(START, "attempt")
    builder.add_edge("attempt", "elsewhere")
    builder.add_edge("elsewhere", "back")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    if on_conflict == "raise":
        with pytest.raises(RollbackConflict):
            graph.invoke({"last": "in"}, T, durability="sync")
        assert facts(memory) == {"shared": "theirs", "own": "ours"}
        assert graph.get_state(T).values["last"] == "ours"
    else:
        assert graph.invoke({"last": "in"}, T, durability="sync")["last"] == "in"
        assert facts(memory) == ({"shared": "theirs"} if on_conflict == "keep" else {})


@pytest.mark.parametrize("durability", SAVING)
@pytest.mark.parametrize("on_conflict", ["raise", "keep", "overwrite"])
def test_what_another_thread_changes_before_the_step_of_the_node_has_ended(
    memory: MemoryStore, on_conflict: Any, durability: Any
) -> None:
    """The node has finished; the one beside it waits for an answer meanwhile."""

    def attempt(state: State, *, store: BaseStore) -> State:
        for name in ("shared", "deleted", "own"):
            store.put(("note",), name, {"text": "ours"})
        return {"last": "ours"}

    builder = StateGraph(State)
    builder.add_node("attempt", attempt)
    builder.add_node("ask", lambda state: {"late": interrupt("?")})
    builder.add_node("back", RollbackNode(1, on_conflict=on_conflict))
    builder.add_edge(START, "attempt").add_edge("attempt", "ask").add_edge("attempt", "back")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    memory.store.put(("note",), "shared", {"text": "before"})
    graph.invoke({"last": "in"}, T, durability=durability)
    memory.store.put(("note",), "shared", {"text": "theirs"})
    memory.store.delete(("note",), "deleted")
    if on_conflict == "raise":
        for _ in range(2):
            with pytest.raises(RollbackConflict, match="note/"):
                graph.invoke(Command(resume="yes"), T, durability=durability)
            assert facts(memory) == {"shared": "theirs", "own": "ours"}
            assert memory.checkpointer.get_tuple(T).checkpoint["channel_values"]["last"] == "ours"
        assert graph.invoke({"last": "new"}, T, durability=durability)["last"] == "new"  # as far as the question
        assert facts(memory) == {"shared": "ours", "deleted": "ours", "own": "ours"}
    else:
        state = graph.invoke(Command(resume="yes"), T, durability=durability)
        assert (state["last"], state["late"]) == ("in", "yes")
        assert facts(memory) == {"shared": "theirs" if on_conflict == "keep" else "before"}


# -- subgraphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("durability", SAVING)
@pytest.mark.parametrize("checkpointer", [None, True], ids=["plain", "keeps"])
def test_in_a_subgraph_its_own_steps_are_undone(
    memory: MemoryStore, checkpointer: bool | None, durability: Any, sync: bool
) -> None:
    runs: list[str] = []

    def attempt(state: State, *, store: BaseStore) -> State:
        runs.append(f"try{len(runs) + 1}")
        store.put(("note",), runs[-1], {"text": "try"})
        return {"log": [runs[-1]], "last": runs[-1]}

    inner = StateGraph(State)
    inner.add_node("attempt", attempt)
    inner.add_node("back", RollbackNode(1, goto="attempt"))
    inner.add_edge(START, "attempt")
    inner.add_conditional_edges("attempt", lambda state: END if len(runs) % 3 == 0 else "back", ["back", END])

    def before(state: State, *, store: BaseStore) -> State:
        store.put(("note",), "before", {"text": "before"})
        return {"total": 1}

    outer = StateGraph(State)
    outer.add_node("before", before)
    outer.add_node("sub", inner.compile(checkpointer=checkpointer))
    outer.add_edge(START, "before")
    outer.add_edge("before", "sub")
    graph = outer.compile(checkpointer=memory.checkpointer, store=memory.store)
    kept: list[str] = []
    for turn in (1, 2):
        value: Any = {"log": [f"in{turn}"]}
        if sync:
            state = graph.invoke(value, T, durability=durability)
        else:
            state = asyncio.run(graph.ainvoke(value, T, durability=durability))
        kept.append(f"try{3 * turn}")
        assert state["last"] == kept[-1]
        assert not {"try1", "try2", "try4", "try5"} & set(state["log"])
        assert set(facts(memory)) == {"before", *kept}
    memory.rollback(turns=1, thread_id="t")
    assert set(facts(memory)) == {"before", "try3"}


def test_a_subgraph_without_checkpoints_is_told(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.graph.rollback_node._PATIENCE", 30.0)
    inner = StateGraph(State)
    inner.add_node("attempt", lambda state: {"last": "try"})
    inner.add_node("back", RollbackNode(1))
    inner.add_edge(START, "attempt")
    inner.add_edge("attempt", "back")
    outer = StateGraph(State)
    outer.add_node("sub", inner.compile(checkpointer=False))
    outer.add_edge(START, "sub")
    graph = outer.compile(checkpointer=memory.checkpointer, store=memory.store)
    started = time.monotonic()
    with pytest.raises(RollbackError):
        graph.invoke({"last": "in"}, T, durability="async")
    assert time.monotonic() - started < 15  # it does not wait for what will never come


# -- vectors ----------------------------------------------------------------------------------------


def test_vectors_follow_with_nothing_embedded_again(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        Agent(memory, 3, RollbackNode(2, goto="try_it")).run()
        assert sorted(model.texts) == ["plan", "planned", "try1", "try2", "try3"]
        check_search(memory, {"try3": "try3", "shared": "try3"})
        memory.flush()
        check_settled(memory, database)

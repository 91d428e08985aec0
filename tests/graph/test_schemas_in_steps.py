"""Schemas, constraints, updates and sessions inside graph steps: a node fails at its write, a step lands what holds."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import InjectedStore, ToolNode
from langgraph.store.base import BaseStore
from langgraph.types import Command, interrupt
from pydantic import BaseModel, ConfigDict

from langgraph_memstate import Constraint, Fact, MemoryStore, MemStateCheckpointer
from langgraph_memstate.errors import ConstraintError, NotFoundError, SchemaError

THREAD: Any = {"configurable": {"thread_id": "t"}}
USER = ("user",)
durabilities = pytest.mark.parametrize("durability", ["sync", "async", "exit"])


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


class User(BaseModel):
    model_config = ConfigDict(extra="allow")
    email: str = ""


@pytest.fixture
def memory(database: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(database) as opened:
        opened.register_schema("user", User, Constraint(unique="email"))
        opened.register_schema("law", User, Constraint(immutable=True))
        opened.register_schema("one", User, Constraint(singleton_key="email"))
        yield opened


Node = Callable[[BaseStore], Any]


def node(name: str, run: Node) -> Any:
    def call(state: State, *, store: BaseStore) -> State:
        run(store)
        return {"log": [name]}

    return call


def side_by_side(memory: MemoryStore, **nodes: Node) -> Any:
    """A graph whose nodes all run in one step."""
    builder = StateGraph(State)
    for name, run in nodes.items():
        builder.add_node(name, node(name, run))
        builder.add_edge(START, name)
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


def one_by_one(memory: MemoryStore, **nodes: Node) -> Any:
    builder = StateGraph(State)
    for before, (name, run) in zip([START, *nodes], nodes.items(), strict=False):
        builder.add_node(name, node(name, run))
        builder.add_edge(before, name)
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


def outside(call: Callable[[], Any]) -> None:
    """Run a call as another program would: in a thread that knows nothing of the running step."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def users(memory: MemoryStore, type: str = "user") -> dict[str, Any]:
    return {fact.id: dict(fact.payload) for fact in memory.query(type, limit=100)}


def same_as_state(graph: Any, memory: MemoryStore) -> list[str]:
    """What the state says has happened, which must be all of it."""
    state = graph.get_state(THREAD)
    assert not state.next
    assert memory.stats()["staged"] == 0
    return sorted(state.values["log"])


# -- the node fails at its write ------------------------------------------------------------------

REFUSED: dict[str, tuple[type[Exception], Callable[[MemoryStore, BaseStore], Any]]] = {
    "schema, put": (SchemaError, lambda memory, store: store.put(USER, "k", {"email": 5})),
    "schema, commit": (SchemaError, lambda memory, store: memory.commit(Fact("user", {"email": 5}))),
    "schema, update": (SchemaError, lambda memory, store: memory.update("user", "taken", {"email": 5})),
    "unique, put": (ConstraintError, lambda memory, store: store.put(USER, "k", {"email": "taken@x"})),
    "unique, commit": (ConstraintError, lambda memory, store: memory.commit(Fact("user", {"email": "taken@x"}))),
    "unique, model": (ConstraintError, lambda memory, store: memory.commit_model(User(email="taken@x"), type="user")),
    "unique, update": (ConstraintError, lambda memory, store: memory.update("user", "other", {"email": "taken@x"})),
    "unique, session": (
        ConstraintError,
        lambda memory, store: memory.commit(Fact("user", {"email": "taken@x"}), session_id="s"),
    ),
    "immutable, put": (ConstraintError, lambda memory, store: store.put(("law",), "1", {"email": "b"})),
    "immutable, update": (ConstraintError, lambda memory, store: memory.update("law", "1", {"email": "b"})),
    "immutable, delete": (ConstraintError, lambda memory, store: store.delete(("law",), "1")),
    "not there": (NotFoundError, lambda memory, store: memory.update("user", "nobody", {})),
}


@durabilities
@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_a_refused_write_fails_its_node(memory: MemoryStore, refused: Any, durability: str) -> None:
    error, write = refused
    memory.commit(
        [Fact("user", {"email": f"{name}@x"}, id=name) for name in ("taken", "other")] + [Fact("law", {}, id="1")]
    )
    before = memory.stats()["facts"]
    fails = [True]

    def run(store: BaseStore) -> None:
        store.put(("note",), "n", {})
        if fails:
            write(memory, store)

    graph = one_by_one(memory, run=run)
    with pytest.raises(error):
        graph.invoke({"log": []}, THREAD, durability=durability)
    assert memory.stats()["facts"] == before
    fails.clear()
    graph.invoke(None, THREAD, durability=durability)
    assert same_as_state(graph, memory) == ["run"]
    assert memory.stats()["facts"] == before + 1


def test_a_node_may_handle_what_was_refused(memory: MemoryStore) -> None:
    memory.commit(Fact("user", {"email": "taken@x"}, id="first"))

    def run(store: BaseStore) -> None:
        try:
            store.put(USER, "k", {"email": "taken@x"})
        except ConstraintError:
            store.put(USER, "k", {"email": "free@x"})

    one_by_one(memory, run=run).invoke({"log": []}, THREAD)
    assert users(memory)["k"] == {"email": "free@x"}


async def test_a_refused_write_of_an_async_node(memory: MemoryStore) -> None:
    memory.commit(Fact("user", {"email": "taken@x"}, id="first"))

    async def run(state: State, *, store: BaseStore) -> State:
        with pytest.raises(ConstraintError):
            await store.aput(USER, "k", {"email": "taken@x"})
        with pytest.raises(ConstraintError):
            async with memory.transaction():
                await memory.acommit(Fact("user", {"email": "taken@x"}))
        await memory.aupdate("user", "first", {"seen": True})
        return {"log": ["run"]}

    builder = StateGraph(State)
    builder.add_node("run", run)
    builder.add_edge(START, "run")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    await graph.ainvoke({"log": []}, THREAD)
    assert users(memory) == {"first": {"email": "taken@x", "seen": True}}


def test_a_refused_write_of_a_tool_is_told_to_the_model(memory: MemoryStore) -> None:
    memory.commit(Fact("user", {"email": "taken@x"}, id="first"))

    @tool
    def remember(email: str, store: Annotated[Any, InjectedStore()]) -> str:
        """Remember a user."""
        store.put(USER, email, {"email": email})
        return "done"

    class Messages(TypedDict):
        messages: Annotated[list[Any], operator.add]

    builder = StateGraph(Messages)
    builder.add_node("tools", ToolNode([remember], handle_tool_errors=True))
    builder.add_edge(START, "tools")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    calls = [{"name": "remember", "args": {"email": email}, "id": email} for email in ("taken@x", "free@x")]
    result = graph.invoke({"messages": [AIMessage("", tool_calls=calls)]}, THREAD)
    answers = {message.tool_call_id: message.content for message in result["messages"][1:]}
    assert "must be unique" in answers["taken@x"]
    assert answers["free@x"] == "done"
    assert set(users(memory)) == {"first", "free@x"}


# -- the step fails at its end --------------------------------------------------------------------


@durabilities
def test_a_step_that_lost_a_race_is_as_if_it_had_not_ended(memory: MemoryStore, durability: str) -> None:
    runs: list[str] = []

    def run(store: BaseStore) -> None:
        runs.append("run")
        store.put(USER, "mine", {"email": "a@x"})
        store.put(("note",), "n", {})
        outside(lambda: memory.commit(Fact("user", {"email": "a@x"}, id="theirs")))

    graph = one_by_one(memory, run=run)
    with pytest.raises(ConstraintError, match=r"user/mine: email='a@x' must be unique and is that of user/theirs"):
        graph.invoke({"log": []}, THREAD, durability=durability)
    assert set(users(memory)) == {"theirs"}
    assert memory.query("note") == []
    if durability == "exit":
        return  # LangGraph saves nothing of such a run before its end
    saved = memory.checkpointer.get_tuple(THREAD)
    assert saved is not None
    assert saved.checkpoint["channel_values"].get("log", []) == []
    with pytest.raises(ConstraintError):
        graph.invoke(None, THREAD, durability=durability)
    memory.delete("user", "theirs")
    graph.invoke(None, THREAD, durability=durability)
    assert runs == ["run"]
    assert set(users(memory)) == {"mine"}
    assert same_as_state(graph, memory) == ["run"]


@durabilities
def test_a_lost_race_does_not_block_the_thread(memory: MemoryStore, durability: str) -> None:
    graph = side_by_side(
        memory,
        a=lambda store: store.put(USER, "a", {"email": "same@x"}),
        b=lambda store: store.put(USER, "b", {"email": "same@x"}) if not users(memory) else None,
    )
    with pytest.raises(ConstraintError):
        graph.invoke({"log": []}, THREAD, durability=durability)
    assert users(memory) == {}
    memory.commit(Fact("user", {"email": "other@x"}, id="other"))
    graph.invoke({"log": ["new input"]}, THREAD, durability=durability)  # drops what could not land
    assert set(users(memory)) == {"a", "other"}
    assert same_as_state(graph, memory)[-3:] == ["a", "b", "new input"]


def test_an_immutable_fact_that_was_written_meanwhile(memory: MemoryStore) -> None:
    def run(store: BaseStore) -> None:
        store.put(("law",), "1", {"email": "mine"})
        outside(lambda: memory.commit(Fact("law", {"email": "theirs"}, id="1")))

    with pytest.raises(ConstraintError, match="law/1 is immutable"):
        one_by_one(memory, run=run).invoke({"log": []}, THREAD)
    assert users(memory, "law") == {"1": {"email": "theirs"}}


def test_a_step_that_starts_from_the_past_may_undo_what_is_immutable(memory: MemoryStore) -> None:
    turns = iter("123")

    def run(store: BaseStore) -> None:
        store.put(("law",), next(turns), {})

    graph = one_by_one(memory, run=run)
    graph.invoke({"log": []}, THREAD)
    first = graph.get_state(THREAD).config
    graph.invoke({"log": ["second"]}, THREAD)
    memory.rollback(turns=1, thread_id="t")
    assert set(users(memory, "law")) == {"1"}
    graph.invoke({"log": ["third"]}, first)
    assert {"1", "3"} == set(users(memory, "law"))


# -- updates --------------------------------------------------------------------------------------


@durabilities
def test_updates_of_parallel_nodes_all_count(memory: MemoryStore, durability: str) -> None:
    memory.commit(Fact("user", {"email": "a@x", "old": 1}, id="u"))

    def update(name: str) -> Node:
        def run(store: BaseStore) -> None:
            memory.update("user", "u", {name: 1, "old": None})
            memory.update("user", "u", {name: 2}, reason=name)
            found = memory.get("user", "u")
            assert found is not None
            assert found.payload == {"email": "a@x", name: 2}  # its own, and nobody else's

        return run

    graph = side_by_side(memory, **{name: update(name) for name in "abc"})
    graph.invoke({"log": []}, THREAD, durability=durability)
    assert users(memory) == {"u": {"email": "a@x", "a": 2, "b": 2, "c": 2}}
    assert len(memory.history("user", "u")) == 7
    assert same_as_state(graph, memory) == ["a", "b", "c"]


def test_an_update_counts_on_top_of_what_was_written_meanwhile(memory: MemoryStore) -> None:
    memory.commit(Fact("user", {"email": "a@x"}, id="u"))

    def run(store: BaseStore) -> None:
        memory.update("user", "u", {"mine": 1}, actor="node")
        outside(lambda: memory.update("user", "u", {"theirs": 1}))
        outside(lambda: store.put(USER, "u", {"email": "b@x", "theirs": 2}))

    one_by_one(memory, run=run).invoke({"log": []}, THREAD)
    assert users(memory) == {"u": {"email": "b@x", "theirs": 2, "mine": 1}}
    assert memory.history("user", "u")[-1].actor == "node"
    assert memory.history("user", "u")[-1].node == "run"


@durabilities
def test_an_update_of_what_was_deleted_meanwhile(memory: MemoryStore, durability: str) -> None:
    memory.commit(Fact("user", {"email": "a@x"}, id="u"))

    def run(store: BaseStore) -> None:
        memory.update("user", "u", {"mine": 1})
        outside(lambda: memory.delete("user", "u"))

    graph = one_by_one(memory, run=run)
    graph.invoke({"log": []}, THREAD, durability=durability)
    assert users(memory) == {}
    assert same_as_state(graph, memory) == ["run"]
    assert [entry.op for entry in memory.history("user", "u")] == ["put", "delete", "delete"]


def test_an_update_waits_for_a_resume_in_another_memory(database: Path) -> None:
    def update(memory: MemoryStore) -> Node:
        return lambda store: memory.update("user", "u", {"mine": 1})

    def ask(store: BaseStore) -> None:
        interrupt("?")

    with MemoryStore.open(database) as memory:
        memory.commit(Fact("user", {"email": "a@x"}, id="u"))
        side_by_side(memory, update=update(memory), ask=ask).invoke({"log": []}, THREAD)
        assert memory.stats()["staged"] == 1
    with MemoryStore.open(database) as memory:
        memory.update("user", "u", {"theirs": 1})
        graph = side_by_side(memory, update=update(memory), ask=ask)
        graph.invoke(Command(resume="!"), THREAD)
        assert users(memory) == {"u": {"email": "a@x", "theirs": 1, "mine": 1}}
        assert same_as_state(graph, memory) == ["ask", "update"]


def test_a_retried_node_updates_once(memory: MemoryStore) -> None:
    memory.commit(Fact("user", {"email": "a@x"}, id="u"))
    fails = [True]

    def run(store: BaseStore) -> None:
        memory.update("user", "u", {"tries": 1 if fails else 2})
        if fails:
            fails.clear()
            raise RuntimeError

    graph = one_by_one(memory, run=run)
    with pytest.raises(RuntimeError):
        graph.invoke({"log": []}, THREAD)
    graph.invoke(None, THREAD)
    assert users(memory) == {"u": {"email": "a@x", "tries": 2}}
    assert len(memory.history("user", "u")) == 2


# -- singletons -----------------------------------------------------------------------------------


@durabilities
def test_singletons_of_steps(memory: MemoryStore, durability: str) -> None:
    memory.commit(Fact("one", {"email": "a@x"}, id="first"))

    def adopts(store: BaseStore) -> None:
        fact = memory.commit(Fact("one", {"email": "a@x", "n": 1}))
        assert fact.id == "first"

    def replaces(store: BaseStore) -> None:
        store.put(("one",), "second", {"email": "a@x", "n": 2})
        assert users(memory, "one") == {"second": {"email": "a@x", "n": 2}}

    graph = one_by_one(memory, adopts=adopts, replaces=replaces)
    graph.invoke({"log": []}, THREAD, durability=durability)
    assert users(memory, "one") == {"second": {"email": "a@x", "n": 2}}
    assert same_as_state(graph, memory) == ["adopts", "replaces"]
    assert [entry.op for entry in memory.history("one", "first")] == ["put", "put", "delete"]


@durabilities
def test_the_last_of_parallel_singletons_stays(memory: MemoryStore, durability: str) -> None:
    def write(name: str) -> Node:
        return lambda store: store.put(("one",), name, {"email": "a@x"})

    graph = side_by_side(memory, **{name: write(name) for name in "abc"})
    graph.invoke({"log": []}, THREAD, durability=durability)
    assert users(memory, "one") == {"c": {"email": "a@x"}}


def test_a_replaced_fact_that_is_another_by_now_stays(memory: MemoryStore) -> None:
    memory.commit(Fact("one", {"email": "a@x"}, id="first"))

    def run(store: BaseStore) -> None:
        store.put(("one",), "second", {"email": "a@x"})
        outside(lambda: memory.update("one", "first", {"email": "b@x"}))
        outside(lambda: memory.commit(Fact("one", {"email": "a@x"}, id="third")))

    one_by_one(memory, run=run).invoke({"log": []}, THREAD)
    assert users(memory, "one") == {"first": {"email": "b@x"}, "second": {"email": "a@x"}}


# -- sessions -------------------------------------------------------------------------------------


@durabilities
def test_a_session_inside_a_graph(memory: MemoryStore, durability: str) -> None:
    fails = [True]

    def talk(store: BaseStore) -> None:
        memory.commit([Fact("note", {"n": n}, id=str(n)) for n in range(3)], session_id="s", actor="talker")
        memory.delete("note", "2", session_id="s")

    def end(store: BaseStore) -> None:
        promoted = memory.promote_session("s", selector=lambda fact: fact.payload["n"] == 0, reason="worth it")
        assert [(fact.id, fact.session_id) for fact in promoted] == [("0", None)]
        assert memory.discard_session("s") == 1
        assert [fact.id for fact in memory.query("note")] == ["0"]
        assert memory.query(session_id="s") == []
        if fails:
            fails.clear()
            raise RuntimeError

    graph = one_by_one(memory, talk=talk, end=end)
    with pytest.raises(RuntimeError):
        graph.invoke({"log": []}, THREAD, durability=durability)
    assert memory.query("note") == []
    assert {fact.id for fact in memory.query("note", session_id="s")} == {"0", "1"}
    graph.invoke(None, THREAD, durability=durability)
    assert users(memory, "note") == {"0": {"n": 0}}
    assert memory.query(session_id="s") == []
    (entry,) = memory.history("note", "0")
    assert (entry.actor, entry.reason, entry.node) == ("talker", "worth it", "end")


@pytest.mark.parametrize("promoted_before", ["the second turn", "the rollback"])
@pytest.mark.parametrize("time_travel", ["rewind", "rollback"])
def test_a_promotion_is_no_part_of_a_turn(memory: MemoryStore, promoted_before: str, time_travel: str) -> None:
    def hear(store: BaseStore) -> None:
        if not memory.log():
            memory.commit(Fact("note", {"n": 1}, id="1"), session_id="s", actor="agent")

    builder = StateGraph(State).add_node("hear", node("hear", hear)).add_edge(START, "hear")
    saver = MemStateCheckpointer(memory, time_travel="rewind")
    graph = builder.compile(checkpointer=saver, store=memory.store)
    graph.invoke({"log": []}, THREAD)
    first = graph.get_state(THREAD).config
    if promoted_before == "the second turn":
        memory.promote_session("s")
    graph.invoke({"log": []}, THREAD)
    if promoted_before == "the rollback":
        memory.promote_session("s")
    if time_travel == "rewind":
        graph.invoke({"log": []}, first)
    else:
        memory.rollback(turns=1, thread_id="t")
    assert users(memory, "note") == {"1": {"n": 1}}
    memory.rollback(1)
    assert users(memory, "note") == {}
    assert [fact.payload for fact in memory.query("note", session_id="s")] == [{"n": 1}]
    (heard, *_), (promoted, *_) = memory.history("note", "1", session_id="s"), memory.history("note", "1")
    assert (heard.thread_id, heard.node, heard.actor) == ("t", "hear", "agent")
    assert (promoted.thread_id, promoted.node, promoted.actor) == (None, None, "agent")


@pytest.mark.parametrize("late", ["put", "put_writes"])
def test_nothing_stays_staged_whichever_save_comes_first(memory: MemoryStore, late: str) -> None:
    class Delayed(MemStateCheckpointer):
        def put(self, *args: Any) -> Any:
            time.sleep(0.05 if late == "put" else 0)
            return super().put(*args)

        def put_writes(self, *args: Any) -> None:
            time.sleep(0.05 if late == "put_writes" else 0)
            super().put_writes(*args)

    memory.commit([Fact("user", {"email": "a@x"}, id="u"), Fact("one", {"email": "a@x"}, id="first")])

    def run(store: BaseStore) -> None:
        memory.update("user", "u", {"mine": 1})
        outside(lambda: memory.delete("user", "u"))
        store.put(("one",), "second", {"email": "a@x"})
        memory.promote_session("s")

    builder = StateGraph(State)
    builder.add_node("run", node("run", run))
    builder.add_edge(START, "run")
    graph = builder.compile(checkpointer=Delayed(memory), store=memory.store)
    graph.invoke({"log": []}, THREAD, durability="async")
    assert same_as_state(graph, memory) == ["run"]
    assert set(users(memory, "one")) == {"second"}

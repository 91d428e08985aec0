"""Rollback of a thread: its state and what it remembered go back together, in one commit."""

from __future__ import annotations

import asyncio
import operator
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.store.base import BaseStore
from langgraph.types import Command, interrupt

sys.path.insert(0, str(Path(__file__).parents[1]))
from truth import Words, check_search, check_settled, open_memory, rows

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import RollbackConflict, RollbackError, UnknownMomentError

DURABILITIES = ("sync", "async", "exit")


def on(thread_id: str) -> Any:
    return {"configurable": {"thread_id": thread_id}}


T = on("t")


def extend(held: list[str], writes: Sequence[list[str]]) -> list[str]:
    return [*held, *(text for write in writes for text in write)]


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    delta: Annotated[list[str], DeltaChannel(extend, snapshot_frequency=3)]
    last: str


def agent(memory: MemoryStore, name: str = "note") -> Any:
    """Two steps a turn. Each writes a fact of its own, one of its turn and one that every step changes."""

    def node(which: str) -> Any:
        def run(state: State, *, store: BaseStore) -> State:
            text = f"{which}{len(state['log'])}"
            store.put((name,), text, {"text": text})
            store.put((name,), "every", {"text": text})
            if which == "say":
                store.delete((name,), f"hear{len(state['log']) - 1}")
            return {"log": [text], "delta": [text], "last": text}

        return run

    builder = StateGraph(State)
    builder.add_node("hear", node("hear"))
    builder.add_node("say", node("say"))
    builder.add_edge(START, "hear")
    builder.add_edge("hear", "say")
    builder.add_edge("say", END)
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


def facts(memory: MemoryStore, name: str = "note") -> dict[str, str]:
    return {fact.id: fact.payload["text"] for fact in memory.query(name, limit=10_000)}


def seen(memory: MemoryStore, graph: Any, thread: Any = T) -> tuple[Any, Any, dict[str, str]]:
    snapshot = graph.get_state(thread)
    return snapshot.values, snapshot.next, facts(memory)


def turns(graph: Any, count: int, thread: Any = T, **options: Any) -> None:
    for n in range(count):
        graph.invoke({"log": [f"in{n}"], "delta": [f"in{n}"]}, thread, **options)


def recorded(memory: MemoryStore, graph: Any, count: int) -> dict[str, Any]:
    """By checkpoint id, what a run of `count` turns showed at each of its checkpoints, the oldest first."""
    found: dict[str, Any] = {}
    for n in range(count):
        for _ in graph.stream({"log": [f"in{n}"], "delta": [f"in{n}"]}, T, stream_mode="values", durability="sync"):
            snapshot = graph.get_state(T)
            found[snapshot.config["configurable"]["checkpoint_id"]] = (snapshot.values, facts(memory))
        snapshot = graph.get_state(T)
        found[snapshot.config["configurable"]["checkpoint_id"]] = (snapshot.values, facts(memory))
    return found


# -- steps and turns --------------------------------------------------------------------------------


def test_every_checkpoint_can_be_gone_back_to(memory: MemoryStore) -> None:
    graph = agent(memory)
    moments = recorded(memory, graph, 4)
    for checkpoint_id, (values, held) in [*moments.items(), *reversed(moments.items())]:
        if graph.get_state(T).config["configurable"]["checkpoint_id"] != checkpoint_id:
            memory.rollback(to=checkpoint_id, thread_id="t")
        assert graph.get_state(T).values == values
        assert facts(memory) == held


def test_step_by_step_to_the_very_beginning(memory: MemoryStore) -> None:
    graph = agent(memory)
    moments = recorded(memory, graph, 3)
    history = list(memory.checkpointer.list(T))
    for earlier in history[1:]:
        memory.rollback(1, thread_id="t")
        if earlier.checkpoint["id"] in moments:
            values, held = moments[earlier.checkpoint["id"]]
            assert graph.get_state(T).values == values
            assert facts(memory) == held
    report = memory.rollback(1, thread_id="t")
    assert graph.get_state(T).values in ({}, {"log": [], "delta": []})
    assert graph.get_state(T).next == ()
    assert facts(memory) == {}
    assert report.steps == 1
    for steps in (1, 2, 100):
        with pytest.raises(RollbackError, match="0 steps"):
            memory.rollback(steps, thread_id="t")
    with pytest.raises(RollbackError, match="0 turns"):
        memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {}
    again = memory.rollback(to=report.undone, thread_id="t")
    memory.rollback(to=report.head, thread_id="t")  # a twin of the empty one
    with pytest.raises(RollbackError, match="0 steps"):
        memory.rollback(1, thread_id="t")
    assert again.steps >= 1
    turns(graph, 1)
    fresh = graph.get_state(T).values
    assert fresh["log"] == ["in0", "hear1", "say2"]
    memory.rollback(to=report.undone, thread_id="t")
    assert facts(memory) == {}


@pytest.mark.parametrize("steps", range(1, 13))
def test_steps_are_checkpoints(file_memory: MemoryStore, steps: int) -> None:
    graph = agent(file_memory)
    turns(graph, 4)
    history = list(graph.get_state_history(T))
    assert len(history) == 16
    target = history[steps]
    report = file_memory.rollback(steps, thread_id="t")
    head = graph.get_state(T)
    assert (head.values, head.next) == (target.values, target.next)
    assert report.steps == steps
    assert report.head == head.config["configurable"]["checkpoint_id"]
    assert report.undone == history[0].config["configurable"]["checkpoint_id"]
    assert facts(file_memory) == {
        item.key: item.value["text"] for item in file_memory.as_of(target.config).search(("note",), limit=100)
    }


def test_a_new_head_is_a_twin_that_says_where_it_came_from(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 2)
    before = list(memory.checkpointer.list(T))
    memory.rollback(3, thread_id="t")
    after = list(memory.checkpointer.list(T))
    assert [one.checkpoint["id"] for one in after[1:]] == [one.checkpoint["id"] for one in before]
    twin, target = after[0], before[3]
    assert twin.parent_config == target.parent_config
    assert twin.metadata["source"] == "fork"
    assert twin.metadata["step"] == target.metadata["step"]
    assert twin.metadata["rollback"] == {  # type: ignore[typeddict-item]
        "from": before[0].checkpoint["id"], "to": target.checkpoint["id"], "source": target.metadata["source"],
    }  # fmt: skip
    same = ("channel_values", "channel_versions", "versions_seen")
    assert [twin.checkpoint[name] for name in same] == [target.checkpoint[name] for name in same]  # type: ignore[literal-required]


@pytest.mark.parametrize("durability", DURABILITIES)
def test_turns_are_invocations(memory: MemoryStore, durability: str) -> None:
    graph = agent(memory)
    states = [(None, {})]
    for n in range(4):
        graph.invoke({"log": [f"in{n}"], "delta": [f"in{n}"]}, T, durability=durability)
        states.append((graph.get_state(T).values, facts(memory)))
    for back in (1, 2):
        memory.rollback(turns=back, thread_id="t")
        states = states[:-back]
        assert (graph.get_state(T).values, facts(memory)) == states[-1]
    with pytest.raises(RollbackError, match="1 turns"):
        memory.rollback(turns=2, thread_id="t")
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {}
    assert graph.get_state(T).values in ({}, {"log": [], "delta": []})


@pytest.mark.parametrize("durability", DURABILITIES)
def test_the_thread_goes_on_from_where_it_was_put(memory: MemoryStore, durability: str) -> None:
    graph, twin = agent(memory), agent(memory, "twin")
    turns(graph, 3, durability=durability)
    memory.rollback(turns=1, thread_id="t")
    graph.invoke({"log": ["other"], "delta": ["other"]}, T, durability=durability)
    for n in ("in0", "in1", "other"):
        twin.invoke({"log": [n], "delta": [n]}, on("u"), durability=durability)
    assert graph.get_state(T).values == twin.get_state(on("u")).values
    assert facts(memory) == facts(memory, "twin")


def test_a_turn_that_was_cut_is_resumed(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 2)
    done = seen(memory, graph)
    memory.rollback(1, thread_id="t")
    assert graph.get_state(T).next == ("say",)
    graph.invoke(None, T)
    assert seen(memory, graph) == done


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_turn_goes_on_when_it_is_resumed_unless_it_saves_at_exit(memory: MemoryStore, durability: Any) -> None:
    builder = StateGraph(State)
    builder.add_node("ask", lambda state: {"last": interrupt("well?")})
    for name in ("hear", "say"):
        builder.add_node(name, lambda state, name=name: {"log": [name]})
    builder.add_edge(START, "ask").add_edge("ask", "hear").add_edge("hear", "say")
    graph = builder.compile(checkpointer=memory.checkpointer)
    for n in range(2):
        graph.invoke({"log": [f"in {n}"]}, T, durability=durability)
        graph.invoke(Command(resume=f"yes {n}"), T, durability=durability)
    memory.rollback(turns=1, thread_id="t")
    state = graph.get_state(T)
    if durability == "exit":
        assert (state.values["log"][-1], state.next) == ("in 1", ("ask",))
    else:
        assert (state.values["log"], state.next) == (["in 0", "hear", "say"], ())


def test_a_rollback_is_taken_back(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 3)
    whole = seen(memory, graph)
    first = memory.rollback(2, thread_id="t")
    middle = seen(memory, graph)
    second = memory.rollback(turns=1, thread_id="t")
    memory.rollback(to=second.undone, thread_id="t")
    assert seen(memory, graph) == middle
    memory.rollback(to=first.undone, thread_id="t")
    assert seen(memory, graph) == whole
    memory.rollback(to=first.head, thread_id="t")
    assert seen(memory, graph) == middle


@pytest.mark.parametrize("named", ["id", "config", "snapshot", "tuple", "config without namespace"])
def test_a_target_has_many_names(memory: MemoryStore, named: str) -> None:
    graph = agent(memory)
    turns(graph, 2)
    target = list(graph.get_state_history(T))[4]
    id = target.config["configurable"]["checkpoint_id"]
    names: dict[str, Any] = {
        "id": id,
        "config": target.config,
        "snapshot": target,
        "tuple": memory.checkpointer.get_tuple(target.config),
        "config without namespace": {"configurable": {"thread_id": "t", "checkpoint_id": id}},
    }
    report = memory.rollback(to=names[named])
    assert report.steps == 4
    assert graph.get_state(T).values == target.values


def test_what_is_no_target(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 1)
    turns(graph, 1, on("u"))
    head, theirs = graph.get_state(T), graph.get_state(on("u"))
    before = memory.stats()
    for to, thread_id, error in (
        (head, "t", "head already"),
        (theirs, "t", "thread 'u'"),
        ("gone", "t", "gone"),
        (3, "t", "sequence of the log"),
    ):
        with pytest.raises((RollbackError, UnknownMomentError), match=error):
            memory.rollback(to=to, thread_id=thread_id)
    with pytest.raises(RollbackError, match="has no checkpoints"):
        memory.rollback(turns=1, thread_id="nobody")
    assert memory.stats() == before


def test_what_was_pruned_cannot_be_gone_back_to(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 3)
    memory.checkpointer.prune(["t"])
    held = facts(memory)
    for arguments in ({"steps": 50}, {"turns": 2}, {"turns": 1}):
        with pytest.raises(RollbackError):
            memory.rollback(thread_id="t", **arguments)
    assert facts(memory) == held


# -- what is undone, and what is not ----------------------------------------------------------------


def test_other_threads_keep_what_they_have(memory: MemoryStore) -> None:
    graph, other = agent(memory), agent(memory, "other")
    turns(graph, 1)
    turns(other, 2, on("u"))
    turns(graph, 1)
    held, state = facts(memory, "other"), other.get_state(on("u"))
    memory.rollback(turns=2, thread_id="t")
    assert facts(memory) == {}
    assert facts(memory, "other") == held
    assert other.get_state(on("u")) == state


def test_a_commit_that_went_back_with_its_thread_is_not_undone_again(memory: MemoryStore) -> None:
    graph = agent(memory)
    memory.commit(Fact("note", {"text": "before"}, id="free"))
    turns(graph, 1)
    memory.commit(Fact("note", {"text": "direct"}, id="direct"), thread_id="t")
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {"free": "before"}
    memory.rollback(1)
    assert facts(memory) == {}
    with pytest.raises(RollbackError, match="0 commits"):
        memory.rollback(1)


def test_a_write_that_another_thread_has_undone_is_no_conflict(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 1)
    turns(graph, 1, on("u"))  # writes `every` and the same facts
    memory.rollback(turns=1, thread_id="u")
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {}


def test_a_conflict_changes_neither_state_nor_memory(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 2)
    memory.store.put(("note",), "every", {"text": "theirs"})
    before, stats = seen(memory, graph), memory.stats()
    with pytest.raises(RollbackConflict) as caught:
        memory.rollback(1, thread_id="t")
    assert (seen(memory, graph), memory.stats()) == (before, stats)
    ((namespace, key, ours, theirs),) = caught.value.conflicts
    history = memory.history(namespace, key)
    assert [entry.version for entry in history[-2:]] == [ours, theirs]
    report = memory.rollback(1, thread_id="t", on_conflict="keep")
    assert facts(memory)["every"] == "theirs"
    assert report.kept == ((("note",), "every"),)
    memory.rollback(to=report.undone, thread_id="t", on_conflict="keep")
    memory.rollback(1, thread_id="t", on_conflict="overwrite")
    assert facts(memory)["every"] == "hear4"
    assert graph.get_state(T).next == ("say",)


def test_facts_that_the_thread_committed_without_its_graph_go_back_too(memory: MemoryStore) -> None:
    graph = agent(memory)
    memory.commit(Fact("note", {"text": "before"}, id="before"), thread_id="t")
    turns(graph, 1)
    before = facts(memory)
    memory.commit(Fact("note", {"text": "mine"}, id="mine"), thread_id="t")
    memory.commit(Fact("note", {"text": "foreign"}, id="foreign"))
    turns(graph, 1)
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {**before, "foreign": "foreign"}
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {"before": "before", "foreign": "foreign"}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_before_the_first_checkpoint_by_way_of_its_twin(memory: MemoryStore, durability: str) -> None:
    graph = agent(memory)
    turns(graph, 2, durability=durability)
    held = facts(memory)
    first = list(memory.checkpointer.list(T))[-1]
    for _ in range(2):
        memory.rollback(to=first.config)
    report = memory.rollback(1, thread_id="t")
    assert facts(memory) == {}
    memory.rollback(to=report.undone, thread_id="t")
    memory.rollback(to=list(memory.checkpointer.list(T))[4].config)
    memory.rollback(to=first.config)
    memory.checkpointer.prune(["t"])
    with pytest.raises(RollbackError, match="pruned"):
        memory.rollback(1, thread_id="t")
    assert facts(memory).keys() <= held.keys()


def test_an_update_of_the_state_is_a_step(memory: MemoryStore) -> None:
    graph = agent(memory)
    turns(graph, 1)
    before = seen(memory, graph)
    graph.update_state(T, {"log": ["edited"], "last": "edited"})
    memory.rollback(1, thread_id="t")
    assert seen(memory, graph) == before
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {}


def test_a_thread_that_waits_goes_back_and_asks_again(memory: MemoryStore) -> None:
    class Asked(TypedDict, total=False):
        answers: Annotated[list[str], operator.add]

    def ask(state: Asked, *, store: BaseStore) -> Asked:
        answer = interrupt("well?")
        store.put(("note",), f"a{len(state['answers'])}", {"text": answer})
        return {"answers": [answer]}

    builder = StateGraph(Asked)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"answers": []}, T)
    graph.invoke(Command(resume="yes"), T)
    assert facts(memory) == {"a0": "yes"}
    waiting = graph.invoke({"answers": []}, T)
    assert waiting["__interrupt__"]
    memory.rollback(3, thread_id="t")
    assert facts(memory) == {}
    assert graph.get_state(T).next == ("ask",)
    again = graph.invoke(None, T)
    assert again["__interrupt__"][0].value == "well?"
    graph.invoke(Command(resume="no"), T)
    assert graph.get_state(T).values == {"answers": ["no"]}
    assert facts(memory) == {"a0": "no"}


def test_a_runs_own_metadata_is_not_taken_for_ours(memory: MemoryStore) -> None:
    graph = agent(memory)
    for metadata in ({"rollback": "x"}, {"rollback": {"to": None}}):
        turns(graph, 2, {**T, "metadata": metadata})
    graph.update_state({**T, "metadata": {"rollback": "y"}}, {"last": "edited"})
    memory.rollback(turns=3, thread_id="t")
    assert graph.get_state(T).values["log"] == ["in0", "hear1", "say2"]
    memory.rollback(turns=1, thread_id="t")
    assert facts(memory) == {}


def test_messages_come_back_as_they_were(memory: MemoryStore) -> None:
    class Chat(TypedDict):
        messages: Annotated[list[Any], add_messages]

    builder = StateGraph(Chat)
    builder.add_node("say", lambda state: {"messages": [AIMessage(f"answer {len(state['messages'])}")]})
    builder.add_edge(START, "say")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"messages": [HumanMessage("one", id="1")]}, T)
    before = graph.get_state(T).values
    graph.invoke({"messages": [HumanMessage("one, edited", id="1"), HumanMessage("two")]}, T)
    memory.rollback(turns=1, thread_id="t")
    assert graph.get_state(T).values == before


# -- subgraphs --------------------------------------------------------------------------------------


def nested(memory: MemoryStore, checkpointer: bool | None, inner_checkpointer: bool | None = None) -> Any:
    """A graph whose node is a subgraph of two steps, the second of which holds one more subgraph."""

    class Inner(TypedDict, total=False):
        count: Annotated[list[str], operator.add]
        log: Annotated[list[str], operator.add]

    def node(name: str) -> Any:
        def run(state: Inner, *, store: BaseStore) -> Inner:
            key = f"{name}{len(state.get('count', []))}"
            store.put(("note",), key, {"text": key})
            return {"count": [key], "log": [key]}

        return run

    deepest = StateGraph(Inner)
    deepest.add_node("deep", node("deep"))
    deepest.add_edge(START, "deep")
    inner = StateGraph(Inner)
    inner.add_node("one", node("one"))
    inner.add_node("two", deepest.compile(checkpointer=inner_checkpointer))
    inner.add_edge(START, "one")
    inner.add_edge("one", "two")
    sub = inner.compile(checkpointer=checkpointer)

    class Outer(TypedDict, total=False):
        log: Annotated[list[str], operator.add]

    outer = StateGraph(Outer)
    outer.add_node("sub", sub)
    outer.add_node("after", lambda state: {"log": ["after"]})
    outer.add_edge(START, "sub")
    outer.add_edge("sub", "after")
    return outer.compile(checkpointer=memory.checkpointer, store=memory.store)


@pytest.mark.parametrize("inner_checkpointer", [None, True], ids=["inner plain", "inner keeps"])
@pytest.mark.parametrize("checkpointer", [None, True], ids=["plain", "keeps"])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_what_subgraphs_wrote_and_kept_goes_back(
    file_memory: MemoryStore, durability: str, checkpointer: bool | None, inner_checkpointer: bool | None
) -> None:
    memory = file_memory
    graph = nested(memory, checkpointer, inner_checkpointer)
    states = []
    for n in range(4):
        graph.invoke({"log": [f"in{n}"]}, T, durability=durability)
        states.append((graph.get_state(T).values, facts(memory)))
    if checkpointer:
        assert len(states[-1][1]) > len(states[0][1])  # the subgraph counted on
    report = memory.rollback(turns=2, thread_id="t")
    assert (graph.get_state(T).values, facts(memory)) == states[1]
    for n in (2, 3):
        graph.invoke({"log": [f"in{n}"]}, T, durability=durability)
        assert (graph.get_state(T).values, facts(memory)) == states[n]
    memory.rollback(to=report.undone, thread_id="t")
    assert (graph.get_state(T).values, facts(memory)) == states[3]
    memory.rollback(turns=4, thread_id="t")
    assert facts(memory) == {}
    graph.invoke({"log": ["in0"]}, T, durability=durability)
    assert (graph.get_state(T).values, facts(memory)) == states[0]


def test_a_subgraphs_checkpoint_is_no_target(memory: MemoryStore) -> None:
    graph = nested(memory, True)
    graph.invoke({"log": []}, T)
    inner = next(one for one in memory.checkpointer.list(T) if one.config["configurable"]["checkpoint_ns"])
    with pytest.raises(RollbackError, match="subgraph"):
        memory.rollback(to=inner.config)


# -- where it may be called, and beside whom --------------------------------------------------------


def test_not_from_inside_a_node(memory: MemoryStore) -> None:
    class Plain(TypedDict, total=False):
        n: int

    def node(state: Plain) -> Plain:
        memory.rollback(1, thread_id="t")
        return {"n": 1}

    builder = StateGraph(Plain)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    with pytest.raises(RollbackError, match="RollbackNode"):
        graph.invoke({"n": 0}, T)


async def test_from_a_coroutine_with_an_async_graph(memory: MemoryStore) -> None:
    graph = agent(memory)
    for n in range(2):
        await graph.ainvoke({"log": [f"in{n}"], "delta": []}, T)
    history = [one async for one in graph.aget_state_history(T)]
    report = await memory.arollback(turns=1, thread_id="t")
    assert (await graph.aget_state(T)).values == history[4].values
    await memory.arollback(to=report.undone, thread_id="t")
    assert (await graph.aget_state(T)).values == history[0].values


def test_state_facts_and_vectors_in_one_step(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        graph = agent(memory)
        turns(graph, 3)
        held = facts(memory)
        asked = list(model.texts)
        first = memory.rollback(4, thread_id="t")
        check_search(memory, facts(memory))
        memory.rollback(to=first.undone, thread_id="t")
        assert facts(memory) == held
        check_search(memory, held)
        memory.flush()
        check_settled(memory, database)
        assert {text for text in model.texts[len(asked) :]} <= {
            "green tea in the morning", "trains to berlin", "a cat on the roof",
        }  # fmt: skip
    with open_memory(database) as memory:
        assert facts(memory) == held
        assert agent(memory).get_state(T).values["last"] == "say8"


def test_a_checkpoint_that_comes_in_between_is_seen(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = agent(memory)
    turns(graph, 2)
    commit = memory._outbox.commit

    def late(*args: Any) -> None:
        monkeypatch.setattr(memory._outbox, "commit", commit)
        graph.invoke({"log": ["late"], "delta": ["late"]}, T)
        commit(*args)

    monkeypatch.setattr(memory._outbox, "commit", late)
    report = memory.rollback(turns=1, thread_id="t")
    assert "late" not in graph.get_state(T).values["log"]
    assert report.steps == 4
    assert "say5" in facts(memory)


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_rollback_beside_a_run_of_the_same_thread_is_whole(file_memory: MemoryStore, durability: str) -> None:
    """Nobody promises which of the two wins; but every checkpoint is whole, and none of them lost its facts' step."""
    memory = file_memory
    graph = agent(memory)
    turns(graph, 2)
    for _ in range(6):
        errors: list[BaseException] = []

        def run(errors: list[BaseException] = errors) -> None:
            try:
                turns(graph, 2, durability=durability)
            except BaseException as error:
                errors.append(error)

        runner = threading.Thread(target=run)
        runner.start()
        for _ in range(3):
            try:
                memory.rollback(1, thread_id="t", on_conflict="overwrite")
            except RollbackError as error:
                assert "steps to undo" in str(error)  # noqa: PT017
        runner.join()
        assert not errors
        check_steps_are_whole(memory)
    memory.rollback(turns=1, thread_id="t", on_conflict="overwrite")
    state = graph.get_state(T).values
    turns(graph, 1)
    assert graph.get_state(T).values["log"][: len(state["log"])] == state["log"]


def check_steps_are_whole(memory: MemoryStore) -> None:
    """Each step's three or two writes landed in one commit, with a checkpoint that is there."""
    database = memory.storage.location
    wrong = rows(
        database,
        "SELECT checkpoint_id, count(DISTINCT commit_id) FROM facts WHERE node IS NOT NULL GROUP BY 1 "
        "HAVING count(DISTINCT commit_id) <> 1 OR NOT EXISTS "
        "(SELECT 1 FROM checkpoints AS c WHERE c.checkpoint_id = facts.checkpoint_id)",
    )
    assert wrong == []
    undone = rows(
        database,
        "SELECT checkpoint_id FROM facts WHERE undoes IS NOT NULL AND NOT EXISTS "
        "(SELECT 1 FROM checkpoints AS c WHERE c.checkpoint_id = facts.checkpoint_id)",
    )
    assert undone == []


async def test_many_threads_go_back_at_once(memory: MemoryStore) -> None:
    graphs = {f"t{n}": agent(memory, f"note{n}") for n in range(6)}

    async def live(thread_id: str, graph: Any) -> None:
        for n in range(3):
            await graph.ainvoke({"log": [f"in{n}"], "delta": []}, on(thread_id))
        await memory.arollback(turns=2, thread_id=thread_id)
        await graph.ainvoke({"log": ["again"], "delta": []}, on(thread_id))

    await asyncio.gather(*(live(thread_id, graph) for thread_id, graph in graphs.items()))
    for n, (thread_id, graph) in enumerate(graphs.items()):
        assert graph.get_state(on(thread_id)).values["log"] == ["in0", "hear1", "say2", "again", "hear4", "say5"]
        assert set(facts(memory, f"note{n}")) == {"every", "say2", "say5"}

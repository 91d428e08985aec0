"""A step whose vectors cannot be stored: it does not happen, and can be resumed without running its tasks again."""

from __future__ import annotations

import asyncio
import operator
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore

sys.path.insert(0, str(Path(__file__).parents[1]))
from truth import (
    Words,
    check_search,
    check_settled,
    commit,
    dump,
    eventually,
    exact_below,
    hook_of,
    notes,
    open_memory,
    python,
    rows,
)

from langgraph_memstate import MemoryStore
from langgraph_memstate.errors import EmbeddingError, VectorSyncError

THREAD: Any = {"configurable": {"thread_id": "t"}}
FIRST = notes(12)
WRITTEN = {
    "before": "a cat waits",
    "w0": "green tea zero",
    "w1": "green tea one",
    "w2": "green tea two",
    "last": "trains to berlin at last",
}
DURABILITIES = ("sync", "async", "exit")


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


class Agent:
    """One node, then three at a time, then one; each notes its run in a file and writes one memory.

    The middle ones also supersede ``n0``, delete ``n1`` and write ``extra``, which the last one deletes again.
    """

    def __init__(self, memory: MemoryStore, runs: Path, *, sync: bool = True, durability: str = "sync") -> None:
        self._runs = runs
        self._sync = sync
        self._durability: Any = durability
        builder = StateGraph(State)
        for name in WRITTEN:
            builder.add_node(name, self._node(name))
        builder.add_edge(START, "before")
        for middle in ("w0", "w1", "w2"):
            builder.add_edge("before", middle)
            builder.add_edge(middle, "last")
        builder.add_edge("last", END)
        self.graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)

    def _node(self, name: str) -> Any:
        def run(state: State, *, store: BaseStore) -> State:
            with open(self._runs, "a") as file:
                file.write(f"{name}\n")
            store.put(("note",), name, {"text": WRITTEN[name]})
            if name == "w0":
                store.put(("note",), "n0", {"text": "trains to paris"})
                store.delete(("note",), "n1")
                store.put(("note",), "extra", {"text": "green tea extra"})
            if name == "last":
                store.delete(("note",), "extra")
            return {"log": [name]}

        async def arun(state: State, *, store: BaseStore) -> State:
            return await asyncio.to_thread(run, state, store=store)

        return run if self._sync else arun

    def invoke(self, value: Any) -> Any:
        if self._sync:
            return self.graph.invoke(value, THREAD, durability=self._durability)
        return asyncio.run(self.graph.ainvoke(value, THREAD, durability=self._durability))

    def runs(self) -> Counter[str]:
        return Counter(self._runs.read_text().split())

    def log(self) -> list[str]:
        """What the last checkpoint says, without the pending writes that `get_state` adds."""
        found = self.graph.checkpointer.get_tuple(THREAD)
        return [] if found is None else list(found.checkpoint["channel_values"].get("log", []))


def after_all() -> dict[str, str]:
    current = FIRST | WRITTEN | {"n0": "trains to paris"}
    del current["n1"]
    return current


def play(database: Path, sync: bool, durability: str, fails: str, late: bool, value: Any) -> None:
    """One run in a process of its own, which dies or fails as the vectors of one memory are sent."""
    with open_memory(database) as memory:
        only = sends(memory, fails)
        if late:
            hook_of(memory).fail("apply", late=True, only=lambda *args: only(*args) and die())
        else:
            hook_of(memory).fail("apply", only=only)
        agent = Agent(memory, database.with_name("runs"), sync=sync, durability=durability)
        try:
            agent.invoke(value)
        except VectorSyncError:
            print("failed")


def die() -> bool:
    signal.raise_signal(signal.SIGKILL)
    return True


def sends(memory: MemoryStore, key: str) -> Any:
    """Whether a call of the hook stores the vector of a memory."""

    def only(upserts: Any, deletes: Any) -> bool:
        embedded = Words()([WRITTEN[key]])[0]
        length = sum(number * number for number in embedded) ** 0.5
        return any([round(number / length, 3) for number in embedded] == rounded(record.vector) for record in upserts)

    return only


def rounded(vector: Any) -> list[float]:
    return [round(float(number), 3) for number in vector]


@pytest.fixture(autouse=True)
def search_asks_the_index() -> Iterator[None]:
    """However few facts there are."""
    with exact_below(2):
        yield


@pytest.fixture
def memory(database: Path) -> Iterator[MemoryStore]:
    with open_memory(database) as opened:
        commit(opened, FIRST)
        yield opened


def agent_of(memory: MemoryStore, database: Path, sync: bool, durability: str) -> Agent:
    return Agent(memory, database.with_name("runs"), sync=sync, durability=durability)


@pytest.fixture(params=[True, False], ids=["sync face", "async face"])
def sync(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# -- atomic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["refused", "timed out"])
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_step_without_its_vectors_does_not_happen_and_resumes(
    memory: MemoryStore, database: Path, sync: bool, durability: str, late: bool
) -> None:
    agent = agent_of(memory, database, sync, durability)
    hook_of(memory).fail("apply", times=1, late=late, only=sends(memory, "w1"))
    with pytest.raises(VectorSyncError):
        agent.invoke({"log": []})
    assert agent.log() == ["before"]
    memory.flush()
    check_search(memory, FIRST | {"before": WRITTEN["before"]})
    check_settled(memory, database)
    before = agent.runs()
    assert [before[name] for name in ("before", "w0", "w1", "w2")] == [1, 1, 1, 1]

    assert sorted(agent.invoke(None)["log"]) == sorted(WRITTEN)
    runs = agent.runs()
    assert [runs[name] for name in ("before", "w0", "w1", "w2")] == [1, 1, 1, 1]
    assert runs["last"] == before["last"] + 1
    memory.flush()
    check_search(memory, after_all())
    check_settled(memory, database)
    written = rows(database, "SELECT key, count(*) FROM facts WHERE op = 'put' AND thread_id = 't' GROUP BY key")
    assert dict(written) == dict.fromkeys((*WRITTEN, "n0", "extra"), 1)


@pytest.mark.parametrize("late", [False, True], ids=["fails", "is killed"])
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_it_resumes_in_another_process(database: Path, sync: bool, durability: str, late: bool) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
    first = python(
        """
sys.path.insert(0, "tests/graph")
import test_vector_steps
test_vector_steps.play(database, sys.argv[2] == "True", sys.argv[3], "w1", sys.argv[4] == "True", {"log": []})
""",
        database, sync, durability, late,
    )  # fmt: skip
    assert first.returncode == (-signal.SIGKILL if late else 0), first.stderr
    assert first.stdout == ("" if late else "failed\n")
    with open_memory(database) as memory:
        agent = agent_of(memory, database, sync, durability)
        assert agent.log() == ["before"]
        check_search(memory, FIRST | {"before": WRITTEN["before"]})
        assert sorted(agent.invoke(None)["log"]) == sorted(WRITTEN)
        check_search(memory, after_all())
        memory.flush()
        check_search(memory, after_all())
        check_settled(memory, database)
        runs = agent.runs()
        assert [runs[name] for name in ("before", "w0", "w1", "w2")] == [1, 1, 1, 1]
        assert len(rows(database, "SELECT key FROM facts WHERE thread_id = 't' AND op = 'put'")) == len(WRITTEN) + 2


def test_a_run_that_saves_at_exit_is_lost_whole(memory: MemoryStore, database: Path, sync: bool) -> None:
    agent = agent_of(memory, database, sync, "exit")
    agent.invoke({"log": ["first run"]})
    memory.flush()
    check_search(memory, after_all())
    before, state = dump(database, without=["embeddings"]), agent.graph.get_state(THREAD)
    hook_of(memory).fail("apply", times=1, only=sends(memory, "w1"))
    with pytest.raises(VectorSyncError):
        agent.invoke({"log": ["second run"]})
    memory.flush()
    assert dump(database, without=["embeddings"]) == before
    assert agent.graph.get_state(THREAD) == state
    check_search(memory, after_all())
    check_settled(memory, database)
    assert agent.invoke({"log": ["third run"]})["log"].count("w1") == 2
    assert len(memory.history("note", "w1")) == 2


def test_a_model_that_fails_takes_the_step_back_too(database: Path, sync: bool) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        commit(memory, FIRST)
        agent = agent_of(memory, database, sync, "sync")
        model.error = RuntimeError("the model is away")
        with pytest.raises(EmbeddingError):
            agent.invoke({"log": []})
        assert agent.log() == []
        model.error = None
        agent.invoke(None)
        assert set(agent.runs().values()) == {1}
        check_search(memory, after_all())
        memory.flush()
        check_settled(memory, database)


def test_a_step_that_fails_is_not_embedded_again(database: Path, sync: bool) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        agent = agent_of(memory, database, sync, "sync")
        hook_of(memory).fail("apply", times=3, only=sends(memory, "w1"))
        for value in ({"log": []}, None, None):
            with pytest.raises(VectorSyncError):
                agent.invoke(value)
        agent.invoke(None)
        assert sorted(model.texts) == sorted([*WRITTEN.values(), "trains to paris", "green tea extra"])


def test_pending_writes_survive_an_index_that_is_away_for_long(memory: MemoryStore, database: Path) -> None:
    """Every try of the step takes its vectors back; none of them leaves anything, and the last one lands."""
    agent = agent_of(memory, database, True, "sync")
    hook = hook_of(memory)
    hook.fail("apply", only=sends(memory, "w1"), late=True)
    hook.fail("apply", only=lambda upserts, deletes: bool(deletes))
    hook.fail("count")
    for value in ({"log": []}, None, None, None):
        with pytest.raises(VectorSyncError):
            agent.invoke(value)
        check_search(memory, FIRST | {"before": WRITTEN["before"]})
    hook.heal()
    agent.invoke(None)
    check_search(memory, after_all())
    assert set(agent.runs().values()) == {1}
    memory.flush()
    check_search(memory, after_all())
    check_settled(memory, database)


# -- deferred -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", DURABILITIES)
def test_deferred_steps_land_while_the_index_is_away(database: Path, sync: bool, durability: str) -> None:
    with open_memory(database, vector_sync="deferred") as memory:
        commit(memory, FIRST)
        memory.flush()
        hook_of(memory).go_away()
        agent = agent_of(memory, database, sync, durability)
        assert sorted(agent.invoke({"log": []})["log"]) == sorted(WRITTEN)
        assert set(agent.runs().values()) == {1}
        check_search(memory, after_all())
        hook_of(memory).heal()
        eventually(lambda: not rows(database, "SELECT * FROM outbox"))
        check_search(memory, after_all())
        check_settled(memory, database)


# -- inside a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [2, 2_000])
@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
@pytest.mark.parametrize("away", [False, True], ids=["", "index away"])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_search_in_a_node_sees_what_its_step_has_written(
    database: Path, vector_sync: Any, away: bool, candidates: int, durability: Any
) -> None:
    model = Words()
    seen: dict[str, dict[str | None, float | None]] = {}

    def look(name: str, store: BaseStore) -> None:
        found = store.search(("note",), query="green tea", limit=50)
        seen[name] = {item.key: item.score for item in found}

    def first(state: State, *, store: BaseStore) -> State:
        look("at first", store)
        store.put(("note",), "new", {"text": "green tea new"})
        store.put(("note",), "n0", {"text": "trains to paris"})
        store.delete(("note",), "n6")
        look("own writes", store)
        store.put(("note",), "new", {"text": "a cat new"})
        look("own writes twice", store)
        return {"log": ["first"]}

    def second(state: State, *, store: BaseStore) -> State:
        look("after the step", store)
        return {"log": ["second"]}

    builder = StateGraph(State)
    builder.add_node("first", first)
    builder.add_node("second", second)
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    with open_memory(database, model=model, vector_sync=vector_sync) as memory, exact_below(candidates):
        commit(memory, FIRST)
        memory.flush()
        if away:
            hook_of(memory).fail("query")
        graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
        graph.invoke({"log": []}, THREAD, durability=durability)
        check_search(memory, final(FIRST))
    assert seen["at first"].keys() == FIRST.keys()
    assert seen["own writes"].keys() == (FIRST.keys() | {"new"}) - {"n6"}
    assert seen["own writes twice"].keys() == seen["own writes"].keys() == seen["after the step"].keys()
    assert next(iter(seen["own writes"])) == "new"
    assert next(iter(seen["own writes twice"])) != "new"
    assert seen["own writes twice"] == pytest.approx(seen["after the step"], abs=1e-6)
    documents = [text for text in model.texts if text in (*FIRST.values(), *final(FIRST).values(), "green tea new")]
    assert len(documents) == len(set(documents)), "a search inside the step spares the commit the embedding"


def final(texts: dict[str, str]) -> dict[str, str]:
    current = texts | {"new": "a cat new", "n0": "trains to paris"}
    del current["n6"]
    return current

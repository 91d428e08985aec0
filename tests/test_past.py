"""The past: the log, the store of a moment, and what changed between two."""

from __future__ import annotations

import operator
import sqlite3
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore, GetOp, PutOp

sys.path.insert(0, str(Path(__file__).parent))
from truth import Words, cosine, note, open_memory

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import FilterError, MemStateError, ReadOnlyError, UnknownMomentError

T: Any = {"configurable": {"thread_id": "t"}}


def texts(store: Any, namespace: tuple[str, ...] = ()) -> dict[str, str]:
    return {item.key: item.value["text"] for item in store.search(namespace, limit=10_000)}


# -- the log ----------------------------------------------------------------------------------------


def story(memory: MemoryStore) -> list[datetime]:
    """Five entries by three writers, and the times between them."""
    times = [datetime.now(UTC)]
    writes: list[Any] = [
        lambda: memory.commit(note("a", "1"), thread_id="t", actor="alice"),
        lambda: memory.commit([note("b", "1"), Fact("other", {"text": "1"}, id="a")], thread_id="u", actor="bob"),
        lambda: memory.delete("note", "a", actor="alice", reason="wrong"),
        lambda: memory.store.put(("note", "deep"), "a", {"text": "1"}),
    ]
    for write in writes:
        time.sleep(0.002)
        write()
        time.sleep(0.002)
        times.append(datetime.now(UTC))
    return times


def test_the_log_can_be_asked_in_every_way(memory: MemoryStore) -> None:
    times = story(memory)

    def seqs(**asked: Any) -> list[int]:
        return [entry.seq for entry in memory.log(**asked)]

    assert seqs() == [1, 2, 3, 4, 5]
    assert seqs(since=2) == [3, 4, 5]
    assert seqs(until=2) == [1, 2]
    assert seqs(since=1, until=4) == [2, 3, 4]
    assert seqs(since=times[1], until=times[3]) == [2, 3, 4]
    assert seqs(limit=2) == [4, 5]
    assert seqs(limit=0) == []
    with pytest.raises(FilterError, match="limit=-1"):
        seqs(limit=-1)
    assert seqs(until=3, limit=2) == [2, 3]
    assert seqs(namespace="note") == [1, 2, 4, 5]
    assert seqs(namespace=("note", "deep")) == [5]
    assert seqs(namespace="not") == []
    assert seqs(key="a") == [1, 3, 4, 5]
    assert seqs(namespace="note", key="a") == [1, 4, 5]
    assert seqs(thread_id="t") == [1]
    assert seqs(actor="alice", since=1) == [4]
    assert seqs(actor="alice", thread_id="u") == []
    assert [entry.seq for entry in memory.history("note", "a")] == [1, 4]
    assert [(entry.op, entry.reason) for entry in memory.history("note", "a")] == [("put", None), ("delete", "wrong")]
    assert [entry.commit_id for entry in memory.log()] == [1, 2, 2, 4, 5]


def test_the_log_of_a_graph_says_who_wrote(memory: MemoryStore) -> None:
    graph = counting(memory)
    graph.invoke({"log": ["x"]}, T)
    head = graph.get_state(T).config["configurable"]["checkpoint_id"]
    (entry,) = memory.log(node="second")
    assert (entry.thread_id, entry.checkpoint_ns, entry.checkpoint_id, entry.node) == ("t", "", head, "second")
    assert memory.log(checkpoint_id=head) == [entry]
    assert memory.log(run_id=entry.run_id or "none") in ([], memory.log(thread_id="t"))


async def test_the_async_face(memory: MemoryStore) -> None:
    story(memory)
    assert await memory.alog() == memory.log()
    assert await memory.ahistory("note", "a") == memory.history("note", "a")
    assert await memory.adiff(1) == memory.diff(1)
    then = await memory.aas_of(1)
    assert [item.key for item in await then.asearch(())] == ["a"]
    assert (await then.aget(("note",), "a")).value == {"text": "1"}
    with pytest.raises(ReadOnlyError):
        await then.aput(("note",), "a", {"text": "2"})


def test_the_log_is_append_only(file_memory: MemoryStore, database: Path) -> None:
    story(file_memory)
    before = file_memory.log()
    changes = [
        "DELETE FROM facts",
        "DELETE FROM facts WHERE seq = 5",
        "UPDATE facts SET value = '{}'",
        "UPDATE facts SET value = NULL, key = 'x' WHERE seq = 1",
        "UPDATE facts SET key = 'x' WHERE op = 'delete'",
        "UPDATE facts SET op = 'delete', value = NULL WHERE seq = 1",
        "UPDATE facts SET seq = seq + 10",
        "UPDATE facts SET ts = 0 WHERE value IS NULL",
        "INSERT OR REPLACE INTO facts SELECT * FROM facts WHERE seq = 1",
        "UPDATE OR REPLACE facts SET version = (SELECT version FROM facts WHERE seq = 2) WHERE seq = 1",
    ]
    with closing(sqlite3.connect(database)) as connection:
        for change in changes:
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(change)
            connection.rollback()
    assert file_memory.log() == before


# -- as of ------------------------------------------------------------------------------------------


def counting(memory: MemoryStore) -> Any:
    class State(TypedDict, total=False):
        log: Annotated[list[str], operator.add]

    def node(name: str) -> Any:
        def run(state: State, *, store: BaseStore) -> State:
            store.put(("note",), f"{name}{len(state['log'])}", {"text": name})
            return {"log": [name]}

        return run

    builder = StateGraph(State)
    builder.add_node("first", node("first"))
    builder.add_node("second", node("second"))
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


@pytest.mark.parametrize("named", ["id", "config", "snapshot", "tuple", "thread"])
def test_a_moment_has_many_names(memory: MemoryStore, named: str) -> None:
    graph = counting(memory)
    graph.invoke({"log": ["x"]}, T)
    snapshot = list(graph.get_state_history(T))[1]
    names = {
        "id": snapshot.config["configurable"]["checkpoint_id"],
        "config": snapshot.config,
        "snapshot": snapshot,
        "tuple": memory.checkpointer.get_tuple(snapshot.config),
        "thread": T,
    }
    memory.commit(note("later", "later"))
    wanted = {"first1": "first"} if named != "thread" else {"first1": "first", "second2": "second"}
    assert texts(memory.as_of(names[named])) == wanted
    memory.checkpointer.copy_thread("t", "copy")
    if named == "id":
        with pytest.raises(UnknownMomentError, match="more than one thread"):
            memory.as_of(names[named])
    else:
        assert texts(memory.as_of(names[named])) == wanted


def test_a_time_is_one_whatever_its_zone(memory: MemoryStore) -> None:
    times = story(memory)
    zone = timezone(timedelta(hours=9))
    for at, seq in zip(times, (0, 1, 3, 4, 5), strict=True):
        for when in (at, at.astimezone(zone)):
            past = memory.as_of(when)
            assert (past.seq, past.at) == (seq, at)
    assert texts(memory.as_of(datetime(1970, 1, 2, tzinfo=UTC))) == {}
    assert texts(memory.as_of(datetime(9000, 1, 1, tzinfo=UTC))) == texts(memory.store)


@pytest.mark.parametrize(
    "when",
    [-1, 6, True, "", "gone", 1.5, None, {}, {"configurable": {}}, T, datetime(2026, 1, 1)],
)
def test_what_is_no_moment(memory: MemoryStore, when: Any) -> None:
    story(memory)
    for ask in (memory.as_of, lambda when: memory.log(since=when), lambda when: memory.diff(when)):
        with pytest.raises(UnknownMomentError):
            ask(when)


def test_the_past_cannot_be_written(memory: MemoryStore) -> None:
    story(memory)
    past, before = memory.as_of(2), memory.log()
    writes: list[Any] = [
        lambda: past.put(("note",), "a", {"text": "2"}),
        lambda: past.delete(("note",), "a"),
        lambda: past.batch([GetOp(("note",), "a"), PutOp(("note",), "a", {"text": "2"})]),
        lambda: past.sweep_ttl(),
        lambda: past.start_ttl_sweeper(),
    ]
    for write in writes:
        with pytest.raises(ReadOnlyError):
            write()
    assert memory.log() == before
    assert isinstance(ReadOnlyError(""), MemStateError)


def test_the_past_knows_what_had_expired(memory: MemoryStore) -> None:
    memory.store.put(("note",), "short", {"text": "short"}, ttl=0.002)
    memory.store.put(("note",), "long", {"text": "long"}, ttl=10)
    early = datetime.now(UTC)
    time.sleep(0.15)
    late = datetime.now(UTC)
    memory.commit(note("tick", "tick"))
    for _ in range(2):
        assert set(texts(memory.as_of(early))) == {"short", "long"}
        assert set(texts(memory.as_of(2))) == {"short", "long"}
        assert set(texts(memory.as_of(late))) == {"long"}
        assert set(texts(memory.as_of(3))) == {"long", "tick"}
        memory.sweep()


def test_reading_the_past_prolongs_nothing(file_memory: MemoryStore, database: Path) -> None:
    file_memory.store.put(("note",), "a", {"text": "1"}, ttl=10)

    def expiry() -> Any:
        with closing(sqlite3.connect(database)) as connection:
            return connection.execute("SELECT expires_at FROM items").fetchall()

    before = expiry()
    time.sleep(0.01)
    past = file_memory.as_of(1)
    past.get(("note",), "a", refresh_ttl=True)
    past.search(("note",), refresh_ttl=True)
    assert expiry() == before
    file_memory.store.get(("note",), "a", refresh_ttl=True)
    assert expiry() != before


def test_a_filter_and_a_page_of_the_past(memory: MemoryStore) -> None:
    for n in range(10):
        memory.store.put(("note", str(n % 2)), f"k{n}", {"text": str(n), "n": n})
    memory.store.put(("note", "0"), "k0", {"text": "new", "n": 100})
    memory.delete(("note", "1"), "k1")
    past = memory.as_of(10)
    assert [item.key for item in past.search(("note",), filter={"n": {"$lt": 4}})] == ["k3", "k2", "k1", "k0"]
    assert [item.key for item in past.search(("note", "1"), limit=2, offset=1)] == ["k7", "k5"]
    assert past.list_namespaces() == [("note", "0"), ("note", "1")]
    assert memory.as_of(1).list_namespaces() == [("note", "0")]
    assert memory.as_of(0).list_namespaces() == []
    assert past.get(("note", "0"), "k0").value["n"] == 0  # type: ignore[union-attr]


def test_an_item_of_the_past_is_the_item_it_was(memory: MemoryStore) -> None:
    seen = []
    for n in range(4):
        memory.store.put(("note",), "a", {"text": str(n)})
        seen.append(memory.store.get(("note",), "a"))
    memory.delete("note", "a")
    for n, item in enumerate(seen):
        assert memory.as_of(n + 1).get(("note",), "a") == item
    assert memory.as_of(5).get(("note",), "a") is None


class Moments:
    """What a memory said at moments of its life, to be asked again later."""

    QUERIES = ("green tea", "trains to berlin")

    def __init__(self, memory: MemoryStore) -> None:
        self.memory = memory
        self.texts: dict[str, str] = {}
        self.found: list[tuple[Any, dict[str, str]]] = []

    def note(self, config: Any) -> None:
        self.found.append((config, dict(self.texts)))

    def check(self, every: int = 1, semantic: int = 25) -> int:
        checked = 0
        for place, (config, wanted) in enumerate(self.found[::every]):
            past = self.memory.as_of(config)
            assert texts(past, ("note",)) == wanted
            assert past.list_namespaces() == ([("note",)] if wanted else [])
            for query in self.QUERIES if place % semantic == 0 else self.QUERIES[:1]:
                items = past.search(("note",), query=query, limit=8)
                best = sorted((cosine(query, text) for text in wanted.values()), reverse=True)[:8]
                assert [item.score for item in items] == pytest.approx(best, abs=1e-6)
                assert {item.key: item.value["text"] for item in items}.items() <= wanted.items()
            checked += 1
        return checked


def test_every_checkpoint_of_five_hundred_steps_is_remembered_as_it_was(database: Path) -> None:
    """A loop of 500 steps that writes, changes and deletes, while another thread writes too."""
    topics = ("green tea", "black coffee", "trains to berlin", "a cat", "morning runs")

    class State(TypedDict, total=False):
        n: int

    with open_memory(database, model=Words(), vector_sync="deferred") as memory:
        moments = Moments(memory)

        def step(state: State, *, store: BaseStore) -> State:
            n = state["n"]
            key, text = f"k{n * 7 % 40}", f"{topics[n % 5]} number {n}"
            if n % 11 == 10:
                store.delete(("note",), key)
                moments.texts.pop(key, None)
            else:
                store.put(("note",), key, {"text": text})
                moments.texts[key] = text
            return {"n": n + 1}

        builder = StateGraph(State)
        builder.add_node("step", step)
        builder.add_edge(START, "step")
        builder.add_conditional_edges("step", lambda state: "step" if state["n"] < 500 else END, ["step", END])
        graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
        run = graph.stream({"n": 0}, {**T, "recursion_limit": 600}, stream_mode="checkpoints", durability="sync")
        for n, event in enumerate(run):
            moments.note(event["config"])
            if n % 50 == 49:
                memory.commit(Fact("note", {"text": f"a cat beside {n}"}, id="beside"))
                moments.texts["beside"] = f"a cat beside {n}"
        assert len(moments.found) == 502
        assert moments.check() == 502
        memory.rollback(250, thread_id="t")
        moments.check(every=25)
    with open_memory(database) as memory:
        moments.memory = memory
        moments.check(every=50)


# -- diff -------------------------------------------------------------------------------------------


def test_a_diff_is_what_changed(memory: MemoryStore) -> None:
    memory.commit([note("same", "1"), note("changed", "1"), note("removed", "1"), note("back", "1")])
    memory.commit([note("changed", "2"), note("added", "2"), note("back", "2"), note("passing", "2")])
    memory.delete("note", "removed")
    memory.commit(note("back", "1"))
    memory.delete("note", "passing")
    memory.commit(Fact("other", {"text": "1"}, id="x"))
    found = {change.key: (change.kind, change.before, change.after) for change in memory.diff(4, namespace="note")}
    assert found == {
        "added": ("added", None, {"text": "2"}),
        "changed": ("changed", {"text": "1"}, {"text": "2"}),
        "removed": ("removed", {"text": "1"}, None),
    }
    assert [change.key for change in memory.diff(4)] == ["added", "changed", "removed", "x"]
    backwards = {change.key: change.kind for change in memory.diff(11, 4)}
    assert backwards == {"added": "removed", "changed": "changed", "removed": "added"}
    assert memory.diff(4, 4) == []


def test_a_diff_of_a_step(memory: MemoryStore) -> None:
    graph = counting(memory)
    graph.invoke({"log": ["x"]}, T)
    head, before = list(graph.get_state_history(T))[:2]
    (change,) = memory.diff(before, head)
    assert (change.key, change.kind, change.after) == ("second2", "added", {"text": "second"})


def test_a_diff_sees_what_expired_in_between(memory: MemoryStore) -> None:
    memory.store.put(("note",), "short", {"text": "short"}, ttl=0.002)
    early = datetime.now(UTC)
    time.sleep(0.15)
    for _ in range(2):
        assert [(change.key, change.kind) for change in memory.diff(early)] == [("short", "removed")]
        memory.sweep()

"""Bugs that savers in the field have had, and ours does not. Each test is named after one.

Where the upstream release that is installed still has the bug, a second test shows it there, which proves that the
check can fail. Those are tied to that release: a later one may well have mended it.
"""

import asyncio
import importlib
import operator
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore, SearchItem

from langgraph_memstate import MemoryStore, MemStateCheckpointer
from langgraph_memstate.errors import DeserializationError

Config = dict[str, Any]


def still_in(package: str, release: str) -> pytest.MarkDecorator:
    """For a bug that was seen in this release of an upstream package."""
    return pytest.mark.skipif(version(package) != release, reason=f"seen in {package} {release}")


def at(thread_id: str, checkpoint_id: str | None = None) -> Config:
    named = {"thread_id": thread_id, "checkpoint_ns": "", "checkpoint_id": checkpoint_id}
    return {"configurable": {name: value for name, value in named.items() if value is not None}}


def put(saver: BaseCheckpointSaver[Any], thread_id: str, value: Any, **metadata: Any) -> Config:
    checkpoint = {**empty_checkpoint(), "channel_values": {"a": value}, "channel_versions": {"a": 1}}
    return saver.put(at(thread_id), checkpoint, {"source": "update", "step": 0, "parents": {}, **metadata}, {"a": 1})


# -- langgraph #8443 and #8551 ---------------------------------------------------------------------------


def extend(state: list[str], writes: Sequence[Any]) -> list[str]:
    return [*state, *(text for write in writes for text in write)]


class Branches(TypedDict):
    plain: Annotated[list[str], operator.add]
    delta: Annotated[list[str], DeltaChannel(extend, snapshot_frequency=1000)]


def both(text: str) -> dict[str, list[str]]:
    return {"plain": [text], "delta": [text]}


def two_node_graph(saver: BaseCheckpointSaver[Any]) -> Any:
    builder = StateGraph(Branches)
    builder.add_node("first", lambda state: both(f"{state['plain'][-1]} first"))
    builder.add_node("second", lambda state: both(f"{state['plain'][-1]} second"))
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    return builder.compile(checkpointer=saver)


def branch_everywhere(graph: Any, durability: str) -> list[str]:
    """Leave every checkpoint of a run three ways; return the branches whose state is not the same when read again.

    The plain channel stores its whole value, so it tells what the delta channel must hold.
    """
    thread = at("t")
    graph.invoke(both("base"), thread, durability=durability)
    graph.invoke(both("abandoned"), thread, durability=durability)
    wrong = []
    for number, past in enumerate(list(graph.get_state_history(thread))):
        for way in ("rerun", "replay", "edit"):
            live = None
            if way == "edit":
                graph.update_state(past.config, both(f"edit {number}"), as_node="second")
            elif way == "rerun":
                live = graph.invoke(both(f"in {number}"), past.config, durability=durability)
            elif past.next:
                live = graph.invoke(None, past.config, durability=durability)
            read = graph.get_state(thread).values
            if read["delta"] != read["plain"] or live not in (None, read):
                wrong.append(f"{way} at {number}: {read}, live {live}")
    for one in graph.get_state_history(thread):
        if one.values.get("delta", []) != one.values.get("plain", []):
            wrong.append(f"history: {one.values}")
    return wrong


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_langgraph_8443_a_fork_with_a_delta_channel_replays_the_abandoned_branch(
    memory: MemoryStore, durability: str
) -> None:
    """A fork's base keeps the writes of the branch that it leaves, and reading the fork replayed them into it."""
    assert branch_everywhere(two_node_graph(memory.checkpointer), durability) == []


def test_langgraph_8551_an_edit_of_the_past_writes_into_the_branch_that_it_leaves(memory: MemoryStore) -> None:
    """`update_state` at an older checkpoint stored its writes there, and the other branch replayed them."""
    graph = two_node_graph(memory.checkpointer)
    thread = at("t")
    graph.invoke(both("base"), thread)
    base = graph.get_state(thread).config
    graph.invoke(both("left"), thread)
    left = graph.get_state(thread)
    graph.update_state(base, both("right"), as_node="second")

    right = graph.get_state(thread)
    assert right.values["delta"] == right.values["plain"] == ["base", "base first", "base first second", "right"]
    assert graph.get_state(left.config).values == left.values
    assert "right" not in left.values["delta"]


def test_langgraph_8443_is_seen_on_a_saver_that_keeps_one_value_per_channel_version() -> None:
    """Branches count their versions alike, so such a saver mixes what LangGraph stores to keep them apart."""

    class OnePerVersion(InMemorySaver):
        def get_next_version(self, current: Any, channel: None) -> Any:
            return 1 if current is None else current + 1

    assert branch_everywhere(two_node_graph(OnePerVersion()), "sync") != []


# -- langgraph #8558 -------------------------------------------------------------------------------------


async def write_while_listing(saver: BaseCheckpointSaver[Any], patience: float) -> list[str]:
    """Pause a listing of 60 checkpoints at the first, write, and go on."""
    for _ in range(60):
        stored = await saver.aput(at("t"), empty_checkpoint(), {}, {})
    listing: AsyncIterator[Any] = saver.alist(at("t"))
    await anext(listing)
    try:
        await asyncio.wait_for(saver.aput_writes(stored, [("a", 1)], "task"), patience)
        await asyncio.wait_for(saver.aput(at("t"), empty_checkpoint(), {}, {}), patience)
        await asyncio.wait_for(saver.aget_tuple(at("t")), patience)
        return [one.checkpoint["id"] async for one in listing]
    finally:
        await listing.aclose()  # type: ignore[attr-defined]


async def test_langgraph_8558_alist_holds_a_lock_across_yield(memory: MemoryStore) -> None:
    """A consumer that paused in `alist` blocked every write of the saver."""
    assert len(await write_while_listing(memory.checkpointer, 30)) == 59


@still_in("langgraph-checkpoint-sqlite", "3.1.2")
async def test_langgraph_8558_upstream(tmp_path: Path) -> None:
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "upstream.db")) as saver:
        with pytest.raises(TimeoutError):
            await write_while_listing(saver, 0.3)


# -- langgraph #7857 -------------------------------------------------------------------------------------


async def test_langgraph_7857_sync_put_inside_a_running_event_loop_deadlocks(url: str) -> None:
    """Sync methods, called on the thread of the event loop, waited for a coroutine that only that thread could run."""

    async def model(texts: Sequence[str]) -> list[list[float]]:
        await asyncio.sleep(0)
        return [[1.0, float(len(text))] for text in texts]

    async with MemoryStore.open(":memory:", index={"dims": 2, "embed": model, "fields": ["text"]}) as memory:
        saver, store = memory.checkpointer, memory.store
        saver.setup()
        stored = put(saver, "t", 1)
        saver.put_writes(stored, [("a", 2)], "task")
        assert saver.get_tuple(stored).pending_writes == [("task", "a", 2)]
        assert [one.config for one in saver.list(None)] == [stored]
        assert saver.get_delta_channel_history(config=stored, channels=["a"]) == {"a": {"writes": []}}
        saver.copy_thread("t", "u")
        saver.prune(["u"])
        saver.delete_for_runs(["nobody"])
        saver.delete_thread("u")
        store.put(("notes",), "k", {"text": "tofu"})  # an async model, called for a sync caller
        assert [item.key for item in store.search(("notes",), query="tofu")] == ["k"]

        def remember(state: Any, *, store: BaseStore) -> dict[str, Any]:
            store.put(("notes",), "in a graph", {"text": "soup"})
            return {"plain": ["done"]}

        builder = StateGraph(Branches)
        builder.add_node("remember", remember)
        builder.add_edge(START, "remember")
        graph = builder.compile(checkpointer=saver, store=store)
        assert graph.invoke(both("in"), at("g"))["plain"] == ["in", "done"]
        assert graph.get_state(at("g")).values["plain"] == ["in", "done"]
        assert store.get(("notes",), "in a graph") is not None
        with MemStateCheckpointer.from_conn_string(url) as another:
            put(another, "t", 1)


UPSTREAM_7857 = """
import asyncio, signal, sys
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

async def main():
    async with AsyncSqliteSaver.from_conn_string(":memory:") as saver:
        await saver.setup()
        signal.alarm(1)  # kills a process that waits for ever
        where = {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "1"}
        saver.put_writes({"configurable": where}, [("a", 1)], "task")

asyncio.run(main())
"""


@still_in("langgraph-checkpoint-sqlite", "3.1.2")
def test_langgraph_7857_upstream() -> None:
    ended = subprocess.run([sys.executable, "-c", UPSTREAM_7857], capture_output=True, timeout=60, check=False)
    assert ended.returncode < 0, "killed by the alarm"


async def test_a_hundred_async_runs_with_vectors_do_not_wait_for_each_other_for_ever() -> None:
    """A pool of threads whose work waits for more work of the same pool stands still once it is full."""

    def model(texts: Sequence[str]) -> list[list[float]]:
        return [[1.0, float(len(text))] for text in texts]

    async def remember(state: Branches, *, store: BaseStore) -> dict[str, Any]:
        await store.aput(("notes",), state["plain"][0], {"text": state["plain"][0]})
        return {"plain": ["done"]}

    builder = StateGraph(Branches)
    builder.add_node("remember", remember)
    builder.add_edge(START, "remember")
    async with MemoryStore.open(":memory:", index={"dims": 2, "embed": model, "fields": ["text"]}) as memory:
        graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
        runs = (graph.ainvoke(both(f"{number}"), at(f"{number}")) for number in range(150))
        await asyncio.wait_for(asyncio.gather(*runs), 60)
        assert len(memory.query(("notes",), limit=1000)) == 150


# -- langgraph #8136 -------------------------------------------------------------------------------------

WRITER = """
import sys, threading
from langgraph.checkpoint.base import empty_checkpoint
from langgraph_memstate import MemoryStore

path, name = sys.argv[1:]
errors = []

def write(memory, thread_id):
    try:
        for number in range(25):
            config = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
            checkpoint = {**empty_checkpoint(), "channel_values": {"a": number}, "channel_versions": {"a": 1}}
            stored = memory.checkpointer.put(config, checkpoint, {"source": "loop", "step": number}, {"a": 1})
            memory.checkpointer.put_writes(stored, [("a", number)], "task")
            memory.store.put(("notes", name), f"{thread_id} {number}", {"number": number})
            assert memory.checkpointer.get_tuple(stored).pending_writes == [("task", "a", number)]
    except BaseException as error:
        errors.append(error)

with MemoryStore.open(path) as memory:
    print("open", flush=True)
    sys.stdin.readline()
    threads = [threading.Thread(target=write, args=(memory, f"{name} {number}")) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
sys.exit("".join(map(repr, errors)) or 0)
"""


def test_langgraph_8136_database_is_locked(database: Path) -> None:
    """Several connections that wrote one file got `database is locked`; here it is 3 processes of 6 threads each."""
    names = ["p0", "p1", "p2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(database), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    ended = []
    for process in processes:  # all are open: now they start together
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        ended.append((process.returncode, errors))
    assert ended == [(0, "")] * 3
    with MemoryStore.open(database) as memory:
        stats = memory.stats()
        assert (stats["checkpoints"], stats["writes"], stats["items"]) == (450, 450, 450)
        numbers = [one.checkpoint["channel_values"]["a"] for one in memory.checkpointer.list(at("p1 3"))]
        assert numbers == list(range(25))[::-1]


def test_langgraph_8136_readers_go_on_while_another_connection_holds_the_write_lock(
    file_memory: MemoryStore, database: Path
) -> None:
    """A writer elsewhere that takes its time delays our writes and fails nothing."""
    stored = put(file_memory.checkpointer, "t", 1)
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    errors: list[BaseException] = []

    def write() -> None:
        try:
            file_memory.checkpointer.put_writes(stored, [("a", 2)], "task")
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.2)
    assert file_memory.checkpointer.get_tuple(stored).pending_writes == []
    other.execute("COMMIT")
    other.close()
    writer.join(30)
    assert errors == []
    assert file_memory.checkpointer.get_tuple(stored).pending_writes == [("task", "a", 2)]


# -- langgraph #8115 -------------------------------------------------------------------------------------


def test_langgraph_8115_put_writes_race(memory: MemoryStore) -> None:
    """Tasks that finished at the same time lost each other's pending writes: a list was read and rebound unlocked."""
    saver = memory.checkpointer
    stored = put(saver, "t", 1)
    start = threading.Barrier(32, timeout=30)
    errors: list[BaseException] = []

    def finish(number: int) -> None:
        try:
            start.wait()
            for _ in range(3):  # LangGraph may save a task again
                saver.put_writes(stored, [("a", number), ("b", number)], f"task-{number:02}", "path")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=finish, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert saver.get_tuple(stored).pending_writes == [
        (f"task-{number:02}", channel, number) for number in range(32) for channel in ("a", "b")
    ]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_langgraph_8115_in_a_graph(memory: MemoryStore, durability: str) -> None:
    """A wide step fails in one task: the writes and memories of the 24 that finished together are all there later."""
    ran: list[str] = []
    finished = threading.Barrier(25, timeout=30)
    down = threading.Event()
    down.set()

    def worker(name: str) -> Callable[..., Any]:
        def work(state: Branches, *, store: BaseStore) -> dict[str, Any]:
            store.put(("notes",), name, {"by": name})
            ran.append(name)
            finished.wait()
            return {"plain": [name]}

        return work

    def failing(state: Branches) -> dict[str, Any]:
        if down.is_set():
            finished.wait()
            time.sleep(0.5)  # LangGraph drops what finishes after a failure that ends an `exit` run
            raise RuntimeError("down")
        return {"plain": ["failing"]}

    names = [f"w{number:02}" for number in range(24)]
    builder = StateGraph(Branches)
    for name in names:
        builder.add_node(name, worker(name))
        builder.add_edge(START, name)
    builder.add_node("failing", failing)
    builder.add_edge(START, "failing")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    with pytest.raises(RuntimeError, match="down"):
        graph.invoke(both("in"), {**at("t"), "max_concurrency": 30}, durability=durability)
    done = {task.name for task in graph.get_state(at("t")).tasks if task.result}
    assert memory.query(("notes",)) == [], "the step has not landed"
    down.clear()

    result = graph.invoke(None, at("t"), durability=durability)
    assert sorted(result["plain"]) == sorted(["in", "failing", *names])
    assert done == set(names)
    assert sorted(ran) == names, "no task ran twice"
    assert sorted(fact.id for fact in memory.query(("notes",), limit=100)) == names


# -- langgraph #6970 -------------------------------------------------------------------------------------


@pytest.fixture
def vanished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes an object of a class whose module is gone when the object has been stored."""
    (tmp_path / "ephemeral_models.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Profile:\n    name: str\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("ephemeral_models")

    def vanish() -> None:
        monkeypatch.delitem(sys.modules, "ephemeral_models")
        (tmp_path / "ephemeral_models.py").unlink()
        importlib.invalidate_caches()

    profile = module.Profile("Ann")
    vanish_later: Callable[[], Any] = lambda: (profile, vanish)  # noqa: E731
    return vanish_later


def test_langgraph_6970_a_value_that_fails_to_load_becomes_none_in_silence(
    memory: MemoryStore, vanished: Callable[[], Any]
) -> None:
    """A class that was renamed or removed turned the stored object into `None`, and the thread went on without it."""
    profile, vanish = vanished()
    stored = put(memory.checkpointer, "t", {"profile": profile})
    other = put(memory.checkpointer, "u", 1)
    memory.checkpointer.put_writes(other, [("a", [profile])], "task")
    assert memory.checkpointer.get_tuple(stored).checkpoint["channel_values"] == {"a": {"profile": profile}}
    vanish()

    for read in (
        lambda: memory.checkpointer.get_tuple(stored),
        lambda: memory.checkpointer.get_tuple(other),
        lambda: list(memory.checkpointer.list(None)),
        lambda: asyncio.run(memory.checkpointer.aget_tuple(stored)),
    ):
        with pytest.raises(DeserializationError, match=r"ephemeral_models\.Profile"):
            read()


@still_in("langgraph-checkpoint", "4.3.2")
def test_langgraph_6970_upstream(vanished: Callable[[], Any]) -> None:
    profile, vanish = vanished()
    saver = InMemorySaver()
    stored = put(saver, "t", {"profile": profile})
    vanish()
    found = saver.get_tuple(stored).checkpoint["channel_values"]["a"]["profile"]
    assert found is None or type(found) is dict  # in silence, one or the other by release


# -- CVE-2025-67644 and CVE-2025-8709 ----------------------------------------------------------------------

HOSTILE_KEYS = [
    "x') = 1 OR 1=1 --",
    "x') IS NULL OR ('1'='1",
    "x' UNION SELECT data FROM channel_values --",
    "'; DROP TABLE checkpoints; --",
    '"; DELETE FROM items; --',
    "a\x00b",
    "source')",
    "%",
    "[0]",
    'a"b\\',
    "",
]


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_cve_2025_67644_filter_keys_of_the_saver_in_sql(memory: MemoryStore, key: str) -> None:
    """Keys of a metadata filter were part of the SQL text, so a key could read or change what it liked."""
    saver = memory.checkpointer
    put(saver, "victim", "secret", owner="bob")
    before = memory.stats()
    for value in (1, None, "loop", {"$eq": 1}, {"$ne": 2}, {key: 1}):
        found = list(saver.list(None, filter={key: value, "owner": "eve"}))
        assert found == [], "another condition still holds"
    assert list(saver.list(None, filter={key: "no such value"})) == []
    mine = put(saver, "mine", 1, **{key: "marked"})
    assert [one.config for one in saver.list(None, filter={key: "marked"})] == [mine], "it is a key like any other"
    assert memory.stats() == {**before, "checkpoints": before["checkpoints"] + 1, "channel_values": 2}


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_cve_2025_8709_filter_keys_of_the_store_in_sql(memory: MemoryStore, key: str) -> None:
    """Keys and operators of a store filter were part of the SQL text."""
    store = memory.store
    store.put(("bob",), "secret", {"owner": "bob", "text": "secret"})
    before = memory.stats()

    def search(filter: dict[str, Any]) -> list[SearchItem]:
        return store.search(("bob",), filter=filter, limit=100)

    for value in (1, None, "loop", {"$eq": 1}, {"$gt": 0}, {"$ne": 2}):
        assert search({key: value, "owner": "eve"}) == []
    assert search({key: "no such value"}) == []
    assert search({"owner": key}) == []
    with pytest.raises(ValueError, match="operator"):
        search({"owner": {f"${key}": 1}})
    assert memory.stats() == before
    store.put(("bob",), "marked", {key: "marked"})
    assert [item.key for item in search({key: "marked"})] == ["marked"]

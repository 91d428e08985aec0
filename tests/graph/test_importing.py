"""What LangGraph's own savers and stores hold is, imported, what they said it was."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import ormsgpack
import pytest
from langchain_core.messages import AIMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import Item
from typing_extensions import TypedDict

sys.path.insert(0, str(Path(__file__).parents[1]))
from moved import Plan, answer, config, faults, graph_on, rows_of, say

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.cli import main
from langgraph_memstate.errors import (
    CorruptRowError,
    DeserializationError,
    MemStateError,
    MigrationError,
    NamespaceError,
    UnfinishedCopyError,
)
from langgraph_memstate.graph import importing, slices
from langgraph_memstate.graph.importing import import_langgraph

SqliteSaver = pytest.importorskip("langgraph.checkpoint.sqlite", reason="the extra [demo] is not installed").SqliteSaver
from langgraph.store.sqlite import SqliteStore  # noqa: E402

ROOT = Path(__file__).parents[2]


def _messages(left: list[Any], right: list[Any]) -> list[Any]:
    return [*left, *(one for batch in right for one in batch)]


class Long(TypedDict):
    said: Annotated[list[str], DeltaChannel(_messages, snapshot_frequency=3)]


def long_graph(saver: Any) -> Any:
    builder = StateGraph(Long).add_node("say", lambda state: {"said": [f"reply {len(state['said'])}"]})
    return builder.add_edge(START, "say").add_edge("say", END).compile(checkpointer=saver)


def play(saver: Any, store: Any) -> None:
    """Threads with all that a checkpoint may hold, and memories of every kind."""
    graph = graph_on(saver, store)
    say(graph, "one", "hello", "green tea", "trains to berlin")
    say(graph, "waits", "ask me")
    with suppress(ConnectionError):
        say(graph, "half", "fail once")
    graph.update_state(config("one"), {"note": {"by": "hand"}})
    earlier = list(graph.get_state_history(config("one")))[4]
    graph.invoke({"messages": [("user", "a branch")]}, earlier.config)
    for text in ("a", "b", "c", "d", "e"):
        long_graph(saver).invoke({"said": [text]}, config("long"))
    store.put(("users", "ada"), "plain", {"text": "é 😀", "deep": [{"a": [1.5, None, True]}], "big": 2**60})
    store.put(("users",), "empty", {})
    store.put(("old",), "gone", {"n": 1}, ttl=0.0)
    store.put(("young",), "stays", {"n": 1}, ttl=60.0)
    store.put(("users", "ada"), "plain", {"text": "again"})


@pytest.fixture(scope="module")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that a saver and a store of LangGraph's share."""
    path = tmp_path_factory.mktemp("langgraph") / "langgraph.db"
    with SqliteSaver.from_conn_string(str(path)) as saver, SqliteStore.from_conn_string(str(path)) as store:
        store.setup()
        play(saver, store)
    return path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "memory.db"


# -- what must hold ---------------------------------------------------------------------------------


def place(step: CheckpointTuple) -> tuple[str, ...]:
    return tuple(step.config["configurable"][name] for name in ("thread_id", "checkpoint_ns", "checkpoint_id"))


def check_threads(saver: Any, memory: MemoryStore) -> None:
    """Every checkpoint, listed or asked for, says what upstream's saver says."""
    theirs = {place(step): step for step in saver.list(None)}
    ours = {place(step): step for step in memory.checkpointer.list(None)}
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 40
    assert len({ns for _, ns, _ in theirs}) > 1, "there should be subgraphs"
    assert any(step.pending_writes for step in theirs.values())
    for key, expected in theirs.items():
        assert ours[key] == expected
        assert memory.checkpointer.get_tuple(expected.config) == expected
    for thread_id in {thread_id for thread_id, _, _ in theirs}:
        listed = [place(step) for step in memory.checkpointer.list(config(thread_id))]
        assert listed == [place(step) for step in saver.list(config(thread_id))]


def check_deltas(saver: Any, memory: MemoryStore) -> None:
    steps = list(saver.list(config("long")))
    assert any("said" not in step.checkpoint["channel_values"] for step in steps), "there should be deltas"
    for step in steps:
        expected = saver.get_delta_channel_history(config=step.config, channels=["said"])
        assert memory.checkpointer.get_delta_channel_history(config=step.config, channels=["said"]) == expected
    assert long_graph(memory.checkpointer).get_state(config("long")) == long_graph(saver).get_state(config("long"))
    again = long_graph(memory.checkpointer).invoke({"said": ["f"]}, config("long"))
    assert again["said"][-2:] == ["f", "reply 11"]


def check_items(store: Any, memory: MemoryStore) -> None:
    theirs = {(item.namespace, item.key): told(item) for item in store.search((), limit=1_000)}
    ours = {(item.namespace, item.key): told(item) for item in memory.store.search((), limit=1_000)}
    assert ours == {key: item for key, item in theirs.items() if key[0] != ("old",)}
    assert len(ours) > 7
    assert memory.store.get(("old",), "gone") is None
    assert memory.store.list_namespaces() == sorted({namespace for namespace, _ in ours})
    for namespace, key in ours:
        found = memory.store.get(namespace, key)
        assert found is not None
        assert told(found) == theirs[namespace, key]
        assert {entry.reason for entry in memory.history(namespace, key)} == {"imported from LangGraph"}


def told(item: Item) -> tuple[Any, ...]:
    times = (item.created_at, item.updated_at)
    return (item.value, *(time if time.tzinfo is not None else time.replace(tzinfo=UTC) for time in times))


def check_that_it_goes_on(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(faults, "on", False)
    graph = graph_on(memory.checkpointer, memory.store)
    assert answer(graph, "waits")["note"] == {"asked": True}
    item = memory.store.get(("users", "ada"), "answer")
    assert item is not None
    assert item.value == {"text": "ada answered yes"}
    assert {10, 20} <= set(graph.invoke(None, config("half"))["seen"])
    before = graph.get_state(config("one")).values
    say(graph, "one", "one more")
    after = graph.get_state(config("one")).values
    assert after["messages"][: len(before["messages"])] == before["messages"]
    assert len(after["messages"]) == len(before["messages"]) + 2
    assert after["plan"] == Plan(title="one more", steps=["look", "answer"])
    memory.rollback(turns=1, thread_id="one", on_conflict="keep")
    assert graph.get_state(config("one")).values == before


# -- from SQLite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", ["sqlite", "postgres"])
def test_threads_and_memories_of_a_file(
    sqlite_file: Path, database: Path, destination: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        url: str | Path = database
        if destination == "postgres":
            url = stack.enter_context(request.getfixturevalue("postgres").database())
        before = sqlite_file.read_bytes()
        counts = import_langgraph([sqlite_file], url)
        assert sqlite_file.read_bytes() == before
        saver = stack.enter_context(SqliteSaver.from_conn_string(str(sqlite_file)))
        store = stack.enter_context(SqliteStore.from_conn_string(str(sqlite_file)))
        memory = stack.enter_context(MemoryStore.open(url))
        assert counts == {"checkpoints": memory.stats()["checkpoints"], "items": memory.stats()["items"]}
        check_threads(saver, memory)
        check_items(store, memory)
        check_deltas(saver, memory)
        check_that_it_goes_on(memory, monkeypatch)


def test_messages_are_stored_once(sqlite_file: Path, database: Path) -> None:
    import_langgraph([sqlite_file], database)
    with MemoryStore.open(database) as memory:
        elements = memory.stats()["elements"]
        say(graph_on(memory.checkpointer, memory.store), "one", "one more")
        assert memory.stats()["elements"] - elements == 4, "two messages, two sends: the others are known again"


@pytest.mark.parametrize("seed", range(4))
def test_lists_that_change_in_any_way(tmp_path: Path, database: Path, seed: int) -> None:
    """Versions of one list on two branches: longer, shorter, changed in the middle, of atoms, emptied, as before."""
    chance = random.Random(seed)
    path = tmp_path / "lists.db"
    fresh: list[Callable[[], Any]] = [
        lambda: AIMessage(str(chance.random()), id="m"),
        chance.random,
        lambda: {"n": [1]},
    ]
    with SqliteSaver.from_conn_string(str(path)) as saver:
        steps = [saver.put({"configurable": {"thread_id": "t", "checkpoint_ns": ""}}, empty_checkpoint(), {}, {})]
        values: list[Any] = []
        for _ in range(60):
            make = fresh[min(2, chance.randrange(12))] if chance.random() < 0.2 else fresh[0]
            place = chance.randint(0, len(values))
            match chance.randrange(6):
                case 0:
                    values = values[:place]
                case 1:
                    values = [*values[:place], make(), *values[place + 1 :]]
                case 2:
                    values = [*values[:place], make(), *values[place:]]
                case _:
                    values = [*values, make(), make()]
            value: Any = tuple(values) if chance.random() < 0.05 else values
            checkpoint = empty_checkpoint() | {"channel_values": {"list": value, "other": values[::-1]}}
            steps.append(saver.put(chance.choice(steps[-2:]), checkpoint, {}, {}))
        import_langgraph([path], database)
        with MemoryStore.open(database) as memory:
            assert list(memory.checkpointer.list(None)) == list(saver.list(None))
            assert memory.stats()["lists"] > 20


def test_saver_and_store_in_two_files(tmp_path: Path, database: Path, sqlite_file: Path) -> None:
    threads, memories = tmp_path / "threads.db", tmp_path / "memories.db"
    with SqliteSaver.from_conn_string(str(threads)) as saver, SqliteStore.from_conn_string(str(memories)) as store:
        store.setup()
        say(graph_on(saver, store), "one", "hello")
        counts = import_langgraph([threads, f"sqlite:///{memories}"], database)
        assert counts == {"checkpoints": len(list(saver.list(None))), "items": len(store.search((), limit=100))}
    refused(MigrationError, "has checkpoints, and so has a source before it", [threads, sqlite_file], tmp_path / "x.db")
    assert not (tmp_path / "x.db").exists()


def test_memories_know_every_checkpoint_and_no_rollback_takes_them(sqlite_file: Path, database: Path) -> None:
    import_langgraph([sqlite_file], database)
    with MemoryStore.open(database) as memory:
        count = len(memory.store.search((), limit=1_000))
        memory.rollback(3, thread_id="one")
        assert len(memory.store.search((), limit=1_000)) == count
        (first, *_) = list(memory.checkpointer.list(config("one")))[::-1]
        past = memory.as_of(first.config).search((), limit=1_000)
        assert len([item for item in past if item.namespace != ("old",)]) == count


def test_an_index_embeds_what_was_imported(sqlite_file: Path, database: Path) -> None:
    from truth import DIMS, Words

    import_langgraph([sqlite_file], database)
    with MemoryStore.open(database, index={"dims": DIMS, "embed": Words(), "fields": ["text"]}) as memory:
        memory.flush()
        assert memory.verify().ok
        known = memory.store.get(("users", "ada"), "said 3")
        assert known is not None
        (best,) = memory.store.search((), query=known.value["text"], limit=1)
        assert best.value == known.value


def test_a_time_to_live_that_began_again(tmp_path: Path, database: Path) -> None:
    path = tmp_path / "store.db"
    with SqliteStore.from_conn_string(str(path)) as store:
        store.setup()
        store.put(("a",), "k", {"n": 1}, ttl=60)
        until = datetime.fromtimestamp(time.time() + 7_000, UTC)
        store.conn.execute("UPDATE store SET expires_at = ?", (until.isoformat(" "),))
        store.conn.commit()
    import_langgraph([path], database)
    (item,) = rows_of(database)["items"]
    assert item[8:] == (60.0, pytest.approx(until.timestamp()))


def test_rows_of_an_early_release(tmp_path: Path, database: Path) -> None:
    """Without task paths and times to live, and with checkpoints as JSON."""
    path = tmp_path / "early.db"
    messages = {"lc": 1, "type": "constructor", "id": ["langchain_core", "messages", "AIMessage"],
                "kwargs": {"content": "hi", "id": "1"}}  # fmt: skip
    checkpoint = {**empty_checkpoint(), "v": 1, "id": "1", "channel_values": {"n": 5, "messages": [messages]}}
    with closing(sqlite3.connect(path)) as conn:
        conn.executescript(
            "CREATE TABLE checkpoints (thread_id TEXT, checkpoint_ns TEXT, checkpoint_id TEXT, "
            "parent_checkpoint_id TEXT, type TEXT, checkpoint BLOB, metadata BLOB);"
            "CREATE TABLE writes (thread_id TEXT, checkpoint_ns TEXT, checkpoint_id TEXT, task_id TEXT, idx INTEGER, "
            "channel TEXT, type TEXT, value BLOB);"
            "CREATE TABLE store (prefix TEXT, key TEXT, value TEXT, created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP, "
            "updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP);"
            "INSERT INTO store (prefix, key, value) VALUES ('a.b', 'k', '{}');"
            "INSERT INTO writes VALUES ('t', '', '1', 'task', 0, 'n', 'json', x'37');"
        )
        row = ("t", "", "1", None, "json", json.dumps(checkpoint).encode(), b'{"step": 1}')
        conn.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        conn.commit()
    import_langgraph([path], database)
    with MemoryStore.open(database) as memory:
        step = memory.checkpointer.get_tuple(config("t"))
        assert step is not None
        assert step.checkpoint == {**checkpoint, "channel_values": {"n": 5, "messages": [AIMessage("hi", id="1")]}}
        assert step.pending_writes == [("task", "n", 7)]
        assert memory.store.get(("a", "b"), "k") is not None


# -- what is not made into an object ----------------------------------------------------------------


def test_classes_need_not_be_there_and_nothing_is_imported(tmp_path: Path, database: Path) -> None:
    """The row names a module whose import would leave a trace."""
    (tmp_path / "trap.py").write_text(
        "from pathlib import Path\nfrom pydantic import BaseModel\n"
        "Path(__file__).with_name('trace').touch()\nclass Trap(BaseModel):\n    n: int = 1\n"
    )
    made = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from trap import Trap
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.base import empty_checkpoint
from pathlib import Path
with SqliteSaver.from_conn_string({str(tmp_path / "source.db")!r}) as saver:
    checkpoint = empty_checkpoint() | {{"channel_values": {{"one": Trap(n=7), "many": [Trap(n=8), Trap(n=9)]}}}}
    step = saver.put({{"configurable": {{"thread_id": "t", "checkpoint_ns": ""}}}}, checkpoint, {{}}, {{}})
    saver.put_writes(step, [("one", Trap(n=10))], "task")
Path({str(tmp_path / "trace")!r}).unlink()
"""
    python(made)
    command = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom langgraph_memstate.cli import main\n"
    python(command + f"sys.exit(main(['import', {str(tmp_path / 'source.db')!r}, {str(database)!r}]))")
    assert not (tmp_path / "trace").exists()
    read = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from langgraph_memstate import MemoryStore
from langgraph_memstate.errors import DeserializationError
with MemoryStore.open({str(database)!r}) as memory:
    try:
        memory.checkpointer.get_tuple({{"configurable": {{"thread_id": "t"}}}})
    except DeserializationError as error:
        assert "trap.Trap" in str(error), error
    else:
        raise AssertionError("a type that is not loaded was read")
    from trap import Trap
    step = memory.checkpointer.get_tuple({{"configurable": {{"thread_id": "t"}}}})
    assert step.checkpoint["channel_values"] == {{"one": Trap(n=7), "many": [Trap(n=8), Trap(n=9)]}}
    assert step.pending_writes == [("task", "one", Trap(n=10))]
"""
    python(read)


def python(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


VALUES: dict[str, Any] = {
    "nothing": None, "yes": True, "small": 5, "negative": -5, "large": 2**60, "least": -(2**60), "half": 0.5,
    "text": "é" * 100, "long": "x" * 70_000, "bytes": b"\x00" * 300, "more": b"\x01" * 70_000, "empty": [], "none": {},
    "list": list(range(40)), "many": [[n] for n in range(70_000)], "map": {str(n): n for n in range(20)},
    "wide": {str(n): [n] for n in range(70_000)}, "message": AIMessage("hello"), "set": {1, 2},
    "when": datetime(2026, 1, 1, tzinfo=UTC), "plan": Plan(title="t"),
}  # fmt: skip


def test_a_value_is_cut_where_msgpack_says() -> None:
    _, packed = JsonPlusSerializer().dumps_typed(VALUES)
    cut = slices.entries(packed)
    assert {key: JsonPlusSerializer().loads_typed(("msgpack", part)) for key, part in cut.items()} == VALUES
    assert slices.entries(slices.packed_map(cut)) == cut
    for key, part in cut.items():
        items = slices.items(part)
        assert (items is not None) == isinstance(VALUES[key], list), key
        if items is not None:
            assert [JsonPlusSerializer().loads_typed(("msgpack", one)) for one in items] == VALUES[key]
            assert slices.items(slices.packed_array(items)) == items
        is_plain = isinstance(VALUES[key], None | bool | int | float | str | bytes)  # type: ignore[arg-type]
        assert slices.is_atom(part) == is_plain, key


@pytest.mark.parametrize("size", [1, 2, 3, 10, 50, 90])
def test_a_value_that_is_cut_off_is_refused(size: int) -> None:
    packed = ormsgpack.packb({"a": [1, 2, {"b": "x" * 40}], "c": b"123", "d": 1.5, "e": 70_000, "f": ["y" * 20]})
    assert len(packed) > 95
    with pytest.raises(CorruptRowError):
        slices.entries(packed[:size])
    with pytest.raises(CorruptRowError):
        slices.entries(packed + b"\x00")
    with pytest.raises(CorruptRowError):
        slices.entries(b"\x81\xc1\x00")
    with pytest.raises(CorruptRowError):
        slices.entries(b"")


# -- from PostgreSQL --------------------------------------------------------------------------------


@pytest.fixture
def postgres_url(postgres: Any) -> Iterator[str]:
    with postgres.database() as url:
        yield url


def test_threads_and_memories_of_a_server(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the very database they are in: its own tables are in a schema of their own."""
    reason = "langgraph-checkpoint-postgres is not installed"
    saver_of = pytest.importorskip("langgraph.checkpoint.postgres", reason=reason).PostgresSaver
    store_of = pytest.importorskip("langgraph.store.postgres", reason=reason).PostgresStore
    with saver_of.from_conn_string(postgres_url) as saver, store_of.from_conn_string(postgres_url) as store:
        saver.setup()
        store.setup()
        play(saver, store)
        counts = import_langgraph([postgres_url], postgres_url)
        with MemoryStore.open(postgres_url) as memory:
            assert counts == {"checkpoints": memory.stats()["checkpoints"], "items": memory.stats()["items"]}
            check_threads(saver, memory)
            check_items(store, memory)
            check_deltas(saver, memory)
            check_that_it_goes_on(memory, monkeypatch)


_TABLES = """
CREATE TABLE checkpoints (thread_id text, checkpoint_ns text, checkpoint_id text, parent_checkpoint_id text, type text,
    checkpoint jsonb, metadata jsonb);
CREATE TABLE checkpoint_blobs (thread_id text, checkpoint_ns text, channel text, version text, type text, blob bytea);
CREATE TABLE checkpoint_writes (thread_id text, checkpoint_ns text, checkpoint_id text, task_id text, idx int,
    channel text, type text, blob bytea, task_path text DEFAULT '');
CREATE TABLE store (prefix text, key text, value jsonb, created_at timestamptz, updated_at timestamptz,
    expires_at timestamptz, ttl_minutes int);
"""


def test_rows_as_upstream_lays_them_out_on_a_server(postgres_url: str, database: Path) -> None:
    """Values beside their checkpoint and inline, a channel that is empty, and sends of an early release."""
    import psycopg

    packed = JsonPlusSerializer().dumps_typed
    first = {**empty_checkpoint(), "v": 1, "id": "1", "channel_values": {"n": 1.0},
             "channel_versions": {"n": "1", "messages": "1", "plan": "1"}}  # fmt: skip
    second = {**first, "id": "2", "channel_values": {"n": 2},
              "channel_versions": {"n": "2", "messages": "2", "plan": "1", "gone": "2"}}  # fmt: skip
    hi, there = AIMessage("hi", id="1"), AIMessage("there", id="2")
    blobs = [("messages", "1", [hi]), ("messages", "2", [hi, there]), ("plan", "1", Plan(title="p"))]
    when = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(_TABLES)
        for step, parent in ((first, None), (second, "1")):
            row = (step["id"], parent, json.dumps(step), '{"step": 1, "source": "loop"}')
            conn.execute("INSERT INTO checkpoints VALUES ('t', '', %s, %s, NULL, %s, %s)", row)
        for channel, version, value in blobs:
            row = (channel, version, *packed(value))
            conn.execute("INSERT INTO checkpoint_blobs VALUES ('t', '', %s, %s, %s, %s)", row)
        conn.execute("INSERT INTO checkpoint_blobs VALUES ('t', '', 'gone', '2', 'empty', NULL)")
        for number, (task, channel) in enumerate((("x", "__pregel_tasks"), ("x", "n"), ("w", "__pregel_tasks"))):
            row = (task, number, channel, *packed({"sent": number}))
            conn.execute("INSERT INTO checkpoint_writes VALUES ('t', '', '1', %s, %s, %s, %s, %s)", row)
        conn.execute("INSERT INTO store VALUES ('a.b', 'k', '{\"x\": 1.0}', %s, %s, NULL, NULL)", (when, when))
    assert import_langgraph([postgres_url], database) == {"checkpoints": 2, "items": 1}
    with MemoryStore.open(database) as memory:
        newest, oldest = memory.checkpointer.list(config("t"))
        assert oldest.checkpoint["channel_values"] == {"n": 1.0, "messages": [hi], "plan": Plan(title="p")}
        assert oldest.pending_writes == [
            ("w", "__pregel_tasks", {"sent": 2}), ("x", "__pregel_tasks", {"sent": 0}), ("x", "n", {"sent": 1}),
        ]  # fmt: skip
        sends = [{"sent": 2}, {"sent": 0}]
        assert newest.checkpoint["channel_values"] == {
            "n": 2, "messages": [hi, there], "plan": Plan(title="p"), "__pregel_tasks": sends,
        }  # fmt: skip
        assert newest.checkpoint["channel_versions"]["__pregel_tasks"] == "2"
        assert newest.parent_config == oldest.config
        item = memory.store.get(("a", "b"), "k")
        assert item is not None
        assert (item.value, item.created_at, item.updated_at) == ({"x": 1.0}, when, when)


# -- refused, and broken off ------------------------------------------------------------------------


def refused(error: type[MemStateError], match: str, sources: list[Any], destination: Any) -> None:
    with pytest.raises(error, match=match):
        import_langgraph(sources, destination)


def test_sources_that_are_none(tmp_path: Path, database: Path, postgres_url: str, sqlite_file: Path) -> None:
    MemoryStore.open(tmp_path / "ours.db").close()
    (tmp_path / "text.db").write_text("not a database, but a long enough text " * 30)
    refused(MigrationError, "is not there", [tmp_path / "nothing.db"], database)
    refused(MigrationError, "has neither .* is moved by migrate", [tmp_path / "ours.db"], database)
    refused(MigrationError, "has neither", [postgres_url], database)
    refused(MigrationError, "nothing to import from", ["redis://x"], database)
    refused(MigrationError, "nothing was named", [], database)
    refused(MemStateError, "not a SQLite database", [tmp_path / "text.db"], database)
    assert not database.exists()
    with pytest.raises(MemStateError, match="another program"):
        import_langgraph([sqlite_file], sqlite_file)


def test_a_destination_in_use_is_left_as_it_is(sqlite_file: Path, database: Path) -> None:
    with MemoryStore.open(database) as memory:
        memory.commit(Fact("note", {"text": "mine"}))
    before = rows_of(database)
    refused(MigrationError, "a memory of its own", [sqlite_file], database)
    assert rows_of(database) == before


def changed(sqlite_file: Path, tmp_path: Path, statement: str) -> Path:
    path = tmp_path / "changed.db"
    path.write_bytes(sqlite_file.read_bytes())
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute(statement).rowcount
        conn.commit()
    return path


LAST = "rowid = (SELECT max(rowid) FROM {})"


@pytest.mark.parametrize(
    ("table", "change", "error", "match"),
    [
        ("checkpoints", "checkpoint = x'82a1'", CorruptRowError, "cut off"),
        ("checkpoints", "type = 'msgpack+aes'", DeserializationError, "of type 'msgpack[+]aes': encrypted"),
        ("checkpoints", "metadata = 'x'", CorruptRowError, "its metadata is not JSON"),
        ("writes", "type = 'pickle'", DeserializationError, "is a pickle"),
        ("store", "value = '[1]'", MemStateError, "a value is a dict"),
        ("store", "value = '{'", CorruptRowError, "is not JSON"),
        ("store", "prefix = 'a..b'", NamespaceError, "label ''"),
        ("store", "updated_at = 'then'", CorruptRowError, "'then' is no time"),
    ],
)
def test_a_row_that_cannot_be_taken_over_is_named(
    sqlite_file: Path, tmp_path: Path, database: Path, table: str, change: str, error: type[MemStateError], match: str
) -> None:
    path = changed(sqlite_file, tmp_path, f"UPDATE {table} SET {change} WHERE {LAST.format(table)}")
    refused(error, match, [path], database)
    with pytest.raises(UnfinishedCopyError, match=r"an import of .*changed\.db"):
        MemoryStore.open(database)


class Broken(Exception):
    """Ends an import in the middle."""


@pytest.mark.parametrize("number", [1, 3, 6])
def test_what_was_broken_off_begins_anew(
    sqlite_file: Path, database: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_CHECKPOINTS", "_ITEMS"):
        monkeypatch.setattr(importing, name, 7)
    told: list[tuple[str, int, int]] = []

    def report(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if len(told) == number:
            raise Broken

    with pytest.raises(Broken):
        import_langgraph([sqlite_file], database, on_progress=report)
    with pytest.raises(UnfinishedCopyError):
        MemoryStore.open(database)
    counts = import_langgraph([sqlite_file], database, on_progress=report)
    assert told[-1] == ("checkpoints", sum(counts.values()), sum(counts.values()))
    with SqliteSaver.from_conn_string(str(sqlite_file)) as saver, MemoryStore.open(database) as memory:
        check_threads(saver, memory)


# -- the command line -------------------------------------------------------------------------------


def test_the_command_imports_and_says_what(
    sqlite_file: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(sqlite_file), str(database)]) == 0
    said = capsys.readouterr()
    with MemoryStore.open(database) as memory:
        stats = memory.stats()
    assert said.out.startswith("imported in ")
    assert said.out.endswith(f": {stats['checkpoints']} checkpoints, {stats['items']} items\n")
    assert said.err.splitlines()[-1] == "100%"


def test_the_command_says_what_was_wrong(sqlite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say_error: Callable[[], str] = lambda: capsys.readouterr().err  # noqa: E731
    assert main(["import", str(tmp_path / "nothing.db"), str(tmp_path / "m.db")]) == 1
    assert say_error().startswith("memstate: ")
    assert main(["migrate", str(sqlite_file), str(tmp_path / "m.db")]) == 1
    assert "for that there is: memstate import" in say_error()
    with pytest.raises(SystemExit) as exit_:
        main(["import", str(sqlite_file)])
    assert exit_.value.code == 2

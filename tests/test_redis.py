"""What only a Redis server can do to a memory: go away in the middle, come back without its data, and be shared."""

from __future__ import annotations

import functools
import logging
import operator
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore

sys.path.insert(0, str(Path(__file__).parent))
from truth import DIMS, Words, check_search, commit, faulty_chroma, notes, python

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import (
    DatabaseOpenError,
    DiskFullError,
    LostCommitsError,
    MemStateError,
    NewerSchemaError,
    ReadOnlyError,
    StorageError,
    TransientError,
)

redis = pytest.importorskip("redis", reason="the extra [redis] is not installed")

from line import When  # noqa: E402
from redis_proxy import line_to  # noqa: E402
from redis_server import Server, running  # noqa: E402

from langgraph_memstate import RedisStorage  # noqa: E402
from langgraph_memstate.storage.operations import Prepare, Settle  # noqa: E402
from langgraph_memstate.storage.values import PreparedRow  # noqa: E402


@pytest.fixture
def name(redis_server: Server) -> Iterator[str]:
    with redis_server.memory() as fresh:
        yield fresh


@pytest.fixture
def memory(redis_server: Server, name: str) -> Iterator[MemoryStore]:
    with MemoryStore(redis_server.storage(name)) as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own, which it may stop, fill and reconfigure."""
    with running() as alone:
        yield alone


def note(key: str, **payload: Any) -> Fact:
    return Fact("note", payload or {"text": key}, id=key)


def keys(memory: MemoryStore) -> list[str]:
    return [entry.key for entry in memory.log()]


def persist(call: Any, seconds: float = 20.0) -> Any:
    """Call until it is not refused with `TransientError` any more; anything else is raised."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except TransientError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


# -- a server that goes away ------------------------------------------------------------------------


def test_connections_that_were_cut_while_idle_are_not_noticed(memory: MemoryStore, redis_server: Server) -> None:
    memory.commit(note("a"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: keys(memory), range(8)))
    redis_server.cut()
    memory.commit(note("b"))
    assert keys(memory) == ["a", "b"]
    redis_server.cut()
    assert keys(memory) == ["a", "b"]


def test_a_connection_that_is_in_use_at_closing_is_not_kept(redis_server: Server, name: str) -> None:
    storage = redis_server.storage(name)
    pool = storage._link._pool
    with MemoryStore(storage) as memory:
        with pool.connection() as conn:
            conn.connect()
            memory.close()
        assert not pool._idle
        assert conn._sock is None
    with MemoryStore(storage) as memory:
        memory.commit(note("a"))
        assert pool._idle


def test_a_server_that_is_down_is_a_transient_error(server: Server) -> None:
    with MemoryStore(server.storage("m", timeout=0.3)) as memory:
        memory.commit(note("a"))
        server.stop()
        with pytest.raises(TransientError, match="nothing landed"):
            memory.commit(note("b"))
        with pytest.raises(TransientError, match="cannot be reached"):
            keys(memory)
        server.start()
        memory.commit(note("c"))
        assert keys(memory) == ["a", "c"]


def test_a_short_absence_is_waited_for(server: Server) -> None:
    with MemoryStore(server.storage("m")) as memory, ThreadPoolExecutor(2) as pool:
        memory.commit(note("a"))
        server.stop()
        written, read = pool.submit(memory.commit, note("b")), pool.submit(keys, memory)
        time.sleep(0.3)
        server.start()
        written.result(timeout=20)
        assert read.result(timeout=20)[0] == "a"
        assert keys(memory) == ["a", "b"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_whose_answer_was_lost_lands_once(redis_server: Server, name: str, when: When) -> None:
    with line_to(redis_server.port) as line, MemoryStore(RedisStorage(line.url, name=name)) as memory:
        memory.commit(note("a"))
        for number in range(3):
            line.breaks = when
            memory.commit(note(f"b{number}"))
            memory.commit(note(f"c{number}"))
        assert line.broken == 3
        assert [entry.seq for entry in memory.log()] == list(range(1, 8))
        assert keys(memory) == ["a", "b0", "c0", "b1", "c1", "b2", "c2"]
        with MemoryStore(redis_server.storage(name)) as other:
            assert keys(other) == keys(memory)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_can_be_done_once_is_done_once(redis_server: Server, name: str, when: When) -> None:
    """A record that is made twice, or settled twice, is refused; a lost answer must not make it so."""
    record = Prepare(PreparedRow("p", "index", ("v",), "me", 1.0))
    with line_to(redis_server.port) as line, closing(RedisStorage(line.url, name=name)) as storage:
        storage.open()
        for op in (record, Settle("p"), record):
            line.breaks = when
            assert storage.apply(((op,),)) == [None]
        assert line.broken == 3
        with storage.snapshot() as reader:
            assert reader.prepared() == [record.row]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_whose_outcome_nobody_can_tell_says_so(redis_server: Server, name: str, when: When) -> None:
    with line_to(redis_server.port) as line, MemoryStore(RedisStorage(line.url, name=name, timeout=0.3)) as memory:
        memory.commit(note("a"))
        line.breaks, line.is_down = when, True
        with pytest.raises(TransientError, match="whole or not at all"):
            memory.commit(note("b"))
        line.is_down = False
        memory.commit(note("c"))
        assert keys(memory) == (["a", "b", "c"] if when == "after" else ["a", "c"])


def test_another_lands_while_an_answer_is_lost(redis_server: Server, name: str) -> None:
    """The entry is there, and is not the last any more; or it is not, and has to be made anew."""
    with line_to(redis_server.port) as line, MemoryStore(redis_server.storage(name)) as other:
        storage = RedisStorage(line.url, name=name)
        with MemoryStore(storage) as memory:
            inner = storage._link.persist
            for number, when in enumerate(("after", "before")):
                line.breaks = when

                def persist(call: Any, doing: str, *, writes: bool = False, number: int = number) -> Any:
                    def late() -> Any:
                        if line.broken == number + 1 and f"other{number}" not in keys(other):
                            other.commit(note(f"other{number}"))
                        return call()

                    return inner(late, doing, writes=writes)

                storage._link.persist = persist  # type: ignore[method-assign]
                memory.commit(note(f"ours{number}"))
                storage._link.persist = inner  # type: ignore[method-assign]
            assert keys(memory) == ["ours0", "other0", "other1", "ours1"] == keys(other)


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


def agent(memory: MemoryStore, pause: float) -> Any:
    def node(name: str) -> Any:
        def run(state: State, *, store: BaseStore) -> dict[str, Any]:
            time.sleep(pause)
            store.put(("remembered",), f"{len(state['log'])}", {"by": name})
            return {"log": [name]}

        return run

    graph = StateGraph(State)
    names = [f"n{number}" for number in range(6)]
    for name in names:
        graph.add_node(name, node(name))
    for left, right in zip((START, *names), (*names, END), strict=True):
        graph.add_edge(left, right)
    return graph.compile(checkpointer=memory.checkpointer, store=memory.store)


def test_a_run_goes_on_when_the_server_comes_back(server: Server) -> None:
    """The server is killed and started again while graphs run; each run is resumed until it is through."""
    with MemoryStore(server.storage("m", timeout=0.1)) as memory, ThreadPoolExecutor(3) as pool:
        graph = agent(memory, 0.02)
        over = threading.Event()

        def play(config: Any, goal: int) -> None:
            found = graph.get_state(config)
            if found.tasks or len(found.values.get("log", ())) < goal:
                graph.invoke(None if found.tasks else {"log": ["in"]}, config, durability="sync")

        def converse(number: int) -> int:
            config = {"configurable": {"thread_id": f"t{number}"}}
            turns = 0
            while turns < 3 or not over.is_set():
                turns += 1
                persist(functools.partial(play, config, turns * 7))
            return turns

        runs = [pool.submit(converse, number) for number in range(3)]
        for _ in range(2):
            time.sleep(0.5)
            server.stop()
            time.sleep(0.3)
            server.start()
        over.set()
        turns = [run.result(timeout=90) for run in runs]
        for number, count in enumerate(turns):
            state = graph.get_state({"configurable": {"thread_id": f"t{number}"}})
            assert state.values["log"] == ["in", *(f"n{step}" for step in range(6))] * count
            assert not state.tasks
        assert len(list(memory.log(namespace=("remembered",)))) == 6 * sum(turns)  # every step once
        assert [entry.seq for entry in memory.log()] == list(range(1, 6 * sum(turns) + 1))


# -- a server that loses what it confirmed ----------------------------------------------------------


def lose_all(server: Server) -> None:
    with server.connect() as client:
        client.flushall()


def lose_the_last(server: Server) -> None:
    with server.connect() as client:
        client.rpop("{memstate:m}:log")


def lose_the_log(server: Server) -> None:
    with server.connect() as client:
        client.delete("{memstate:m}:log")


def go_back(server: Server) -> None:
    """As a failover to a replica that had not got the last commit leaves it."""
    with server.connect() as client:
        client.rpop("{memstate:m}:log")
        before = client.lindex("{memstate:m}:log", -1)
        client.hset("{memstate:m}:head", mapping={"length": 1, "last": before[17:33], "bytes": len(before)})


def lose_and_begin_again(server: Server) -> None:
    lose_all(server)
    with MemoryStore(server.storage("m")) as other:
        other.commit(note("a"))


@pytest.mark.parametrize("lose", [lose_all, lose_the_last, lose_the_log, go_back, lose_and_begin_again])
def test_a_process_that_saw_what_is_lost_does_not_go_on(server: Server, lose: Any, tmp_path: Path) -> None:
    replica = tmp_path / "replica.db"
    with (
        MemoryStore(server.storage("m")) as memory,
        MemoryStore(server.storage("m", replica=replica)) as kept,
    ):
        memory.commit(note("a"))
        memory.commit(note("b"))
        assert keys(kept) == ["a", "b"]
        lose(server)
        for _ in range(2):
            with pytest.raises(LostCommitsError, match="has lost"):
                keys(memory)
            with pytest.raises(LostCommitsError):
                kept.commit(note("c"))
    with pytest.raises(StorageError):  # the file holds what Redis does not: it is not overwritten
        MemoryStore(server.storage("m", replica=replica))


def test_without_a_place_for_temporary_files_it_says_so(
    redis_server: Server, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
        with pytest.raises(DatabaseOpenError, match="TMPDIR"):
            MemoryStore(redis_server.storage(name))
    with MemoryStore(storage := redis_server.storage(name)) as memory:
        memory.commit(note("a"))
        with monkeypatch.context() as broken:
            broken.setattr(storage, "_folder", tmp_path / "nothing")
            with pytest.raises(StorageError, match="no folder for an image"):
                memory.vacuum()
        assert keys(memory) == ["a"]


def test_a_fork_of_the_log_is_seen(server: Server) -> None:
    """A server that went back to an earlier state, and on from there, past what a process has seen."""
    with MemoryStore(server.storage("m")) as memory, server.connect() as client:
        memory.commit(note("a"))
        before = {key: client.dump(key) for key in client.scan_iter()}
        memory.commit(note("lost"))
        for key, content in before.items():
            client.restore(key, 0, content, replace=True)
        with MemoryStore(server.storage("m")) as other:
            other.commit(note("x"))
            with pytest.raises(LostCommitsError):
                keys(memory)
            other.commit(note("y"))
            assert keys(other) == ["a", "x", "y"]
        memory.storage._lost = None  # type: ignore[attr-defined]  # it also sees it from the entries that follow
        with pytest.raises(LostCommitsError):
            memory.commit(note("z"))


def test_a_restart_without_an_append_only_file_is_seen() -> None:
    with running(appendonly="no") as server, MemoryStore(server.storage("m")) as memory:
        memory.commit(note("a"))
        server.stop()
        server.start()
        with pytest.raises(LostCommitsError):
            memory.commit(note("b"))


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({}, None),
        ({"appendfsync": "everysec"}, "a second"),
        ({"appendfsync": "no"}, "half a minute"),
        ({"appendonly": "no"}, "last snapshot"),
    ],
)
def test_what_the_server_keeps_is_said(options: Any, warning: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with running(**options) as server, caplog.at_level(logging.INFO, "langgraph_memstate"):
        MemoryStore(server.storage("m")).close()
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (warning is not None)
        assert warning is None or warning in said[0]


# -- whose server it is -----------------------------------------------------------------------------


def test_memories_of_one_server_are_their_own(redis_server: Server) -> None:
    with redis_server.memory() as one, redis_server.memory() as two:
        with (
            MemoryStore(redis_server.storage(one)) as left,
            MemoryStore(redis_server.storage(two + " :*?[\\")) as right,
        ):
            left.commit(note("a"))
            right.commit(note("b"))
            assert (keys(left), keys(right)) == (["a"], ["b"])
            assert left.store_id != right.store_id
        redis_server.remove(two + " :\\*\\?\\[\\\\")


@pytest.mark.parametrize("name", ["", "a{b", "a}b", "a\0b", "x" * 201, None])
def test_a_name_that_no_memory_may_have(name: Any) -> None:
    with pytest.raises(DatabaseOpenError, match="name"):
        RedisStorage("redis://localhost:1", name=name)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:1", "redis://127.0.0.1:x", "unix:///nowhere/redis.sock", "redis://localhost:1?db=x"]
)
def test_what_cannot_be_opened(url: str) -> None:
    with pytest.raises(DatabaseOpenError):
        MemoryStore(RedisStorage(url))


def test_a_url_names_a_memory(redis_server: Server) -> None:
    with redis_server.memory() as name:
        with MemoryStore.open(f"{redis_server.url}/0?name={name}&decode_responses=True") as memory:
            memory.commit(note("a"))
        with MemoryStore(redis_server.storage(name)) as memory:
            assert keys(memory) == ["a"]
    with redis_server.default() as url:
        with MemoryStore.open(url, index={"dims": DIMS, "embed": Words(), "fields": ["text"]}) as memory:
            memory.commit(note("a"))
        with MemoryStore(redis_server.storage("memstate")) as memory:
            assert keys(memory) == ["a"]


@pytest.mark.parametrize("key", ["head", "log"])
@pytest.mark.parametrize("kind", ["string", "hash", "list"])
def test_keys_of_another_program_are_left_alone(redis_server: Server, name: str, key: str, kind: str) -> None:
    full = f"{{memstate:{name}}}:{key}"
    with redis_server.connect() as client:
        if kind == "string":
            client.set(full, "x")
        elif kind == "hash":
            client.hset(full, "a", "b")
        else:
            client.rpush(full, "x")
        before = client.dump(full)
        with pytest.raises(DatabaseOpenError, match="another program"):
            MemoryStore(redis_server.storage(name))
        assert client.dump(full) == before
        assert client.keys(f"{{memstate:{name}}}*") == [full.encode()]


def test_what_a_newer_release_wrote_is_left_alone(redis_server: Server, name: str, memory: MemoryStore) -> None:
    memory.commit(note("a"))
    head, log = (f"{{memstate:{name}}}:{key}" for key in ("head", "log"))
    with redis_server.connect() as client:
        with MemoryStore(redis_server.storage(name)) as other:
            memory.commit(note("b"))
            client.lset(log, -1, b"\x02" + client.lindex(log, -1)[1:])
            with pytest.raises(NewerSchemaError, match="format 2"):
                keys(other)
        client.hset(head, "format", 2)
        with pytest.raises(NewerSchemaError, match="format 2"):
            MemoryStore(redis_server.storage(name))


def test_entries_that_nobody_of_ours_wrote(redis_server: Server, name: str, memory: MemoryStore) -> None:
    memory.commit(note("a"))
    log = f"{{memstate:{name}}}:log"
    with redis_server.connect() as client:
        entry = client.lindex(log, 0)
        for bad in (
            b"",
            b"x",
            entry[:33],
            entry[:-1],
            entry + b"x",
            entry[:33] + b"\0\x93\1\2\3",
            entry[:33] + b"\0\x90",
        ):
            client.lset(log, 0, bad)
            with pytest.raises(MemStateError) as caught:
                MemoryStore(redis_server.storage(name))
            assert type(caught.value).__name__ in ("CorruptRowError", "NewerSchemaError", "LostCommitsError"), bad


@pytest.mark.parametrize("field", ["length", "trimmed", "image_bytes", "last"])
def test_a_head_that_nobody_of_ours_wrote(redis_server: Server, name: str, memory: MemoryStore, field: str) -> None:
    memory.commit(note("a"))
    with redis_server.connect() as client:
        for bad in ("", "x", "7"):
            client.hset(f"{{memstate:{name}}}:head", field, bad)
            if (field, bad) != ("image_bytes", "7"):
                with pytest.raises(StorageError):
                    MemoryStore(redis_server.storage(name))


def fill(memory: MemoryStore) -> None:
    for n in range(500):
        memory.commit(note(f"{n}", text=os.urandom(20_000).hex()))


def test_a_server_without_memory_left(server: Server) -> None:
    with MemoryStore(server.storage("m")) as memory, server.connect() as client:
        memory.commit(note("a"))
        client.config_set("maxmemory", 1_000_000)
        with pytest.raises(DiskFullError, match="maxmemory"):
            fill(memory)
        assert keys(memory)[0] == "a"
        held = len(keys(memory))
        client.config_set("maxmemory", 0)
        memory.commit(note("c"))
        assert keys(memory)[-1] == "c"
        assert len(keys(memory)) == held + 1


def test_a_server_that_throws_keys_away_is_refused(server: Server) -> None:
    with server.connect() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        MemoryStore(server.storage("m")).close()  # it has no limit, so it throws nothing away
        client.config_set("maxmemory", 100_000_000)
        with pytest.raises(DatabaseOpenError, match="allkeys-lru"):
            MemoryStore(server.storage("m"))
        client.config_set("maxmemory-policy", "volatile-lru")
        MemoryStore(server.storage("m")).close()


def test_a_server_that_takes_no_writes(server: Server) -> None:
    with MemoryStore(server.storage("m")) as memory, server.connect() as client:
        memory.commit(note("a"))
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(ReadOnlyError, match="primary"):
            memory.commit(note("b"))
        assert keys(memory) == ["a"]
        with pytest.raises(ReadOnlyError):
            MemoryStore(server.storage("another"))
        client.replicaof("NO", "ONE")
        memory.commit(note("c"))
        assert keys(memory) == ["a", "c"]


def test_a_user_that_may_not(server: Server) -> None:
    with MemoryStore(server.storage("m")) as memory:
        memory.commit(note("a"))
        with server.connect() as client:
            client.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+eval", "+evalsha")
            client.execute_command("ACL", "SETUSER", "plain", "on", ">pw", "~{memstate:*", "+@all", "-@dangerous")
        host = server.url.partition("://")[2]
        with MemoryStore(RedisStorage(f"redis://reader:pw@{host}", name="m")) as reader:
            assert keys(reader) == ["a"]
            with pytest.raises(ReadOnlyError, match="may not"):
                reader.commit(note("b"))
        with MemoryStore(RedisStorage(f"redis://plain:pw@{host}", name="m")) as plain:  # it may not ask INFO or CONFIG
            plain.commit(note("c"))
            plain.forget("note", "c")
        with pytest.raises(DatabaseOpenError, match="password") as caught:
            MemoryStore(RedisStorage(f"redis://plain:secret@{host}", name="m"))
        assert "secret" not in str(caught.value)
        assert keys(memory)[:2] == ["a", "c"]


def test_replicas_of_the_server_are_waited_for(server: Server) -> None:
    with running() as second:
        with MemoryStore(server.storage("m", wait_replicas=1, timeout=0.3)) as memory:
            with pytest.raises(TransientError, match="0 of 1"):
                memory.commit(note("a"))
            assert keys(memory) == ["a"]
        with second.connect() as client:
            client.replicaof("127.0.0.1", server.port)
            with MemoryStore(server.storage("m", wait_replicas=1, timeout=20.0)) as memory:
                memory.commit(note("b"))
                assert client.llen("{memstate:m}:log") == 2
                assert keys(memory) == ["a", "b"]


def test_a_cluster_has_each_memory_on_one_node() -> None:
    """Whichever node the URL names, and also when the slot moves to the other."""
    cluster = {"cluster-enabled": "yes", "cluster-node-timeout": "2000"}
    with running(**cluster) as first, running(**cluster) as second, first.connect() as one, second.connect() as two:
        for client, slots in ((one, range(8_192)), (two, range(8_192, 16_384))):
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
        one.execute_command("CLUSTER", "MEET", "127.0.0.1", second.port)
        deadline = time.monotonic() + 20
        while not all(b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO") for client in (one, two)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        names = [f"m{number}" for number in range(6)]
        for number, memory_name in enumerate(names):
            with MemoryStore(first.storage(memory_name)) as memory, MemoryStore(second.storage(memory_name)) as other:
                memory.commit(note(f"{number}"))
                other.commit(note("other"))
                assert keys(memory) == [f"{number}", "other"]
        held = [client.dbsize() for client in (one, two)]
        assert sum(held) == 2 * len(names)
        assert all(held)


def test_without_the_driver_it_is_said_what_to_install() -> None:
    script = """
import sys
sys.modules["redis"] = None
import langgraph_memstate
from langgraph_memstate.errors import DatabaseOpenError
try:
    langgraph_memstate.MemoryStore.open("redis://localhost")
except DatabaseOpenError as error:
    print(error)
try:
    langgraph_memstate.RedisStorage
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("pip install 'langgraph-memstate[redis]'" in line for line in lines)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_is_told_to_open_again(redis_server: Server, name: str) -> None:
    script = """
import os, sys
from langgraph_memstate import RedisStorage
from langgraph_memstate.errors import StorageClosedError
storage = RedisStorage(sys.argv[1], name=sys.argv[2])
storage.open()
with storage.snapshot() as reader:
    reader.last_seq()
if (child := os.fork()) == 0:
    try:
        storage.apply(((),))
    except StorageClosedError:
        storage.close()
        os._exit(7)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
with storage.snapshot() as reader:
    print(reader.last_seq())
storage.close()
"""
    done = python(script, redis_server.url, name)
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr


# -- vectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["exact", "chroma"])
@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_search_is_what_the_log_holds(
    redis_server: Server, name: str, database: Path, hook: str, vector_sync: Any
) -> None:
    index = {"dims": DIMS, "embed": Words(), "fields": ["text"]}
    texts = notes(40)

    def opened() -> MemoryStore:
        made = MemoryStore(redis_server.storage(name), index=index, vector_sync=vector_sync)
        if hook == "chroma":
            made.add_hook(faulty_chroma(database))
        else:
            made._attach(None)
        return made

    with opened() as memory:
        commit(memory, texts)
        changed = {key: text + " changed" for key, text in list(texts.items())[:10]}
        commit(memory, changed)
        memory.delete(("note",), "n39")
        texts = {**texts, **changed}
        del texts["n39"]
        check_search(memory, texts)
        memory.flush()
        check_search(memory, texts)
        memory.rollback(1)
    with opened() as memory:
        assert memory.verify().ok


def test_a_folder_is_gone_with_its_process(redis_server: Server, name: str) -> None:
    script = """
import os, sys, time
from langgraph_memstate import RedisStorage
storage = RedisStorage(sys.argv[1], name=sys.argv[2])
storage.open()
print(storage._folder, flush=True)
os.kill(os.getpid(), 9)
"""
    left = Path(python(script, redis_server.url, name).stdout.strip())
    assert left.parent == Path(tempfile.gettempdir())
    assert (left / "view.db").exists()
    storage = redis_server.storage(name)
    storage.open()
    ours = storage._folder
    assert ours is not None
    for folder in (left, ours):
        os.utime(folder, (1, 1))
    MemoryStore(redis_server.storage(name)).close()
    assert not left.exists()  # a process that was killed cannot tidy up: the next one does
    assert ours.exists()  # somebody uses it
    storage.close()
    assert not ours.exists()

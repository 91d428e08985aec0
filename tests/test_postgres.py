"""What only a server can do to a memory: go away in the middle, come back, be shared by many, and belong to others."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import uuid4

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore

sys.path.insert(0, str(Path(__file__).parent))
from truth import DIMS, Words, check_search, commit, faulty_chroma, held_ids, hook_of, notes, python

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import (
    CorruptRowError,
    DatabaseOpenError,
    NewerSchemaError,
    ReadOnlyError,
    SerializationError,
    TransientError,
    VectorSyncError,
)
from tests.benchmarks.work import checkpoint_chain, pending_writes

psycopg = pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")

from line import When  # noqa: E402
from postgres_proxy import line_to  # noqa: E402
from postgres_server import Server  # noqa: E402

from langgraph_memstate import PostgresStorage  # noqa: E402
from langgraph_memstate.storage import postgres as module  # noqa: E402
from langgraph_memstate.storage import postgres_schema  # noqa: E402


@pytest.fixture
def schema(postgres: Server) -> Iterator[str]:
    with postgres.schema() as name:
        yield name


@pytest.fixture
def memory(postgres: Server, schema: str) -> Iterator[MemoryStore]:
    with MemoryStore(postgres.storage(schema)) as opened:
        yield opened


@pytest.fixture
def stopped(postgres: Server) -> Iterator[Server]:
    """The server, which a test may stop; it runs again afterwards."""
    yield postgres
    postgres.start()


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


def test_connections_that_were_cut_while_idle_are_not_noticed(memory: MemoryStore, postgres: Server) -> None:
    memory.commit(note("a"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: keys(memory), range(8)))
    assert postgres.cut() >= 2
    memory.commit(note("b"))
    assert keys(memory) == ["a", "b"]
    postgres.cut()
    assert keys(memory) == ["a", "b"]


def test_a_server_that_is_down_is_a_transient_error(memory: MemoryStore, stopped: Server) -> None:
    memory.commit(note("a"))
    stopped.stop()
    for call in (lambda: memory.commit(note("b")), lambda: keys(memory)):
        with pytest.raises(TransientError):
            call()
    stopped.start()
    memory.commit(note("c"))
    assert keys(memory) == ["a", "c"]


def test_a_cut_in_the_middle_of_reading_is_a_transient_error(memory: MemoryStore, postgres: Server) -> None:
    memory.commit([note(f"{number}") for number in range(200)])

    def interrupted() -> None:
        with memory.storage.snapshot() as reader:
            rows = reader.log()
            next(rows)
            postgres.cut()
            list(rows)

    with pytest.raises(TransientError):
        interrupted()
    assert len(keys(memory)) == 200


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_whose_answer_was_lost_lands_once(postgres: Server, schema: str, when: When) -> None:
    with line_to(postgres.uri) as line, MemoryStore(PostgresStorage(line.uri, schema=schema)) as memory:
        memory.commit(note("a"))
        for number in range(3):
            line.breaks = when
            memory.commit(note(f"b{number}"))
            memory.commit(note(f"c{number}"))
        assert line.broken == 3
        assert [entry.seq for entry in memory.log()] == list(range(1, 8))
        assert keys(memory) == ["a", "b0", "c0", "b1", "c1", "b2", "c2"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_whose_answer_was_lost_lands_once(postgres: Server, schema: str, when: When) -> None:
    """It is one statement, without a COMMIT."""
    with line_to(postgres.uri) as line, MemoryStore(PostgresStorage(line.uri, schema=schema)) as memory:
        chain = checkpoint_chain("t")
        for _ in range(3):
            memory.storage._drop_writer()  # a new connection sends the text of its statements
            line.breaks = when
            config = memory.checkpointer.put(*next(chain))
            memory.checkpointer.put_writes(*next(pending_writes(config)))
        assert line.broken == 3
        assert [len(one.pending_writes or ()) for one in memory.checkpointer.list(None)] == [2, 2, 2]


def test_a_server_that_is_down_is_no_reason_to_wait_for_a_checkpoint(memory: MemoryStore, stopped: Server) -> None:
    chain = checkpoint_chain("t")
    memory.checkpointer.put(*next(chain))
    stopped.stop()
    began = time.monotonic()
    with pytest.raises(TransientError):
        memory.checkpointer.put(*next(chain))
    assert time.monotonic() - began < 5
    stopped.start()
    memory.checkpointer.put(*next(chain))


def test_a_commit_whose_outcome_nobody_can_tell_says_so(
    postgres: Server, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESOLVE", 0.2)
    with line_to(postgres.uri) as line, MemoryStore(PostgresStorage(line.uri, schema=schema)) as memory:
        memory.commit(note("a"))
        line.breaks = "after"
        monkeypatch.setattr(module, "connect", _refused)
        with pytest.raises(TransientError, match="whole or not at all"):
            memory.commit(note("b"))
        monkeypatch.undo()
        memory.commit(note("c"))
        assert keys(memory) == ["a", "b", "c"]


def _refused(conninfo: str) -> Any:
    raise psycopg.OperationalError("connection refused")


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


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_run_goes_on_when_the_server_comes_back(memory: MemoryStore, stopped: Server, durability: str) -> None:
    """The server is killed and started again while graphs run; each run is resumed until it is through."""
    graph = agent(memory, 0.02)
    over = threading.Event()

    def play(config: Any, goal: int) -> None:
        found = graph.get_state(config)  # whose values show what finished tasks wrote, be their step over or not
        if found.tasks or len(found.values.get("log", ())) < goal:
            graph.invoke(None if found.tasks else {"log": ["in"]}, config, durability=durability)

    def converse(number: int) -> int:
        config = {"configurable": {"thread_id": f"t{number}"}}
        turns = 0
        while turns < 3 or not over.is_set():
            turns += 1
            persist(functools.partial(play, config, turns * 7))
        return turns

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(converse, number) for number in range(3)]
        for _ in range(2):
            time.sleep(0.6)
            stopped.stop()
            time.sleep(0.2)
            stopped.start()
        over.set()
        turns = [run.result(timeout=90) for run in runs]
    for number, count in enumerate(turns):
        state = graph.get_state({"configurable": {"thread_id": f"t{number}"}})
        assert state.values["log"] == ["in", *(f"n{step}" for step in range(6))] * count
        assert not state.tasks
    written = list(memory.log(namespace=("remembered",)))
    assert len(written) == 6 * sum(turns)  # every step once, however often its commit was tried
    assert [entry.seq for entry in memory.log()] == list(range(1, 6 * sum(turns) + 1))


# -- many at once -----------------------------------------------------------------------------------

OPEN = """
import os, sys
from langgraph_memstate import Fact, MemoryStore, PostgresStorage
go, start = os.pipe()
children = []
for child in range(8):  # forked from one that has only imported
    if (pid := os.fork()) == 0:
        os.close(start)
        os.read(go, 1)
        with MemoryStore(PostgresStorage(sys.argv[1], schema=sys.argv[2])) as memory:
            for number in range(5):
                memory.commit(Fact("note", {"n": number}, id=f"{child}-{number}"))
        os._exit(0)
    children.append(pid)
os.close(start)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_eight_processes_open_a_new_database_at_once(postgres: Server, schema: str) -> None:
    done = python(OPEN, postgres.uri, schema)
    assert done.stdout.strip() == str([0] * 8), done.stderr
    with MemoryStore(postgres.storage(schema)) as memory:
        assert [entry.seq for entry in memory.log()] == list(range(1, 41))


def test_more_threads_than_connections(postgres: Server, schema: str) -> None:
    with MemoryStore(postgres.storage(schema, pool_size=2)) as memory, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: memory.commit(note(f"{number}")), range(64)))
        assert all(len(found) == 64 for found in pool.map(lambda _: keys(memory), range(32)))
        with postgres.connect() as conn:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'langgraph-memstate'"
            assert conn.execute(query).fetchall()[0][0] <= 3


def test_all_connections_in_use_is_a_transient_error(postgres: Server, schema: str) -> None:
    storage = PostgresStorage(postgres.uri, schema=schema, pool_size=1, timeout=0.2)
    storage.open()
    with storage.snapshot(), ThreadPoolExecutor(1) as pool, pytest.raises(TransientError, match="in use"):
        pool.submit(lambda: storage.snapshot().__enter__()).result()
    storage.close()


def test_nothing_stays_with_a_connection_between_transactions(memory: MemoryStore) -> None:
    """Else a pooler that hands connections round between transactions would mix callers up."""
    for number in range(8):
        memory.commit(note(f"{number}"))
    conn = memory.storage._writer
    assert conn.execute("SELECT current_setting('search_path')").fetchone() == ('"$user", public',)
    for catalogue in ("pg_cursors", "pg_listening_channels()"):
        assert conn.execute(f"SELECT count(*) FROM {catalogue}").fetchone() == (0,), catalogue
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    assert conn.execute(locks).fetchone() == (0,)


@pytest.mark.parametrize("pools", [False, True])
def test_statements_are_prepared_where_no_pooler_stands_in_between(postgres: Server, schema: str, pools: bool) -> None:
    with line_to(postgres.uri) as line:
        line.pools = pools
        with MemoryStore(PostgresStorage(line.uri, schema=schema)) as memory:
            for number in range(8):
                memory.commit(note(f"{number}"))
                assert memory.get("note", f"{number}") is not None
            conn = memory.storage._writer
            (prepared,) = conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()
    assert bool(prepared) is not pools


def test_what_waits_for_the_server_waits_once(postgres: Server, schema: str) -> None:
    """Twice where it reads: once for the answer and once for the end."""
    with line_to(postgres.uri) as line, MemoryStore(PostgresStorage(line.uri, schema=schema)) as memory:
        saver, store = memory.checkpointer, memory.store
        chain = checkpoint_chain("t")
        config = saver.put(*next(chain))
        task = pending_writes(config)
        latest = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
        calls: dict[str, tuple[int, Callable[[], object]]] = {
            "put": (1, lambda: saver.put(*next(chain))),
            "put_writes": (1, lambda: saver.put_writes(*next(task))),
            "a new item": (1, lambda: store.put(("a",), uuid4().hex, {"n": 1})),
            "an item again": (1, lambda: store.put(("a",), "same", {"n": 1})),
            "get": (2, lambda: store.get(("a",), "same")),
            "get_tuple": (3, lambda: saver.get_tuple(latest)),
        }
        trips = {}
        for name, (_, call) in calls.items():
            for _ in range(8):  # by then the driver has prepared its statements
                call()
            before = line.trips
            call()
            trips[name] = line.trips - before
        assert trips == {name: expected for name, (expected, _) in calls.items()}


def test_what_is_large_is_sent_whole(memory: MemoryStore) -> None:
    """More than the buffers of driver and socket hold, in both directions at once."""
    texts = [f"{number}" * 1_000_000 for number in range(8)]
    memory.commit([note(f"{number}", text=text) for number, text in enumerate(texts)])
    assert [memory.get("note", f"{number}").payload["text"] for number in range(8)] == texts


def test_a_checkpoint_that_takes_the_place_of_another_frees_its_values(memory: MemoryStore) -> None:
    config, checkpoint, metadata, versions = next(checkpoint_chain("t"))
    for text in ("first", "second"):
        checkpoint["channel_values"] = {"profile": {"text": text}}
        memory.checkpointer.put(config, checkpoint, metadata, versions)
        assert memory.stats()["channel_values"] == 1


class Talk(TypedDict):
    messages: Annotated[list[str], operator.add]


def test_a_message_is_stored_once(memory: MemoryStore, postgres: Server, schema: str) -> None:
    """What a task writes to a list is the element that the list gets by it."""

    def words() -> str:
        return " ".join(uuid4().hex for _ in range(12))

    graph = StateGraph(Talk)
    graph.add_node("answer", lambda state: {"messages": [f"{len(state['messages'])} {words()}"]})
    graph.add_edge(START, "answer")
    config = {"configurable": {"thread_id": "t"}}
    compiled = graph.compile(checkpointer=memory.checkpointer)
    for _ in range(4):
        said = compiled.invoke({"messages": [words()]}, config)["messages"]
    assert len(said) == 8
    with postgres.connect() as conn:
        conn.execute(f"SET search_path TO {schema}")
        ((elements,),) = conn.execute("SELECT count(*) FROM elements").fetchall()
        ((writes, shared, longest),) = conn.execute(
            "SELECT count(*), count(*) FILTER (WHERE digest <> ''), max(length(value)) FROM writes"
        ).fetchall()
    assert elements == 8
    assert (writes, shared) == (12, 8)
    assert longest < 128
    written = [value for one in memory.checkpointer.list(config) for _, channel, value in one.pending_writes or ()
               if channel == "messages"]  # fmt: skip
    assert sorted(text for (text,) in written) == sorted(said)
    memory.checkpointer.prune(["t"])
    state = compiled.get_state(config)
    assert state.values["messages"] == said
    assert memory.stats()["writes"] == 0
    memory.checkpointer.delete_thread("t")
    with postgres.connect() as conn:
        for table in ("threads", "elements", "lists", "channel_values"):
            assert conn.execute(f"SELECT count(*) FROM {schema}.{table}").fetchone() == (0,), table


def test_a_thread_whose_checkpoints_are_deleted_leaves_no_name(
    memory: MemoryStore, postgres: Server, schema: str
) -> None:
    chain = checkpoint_chain("a name")
    for _ in range(3):
        memory.checkpointer.put(*next(chain))
    (config, checkpoint, metadata, versions) = next(chain)
    memory.checkpointer.put(config, checkpoint, {**metadata, "run_id": "r"}, versions)
    memory.checkpointer.prune(["a name"])
    with postgres.connect() as conn:
        names = f"SELECT thread_id FROM {schema}.threads"
        assert conn.execute(names).fetchall() == [("a name",)]
        memory.checkpointer.delete_for_runs(["r"])
        assert conn.execute(names).fetchall() == []


def test_threads_that_start_at_once_get_a_number_each(postgres: Server, schema: str) -> None:
    with ExitStack() as stack:
        memories = [stack.enter_context(MemoryStore(postgres.storage(schema))) for _ in range(4)]

        def put(number: int) -> None:
            saver = memories[number % 4].checkpointer
            for arguments in islice(checkpoint_chain(f"t{number % 5}"), 3):
                saver.put(*arguments)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(40)))
        assert memories[0].stats()["checkpoints"] == 120
        with postgres.connect() as conn:
            names = conn.execute(f"SELECT thread_id FROM {schema}.threads ORDER BY 1").fetchall()
        assert names == [(f"t{number}",) for number in range(5)]


@pytest.mark.parametrize("damage", [
    "UPDATE checkpoints SET head = '\\x00'", "UPDATE checkpoints SET head = ''",
    "UPDATE checkpoints SET head = substring(head FROM 1 FOR length(head) - 3)",
    "UPDATE checkpoints SET manifest = '[1]'", "UPDATE checkpoints SET manifest = ''",
    "UPDATE writes SET value = '\\xff0000ffff'", "UPDATE writes SET digest = 'x'", "UPDATE writes SET value = ''",
])  # fmt: skip
def test_a_damaged_checkpoint_is_said_to_be(memory: MemoryStore, postgres: Server, schema: str, damage: str) -> None:
    config = memory.checkpointer.put(*next(checkpoint_chain("t")))
    memory.checkpointer.put_writes(*next(pending_writes(config)))
    with postgres.connect() as conn:
        conn.execute(f"SET search_path TO {schema}")
        conn.execute(damage)
    with pytest.raises(CorruptRowError):
        memory.checkpointer.get_tuple(config)


def test_a_schema_of_the_first_version_is_brought_up_to_date(
    postgres: Server, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(postgres_schema, "MIGRATIONS", postgres_schema.MIGRATIONS[:1])
        old = postgres.storage(schema)
        store_id = old.open()
        old.close()
    new = postgres.storage(schema)
    assert new.open() == store_id
    new.close()
    with MemoryStore(postgres.storage(schema)) as memory:
        memory.commit(note("a"))
        assert keys(memory) == ["a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_is_told_to_open_again(postgres: Server, schema: str) -> None:
    script = """
import os, sys
from langgraph_memstate import PostgresStorage
from langgraph_memstate.errors import StorageClosedError
storage = PostgresStorage(sys.argv[1], schema=sys.argv[2])
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
"""
    done = python(script, postgres.uri, schema)
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr


# -- whose database it is ---------------------------------------------------------------------------


def test_a_url_opens_the_default_schema(postgres: Server) -> None:
    with postgres.database() as url:
        with MemoryStore.open(url, index={"dims": DIMS, "embed": Words(), "fields": ["text"]}) as memory:
            memory.commit(note("a"))
        with MemoryStore.open(url.replace("postgresql://", "postgres://")) as memory:
            assert keys(memory) == ["a"]
        with psycopg.connect(url) as conn:
            assert conn.execute("SELECT count(*) FROM memstate.facts").fetchone() == (1,)


def test_schemas_are_memories_of_their_own(postgres: Server) -> None:
    with postgres.schema() as one, postgres.schema() as two:
        with MemoryStore(postgres.storage(one)) as left, MemoryStore(postgres.storage(two + '" x%s')) as right:
            left.commit(note("a"))
            right.commit(note("b"))
            right.checkpointer.put(*next(checkpoint_chain("t")))
            assert (left.stats()["checkpoints"], right.stats()["checkpoints"]) == (0, 1)
            assert (keys(left), keys(right)) == (["a"], ["b"])
            assert left.store_id != right.store_id
        with postgres.connect() as conn:
            conn.execute(psycopg.sql.SQL("DROP SCHEMA {} CASCADE").format(psycopg.sql.Identifier(two + '" x%s')))


def test_a_newer_schema_is_left_alone(postgres: Server, schema: str, memory: MemoryStore) -> None:
    with postgres.connect() as conn:
        conn.execute(f"UPDATE {schema}.meta SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(NewerSchemaError, match="99"):
        MemoryStore(postgres.storage(schema))


def test_tables_of_another_program_are_left_alone(postgres: Server, schema: str) -> None:
    with postgres.connect() as conn:
        conn.execute(f"CREATE SCHEMA {schema}")
        conn.execute(f"CREATE TABLE {schema}.checkpoints (thread_id text)")
    with pytest.raises(DatabaseOpenError, match="another program"):
        MemoryStore(postgres.storage(schema))


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://localhost:1/nowhere",
        "postgresql:///x?host=/nowhere",
        "postgresql://h?nonsense=1",
        "postgresql://[",
    ],
)
def test_what_cannot_be_opened(uri: str) -> None:
    with pytest.raises(DatabaseOpenError):
        MemoryStore.open(uri)


def test_a_database_that_is_not_there(postgres: Server) -> None:
    with pytest.raises(DatabaseOpenError, match="nobody_made_this"):
        MemoryStore.open(postgres.uri.replace("/postgres?", "/nobody_made_this?"))


def test_a_database_in_another_encoding_is_refused(postgres: Server) -> None:
    with postgres.connect() as conn:
        conn.execute("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    with pytest.raises(DatabaseOpenError, match="LATIN1"):
        MemoryStore.open(postgres.uri.replace("/postgres?", "/latin?"))


def test_commits_are_durable_where_the_server_is_set_not_to(postgres: Server) -> None:
    with postgres.database() as url:
        with psycopg.connect(url, autocommit=True) as conn:
            name = conn.info.dbname
            conn.execute(f"ALTER DATABASE {name} SET synchronous_commit TO off")
        with MemoryStore.open(url) as memory, psycopg.connect(url, autocommit=True) as conn:
            conn.execute("CREATE TABLE seen AS SELECT current_setting('synchronous_commit') AS setting")
            conn.execute(
                "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen "
                "SELECT current_setting('synchronous_commit'); RETURN NEW; END $$"
            )
            conn.execute("CREATE TRIGGER looks BEFORE INSERT ON memstate.facts FOR EACH ROW EXECUTE FUNCTION look()")
            memory.commit(note("a"))
            assert conn.execute("SELECT setting FROM seen").fetchall() == [("off",), ("on",)]


def test_a_server_that_takes_no_writes(postgres: Server, schema: str, memory: MemoryStore) -> None:
    memory.commit(note("a"))
    uri = postgres.uri + "&options=-cdefault_transaction_read_only%3Don"
    with MemoryStore(PostgresStorage(uri, schema=schema)) as reading:
        assert keys(reading) == ["a"]
        with pytest.raises(ReadOnlyError):
            reading.commit(note("b"))


def test_the_log_cannot_be_changed_behind_our_back(postgres: Server, schema: str, memory: MemoryStore) -> None:
    memory.commit(note("a"))
    with postgres.connect() as conn:
        for statement in ("DELETE FROM {}.facts", "UPDATE {}.facts SET actor = 'x'"):
            with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
                conn.execute(statement.format(schema))


def test_without_the_driver_it_is_said_what_to_install() -> None:
    script = """
import sys
sys.modules["psycopg"] = None
import langgraph_memstate
from langgraph_memstate.errors import DatabaseOpenError
try:
    langgraph_memstate.MemoryStore.open("postgresql://localhost/x")
except DatabaseOpenError as error:
    print(error)
try:
    langgraph_memstate.PostgresStorage
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("pip install 'langgraph-memstate[postgres]'" in line for line in lines)


# -- limits and plans -------------------------------------------------------------------------------


def test_a_name_that_no_index_holds_is_named(memory: MemoryStore) -> None:
    long = os.urandom(5_000).hex()
    with ThreadPoolExecutor(2) as pool:
        refused = pool.submit(memory.commit, note(long, text="x"))
        memory.commit(note("a"))
        with pytest.raises(SerializationError, match="2,700"):
            refused.result()
    assert keys(memory) == ["a"]


def test_filters_use_the_index(postgres: Server, schema: str, memory: MemoryStore) -> None:
    for start in range(0, 4_000, 1_000):
        memory.commit([note(f"{n}", n=n, kind=f"k{n % 500}") for n in range(start, start + 1_000)])
    memory.commit(note("nul", kind="k7\0"))
    assert {fact.id for fact in memory.query("note", filter={"kind": "k7"})} == {str(n) for n in range(7, 4_000, 500)}
    assert [fact.id for fact in memory.query("note", filter={"kind": "k7\0"})] == ["nul"]
    assert [fact.id for fact in memory.query("note", filter={"n": 77})] == ["77"]
    with postgres.connect() as conn:
        conn.execute(f"ANALYZE {schema}.items")
        plan = conn.execute(
            f"EXPLAIN SELECT key FROM {schema}.items AS items "
            'WHERE (items.doc IS NULL OR items.doc @> \'{"kind":"k7"}\'::jsonb)'
        ).fetchall()
    assert "items_by_content" in str(plan)


# -- vectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["exact", "chroma"])
@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_search_is_what_sql_holds(postgres: Server, schema: str, database: Path, hook: str, vector_sync: Any) -> None:
    index = {"dims": DIMS, "embed": Words(), "fields": ["text"]}
    texts = notes(40)

    def opened() -> MemoryStore:
        made = MemoryStore(postgres.storage(schema), index=index, vector_sync=vector_sync)
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
        if hook == "chroma":
            hook_of(memory).fail("apply", error=RuntimeError("away"), times=1)
            if vector_sync == "atomic":
                with pytest.raises(VectorSyncError):
                    commit(memory, {"lost": "green tea lost"})
            else:
                commit(memory, {"late": "green tea late"})
                texts["late"] = "green tea late"
            check_search(memory, texts)
            memory.flush()
            with memory.storage.snapshot() as reader:
                assert set(reader.vector_ids("chroma:memory")) == held_ids(memory)
        memory.rollback(1)
    with opened() as memory:
        assert memory.verify().ok

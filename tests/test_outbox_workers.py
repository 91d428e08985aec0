"""Processes that share the outbox: no two apply an entry at a time, and the work of one that dies is taken over."""

from __future__ import annotations

import json
import operator
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, StateGraph

sys.path.insert(0, str(Path(__file__).parent))
from truth import DIMS, ROOT, Words, command, commit, notes

from langgraph_memstate import MemoryStore, follower
from langgraph_memstate.errors import VectorSyncError
from langgraph_memstate.hooks.base import Capabilities, IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.storage.operations import OutboxDone, OutboxFailed, Prepare, QueueIndex, Settle
from langgraph_memstate.storage.values import OutboxRow, PreparedRow
from langgraph_memstate.urls import storage_at

psycopg = pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")

from postgres_server import Server  # noqa: E402

from langgraph_memstate import PostgresStorage  # noqa: E402

NAME = "shared"


class SharedHook(SyncHook):
    """A vector database in a SQLite file, for any number of processes, which notes when each vector was written.

    Args:
        pause: seconds that a call takes between what it notes and what it does.
    """

    name = NAME
    capabilities = Capabilities(multiprocess=True, max_batch=10)

    def __init__(self, path: str | Path, pause: float = 0.0) -> None:
        self._path = str(path)
        self._pause = pause
        with closing(self._connect()) as conn:
            conn.executescript(
                "PRAGMA journal_mode = WAL; CREATE TABLE IF NOT EXISTS spec (spec TEXT PRIMARY KEY);"
                "CREATE TABLE IF NOT EXISTS vectors (id TEXT PRIMARY KEY, vector BLOB);"
                "CREATE TABLE IF NOT EXISTS calls (pid INTEGER, began REAL, ended REAL, ids TEXT);"
            )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=30, isolation_level=None)

    def _rows(self, query: str, *parameters: Any) -> list[Any]:
        with closing(self._connect()) as conn:
            return conn.execute(query, parameters).fetchall()

    def open(self, spec: IndexSpec) -> IndexState:
        found = self._rows("SELECT spec FROM spec")
        if not found:
            return IndexState.EMPTY
        return IndexState.OK if found == [(repr(spec),)] else IndexState.MISMATCH

    def reset(self, spec: IndexSpec) -> None:
        with closing(self._connect()) as conn:
            conn.executescript("BEGIN; DELETE FROM vectors; DELETE FROM spec;")
            conn.execute("INSERT INTO spec VALUES (?)", (repr(spec),))
            conn.execute("COMMIT")

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        ids = json.dumps([*(record.id for record in upserts), *deletes])
        with closing(self._connect()) as conn:
            row = conn.execute("INSERT INTO calls VALUES (?, ?, NULL, ?)", (os.getpid(), time.time(), ids)).lastrowid
            time.sleep(self._pause)
            conn.execute("BEGIN IMMEDIATE")
            stored = [(record.id, record.vector.tobytes()) for record in upserts]
            conn.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", stored)
            conn.executemany("DELETE FROM vectors WHERE id = ?", [(id_,) for id_ in deletes])
            conn.execute("UPDATE calls SET ended = ? WHERE rowid = ?", (time.time(), row))
            conn.execute("COMMIT")

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        held = {id_: np.frombuffer(data, np.float32) for id_, data in self._rows("SELECT id, vector FROM vectors")}
        return sorted(held, key=lambda id_: -float(vector @ held[id_]))[:k]

    def ids(self) -> Iterator[str]:
        return iter([id_ for (id_,) in self._rows("SELECT id FROM vectors")])

    def count(self) -> int:
        return len(list(self.ids()))

    def close(self) -> None:
        self._path = "/nowhere/closed"


@pytest.fixture
def url(postgres: Server) -> Iterator[str]:
    with postgres.database() as fresh:
        yield fresh


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "vectors.db"


def opened(url: str, index: Path, pause: float = 0.0) -> MemoryStore:
    memory = MemoryStore(
        storage_at(url), index={"dims": DIMS, "embed": Words(), "fields": ["text"]}, vector_sync="deferred"
    )
    memory.add_hook(SharedHook(index, pause))
    return memory


def entries(memory: MemoryStore) -> list[OutboxRow]:
    with memory.storage.snapshot() as reader:
        return reader.outbox(NAME, due=None, limit=1_000)


def check_equal(memory: MemoryStore, index: Path) -> None:
    assert entries(memory) == []
    with memory.storage.snapshot() as reader:
        wanted = sorted(reader.vector_ids(NAME))
    assert sorted(SharedHook(index).ids()) == wanted
    assert len(wanted) == len(set(wanted))
    assert memory.verify().ok


# -- claims -----------------------------------------------------------------------------------------


@pytest.fixture
def quiet(url: str, index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    """A memory that has work and applies none of it by itself: it has no thread to do so."""
    monkeypatch.setattr(follower.Follower, "_start", lambda self: None)
    with opened(url, index) as memory:
        commit(memory, notes(5))
        yield memory


@pytest.fixture
def other(url: str, quiet: MemoryStore) -> Iterator[PostgresStorage]:
    storage = PostgresStorage(url)
    storage.open()
    yield storage
    storage.close()


def claim(storage: Any, limit: int = 10, lease: float = 60.0) -> list[OutboxRow]:
    return storage.claim(NAME, due=time.time(), limit=limit, lease=lease)


def test_what_one_has_claimed_no_other_is_given(quiet: MemoryStore, other: PostgresStorage) -> None:
    mine = claim(quiet.storage, 2)
    theirs = claim(other)
    assert [row.id for row in mine + theirs] == [row.id for row in entries(quiet)]
    assert [row.is_held for row in entries(quiet)] == [False] * 2 + [True] * 3
    assert claim(quiet.storage) == mine, "it may ask again"
    assert other.apply(((OutboxDone(tuple(theirs[:1])), OutboxFailed((theirs[1].id,), "why", 0.0)),)) == [None]
    assert [row.id for row in claim(quiet.storage)] == [mine[0].id, mine[1].id, theirs[1].id]


def test_a_claim_ends_with_its_lease(quiet: MemoryStore, other: PostgresStorage) -> None:
    assert len(claim(other, lease=1.0)) == 5
    assert claim(quiet.storage) == []
    time.sleep(1.1)
    assert len(claim(quiet.storage)) == 5
    assert claim(other) == []


def test_a_claim_ends_with_its_memory(quiet: MemoryStore, url: str) -> None:
    storage = PostgresStorage(url)
    storage.open()
    assert len(claim(storage)) == 5
    storage.close()
    assert len(claim(quiet.storage)) == 5


def test_a_vector_is_removed_after_the_store_that_it_follows(quiet: MemoryStore, other: PostgresStorage) -> None:
    theirs = claim(other)
    quiet.delete("note", "n0")
    assert {row.op for row in entries(quiet)} == {"upsert", "delete"}
    assert claim(quiet.storage) == []
    assert other.apply(((OutboxDone(tuple(theirs)),),)) == [None]
    assert [row.op for row in claim(quiet.storage)] == ["delete"]


def test_a_store_that_came_too_late_is_looked_at(quiet: MemoryStore, other: PostgresStorage, index: Path) -> None:
    """Its lease was over, and the removal that waited for it is done."""
    theirs = claim(other, lease=0.0)
    late = SharedHook(index)
    quiet.delete("note", "n0")
    quiet.flush()
    check_equal(quiet, index)
    gone = next(row.vector_id for row in theirs if row.vector_id not in set(late.ids()))
    vector = np.ones(DIMS, np.float32)
    late.apply([VectorRecord(gone, vector / np.linalg.norm(vector), ("note",))], [])
    assert other.apply(((OutboxDone(tuple(theirs)),),)) == [None]
    quiet.flush()
    check_equal(quiet, index)


def test_a_flush_waits_for_what_others_have_claimed(quiet: MemoryStore, other: PostgresStorage, index: Path) -> None:
    claim(other, 3, lease=0.5)
    began = time.monotonic()
    quiet.flush()
    assert time.monotonic() - began > 0.3
    check_equal(quiet, index)


def test_a_close_does_not(url: str, index: Path, other: PostgresStorage) -> None:
    claim(other, 3, lease=30.0)
    began = time.monotonic()
    opened(url, index).close()
    assert time.monotonic() - began < 10


def test_a_flush_says_when_work_fails_that_nobody_else_has(quiet: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, upserts: Any, deletes: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(SharedHook, "apply", refuse)
    with pytest.raises(VectorSyncError, match="5 index entries"):
        quiet.flush()


@pytest.mark.parametrize("on", ["postgres", "sqlite"])
def test_what_a_commit_has_prepared_is_left_to_it(
    request: pytest.FixtureRequest, database: Path, index: Path, on: str
) -> None:
    many = 200  # more than are applied at once
    url = str(database) if on == "sqlite" else request.getfixturevalue("url")
    with opened(url, index) as memory:
        commit(memory, notes(5))
        memory.flush()
        prepared, *rest = SharedHook(index).ids()
        memory._writer.land(
            (
                Prepare(PreparedRow("p", NAME, (prepared,), "elsewhere/1", time.time() + 60)),
                QueueIndex(NAME, (), (*[prepared] * many, "stranger")),
                QueueIndex(NAME, tuple(rest), ()),
            )
        )
        memory.flush()
        assert [(row.op, row.vector_id) for row in entries(memory)] == [("delete", prepared)] * many
        memory._writer.land((Settle("p"),))
        memory.flush()
        check_equal(memory, index)


# -- workers that die -------------------------------------------------------------------------------

LEASE = 5.0  # seconds: longer than a busy machine keeps a process waiting
SETUP = """
import random
from langgraph_memstate import follower
import test_outbox_workers as shared
follower._LEASE = shared.LEASE
url, index, who = sys.argv[1], sys.argv[2], sys.argv[3]
memory = shared.opened(url, Path(index), pause=0.01)
print("ready", flush=True)
"""
WORK = """
number = 0
while not Path(index + ".over").exists():
    keys = [f"shared{random.randrange(12)}", f"{who}-{number}"]
    memory.commit([note(key, f"green tea {who} {number} {key}") for key in keys])
    if number % 3 == 0:
        memory.delete("note", random.choice(keys))
    number += 1
    time.sleep(0.05)
memory.close()
"""
FOLLOW = """
while not Path(index + ".over").exists():
    time.sleep(0.05)
memory.close()
"""
RUN = """
while not Path(index + ".go").exists():
    time.sleep(0.01)
shared.run_graphs(memory, who, Path(index + ".enough"))
memory.close()
"""
THREADS, NODES = 8, 2


class Talk(TypedDict):
    said: Annotated[list[str], operator.add]


def run_graphs(memory: MemoryStore, who: str, enough: Path) -> None:
    """Talk in several threads at a time until there is a file; every node remembers what it says."""

    def say(state: Talk, config: RunnableConfig) -> Talk:
        thread, number = config["configurable"]["thread_id"], len(state["said"])
        memory.store.put(("note", who, thread), str(number), {"text": f"{thread} said {number}"})
        return {"said": [f"{thread} said {number}"]}

    builder = StateGraph(Talk).add_sequence([(f"say{number}", say) for number in range(NODES)])
    builder.add_edge(START, "say0")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)

    def talk(number: int) -> None:
        while not enough.exists():
            graph.invoke({"said": []}, {"configurable": {"thread_id": f"{who}-{number}"}})

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(talk, range(THREADS)))


class Processes:
    """Processes that say when they are ready."""

    def __init__(self, url: str, index: Path) -> None:
        self._url = url
        self._index = index
        self._all: list[subprocess.Popen[str]] = []

    def start(self, script: str) -> subprocess.Popen[str]:
        arguments = command(SETUP + script, self._url, self._index, f"w{len(self._all)}")
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self._all.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def replace_one(self, workers: list[subprocess.Popen[str]], script: str, dice: random.Random) -> None:
        """Kill one of these, and start another in its place."""
        victim = workers.pop(dice.randrange(len(workers)))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        workers.append(self.start(script))

    def end(self) -> None:
        for process in self._all:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def processes(url: str, index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    opened(url, index).close()
    monkeypatch.setattr(follower, "_LEASE", LEASE)
    started = Processes(url, index)
    yield started
    started.end()


@pytest.mark.slow
def test_three_workers_of_which_one_is_killed_every_second(processes: Processes, url: str, index: Path) -> None:
    dice = random.Random(5)
    workers = [processes.start(WORK) for _ in range(3)]
    for _ in range(4):
        time.sleep(1.0)
        processes.replace_one(workers, WORK, dice)
    Path(f"{index}.over").touch()
    assert [worker.wait(240) for worker in workers] == [0, 0, 0]
    with opened(url, index) as memory:
        memory.flush()
        check_equal(memory, index)
        facts = memory.query("note", limit=100_000)
        assert len(facts) > 50
        assert len({fact.id for fact in facts}) == len(facts)
    _check_turns(SharedHook(index)._rows("SELECT pid, began, ended, ids FROM calls ORDER BY began"), 7)


@pytest.mark.slow
def test_graphs_of_four_processes_beside_workers_that_are_killed(processes: Processes, url: str, index: Path) -> None:
    dice = random.Random(7)
    workers = [processes.start(FOLLOW) for _ in range(3)]
    running = [processes.start(RUN) for _ in range(4)]
    Path(f"{index}.go").touch()
    for _ in range(3):
        time.sleep(1.0)
        processes.replace_one(workers, FOLLOW, dice)
    Path(f"{index}.enough").touch()
    assert [process.wait(240) for process in running] == [0] * 4
    Path(f"{index}.over").touch()
    assert [process.wait(240) for process in workers] == [0] * 3
    with opened(url, index) as memory:
        memory.flush()
        check_equal(memory, index)
        said: list[str] = []
        for thread_id in [f"w{who}-{number}" for who in range(3, 7) for number in range(THREADS)]:
            found = memory.checkpointer.get_tuple({"configurable": {"thread_id": thread_id}})
            assert found is not None
            texts = found.checkpoint["channel_values"]["said"]
            assert texts == [f"{thread_id} said {number}" for number in range(len(texts))]
            assert len(texts) >= NODES
            said += texts
        facts = memory.store.search(("note",), limit=1_000_000)
        assert sorted(fact.value["text"] for fact in facts) == sorted(said)
        with memory.storage.snapshot() as reader:
            assert len(list(reader.log(prefix=("note",)))) == len(said)
    _check_turns(SharedHook(index)._rows("SELECT pid, began, ended, ids FROM calls ORDER BY began"), 5)


def _check_turns(calls: Sequence[tuple[int, float, float | None, str]], workers: int) -> None:
    """No vector was written by two processes at a time; one that died has written nothing."""
    turns: defaultdict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for pid, began, ended, ids in calls:
        if ended is not None:
            for id_ in json.loads(ids):
                turns[id_].append((began, ended, pid))
    assert len({pid for turn in turns.values() for _, _, pid in turn}) >= workers - 1
    for id_, turn in turns.items():
        for (_, ended, pid), (began, _, next_pid) in pairwise(turn):
            assert pid == next_pid or ended <= began, id_

"""The writer: callers land what they bring, and what others have queued meanwhile."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gate import Gate

from langgraph_memstate.commit import Landing, Writer
from langgraph_memstate.errors import FactRaced, StorageClosedError, StorageError
from langgraph_memstate.facts import Draft, new_version
from langgraph_memstate.storage.operations import Append, Commit, Expect, PutWrites
from langgraph_memstate.storage.values import Blob, StepKey, WriteRow


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    storage = Gate(tmp_path / "memory.db")
    storage.open()
    yield storage
    storage.close()


@pytest.fixture
def writer(gate: Gate) -> Iterator[Writer]:
    opened = Writer(gate)
    yield opened
    gate.opened.set()
    opened.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


def put(*keys: str) -> Commit:
    return (Append(tuple(Draft(new_version(), ("notes",), key, "put", "{}") for key in keys)),)


def raced() -> Commit:
    """A commit that fails, after it has written."""
    return (*put("never"), Expect(((("notes",), "absent", "a version"),)))


def queued(writer: Writer, count: int) -> None:
    """Return once so many commits wait for their turn."""
    deadline = time.monotonic() + 30
    while len(writer._queue) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def behind_one(
    gate: Gate, writer: Writer, pool: ThreadPoolExecutor, *commits: Commit
) -> tuple[Future[None], list[Future[None]]]:
    """One commit that is being written, and others that were queued behind it, in order."""
    first = pool.submit(writer.land, put("first"))
    assert gate.entered.wait(30)
    rest = []
    for commit in commits:
        rest.append(pool.submit(writer.land, commit))
        queued(writer, len(rest))
    return first, rest


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_once(gate: Gate) -> None:
    def strike() -> None:
        gate.strike = lambda: None
        raise KeyboardInterrupt

    gate.strike = strike


def test_what_is_queued_lands_in_order_and_in_one_group(gate: Gate, writer: Writer, pool: ThreadPoolExecutor) -> None:
    first, rest = behind_one(gate, writer, pool, *(put(f"{number}a", f"{number}b") for number in range(5)))
    gate.opened.set()
    for landing in (first, *rest):
        landing.result(30)
    assert gate.groups == [1, 5]
    assert gate.landed() == ["first", *(f"{number}{part}" for number in range(5) for part in "ab")]
    assert gate.commit_ids() == [1, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]  # a group is one transaction of many commits
    assert not writer._queue


def test_one_key_written_by_several_commits_of_a_group(gate: Gate, writer: Writer, pool: ThreadPoolExecutor) -> None:
    gone: Commit = (Append((Draft(new_version(), ("notes",), "k", "delete", None),)),)
    first, rest = behind_one(gate, writer, pool, put("k"), put("k"), gone, put("k"))
    gate.opened.set()
    for landing in (first, *rest):
        landing.result(30)
    assert gate.groups == [1, 4]
    with gate.snapshot() as reader:
        newest_first = list(reader.versions(("notes",), "k"))
        item = reader.item(("notes",), "k", time.time())
    assert [entry.op for entry in newest_first] == ["put", "delete", "put", "put"]
    supersedes = [entry.supersedes for entry in newest_first]
    assert supersedes == [None, newest_first[2].version, newest_first[3].version, None]
    assert item is not None
    assert (item.version, item.seq) == (newest_first[0].version, 5)


def test_a_commit_that_fails_in_a_group_fails_alone(gate: Gate, writer: Writer, pool: ThreadPoolExecutor) -> None:
    first, rest = behind_one(gate, writer, pool, put("a"), raced(), put("b"))
    gate.opened.set()
    first.result(30)
    assert [type(landing.exception(30)) for landing in rest] == [type(None), FactRaced, type(None)]
    assert gate.groups == [1, 3]
    assert gate.landed() == ["first", "a", "b"]


def test_a_caller_interrupted_while_it_writes_leaves_the_others_to_each_other(
    gate: Gate, writer: Writer, pool: ThreadPoolExecutor
) -> None:
    first, rest = behind_one(gate, writer, pool, put("a"), put("b"))
    interrupt_once(gate)
    gate.opened.set()
    assert isinstance(first.exception(30), KeyboardInterrupt)
    for landing in rest:
        landing.result(30)
    assert gate.landed() == ["a", "b"]


def test_those_that_an_interrupted_caller_was_writing_for_are_told(
    gate: Gate, writer: Writer, pool: ThreadPoolExecutor
) -> None:
    first, rest = behind_one(gate, writer, pool, put("a"), put("b"), put("c"))
    gate.strike = lambda: interrupt() if gate.groups[-1] == 3 else None
    gate.opened.set()
    first.result(30)
    errors = [type(landing.exception(30)) for landing in rest]
    assert errors == [KeyboardInterrupt, StorageError, StorageError]
    gate.strike = lambda: None
    writer.land(put("d"))
    assert gate.landed() == ["first", "d"]


def test_a_caller_interrupted_as_it_is_called_to_write_passes_it_on(
    gate: Gate, writer: Writer, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep, called = Landing.sleep, threading.Event()

    def interrupted(self: Landing, timeout: float = -1) -> None:
        sleep(self, timeout)
        if not called.is_set():
            called.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(Landing, "sleep", interrupted)
    first, rest = behind_one(gate, writer, pool, put("a"), put("b"))
    gate.opened.set()
    first.result(30)
    assert isinstance(rest[0].exception(30), KeyboardInterrupt)
    rest[1].result(30)
    assert gate.landed() == ["first", "a", "b"]  # what was queued is whole, whoever waits for it


def test_close_lands_what_nobody_waits_for(gate: Gate, writer: Writer) -> None:
    gate.opened.set()
    writer.enqueue(put("a"))
    behind = writer.submit(put("b"))
    behind.result(30)
    assert gate.landed() == ["a", "b"]
    writer.enqueue(put("c"))
    writer.close()
    assert gate.landed() == ["a", "b", "c"]
    with pytest.raises(StorageClosedError):
        writer.enqueue(put("d"))
    with pytest.raises(StorageClosedError):
        writer.submit(put("d"))


def test_the_writes_of_a_task_wait_for_their_step(
    gate: Gate, writer: Writer, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.commit._PATIENCE", 30.0)
    writer._took = 30.0  # seconds: a slow disk
    gate.opened.set()
    step = StepKey("thread", "", "checkpoint")
    writes: Commit = (PutWrites(step, "task", "path", (WriteRow(0, "channel", Blob("null", b"")),)),)
    saved = [pool.submit(writer.land, writes) for _ in range(3)]
    queued(writer, 3)
    assert gate.groups == []
    writer.land(put("the step"))
    for landing in saved:
        landing.result(30)
    assert gate.groups == [4]


def test_many_callers_lose_nothing(gate: Gate, writer: Writer, pool: ThreadPoolExecutor) -> None:
    gate.opened.set()

    def land(caller: int) -> None:
        for number in range(50):
            writer.land(put(f"{caller}.{number}"))

    list(pool.map(land, range(16)))
    assert sorted(gate.landed()) == sorted(f"{caller}.{number}" for caller in range(16) for number in range(50))
    assert sum(gate.groups) == 16 * 50
    for caller in range(16):
        mine = [key for key in gate.landed() if key.startswith(f"{caller}.")]
        assert mine == [f"{caller}.{number}" for number in range(50)]

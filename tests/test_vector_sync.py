"""Atomic and deferred: what a commit does while the vector database, the model or the process fails."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from truth import (
    DIMS,
    Words,
    check_search,
    check_settled,
    commit,
    dump,
    eventually,
    exact_below,
    faulty_chroma,
    held_ids,
    hook_of,
    note,
    notes,
    open_memory,
    python,
    rows,
    vector_of,
    wanted_ids,
)

from langgraph_memstate import MemoryStore
from langgraph_memstate.errors import EmbeddingError, VectorSyncError
from langgraph_memstate.outbox import Outbox

FIRST = notes(12)


class Crash(BaseException):
    """Ends a commit where it is, as the death of its process would: nothing cleans up."""


@pytest.fixture(autouse=True)
def search_asks_the_index() -> Iterator[None]:
    """However few facts there are."""
    with exact_below(2):
        yield


@pytest.fixture
def memory(database: Path) -> Iterator[MemoryStore]:
    """An atomic memory with twelve notes in it."""
    with open_memory(database) as opened:
        commit(opened, FIRST)
        yield opened


@pytest.fixture
def deferred(database: Path) -> Iterator[MemoryStore]:
    """A deferred memory with twelve notes in it and in its index."""
    with open_memory(database, vector_sync="deferred") as opened:
        commit(opened, FIRST)
        opened.flush()
        yield opened


# -- atomic: the commit and its vectors, or nothing ------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("the model is away"),
        lambda texts: [vector_of(text) for text in texts][1:],
        lambda texts: [[float("nan")] * DIMS for _ in texts],
        lambda texts: [[1.0] * (DIMS + 1) for _ in texts],
    ],
    ids=["raises", "too few", "not a number", "wrong dims"],
)
@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_a_model_that_fails_writes_nothing(database: Path, answer: Any, vector_sync: Any) -> None:
    fails = False

    class Model(Words):
        def __call__(self, texts: Any) -> Any:
            if not fails:
                return super().__call__(texts)
            if isinstance(answer, Exception):
                raise answer
            return answer(texts)

    with open_memory(database, model=Model(), vector_sync=vector_sync) as memory:
        commit(memory, FIRST)
        memory.flush()
        before, held = dump(database), held_ids(memory)
        fails = True
        with pytest.raises(EmbeddingError):
            memory.commit([note("new", "green tea again"), note("n1", "black coffee again")])
        assert (dump(database), held_ids(memory)) == (before, held)
        fails = False
        check_search(memory, FIRST)


@pytest.mark.parametrize("late", [False, True], ids=["refused", "timed out after it was applied"])
def test_a_failed_upsert_takes_the_commit_back(memory: MemoryStore, database: Path, late: bool) -> None:
    before, held = dump(database, without=["embeddings"]), held_ids(memory)
    hook_of(memory).fail("apply", times=1, late=late, error=TimeoutError("read timed out"))
    with pytest.raises(VectorSyncError, match="read timed out"):
        memory.commit([note("new", "green tea again"), note("n1", "black coffee again")])
    assert dump(database, without=["embeddings"]) == before
    assert held_ids(memory) == held
    check_search(memory, FIRST)
    commit(memory, {"new": "green tea again"})
    memory.flush()
    check_search(memory, FIRST | {"new": "green tea again"})
    check_settled(memory, database)


def test_a_commit_that_cannot_be_taken_back_stays_invisible(memory: MemoryStore, database: Path) -> None:
    hook = hook_of(memory)
    before = dump(database, without=["embeddings", "outbox"])
    hook.fail("apply", times=1, late=True)
    hook.fail("apply", only=lambda upserts, deletes: bool(deletes))
    with pytest.raises(VectorSyncError):
        commit(memory, {f"new{n}": f"green tea in the morning {n}" for n in range(70)})
    assert dump(database, without=["embeddings", "outbox"]) == before
    assert len(held_ids(memory) - wanted_ids(database)) == 50, "a batch got in before the fault"
    assert len(rows(database, "SELECT * FROM outbox WHERE op = 'delete'")) == 70
    check_search(memory, FIRST)
    hook.heal()
    eventually(lambda: held_ids(memory) == wanted_ids(database))  # without a flush: the outbox goes on by itself
    memory.flush()
    check_search(memory, FIRST)
    check_settled(memory, database)


def test_a_commit_that_crashes_is_taken_back_by_the_same_process(memory: MemoryStore, database: Path) -> None:
    hook_of(memory).fail("apply", times=1, late=True, error=Crash())
    with pytest.raises(Crash):
        commit(memory, {"new": "green tea in the morning"})
    assert len(held_ids(memory) - wanted_ids(database)) == 1
    check_search(memory, FIRST)
    eventually(lambda: held_ids(memory) == wanted_ids(database))
    memory.flush()
    check_settled(memory, database)


def test_a_commit_that_crashes_is_settled_at_the_next_open(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "settle_abandoned", lambda self: None)  # nobody is there to do it before
    with open_memory(database) as memory:
        commit(memory, FIRST)
        hook_of(memory).fail("apply", times=1, late=True, error=Crash())
        with pytest.raises(Crash):
            commit(memory, {"new": "green tea in the morning"})
    assert len(rows(database, "SELECT * FROM prepared")) == 1
    monkeypatch.undo()
    with open_memory(database) as memory:
        check_search(memory, FIRST)
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)


@pytest.mark.parametrize("late", [False, True], ids=["before a batch", "after a batch"])
@pytest.mark.parametrize("batch", [1, 2])
def test_killed_between_prepare_and_publish(database: Path, batch: int, late: bool) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
    killed = python(
        """
memory = open_memory(database)
hook = hook_of(memory)
hook.fail("apply", times=0)
seen = []
def die(upserts, deletes):
    seen.append(upserts)
    if len(seen) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
hook.fail("apply", late=sys.argv[3] == "True", only=die)
commit(memory, {f"new{n}": f"green tea in the morning {n}" for n in range(70)})
""",
        database, batch, late,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(rows(database, "SELECT * FROM prepared")) == 1
    with open_memory(database) as memory:
        check_search(memory, FIRST)
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)


def test_an_index_that_is_not_open_refuses_atomic_commits(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
    hook = faulty_chroma(database)
    hook.go_away()
    with open_memory(database, vectors=hook) as memory:
        assert [record.levelname for record in caplog.records].count("WARNING") == 1
        check_search(memory, FIRST)
        before = dump(database, without=["embeddings"])
        with pytest.raises(VectorSyncError, match="repair"):
            commit(memory, {"new": "green tea again"})
        assert dump(database, without=["embeddings"]) == before
        report = memory.verify()
        assert not report.ok
        assert not report.indexes[0].reachable
        with pytest.raises(VectorSyncError):
            memory.repair()
        hook.heal()
        assert memory.repair().ok
        commit(memory, {"new": "green tea again"})
        check_search(memory, FIRST | {"new": "green tea again"})


# -- deferred: the commit lands, its vectors follow ------------------------------------------------


def change(memory: MemoryStore) -> dict[str, str]:
    """New, superseded and deleted facts; returns what is current then."""
    commit(memory, notes(6, start=100))
    commit(memory, {"n0": "trains to berlin and back", "n1": "the roof"})
    commit(memory, {"n0": "trains to paris"})
    memory.delete("note", "n2")
    memory.delete("note", "n100")
    current = FIRST | notes(6, start=100) | {"n0": "trains to paris", "n1": "the roof"}
    return {key: text for key, text in current.items() if key not in ("n2", "n100")}


def test_search_is_right_while_the_database_is_away(deferred: MemoryStore, database: Path) -> None:
    hook = hook_of(deferred)
    hook.go_away()
    current = change(deferred)
    check_search(deferred, current)
    hook.heal()
    hook.fail("apply")  # it answers searches again, from the past
    check_search(deferred, current)
    report = deferred.verify().indexes[0]
    assert (report.reachable, report.missing, report.orphaned, report.quarantined) == (True, (), (), 0)
    assert report.pending == len(rows(database, "SELECT * FROM outbox")) > 0
    with pytest.raises(VectorSyncError):
        deferred.flush()
    check_search(deferred, current)
    hook.heal()
    eventually(lambda: not rows(database, "SELECT * FROM outbox"))
    check_search(deferred, current)
    check_settled(deferred, database)


def test_search_is_right_half_way_through_a_replay(deferred: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.follower._BATCH", 3)
    hook = hook_of(deferred)
    hook.go_away()
    current = change(deferred)
    hook.heal()
    checks = 0

    def look() -> None:
        nonlocal checks
        checks += 1
        check_search(deferred, current)

    hook.meanwhile("apply", look, times=None)
    hook.meanwhile("apply", look, times=None, late=True)
    deferred.flush()
    hook.heal()
    check_search(deferred, current)
    assert checks > 6


def test_retries_back_off(
    deferred: MemoryStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.follower._POLL", 0.01)
    tries: list[float] = []

    def note_time(*args: object) -> bool:
        tries.append(time.monotonic())
        return True

    hook_of(deferred).fail("apply", only=note_time)
    hook_of(deferred).fail("count")
    change(deferred)
    eventually(lambda: len(tries) == 6)
    assert tries[-1] - tries[0] > 0.05 * (2 + 4 + 8 + 16)
    assert tries[-1] - tries[-2] > 4 * (tries[-3] - tries[-4]) * 0.6
    assert sum("does not answer" in record.message for record in caplog.records) == 1


def test_a_poisoned_entry_does_not_hold_up_its_neighbours(
    deferred: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.follower.POISON_AFTER", 3)
    hook = hook_of(deferred)
    poison = note("poison", "green tea with sugar")
    hook.fail("apply", only=lambda upserts, deletes: any(record.id == version for record in upserts))
    version = ""
    with deferred.transaction():
        version = deferred.commit([*(note(f"a{n}", f"a cat {n}") for n in range(5)), poison])[-1].version
        deferred.commit([note(f"b{n}", f"trains {n}") for n in range(5)])
    current = FIRST | {f"a{n}": f"a cat {n}" for n in range(5)} | {f"b{n}": f"trains {n}" for n in range(5)}
    current["poison"] = "green tea with sugar"
    eventually(lambda: wanted_ids(database) - held_ids(deferred) == {version})
    check_search(deferred, current)
    eventually(lambda: deferred.verify().indexes[0].quarantined == 1)
    check_search(deferred, current)
    report = deferred.verify()
    assert not report.ok
    assert (report.indexes[0].missing, report.indexes[0].pending) == ((version,), 0)
    deferred.flush()  # what is quarantined does not wait any more
    with pytest.raises(VectorSyncError):
        deferred.repair()
    check_search(deferred, current)
    hook.heal()
    assert deferred.repair().ok
    check_search(deferred, current)
    check_settled(deferred, database)


def test_a_poisoned_entry_is_forgotten_with_its_fact(
    deferred: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langgraph_memstate.follower.POISON_AFTER", 1)
    hook_of(deferred).fail("apply", only=lambda upserts, deletes: bool(upserts))
    commit(deferred, {"poison": "green tea"})
    eventually(lambda: deferred.verify().indexes[0].quarantined == 1)
    deferred.delete("note", "poison")
    deferred.flush()
    check_search(deferred, FIRST)
    check_settled(deferred, database)


def test_an_outage_poisons_nothing(deferred: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.follower.POISON_AFTER", 1)
    hook = hook_of(deferred)
    hook.go_away()
    current = change(deferred)
    for _ in range(5):
        with pytest.raises(VectorSyncError):
            deferred.flush()
    assert rows(database, "SELECT DISTINCT attempts, retry_at FROM outbox") == [(0, 0.0)]
    hook.heal()
    deferred.flush()
    check_search(deferred, current)
    check_settled(deferred, database)


def test_flush_applies_what_it_can_around_an_entry_that_fails(deferred: MemoryStore, database: Path) -> None:
    hook = hook_of(deferred)
    hook.go_away()
    commit(deferred, {"bad": "green tea"})
    commit(deferred, notes(60, start=200))
    (bad,) = rows(database, "SELECT version FROM items WHERE key = 'bad'")[0]
    hook.heal()
    hook.fail("apply", only=lambda upserts, deletes: any(record.id == bad for record in upserts))
    with pytest.raises(VectorSyncError, match=r"1 index entries .* \(chroma:memory: ConnectionError\("):
        deferred.flush()
    assert wanted_ids(database) - held_ids(deferred) == {bad}
    hook.heal()
    deferred.flush()
    check_settled(deferred, database)


def test_a_database_that_is_away_at_open_is_followed_once_it_is_back(database: Path) -> None:
    with open_memory(database, vector_sync="deferred") as memory:
        commit(memory, FIRST)
    hook = faulty_chroma(database)
    hook.go_away()
    with open_memory(database, vectors=hook, vector_sync="deferred") as memory:
        current = change(memory)
        check_search(memory, current)
        with pytest.raises(VectorSyncError):
            memory.flush()
        hook.heal()
        memory.flush()
        check_search(memory, current)
        check_settled(memory, database)


def test_an_index_comes_back_without_being_asked_to(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.follower._REOPEN", 0.1)
    hook = faulty_chroma(database)
    hook.go_away()
    with open_memory(database, vectors=hook, vector_sync="deferred") as memory:
        commit(memory, FIRST)
        hook.heal()
        eventually(lambda: not rows(database, "SELECT * FROM outbox"))
        check_search(memory, FIRST)
        check_settled(memory, database)


@pytest.mark.parametrize("away", ["at open", "later"])
def test_closing_with_work_left_loses_nothing(database: Path, caplog: pytest.LogCaptureFixture, away: str) -> None:
    with open_memory(database, vector_sync="deferred") as memory:
        commit(memory, FIRST)
    hook = faulty_chroma(database)
    if away == "at open":
        hook.go_away()
    with open_memory(database, vectors=hook, vector_sync="deferred") as memory:
        hook.go_away()
        current = change(memory)
    assert any("closing with index work left" in record.message for record in caplog.records)
    assert rows(database, "SELECT * FROM outbox")
    with open_memory(database, vector_sync="deferred") as memory:
        check_search(memory, current)
        memory.flush()
        check_search(memory, current)
        check_settled(memory, database)


def test_a_hook_that_cannot_close_does_not_keep_the_database_open(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
        hook = hook_of(memory)
        hook.fail("close", late=True)
    assert any("closing index chroma:memory failed" in record.message for record in caplog.records)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memstate")]
    with open_memory(database) as memory:
        check_search(memory, FIRST)

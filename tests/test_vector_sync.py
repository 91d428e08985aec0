"""The index follows the log: faults of the vector database, of the model and of the process, with real Chroma.

Every state is looked at twice: answered by a scan over SQL, and by the index, which is asked from the first fact on.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_core.embeddings import Embeddings

sys.path.insert(0, str(Path(__file__).parent))
from truth import (
    DIMS,
    Words,
    check_search,
    check_settled,
    commit,
    cosine,
    directory,
    dump,
    eventually,
    faulty_chroma,
    held_ids,
    hook_of,
    note,
    notes,
    open_memory,
    rows,
    vector_of,
    wanted_ids,
)

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate.errors import EmbeddingError, IndexConfigError, TransientError, VectorSyncError
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from langgraph_memstate.index import VectorIndex
from langgraph_memstate.outbox import Outbox

ROOT = Path(__file__).parents[1]
FIRST = notes(12)


class Crash(BaseException):
    """Ends a commit where it is, as the death of its process would: nothing cleans up."""


@pytest.fixture(params=["scan", "index"], autouse=True)
def path_of_search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "index":
        monkeypatch.setattr("langgraph_memstate.search.EXACT_BELOW", 2)
    return str(request.param)


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


def python(script: str, *arguments: object, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with the names of `truth` at hand."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


PRELUDE = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from truth import *
database = Path(sys.argv[1])
"""

# -- atomic: the commit and its vectors, or nothing ---------------------------------------------------


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


# -- deferred: the commit lands, its vectors follow ------------------------------------------------------


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
    monkeypatch.setattr("langgraph_memstate.outbox._BATCH", 3)
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
    monkeypatch.setattr("langgraph_memstate.outbox._POLL", 0.01)
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
    monkeypatch.setattr("langgraph_memstate.outbox.POISON_AFTER", 3)
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
    monkeypatch.setattr("langgraph_memstate.outbox.POISON_AFTER", 1)
    hook_of(deferred).fail("apply", only=lambda upserts, deletes: bool(upserts))
    commit(deferred, {"poison": "green tea"})
    eventually(lambda: deferred.verify().indexes[0].quarantined == 1)
    deferred.delete("note", "poison")
    deferred.flush()
    check_search(deferred, FIRST)
    check_settled(deferred, database)


def test_an_outage_poisons_nothing(deferred: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.outbox.POISON_AFTER", 1)
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
    with pytest.raises(VectorSyncError, match="1 index entries"):
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
    monkeypatch.setattr("langgraph_memstate.outbox._REOPEN", 0.1)
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


# -- commits and replay at the same time ----------------------------------------------------------------


def once_sent(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Run something in the next commit, between the upsert of its vectors and its publication."""
    apply = VectorIndex.apply

    def apply_and(self: VectorIndex, upserts: Any, deletes: Any) -> None:
        apply(self, upserts, deletes)
        if upserts and threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(VectorIndex, "apply", apply)
            then()

    monkeypatch.setattr(VectorIndex, "apply", apply_and)


def drafts_of(memory: MemoryStore, texts: dict[str, str]) -> list[Any]:
    return [memory.draft_put(("note",), key, {"text": text}, type="note") for key, text in texts.items()]


def test_a_commit_tried_again_keeps_its_vectors(
    memory: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first try is being taken back by the follower, with the very same ids, while the second one lands."""
    deleting, landed = threading.Event(), threading.Event()
    apply = VectorIndex.apply

    def pause(self: VectorIndex, upserts: Any, deletes: Any) -> None:
        if deletes and threading.current_thread().name == "memstate-outbox":
            deleting.set()
            assert landed.wait(10)
        apply(self, upserts, deletes)

    monkeypatch.setattr(VectorIndex, "apply", pause)
    drafts = drafts_of(memory, {"new": "green tea in the morning"})
    hook = hook_of(memory)
    hook.fail("apply", times=1, late=True)
    hook.fail("count", times=1)  # so that the commit leaves its vectors to the follower
    with pytest.raises(VectorSyncError):
        memory.land(drafts)
    assert deleting.wait(10)
    memory.land(drafts)
    check_search(memory, FIRST | {"new": "green tea in the morning"})
    landed.set()
    eventually(lambda: not rows(database, "SELECT * FROM outbox"))
    check_search(memory, FIRST | {"new": "green tea in the morning"})
    check_settled(memory, database)


def test_a_removal_that_comes_after_the_second_upsert(
    memory: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower removes between the second try's upsert and its publication."""
    drafts = drafts_of(memory, {"new": "green tea in the morning"})
    hook = hook_of(memory)
    apply, deleting, upserted = VectorIndex.apply, threading.Event(), threading.Event()
    hook.fail("apply", times=1, late=True)
    hook.fail("count", times=1)

    def pause(self: VectorIndex, upserts: Any, deletes: Any) -> None:
        if deletes and not deleting.is_set():
            deleting.set()
            assert upserted.wait(10)
            apply(self, upserts, deletes)
            removed.set()
            return
        apply(self, upserts, deletes)
        if upserts and deleting.is_set() and not upserted.is_set():
            upserted.set()
            assert removed.wait(10)

    removed = threading.Event()
    monkeypatch.setattr(VectorIndex, "apply", pause)
    with pytest.raises(VectorSyncError):
        memory.land(drafts)
    assert deleting.wait(10)
    memory.land(drafts)
    check_search(memory, FIRST | {"new": "green tea in the morning"})
    eventually(lambda: not rows(database, "SELECT * FROM outbox"))
    check_search(memory, FIRST | {"new": "green tea in the morning"})
    check_settled(memory, database)


def test_the_follower_leaves_vectors_alone_that_a_commit_has_prepared(
    memory: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts = drafts_of(memory, {"new": "green tea in the morning"})
    hook = hook_of(memory)
    hook.fail("apply", times=1, late=True)
    hook.fail("apply", only=lambda upserts, deletes: bool(deletes))
    with pytest.raises(VectorSyncError):
        memory.land(drafts)
    hook.heal()
    once_sent(monkeypatch, memory.flush)
    memory.land(drafts)
    check_search(memory, FIRST | {"new": "green tea in the morning"})
    memory.flush()
    check_settled(memory, database)


def test_a_version_superseded_while_its_vector_is_sent(deferred: MemoryStore, database: Path) -> None:
    hook = hook_of(deferred)
    hook.meanwhile("apply", lambda: commit(deferred, {"n0": "trains to paris"}))
    commit(deferred, {"n0": "trains to berlin"})
    eventually(lambda: ("apply" in [name for name, _ in hook.calls]) and not rows(database, "SELECT * FROM outbox"))
    check_search(deferred, FIRST | {"n0": "trains to paris"})
    check_settled(deferred, database)


def test_a_commit_of_somebody_else_during_a_rebuild_is_not_lost(database: Path) -> None:
    """It cannot reach the index, so it leaves its vectors in the outbox that the rebuild is about to replace."""
    with open_memory(database) as memory:
        commit(memory, FIRST)
    shutil.rmtree(directory(database))
    away = faulty_chroma(database)
    away.go_away()
    hook = faulty_chroma(database)
    with open_memory(database, vectors=away, vector_sync="deferred") as other, MemoryStore.open(database) as unaware:
        hook.meanwhile("reset", lambda: commit(other, {"during": "green tea"}), late=True)
        hook.meanwhile("reset", lambda: commit(unaware, {"unaware": "green tea in the morning"}), late=True)
        with open_memory(database, vectors=hook) as memory:
            current = FIRST | {"during": "green tea", "unaware": "green tea in the morning"}
            check_search(memory, current)
            memory.flush()
            check_search(memory, current)
            check_settled(memory, database)


def test_a_commit_that_prepared_vectors_before_a_rebuild_starts_again(
    memory: MemoryStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_everything() -> None:
        drop_collection(memory)
        memory.repair()

    once_sent(monkeypatch, lose_everything)
    with pytest.raises(TransientError):
        commit(memory, {"new": "green tea"})
    memory.flush()
    check_search(memory, FIRST)
    check_settled(memory, database)


def drop_collection(memory: MemoryStore) -> None:
    """Lose the vectors behind the memory's back."""
    chroma = hook_of(memory).inner
    assert isinstance(chroma, ChromaSyncHook)
    chroma._client.delete_collection("memory")


def test_search_sees_what_is_applied_between_its_reads(
    deferred: MemoryStore, monkeypatch: pytest.MonkeyPatch, path_of_search: str
) -> None:
    """The index is read before the work is applied, SQL after it is struck out."""
    propose = VectorIndex.propose
    hook = hook_of(deferred)
    hook.fail("apply")
    commit(deferred, {"new": "green tea in the morning"})

    def then_apply(self: VectorIndex, *args: Any) -> Any:
        found = propose(self, *args)
        hook.heal()
        deferred.flush()
        return found

    monkeypatch.setattr(VectorIndex, "propose", then_apply)
    found = deferred.search("green tea in the morning", limit=3)
    assert found[0].id == "new"
    if path_of_search == "index":
        assert hook._faults == [], "the index was asked"


def test_search_sees_a_fact_that_is_superseded_between_its_reads(
    memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = VectorIndex.propose
    commit(memory, {"new": "green tea in the morning"})

    def then_supersede(self: VectorIndex, *args: Any) -> Any:
        found = propose(self, *args)
        commit(memory, {"new": "green tea in the evening"})
        memory.flush()
        return found

    monkeypatch.setattr(VectorIndex, "propose", then_supersede)
    assert memory.search("green tea in the morning", limit=3)[0].id == "new"


def test_settling_is_a_race_nobody_has_to_win(memory: MemoryStore, database: Path) -> None:
    """Two processes that start after a crash both find its prepare record."""
    hook_of(memory).fail("apply", times=1, late=True, error=Crash())
    with pytest.raises(Crash):
        commit(memory, {"new": "green tea"})
    outboxes = [memory._outbox] * 8
    barrier = threading.Barrier(len(outboxes))

    def settle(outbox: Outbox) -> None:
        barrier.wait()
        outbox.settle_abandoned()

    threads = [threading.Thread(target=settle, args=(outbox,)) for outbox in outboxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.flush()
    check_settled(memory, database)


def test_writers_readers_and_replay_at_once(database: Path) -> None:
    """Facts that do not change are always found, whatever the others do."""
    steady = {f"s{n}": f"green tea in the morning {n}" for n in range(5)}
    with open_memory(database, vector_sync="deferred") as memory:
        commit(memory, steady | FIRST)
        done, wrong = threading.Event(), []

        def write(writer: int) -> None:
            for n in range(25):
                commit(memory, {f"w{writer}": f"trains to berlin {n}", f"w{writer}-{n % 3}": f"a cat {n}"})
                memory.delete("note", f"w{writer}-{n % 3}")

        def read() -> None:
            while not done.is_set():
                found = {fact.id for fact in memory.search("green tea in the morning", limit=30)}
                if not found >= steady.keys() | FIRST.keys():
                    wrong.append((steady.keys() | FIRST.keys()) - found)

        readers = [threading.Thread(target=read) for _ in range(2)]
        writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in [*readers, *writers]:
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        for thread in readers:
            thread.join()
        assert not wrong
        memory.flush()
        check_search(memory, steady | FIRST | {f"w{writer}": "trains to berlin 24" for writer in range(3)})
        check_settled(memory, database)


# -- an index that is lost, damaged or somebody else's ----------------------------------------------------


@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_a_directory_deleted_while_closed(database: Path, vector_sync: Any) -> None:
    with open_memory(database, vector_sync=vector_sync) as memory:
        commit(memory, FIRST)
    shutil.rmtree(directory(database))
    model = Words()
    hook = faulty_chroma(database)
    hook.fail("apply")  # look before anything is rebuilt
    with open_memory(database, model=model, vectors=hook, vector_sync=vector_sync) as memory:
        check_search(memory, FIRST)
        hook.heal()
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)
        assert set(model.texts).isdisjoint(FIRST.values()), "SQL holds the embeddings"


def test_a_marker_left_behind_condemns_the_collection(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
        collection = collection_of(memory)
    (directory(database) / f"INFLIGHT-{collection.id}").touch()
    with open_memory(database) as memory:
        assert any("is suspect" in record.message for record in caplog.records)
        check_search(memory, FIRST)
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)
        assert collection_of(memory).id != collection.id
    assert rows(database, "SELECT generation FROM indexes") == [(2,)]


def collection_of(memory: MemoryStore) -> Any:
    chroma = hook_of(memory).inner
    assert isinstance(chroma, ChromaSyncHook)
    return chroma._collection


def test_a_rebuild_that_is_killed_starts_again(database: Path) -> None:
    texts = notes(120)
    with open_memory(database) as memory:
        commit(memory, texts)
    shutil.rmtree(directory(database))
    for method, call in (("reset", 1), ("apply", 1), ("apply", 2)):
        killed = python(
            """
hook = faulty_chroma(database)
seen = []
def die(*args):
    seen.append(args)
    if len(seen) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
hook.fail(sys.argv[2], late=True, only=die)
with open_memory(database, vectors=hook) as memory:
    memory.flush()
""",
            database, method, call,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    with open_memory(database) as memory:
        check_search(memory, texts)
        memory.flush()
        check_search(memory, texts)
        check_settled(memory, database)


@pytest.mark.parametrize("change", [{"dims": DIMS + 1}, {"model": "another"}], ids=["dims", "model"])
def test_another_model_is_refused(database: Path, change: dict[str, Any]) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
    before = dump(database)
    index = {"dims": DIMS, "embed": Words(), "fields": ["text"]} | change
    with pytest.raises(IndexConfigError, match="words"):
        MemoryStore.open(database, index=index)
    assert dump(database) == before
    with open_memory(database) as memory:
        check_search(memory, FIRST)


def test_the_collection_of_another_database_is_rebuilt(database: Path, tmp_path: Path) -> None:
    """A directory that was copied, or a database file that was swapped: the vectors in it are not ours."""
    other = tmp_path / "other.db"
    with open_memory(other) as memory:
        commit(memory, notes(8, start=50))
    with open_memory(database) as memory:
        commit(memory, FIRST)
    shutil.rmtree(directory(database))
    shutil.copytree(directory(other), directory(database))
    with open_memory(database) as memory:
        check_search(memory, FIRST)
        memory.flush()
        check_search(memory, FIRST)
        check_settled(memory, database)
    with open_memory(other) as memory:
        check_search(memory, notes(8, start=50))
        check_settled(memory, other)


def test_a_collection_dropped_at_runtime(memory: MemoryStore, database: Path) -> None:
    drop_collection(memory)
    check_search(memory, FIRST)
    with pytest.raises(VectorSyncError):
        commit(memory, {"new": "green tea"})
    assert memory.get("note", "new") is None
    report = memory.verify().indexes[0]
    assert (report.reachable, report.index) == (False, "chroma:memory")
    assert report.error
    assert memory.repair().ok
    check_search(memory, FIRST)
    check_settled(memory, database)
    commit(memory, {"new": "green tea"})
    check_search(memory, FIRST | {"new": "green tea"})


# -- verify and repair ----------------------------------------------------------------------------------------


def test_verify_finds_what_differs_and_repair_mends_it(memory: MemoryStore, database: Path) -> None:
    collection = collection_of(memory)
    (lost,) = (row[0] for row in rows(database, "SELECT version FROM items WHERE key = 'n3'"))
    ghosts = ["00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"]
    collection.delete(ids=[lost])
    green = np.array(vector_of("green tea in the morning"), np.float32)
    collection.add(ids=ghosts, embeddings=[green, green], metadatas=[{"ns0": "note\x1f"}] * 2)
    before = dump(database)
    report = memory.verify()
    assert not report.ok
    (index,) = report.indexes
    assert (index.index, index.reachable, index.error) == ("chroma:memory", True, None)
    assert (index.missing, index.orphaned) == ((lost,), tuple(ghosts))
    assert (index.pending, index.quarantined, index.unembedded) == (0, 0, 0)
    assert dump(database) == before, "verify changes nothing"
    found = memory.search("green tea in the morning", limit=20)
    assert {fact.id for fact in found} <= FIRST.keys(), "a ghost is never shown"
    assert memory.repair().ok
    check_search(memory, FIRST)
    check_settled(memory, database)


def test_verify_during_commits_sees_no_phantoms(memory: MemoryStore) -> None:
    """Reading the index and SQL takes two looks, between which a commit may land."""
    hook = hook_of(memory)
    hook.meanwhile("ids", lambda: commit(memory, {"new": "green tea", "n0": "a cat"}), late=True)
    report = memory.verify().indexes[0]
    assert (report.missing, report.orphaned) == ((), ())


def test_facts_from_before_the_hook(database: Path) -> None:
    with MemoryStore.open(database) as memory:
        commit(memory, FIRST)
        memory.delete("note", "n0")
    current = {key: text for key, text in FIRST.items() if key != "n0"}
    model = Words()
    hook = faulty_chroma(database)
    model.error = RuntimeError("the model is away")
    with open_memory(database, model=model, vectors=hook) as memory:
        report = memory.verify().indexes[0]
        assert (report.pending, report.unembedded, report.missing) == (11, 0, ())
        with pytest.raises(EmbeddingError):
            memory.search("green tea")  # rather than an answer that misses what is not embedded
        model.error = None
        check_search(memory, current)
        memory.flush()
        check_search(memory, current)
        check_settled(memory, database)
        assert sorted(set(model.texts) & set(FIRST.values())) == sorted(current.values())


def test_facts_of_a_process_without_the_index(database: Path) -> None:
    with open_memory(database) as memory:
        commit(memory, FIRST)
        with MemoryStore.open(database) as unaware:
            commit(unaware, {"n0": "trains to paris", "new": "green tea"})
            unaware.delete("note", "n1")
        current = FIRST | {"n0": "trains to paris", "new": "green tea"}
        del current["n1"]
        check_search(memory, current)
        memory.flush()
        check_search(memory, current)
        check_settled(memory, database)


def test_a_value_the_model_refuses_does_not_stop_search(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Written by a process without the index; with it, the commit would have been refused."""

    class Picky(Words):
        strict = True

        def __call__(self, texts: Any) -> Any:
            if self.strict and any(len(text) > 1000 for text in texts):
                raise ValueError("too long for the model")
            return super().__call__(texts)

    model = Picky()
    with open_memory(database, model=model) as memory, MemoryStore.open(database) as unaware:
        commit(unaware, FIRST | {"long": "green tea " * 200})
        check_search(memory, FIRST)
        memory.flush()
        report = memory.verify()
        assert not report.ok
        assert report.indexes[0].unembedded == 1
        assert any("quarantined" in record.message for record in caplog.records)
        model.strict = False
        assert memory.repair().ok
        check_search(memory, FIRST | {"long": "green tea " * 200})
        check_settled(memory, database)


def test_unembedded_values_are_reported_and_embedded(memory: MemoryStore, database: Path) -> None:
    """However they came about: here the rows are removed by hand."""
    with memory.storage.snapshot() as reader:
        (version,) = [record.version for record in reader.items((), time.time()) if record.key == "n3"]
    edit(database, "DELETE FROM vectors WHERE version = ?", version)
    report = memory.verify().indexes[0]
    assert (report.unembedded, report.missing, report.orphaned) == (1, (), (version,))
    assert memory.repair().ok
    check_search(memory, FIRST)
    check_settled(memory, database)


def edit(database: Path, statement: str, *parameters: object) -> None:
    connection = sqlite3.connect(database)
    with connection:
        connection.execute(statement, parameters)
    connection.close()


def test_values_without_text_are_not_called_unembedded(memory: MemoryStore) -> None:
    memory.commit([Fact("note", {"number": 1}, id="no text"), note("blank", "   ")])
    memory.store.put(("note",), "unindexed", {"text": "green tea"}, index=False)
    assert memory.verify().ok


# -- more than one index ---------------------------------------------------------------------------------------


@pytest.fixture
def double(database: Path) -> Iterator[MemoryStore]:
    """A memory with two collections in one directory: one embeds the text, the other the title."""
    with open_memory(database, vectors=faulty_chroma(database, text_field="text")) as memory:
        memory.add_hook(faulty_chroma(database, "titles", text_field="title", metadata_fields=["title"]))
        memory.commit([note(key, text, title=f"title {key}") for key, text in FIRST.items()])
        yield memory


def test_two_hooks_follow_one_log(double: MemoryStore, database: Path) -> None:
    double.delete("note", "n0")
    double.commit(note("n1", "green tea", title="another title"))
    double.commit(note("untitled", "black coffee"))
    double.flush()
    current = FIRST | {"n1": "green tea", "untitled": "black coffee"}
    del current["n0"]
    check_search(double, current)
    check_settled(double, database)
    assert len(held_ids(double, 0)) == 12
    assert len(held_ids(double, 1)) == 11


@pytest.mark.parametrize("failing", [0, 1])
def test_one_of_two_indexes_fails(double: MemoryStore, database: Path, failing: int) -> None:
    before = dump(database, without=["embeddings"])
    held = held_ids(double, 0), held_ids(double, 1)
    hook_of(double, failing).fail("apply", times=1, late=True)
    with pytest.raises(VectorSyncError):
        double.commit(note("new", "green tea", title="new title"))
    double.flush()
    assert dump(database, without=["embeddings"]) == before
    assert (held_ids(double, 0), held_ids(double, 1)) == held
    check_search(double, FIRST)
    check_settled(double, database)


def test_one_of_two_indexes_is_away(double: MemoryStore, database: Path) -> None:
    """In deferred mode the other one goes on."""
    double._outbox.mode = "deferred"
    hook_of(double, 0).go_away()
    double.commit(note("new", "green tea", title="new title"))
    eventually(lambda: held_ids(double, 1) == wanted_ids(database, "chroma:titles"))
    assert held_ids(double, 0) != wanted_ids(database)
    check_search(double, FIRST | {"new": "green tea"})
    with pytest.raises(VectorSyncError):
        double.flush()
    hook_of(double, 0).heal()
    double.flush()
    check_settled(double, database)


def test_two_models_of_one_name_are_told_apart(database: Path) -> None:
    def backwards(texts: Any) -> Any:
        return [vector_of(text)[::-1] for text in texts]

    def forwards(texts: Any) -> Any:
        return [vector_of(text) for text in texts]

    with MemoryStore(SQLiteStorage(database)) as memory:
        memory.add_hook(faulty_chroma(database, "one", embedding=forwards))
        with pytest.raises(IndexConfigError, match="model"):
            memory.add_hook(faulty_chroma(database, "two", embedding=backwards))
        backwards.model = "backwards"  # type: ignore[attr-defined]
        memory.add_hook(faulty_chroma(database, "two", embedding=backwards))
        commit(memory, FIRST)
        assert rows(database, "SELECT model, count(*) FROM embeddings GROUP BY model") == [
            ("backwards", 12),
            ("function", 12),
        ]


# -- how often the model is asked ---------------------------------------------------------------------------------


def test_a_text_is_embedded_once(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model, vectors=faulty_chroma(database, text_field="text")) as memory:
        memory.add_hook(faulty_chroma(database, "again", text_field="text"))
        hook_of(memory).fail("apply", times=1)
        drafts = drafts_of(memory, FIRST | {"same": FIRST["n0"]})
        with pytest.raises(VectorSyncError):
            memory.land(drafts)
        memory.land(drafts)
        commit(memory, FIRST)
        memory.delete("note", "n0")
        commit(memory, {"n0": FIRST["n0"]})
        memory.flush()
        assert sorted(model.texts) == sorted(FIRST.values())
    shutil.rmtree(directory(database))
    with open_memory(database, model=model, vectors=faulty_chroma(database, text_field="text")) as memory:
        memory.add_hook(faulty_chroma(database, "again", text_field="text"))
        commit(memory, FIRST)
        memory.flush()
        assert memory.repair().ok
    assert sorted(model.texts) == sorted(FIRST.values())


# -- what the user brings -----------------------------------------------------------------------------------------


@pytest.fixture
def ephemeral() -> Iterator[Any]:
    client = chromadb.EphemeralClient()
    yield client
    for collection in client.list_collections():
        client.delete_collection(collection.name)


class Model(Embeddings):
    """A LangChain model over the same vectors."""

    model = "words"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [vector_of(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return vector_of(text)


@pytest.mark.parametrize("kind", ["client", "collection", "langchain", "hook"])
@pytest.mark.parametrize("how", ["open", "add_hook"])
@pytest.mark.parametrize("where", ["in memory", "directory"])
def test_objects_of_the_user(database: Path, ephemeral: Any, kind: str, how: str, where: str) -> None:
    index = {"dims": DIMS, "embed": Model(), "fields": ["text"]}
    for _ in range(2):  # again on what the first one left
        client = (
            ephemeral if where == "in memory" else chromadb.PersistentClient(str(database.with_name("user.chroma")))
        )
        given = {
            "client": lambda: client,
            "collection": lambda: client.get_or_create_collection("mine", embedding_function=None),
            "langchain": lambda: Chroma("mine", Model(), client=client),
            "hook": lambda: ChromaSyncHook(client=client, collection_name="mine"),
        }[kind]()
        if how == "open":
            memory = MemoryStore.open(database, index=index, vectors=given)
        else:
            memory = MemoryStore(SQLiteStorage(database), index=index)
            memory.add_hook(given if isinstance(given, ChromaSyncHook) else ChromaSyncHook(given))
        with memory:
            commit(memory, FIRST)
            memory.flush()
            check_search(memory, FIRST)
            assert memory.verify().ok
            name = "memory" if kind == "client" else "mine"
            assert set(client.get_collection(name).get()["ids"]) == wanted_ids(database, f"chroma:{name}")


def test_the_public_usage_spelled_out(database: Path, ephemeral: Any) -> None:
    chroma = ephemeral
    chroma.create_collection("memory", embedding_function=None)
    memory = MemoryStore(SQLiteStorage(str(database)), index={"dims": DIMS, "embed": vectors_of, "fields": ["content"]})
    memory.add_hook(
        ChromaSyncHook(client=chroma, collection_name="memory", text_field="content", metadata_fields=["role"])
    )
    with memory:
        memory.commit(Fact(type="profile_update", payload={"content": "User prefers vegetarian", "role": "preference"}))
        (found,) = memory.search("vegetarian food")
        assert found.payload["content"] == "User prefers vegetarian"
        assert found.score == pytest.approx(cosine("vegetarian food", "User prefers vegetarian"), abs=1e-6)
        stored = chroma.get_collection("memory").get(include=["metadatas", "documents"])
        assert stored["ids"] == [found.version]
        assert stored["metadatas"][0]["role"] == "preference"
        assert stored["documents"] in (None, [None])


def vectors_of(texts: Any) -> Any:
    return [vector_of(text) for text in texts]


def test_the_three_lines_most_users_need(database: Path) -> None:
    with MemoryStore.open(database, index={"dims": DIMS, "embed": vectors_of, "fields": ["text"]}) as memory:
        commit(memory, FIRST)
        check_search(memory, FIRST)
        assert memory.verify().ok
    assert (directory(database) / "chroma.sqlite3").is_file()


# -- two processes --------------------------------------------------------------------------------------------------

SECOND = """
from langgraph_memstate.hooks.base import IndexState
with open_memory(database) as memory:
    index = memory._outbox.indexes[0]
    assert index.state is IndexState.BUSY
    print("open", flush=True)
    texts = notes(200, start=1000)
    for key, text in texts.items():
        memory.commit(note(key, text))
    found = {fact.id for fact in memory.search(QUERIES[0], limit=500)}
    assert found >= texts.keys()
    memory.flush()
    assert not memory.verify().indexes[0].reachable
    print("wrote", flush=True)
    sys.stdin.readline()
    eventually(lambda: index.state is IndexState.OK)
    memory.commit(note("alone", "green tea"))
    memory.flush()
    check_settled(memory, database)
    print("owner", flush=True)
"""


def test_two_processes_on_one_database(database: Path, path_of_search: str) -> None:
    ours, theirs = notes(200), notes(200, start=1000)
    with open_memory(database) as memory:
        other = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + SECOND, str(database)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stderr is not None
        try:
            if other.stdout.readline() != "open\n":
                pytest.fail(other.stderr.read())
            for key, text in ours.items():
                memory.commit(note(key, text))
            if other.stdout.readline() != "wrote\n":
                pytest.fail(other.stderr.read())
            check_search(memory, ours | theirs)
            eventually(lambda: held_ids(memory) == wanted_ids(database))  # the owner applies what the other left
            check_search(memory, ours | theirs)
            memory.flush()
            check_settled(memory, database)
            memory.close()
            print(file=other.stdin, flush=True)
            if other.stdout.readline() != "owner\n":
                pytest.fail(other.stderr.read())
        finally:
            other.stdin.close()
            other.wait(30)
            other.stdout.close()
            errors = other.stderr.read()
            other.stderr.close()
    assert other.returncode == 0, errors
    assert rows(database, "PRAGMA integrity_check") == [("ok",)]
    with open_memory(database) as memory:
        check_search(memory, ours | theirs | {"alone": "green tea"})
        check_settled(memory, database)

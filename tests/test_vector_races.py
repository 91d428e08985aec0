"""Commits, replay, rebuilds and searches at the same time."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from truth import (
    check_search,
    check_settled,
    commit,
    directory,
    drafts_of,
    drop_collection,
    eventually,
    exact_below,
    faulty_chroma,
    hook_of,
    notes,
    open_memory,
    rows,
)

from langgraph_memstate import MemoryStore
from langgraph_memstate.errors import VectorSyncError
from langgraph_memstate.index import VectorIndex
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


def once_sent(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Run something in the next commit, between the upsert of its vectors and its publication."""
    apply = VectorIndex.apply

    def apply_and(self: VectorIndex, upserts: Any, deletes: Any) -> None:
        apply(self, upserts, deletes)
        if upserts and threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(VectorIndex, "apply", apply)
            then()

    monkeypatch.setattr(VectorIndex, "apply", apply_and)


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
    commit(memory, {"new": "green tea"})
    memory.flush()
    check_search(memory, {**FIRST, "new": "green tea"})
    check_settled(memory, database)


def test_search_sees_what_is_applied_between_its_reads(deferred: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
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

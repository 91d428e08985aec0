"""Undo of commits that no graph made: values, vectors, conflicts, and undo of undo."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from truth import Words, check_search, check_settled, collection_of, note, notes, open_memory, rows

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import KeyTypeError, RollbackConflict, RollbackError, UnknownMomentError
from langgraph_memstate.facts import Origin


def texts(memory: MemoryStore) -> dict[str, Any]:
    return {fact.id: fact.payload["text"] for fact in memory.query("note", limit=10_000)}


def put(memory: MemoryStore, key: str, text: str, **options: Any) -> None:
    memory.commit(note(key, text), **options)


# -- back and forth ---------------------------------------------------------------------------------


def test_a_rollback_undoes_the_last_commit_whole(memory: MemoryStore) -> None:
    memory.commit([note("a", "1"), note("b", "1")])
    memory.commit([note("a", "2"), note("c", "2")])
    memory.delete("note", "b")
    report = memory.rollback(2)
    assert texts(memory) == {"a": "1", "b": "1"}
    assert report.steps == 2
    assert set(report.restored) == {(("note",), "a"), (("note",), "b")}
    assert report.removed == ((("note",), "c"),)
    assert (report.kept, report.head, report.undone) == ((), None, 5)


def test_an_undo_is_one_commit_at_the_end_of_the_log(memory: MemoryStore) -> None:
    put(memory, "a", "1", actor="alice")
    put(memory, "a", "2")
    memory.rollback(1, actor="bob", reason="typo")
    first, second, undo = memory.history("note", "a")
    assert [entry.value for entry in (first, second, undo)] == [{"text": "1"}, {"text": "2"}, {"text": "1"}]
    assert (undo.supersedes, undo.undoes, undo.actor, undo.reason) == (second.version, 1, "bob", "typo")
    assert undo.commit_id == undo.seq == 3
    assert first.version != undo.version


def test_a_rollback_once_more_goes_further_back(memory: MemoryStore) -> None:
    for n in range(4):
        put(memory, "a", str(n))
    for expected in ("2", "1", "0"):
        memory.rollback()
        assert texts(memory) == {"a": expected}
    memory.rollback()
    assert texts(memory) == {}
    with pytest.raises(RollbackError, match="0 commits"):
        memory.rollback()
    assert len(memory.history("note", "a")) == 8


def test_a_rollback_is_taken_back_and_that_too(memory: MemoryStore) -> None:
    put(memory, "a", "1")
    put(memory, "a", "2")
    put(memory, "b", "2")
    back = memory.rollback(2)
    again = memory.rollback(to=back.undone)
    assert texts(memory) == {"a": "2", "b": "2"}
    memory.rollback(to=again.undone)
    assert texts(memory) == {"a": "1"}
    memory.rollback(1)
    assert texts(memory) == {}


def test_what_is_written_after_an_undo_is_undone_before_what_is_older(memory: MemoryStore) -> None:
    put(memory, "a", "1")
    put(memory, "a", "2")
    memory.rollback(1)
    put(memory, "b", "new")
    assert memory.rollback(2).steps == 2
    assert texts(memory) == {}


def test_each_thread_and_the_rest_are_undone_on_their_own(memory: MemoryStore) -> None:
    put(memory, "base", "0")
    put(memory, "x", "1", thread_id="x")
    put(memory, "b", "1")
    assert memory.rollback(1, thread_id="x").removed == ((("note",), "x"),)
    assert memory.rollback(1).removed == ((("note",), "b"),)  # neither `base` goes with it, nor does `x` come back
    assert texts(memory) == {"base": "0"}
    put(memory, "c", "1")
    assert memory.rollback(2).steps == 2
    assert texts(memory) == {}


def test_a_commit_is_not_undone_by_its_thread_once_more(memory: MemoryStore) -> None:
    put(memory, "a", "1", thread_id="x")
    put(memory, "a", "2", thread_id="x")
    memory.rollback(1)
    assert texts(memory) == {"a": "1"}
    memory.rollback(1, thread_id="x")
    assert texts(memory) == {}
    with pytest.raises(RollbackError, match="0 commits"):
        memory.rollback(1, thread_id="x")
    with pytest.raises(RollbackError, match="0 commits"):
        memory.rollback(1)


def test_what_a_thread_undid_stays_undone_where_others_wrote_since(memory: MemoryStore) -> None:
    put(memory, "a", "1", thread_id="x")
    put(memory, "b", "1")
    undo = memory.rollback(1, thread_id="x")
    put(memory, "a", "2")
    memory.rollback(2)
    assert texts(memory) == {}
    memory.rollback(to=undo.undone)  # everything since, the thread's rollback too
    assert texts(memory) == {"a": "1", "b": "1"}


def test_to_a_sequence(memory: MemoryStore) -> None:
    for n in range(5):
        put(memory, f"k{n}", str(n))
    report = memory.rollback(to=2)
    assert texts(memory) == {"k0": "0", "k1": "1"}
    assert report.steps == 3
    memory.rollback(to=0)
    assert texts(memory) == {}
    memory.rollback(to=5)
    assert texts(memory) == {f"k{n}": str(n) for n in range(5)}


def test_a_fact_comes_back_as_it_was(memory: MemoryStore) -> None:
    memory.store.put(("note",), "a", {"text": "1", "deep": {"list": [1, None, "é"]}}, index=["text"], ttl=60)
    born = memory.store.get(("note",), "a")
    memory.store.put(("note",), "a", {"text": "2"})
    memory.delete("note", "a")
    memory.rollback(2)
    back = memory.store.get(("note",), "a")
    assert born is not None
    assert back is not None
    assert (back.value, back.created_at) == (born.value, born.created_at)
    first, *_, last = memory.history("note", "a")
    assert (last.index, last.ttl, last.type) == (first.index, first.ttl, first.type) == (("text",), 60.0, None)


def test_restored_facts_are_listed_in_the_order_they_had(memory: MemoryStore) -> None:
    for key in "abc":
        put(memory, key, "1")
    before = [fact.id for fact in memory.query("note")]
    memory.commit([note("b", "2"), note("a", "2"), note("c", "2")])
    memory.rollback()
    assert [fact.id for fact in memory.query("note")] == before


def test_namespaces_that_look_alike_are_apart(memory: MemoryStore) -> None:
    for namespace in (("a",), ("a", "b"), ("ab",)):
        memory.store.put(namespace, "k", {"text": "old"})
    memory.store.put(("a",), "k", {"text": "new"})
    memory.rollback()
    assert [memory.store.get(namespace, "k").value["text"] for namespace in (("a",), ("a", "b"), ("ab",))] == [
        "old"
    ] * 3


def test_expiry_is_no_commit_to_undo(memory: MemoryStore) -> None:
    put(memory, "b", "stays")
    memory.store.put(("note",), "a", {"text": "short"}, ttl=0.0001)
    time.sleep(0.02)
    assert memory.sweep() == 1
    memory.rollback(1)  # the put of `a`, whose end nobody regrets
    assert texts(memory) == {"b": "stays"}
    assert memory.rollback(1).removed == ((("note",), "b"),)


def test_what_has_expired_since_is_no_conflict(memory: MemoryStore) -> None:
    put(memory, "a", "base")
    draft = memory.draft_put(("note",), "a", {"text": "short"}, ttl=0.0001, origin=Origin(thread_id="mine"))
    memory.write([draft])
    time.sleep(0.02)
    assert memory.sweep() == 1
    memory.rollback(1, thread_id="mine")
    assert texts(memory) == {"a": "base"}


def test_what_had_expired_before_stays_absent(memory: MemoryStore) -> None:
    memory.store.put(("note",), "a", {"text": "short"}, ttl=0.0001)
    time.sleep(0.02)
    put(memory, "b", "1")
    put(memory, "a", "new")
    before = memory.as_of(memory.log()[-2].seq)
    report = memory.rollback(1)
    assert report.removed == ((("note",), "a"),)
    assert texts(memory) == {fact.key: fact.value["text"] for fact in before.search(("note",))} == {"b": "1"}
    memory.rollback(to=report.undone)
    assert texts(memory) == {"a": "new", "b": "1"}


@pytest.mark.parametrize("swept", [False, True])
def test_what_an_undo_brought_back_has_a_life_of_its_own(memory: MemoryStore, swept: bool) -> None:
    memory.store.put(("note",), "a", {"text": "short"}, ttl=0.005)
    put(memory, "a", "2")
    time.sleep(0.35)
    memory.rollback(1)
    put(memory, "a", "3")
    memory.rollback(1)
    assert texts(memory) == {"a": "short"}
    time.sleep(0.35)
    if swept:
        assert memory.sweep() == 1
    put(memory, "a", "4")
    memory.rollback(1)
    assert texts(memory) == {}


def test_reads_have_kept_a_fact_alive_that_an_undo_restores(memory: MemoryStore) -> None:
    memory.store.put(("note",), "a", {"text": "short"}, ttl=0.01)
    for _ in range(4):
        time.sleep(0.25)
        assert memory.store.get(("note",), "a", refresh_ttl=True) is not None
    put(memory, "a", "new")
    memory.rollback(1)
    assert texts(memory) == {"a": "short"}


# -- conflicts --------------------------------------------------------------------------------------


def disputed(memory: MemoryStore) -> None:
    """`mine` writes two facts, and somebody else changes one of them."""
    put(memory, "a", "base")
    memory.commit([note("a", "ours"), note("b", "ours")], thread_id="mine")
    put(memory, "a", "theirs", thread_id="other")


def test_a_conflict_changes_nothing_and_says_what_it_is(memory: MemoryStore) -> None:
    disputed(memory)
    before = memory.log()
    with pytest.raises(RollbackConflict, match="note 'a'") as caught:
        memory.rollback(1, thread_id="mine")
    assert memory.log() == before
    (conflict,) = caught.value.conflicts
    _, ours, theirs = memory.history("note", "a")
    assert conflict == (("note",), "a", ours.version, theirs.version)


def test_keep_leaves_theirs(memory: MemoryStore) -> None:
    disputed(memory)
    report = memory.rollback(1, thread_id="mine", on_conflict="keep")
    assert texts(memory) == {"a": "theirs"}
    assert report.kept == ((("note",), "a"),)
    assert report.removed == ((("note",), "b"),)


def test_a_commit_of_which_all_would_be_kept_is_passed_over(memory: MemoryStore) -> None:
    put(memory, "a", "1", thread_id="x")
    put(memory, "b", "1", thread_id="x")
    put(memory, "b", "2")
    report = memory.rollback(1, thread_id="x", on_conflict="keep")
    assert (report.steps, report.removed, report.kept) == (1, ((("note",), "a"),), ((("note",), "b"),))
    with pytest.raises(RollbackError, match="0 commits to undo, not 1; of 1 more, others"):
        memory.rollback(1, thread_id="x", on_conflict="keep")
    with pytest.raises(RollbackConflict):
        memory.rollback(1, thread_id="x")
    memory.rollback(1, thread_id="x", on_conflict="overwrite")
    assert texts(memory) == {}


def test_keep_goes_on_after_a_commit_of_which_a_part_was_kept(memory: MemoryStore) -> None:
    put(memory, "c", "1", thread_id="mine")
    disputed(memory)
    memory.rollback(1, thread_id="mine", on_conflict="keep")
    memory.rollback(1, thread_id="mine", on_conflict="keep")
    assert texts(memory) == {"a": "theirs"}


def test_a_write_that_was_undone_is_no_conflict(memory: MemoryStore) -> None:
    put(memory, "a", "0")
    put(memory, "a", "1", thread_id="x")
    put(memory, "a", "2", thread_id="y")
    redo = memory.rollback(1, thread_id="y")
    memory.rollback(1, thread_id="x")
    assert texts(memory) == {"a": "0"}
    assert redo.undone is not None
    memory.rollback(to=redo.undone, thread_id="y")  # it stands again
    assert texts(memory) == {"a": "2"}
    memory.rollback(1, thread_id="y")
    assert texts(memory) == {"a": "0"}


def test_what_others_have_taken_back_too_is_undone(memory: MemoryStore) -> None:
    disputed(memory)
    report = memory.rollback(1, thread_id="mine", on_conflict="overwrite")
    with pytest.raises(RollbackError, match="0 commits"):
        memory.rollback(1, thread_id="other")
    put(memory, "a", "another", thread_id="third")
    memory.rollback(1, thread_id="third")
    assert texts(memory) == {"a": "base"}
    memory.rollback(to=report.undone, thread_id="mine")
    memory.rollback(1, thread_id="other")
    assert texts(memory) == {"a": "ours", "b": "ours"}


def test_overwrite_takes_theirs_back_too(memory: MemoryStore) -> None:
    disputed(memory)
    report = memory.rollback(1, thread_id="mine", on_conflict="overwrite")
    assert texts(memory) == {"a": "base"}
    assert report.restored == ((("note",), "a"),)
    memory.rollback(to=report.undone, thread_id="mine")
    assert texts(memory) == {"a": "theirs", "b": "ours"}


def test_what_others_wrote_before_is_no_conflict(memory: MemoryStore) -> None:
    put(memory, "a", "1", thread_id="mine")
    put(memory, "a", "2", thread_id="other")
    put(memory, "a", "3", thread_id="mine")
    memory.rollback(2, thread_id="mine")
    assert texts(memory) == {"a": "2"}


def test_a_thousand_conflicts_are_all_in_the_error(memory: MemoryStore) -> None:
    memory.commit([note(f"k{n}", "ours") for n in range(1_000)], thread_id="mine")
    memory.commit([note(f"k{n}", "theirs") for n in range(1_000)])
    with pytest.raises(RollbackConflict, match="1000 of the facts") as caught:
        memory.rollback(thread_id="mine")
    assert len(caught.value.conflicts) == 1_000
    assert len(str(caught.value)) < 2_000


# -- what cannot be asked ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0}, {"steps": -1}, {"steps": True}, {"steps": 1.5}, {"steps": "1"}, {"turns": 0},
        {"steps": 1, "to": 0}, {"steps": 1, "turns": 1}, {"turns": 1, "to": 0}, {"turns": 1},
        {"steps": 4}, {"to": 4}, {"to": -1}, {"to": True}, {"on_conflict": "theirs"},
        {"thread_id": "nobody"}, {"thread_id": "nobody", "turns": 1}, {"thread_id": "nobody", "to": "x"},
    ],
)  # fmt: skip
def test_nonsense_is_refused_and_changes_nothing(memory: MemoryStore, arguments: dict[str, Any]) -> None:
    for n in range(3):
        put(memory, "a", str(n))
    with pytest.raises((RollbackError, UnknownMomentError)):
        memory.rollback(**arguments)
    assert len(memory.log()) == 3


@pytest.mark.parametrize("to", ["no such checkpoint", {"configurable": {}}, object(), 1.5, "", {}])
def test_a_target_that_is_nothing_is_refused(memory: MemoryStore, to: Any) -> None:
    put(memory, "a", "1")
    with pytest.raises((UnknownMomentError, RollbackError)):
        memory.rollback(to=to)
    assert len(memory.log()) == 1


def test_a_thread_is_named_by_a_string(memory: MemoryStore) -> None:
    with pytest.raises(KeyTypeError):
        memory.rollback(thread_id=7)  # type: ignore[arg-type]


def test_no_rollback_inside_a_transaction(memory: MemoryStore) -> None:
    put(memory, "a", "1")
    with memory.transaction(), pytest.raises(RollbackError, match="transaction"):
        memory.rollback()
    assert texts(memory) == {"a": "1"}


async def test_the_async_face(memory: MemoryStore) -> None:
    await memory.acommit(note("a", "1"))
    await memory.acommit(note("a", "2"))
    report = await memory.arollback(1)
    assert texts(memory) == {"a": "1"}
    await memory.arollback(to=report.undone)
    assert texts(memory) == {"a": "2"}


# -- vectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector_sync", ["atomic", "deferred"])
def test_vectors_follow_an_undo_without_the_model(database: Path, vector_sync: str) -> None:
    model = Words()
    first, second = notes(20), {key: f"{text} again" for key, text in notes(20).items()}
    with open_memory(database, model=model, vector_sync=vector_sync) as memory:
        memory.commit([note(key, text) for key, text in first.items()])
        memory.commit([note(key, text) for key, text in second.items()])
        memory.delete("note", "n3")
        embedded = len(model.texts)
        report = memory.rollback(2)
        check_search(memory, first)
        memory.rollback(to=report.undone)
        left = {key: text for key, text in second.items() if key != "n3"}
        check_search(memory, left)
        memory.rollback(3)
        assert texts(memory) == {}
        memory.rollback(to=report.undone)
        memory.flush()
        check_search(memory, left)
        check_settled(memory, database)
        assert collection_of(memory).count() == len(left)
        queries = [text for text in model.texts[embedded:] if text in {**first, **second}.values()]
        assert queries == []
    with open_memory(database) as memory:
        check_search(memory, left)


def test_a_hundred_undone_commits_of_a_thousand_facts_ask_the_model_nothing(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        base = {f"k{n}": f"green tea {n}" for n in range(1_000)}
        memory.commit([note(key, text) for key, text in base.items()])
        for step in range(100):
            memory.commit([note(f"k{step * 10 + n}", f"black coffee {step} {n}") for n in range(10)])
        asked = len(model.texts)
        report = memory.rollback(100)
        assert len(model.texts) == asked
        assert (report.steps, len(report.restored), len(report.removed)) == (100, 1_000, 0)
        assert texts(memory) == base
        memory.flush()
        check_settled(memory, database)


def test_an_undo_looks_only_at_the_facts_it_touches(database: Path) -> None:
    """In a long log, the versions of one fact are found by their index."""
    with MemoryStore.open(database) as memory:
        for _ in range(40):
            memory.commit([note(f"other{n}", "noise") for n in range(500)])
        put(memory, "a", "1")
        put(memory, "a", "2")
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        with memory.storage.snapshot() as reader:
            reader._conn.set_progress_handler(count, 100)  # type: ignore[attr-defined]
            assert [entry.value for entry in reader.versions(("note",), "a")] == [{"text": "2"}, {"text": "1"}]
            reader._conn.set_progress_handler(None, 0)  # type: ignore[attr-defined]
    assert steps < 20  # thousands of rows would take tens of thousands of instructions


# -- others at work ---------------------------------------------------------------------------------


def test_a_rollback_that_lost_a_race_is_planned_again(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(memory, "a", "1", thread_id="mine")
    put(memory, "a", "2", thread_id="mine")
    commit = memory._outbox.commit
    raced: list[int] = []

    def late(*args: Any) -> None:
        if args[1:] != ((), ()) and len(raced) < 3:
            raced.append(len(raced))
            put(memory, "a", f"meanwhile {raced[-1]}", thread_id="mine")
        commit(*args)

    monkeypatch.setattr(memory._outbox, "commit", late)
    memory.rollback(1, thread_id="mine")
    assert raced == [0, 1, 2]
    assert texts(memory) == {"a": "meanwhile 1"}


def test_a_conflict_that_comes_up_in_the_race_is_seen(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(memory, "a", "1", thread_id="mine")
    commit = memory._outbox.commit

    def late(*args: Any) -> None:
        monkeypatch.setattr(memory._outbox, "commit", commit)
        put(memory, "a", "theirs", thread_id="other")
        commit(*args)

    monkeypatch.setattr(memory._outbox, "commit", late)
    with pytest.raises(RollbackConflict):
        memory.rollback(1, thread_id="mine")
    assert texts(memory) == {"a": "theirs"}


def test_rollbacks_while_others_commit(database: Path) -> None:
    """One thread goes forth and back while three write elsewhere: nobody loses anything."""
    with open_memory(database) as memory:
        failures: list[BaseException] = []

        def write(name: str) -> None:
            try:
                for n in range(25):
                    memory.commit(Fact("note", {"text": f"{name} {n}"}, id=name), thread_id=name)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(f"w{n}",)) for n in range(3)]
        for thread in threads:
            thread.start()
        for n in range(15):
            memory.commit([note("mine", f"{n}"), note(f"m{n}", "extra")], thread_id="mine")
            memory.rollback(1, thread_id="mine")
        for thread in threads:
            thread.join()
        assert not failures
        wanted = {f"w{n}": f"w{n} 24" for n in range(3)}
        assert texts(memory) == wanted
        memory.flush()
        check_search(memory, wanted)
        check_settled(memory, database)
    assert len(rows(database, "SELECT 1 FROM facts")) == 3 * 25 + 15 * 4


def test_many_rollbacks_at_once_undo_a_commit_each(memory: MemoryStore) -> None:
    for n in range(12):
        put(memory, "a", str(n))
    errors: list[BaseException] = []

    def undo() -> None:
        try:
            memory.rollback(1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=undo) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert texts(memory) == {"a": "6"}


async def test_a_cancelled_rollback_is_whole_or_absent(memory: MemoryStore) -> None:
    for n in range(20):
        await memory.acommit([note("a", str(n)), note("b", str(n))])
    for _ in range(10):
        task = asyncio.create_task(memory.arollback(1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    found = texts(memory)
    assert found["a"] == found["b"]

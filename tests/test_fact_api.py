"""Updates as merge patches, and facts of sessions. See also test_memory.py and graph/test_schemas_in_steps.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent))
from truth import check_settled, open_memory

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import (
    KeyTypeError,
    MemStateError,
    NamespaceError,
    NotFoundError,
    SchemaError,
    SerializationError,
)
from langgraph_memstate.facts import Fact as SameFact
from langgraph_memstate.merging import merge_patch

WRITERS = 12


class Profile(BaseModel):
    name: str
    age: int = 0
    tags: list[str] = []


def payload(memory: MemoryStore, key: str = "1", session_id: str | None = None) -> Any:
    fact = memory.get("note", key, session_id=session_id)
    return None if fact is None else fact.payload


# -- merge patches --------------------------------------------------------------------------------

# The examples of RFC 7396, appendix A.
EXAMPLES: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), EXAMPLES)
def test_the_examples_of_the_standard(memory: MemoryStore, target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result
    if isinstance(target, dict) and isinstance(patch, dict):
        memory.commit(Fact("note", target, id="1"))
        assert memory.update("note", "1", patch).payload == result
        assert payload(memory) == result


FIELDS = st.sampled_from("abc")
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=2) | st.lists(st.integers(0, 3), max_size=2)
VALUES = st.recursive(LEAVES, lambda inner: st.dictionaries(FIELDS, inner, max_size=3), max_leaves=6)
OBJECTS = st.dictionaries(FIELDS, VALUES, max_size=3)
KEYS = st.sampled_from("12")
SESSIONS = st.none() | st.sampled_from("st")


def patched(target: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """The reference: as the standard describes it, field by field, in place."""
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict):
            inner = target.get(name)
            target[name] = patched(dict(inner) if isinstance(inner, dict) else {}, value)
        else:
            target[name] = value
    return target


class FactsAsDicts(RuleBasedStateMachine):
    """The fact API against a dict from (session, key) to values."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryStore.open(":memory:")
        self.model: dict[tuple[str | None, str], dict[str, Any]] = {}

    def teardown(self) -> None:
        self.memory.close()

    @rule(session=SESSIONS, key=KEYS, value=OBJECTS)
    def commit(self, session: str | None, key: str, value: dict[str, Any]) -> None:
        self.memory.commit(Fact("note", value, id=key), session_id=session)
        self.model[session, key] = value

    @rule(session=SESSIONS, key=KEYS, patches=st.lists(OBJECTS, min_size=1, max_size=3), together=st.booleans())
    def update(self, session: str | None, key: str, patches: list[dict[str, Any]], together: bool) -> None:
        before = self.model.get((session, key))
        if before is None:
            with pytest.raises(NotFoundError):
                self.memory.update("note", key, patches[0], session_id=session)
            return
        for patch in patches:
            before = patched(dict(before), patch)
        self.model[session, key] = before
        if together:
            with self.memory.transaction():
                for patch in patches:
                    self.memory.update("note", key, patch, session_id=session)
        else:
            for patch in patches:
                written = self.memory.update("note", key, patch, session_id=session)
            assert written.payload == before

    @rule(session=SESSIONS, key=KEYS)
    def delete(self, session: str | None, key: str) -> None:
        self.memory.delete("note", key, session_id=session)
        self.model.pop((session, key), None)

    @rule(session=st.sampled_from("st"), keys=st.sets(KEYS))
    def promote(self, session: str, keys: set[str]) -> None:
        promoted = self.memory.promote_session(session, selector=lambda fact: fact.id in keys)
        moved = {key: self.model.pop((session, key)) for key in keys if (session, key) in self.model}
        self.model |= {(None, key): value for key, value in moved.items()}
        assert {fact.id: fact.payload for fact in promoted} == moved

    @rule(session=st.sampled_from("st"))
    def discard(self, session: str) -> None:
        doomed = [place for place in self.model if place[0] == session]
        assert self.memory.discard_session(session) == len(doomed)
        for place in doomed:
            del self.model[place]

    @invariant()
    def the_facts_are_those_of_the_model(self) -> None:
        for session in (None, "s", "t"):
            found = {fact.id: fact.payload for fact in self.memory.query("note", session_id=session)}
            assert found == {key: value for (owner, key), value in self.model.items() if owner == session}


TestFactsAsDicts = FactsAsDicts.TestCase
TestFactsAsDicts.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@given(OBJECTS, st.lists(OBJECTS, max_size=4))
def test_merging_is_as_the_standard_describes_it(target: dict[str, Any], patches: list[dict[str, Any]]) -> None:
    expected = dict(target)
    merged: Any = target
    for patch in patches:
        merged, expected = merge_patch(merged, patch), patched(expected, patch)
    assert merged == expected


# -- updates --------------------------------------------------------------------------------------


def test_an_update_keeps_what_it_does_not_name(memory: MemoryStore) -> None:
    memory.commit(Fact("task", {"title": "t", "due": {"day": 1, "hour": 2}}, id="1", namespace=("u", "tasks")))
    before = memory.get(("u", "tasks"), "1")
    fact = memory.update(("u", "tasks"), "1", {"due": {"hour": 3}}, actor="me", reason="late", thread_id="t")
    assert before is not None
    assert (fact.type, fact.id, fact.namespace) == ("task", "1", ("u", "tasks"))
    assert fact.payload == {"title": "t", "due": {"day": 1, "hour": 3}}
    assert fact == memory.get(("u", "tasks"), "1") or fact.created_at == before.created_at
    entry = memory.history(("u", "tasks"), "1")[-1]
    assert (entry.version, entry.actor, entry.reason, entry.thread_id) == (fact.version, "me", "late", "t")
    assert entry.supersedes == before.version


def test_an_update_keeps_the_time_to_live_and_what_is_indexed(tmp_path: Path) -> None:
    database = tmp_path / "memory.db"
    with open_memory(database) as memory:
        memory.store.put(("note",), "hidden", {"text": "green tea", "n": 1}, index=False, ttl=60)
        memory.store.put(("note",), "title", {"text": "green tea", "title": "trains"}, index=["title"])
        for key in ("hidden", "title"):
            memory.update("note", key, {"n": 2})
        assert [fact.id for fact in memory.search("green tea")] == ["title"]
        with memory.storage.snapshot() as reader:
            ttls = {record.key: record.ttl for record in reader.items((), 0.0)}
        assert ttls == {"hidden": 60.0, "title": None}
        memory.update("note", "title", {"title": "green tea"})
        assert memory.search("green tea")[0].score == pytest.approx(1.0)
        memory.flush()
        check_settled(memory, database)


def test_an_update_is_validated(memory: MemoryStore) -> None:
    memory.register_schema("note", Profile)
    memory.commit(Fact("note", {"name": "Ann"}, id="1"))
    assert memory.update("note", "1", {"age": "7"}).payload == {"name": "Ann", "age": 7, "tags": []}
    for wrong in ({"name": None}, {"age": "old"}, {"tags": {}}):
        with pytest.raises(SchemaError):
            memory.update("note", "1", wrong)
    assert memory.update("note", "1", {"age": None}).payload == {"name": "Ann", "age": 0, "tags": []}


@pytest.mark.parametrize("patch", [None, [], "x", 5, {"a": {1: 2}}, {"a": {1, 2}}, {1: "a"}], ids=repr)
def test_a_patch_is_a_json_object(memory: MemoryStore, patch: Any) -> None:
    memory.commit(Fact("note", {}, id="1"))
    with pytest.raises(SerializationError):
        memory.update("note", "1", patch)


def test_what_is_not_there_cannot_be_updated(memory: MemoryStore) -> None:
    memory.store.put(("note",), "expired", {}, ttl=0)
    memory.commit(Fact("note", {}, id="deleted"))
    memory.delete("note", "deleted")
    before = memory.stats()["facts"]
    for key in ("never", "expired", "deleted"):
        with pytest.raises(NotFoundError, match=f"note/{key} is not there"):
            memory.update("note", key, {"n": 1})
        with pytest.raises(LookupError):
            asyncio.run(memory.aupdate("note", key, {"n": 1}))
    assert memory.stats()["facts"] == before


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda memory: memory.update("", "1", {}), NamespaceError),
        (lambda memory: memory.update("note", "", {}), KeyTypeError),
        (lambda memory: memory.update("note", "1", {}, session_id=""), NamespaceError),
        (lambda memory: memory.update("note", "1", {}, actor=5), KeyTypeError),
        (lambda memory: memory.commit(Fact("note", {}), session_id=5), NamespaceError),
        (lambda memory: memory.commit(Fact("note", {}, session_id="\ud800")), NamespaceError),
        (lambda memory: memory.query("note", session_id=""), NamespaceError),
        (lambda memory: memory.query(session_id=""), NamespaceError),
        (lambda memory: memory.promote_session(""), NamespaceError),
        (lambda memory: memory.discard_session(None), NamespaceError),
    ],
)
def test_bad_addresses(memory: MemoryStore, call: Any, error: type[MemStateError]) -> None:
    memory.commit(Fact("note", {}, id="1"))
    with pytest.raises(error):
        call(memory)
    assert memory.stats()["facts"] == 1


def test_a_transaction_updates_what_it_wrote(memory: MemoryStore) -> None:
    with memory.transaction():
        memory.commit(Fact("note", {"a": 1}, id="1"))
        memory.update("note", "1", {"b": 2})
        with memory.transaction():
            memory.update("note", "1", {"c": 3})
            memory.commit(Fact("note", {"a": 1}, id="2"))
            memory.delete("note", "2")
            with pytest.raises(NotFoundError):
                memory.update("note", "2", {"b": 2})
    assert payload(memory) == {"a": 1, "b": 2, "c": 3}
    assert payload(memory, "2") is None


def test_a_transaction_updates_what_is_there_when_it_ends(memory: MemoryStore) -> None:
    memory.commit([Fact("note", {"a": 1}, id="1"), Fact("note", {}, id="2")])

    def elsewhere(call: Any) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with memory.transaction():
        memory.update("note", "1", {"mine": 1})
        elsewhere(lambda: memory.update("note", "1", {"theirs": 1}))
    assert payload(memory) == {"a": 1, "mine": 1, "theirs": 1}
    transaction = memory.transaction()
    transaction.__enter__()
    memory.update("note", "1", {"lost": 1})
    elsewhere(lambda: memory.delete("note", "1"))
    with pytest.raises(NotFoundError):
        transaction.__exit__(None, None, None)
    assert payload(memory) is None


async def test_an_async_transaction_updates_too(memory: MemoryStore) -> None:
    async with memory.transaction():
        await memory.acommit(Fact("note", {"a": 1}, id="1"))
        await memory.aupdate("note", "1", {"b": 2})
    assert payload(memory) == {"a": 1, "b": 2}


# -- between writers ------------------------------------------------------------------------------


def test_updates_of_many_threads_all_count(memory: MemoryStore) -> None:
    memory.commit(Fact("note", {"n": {}}, id="1"))
    barrier = threading.Barrier(WRITERS)

    def run(number: int) -> None:
        barrier.wait()
        for turn in range(5):
            memory.update("note", "1", {"n": {f"{number}/{turn}": turn}})

    threads = [threading.Thread(target=run, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert payload(memory) == {"n": {f"{number}/{turn}": turn for number in range(WRITERS) for turn in range(5)}}
    assert len(memory.history("note", "1")) == 1 + WRITERS * 5


async def test_updates_of_many_tasks_all_count(memory: MemoryStore) -> None:
    memory.commit(Fact("note", {}, id="1"))
    await asyncio.gather(*(memory.aupdate("note", "1", {str(number): number}) for number in range(WRITERS)))
    assert payload(memory) == {str(number): number for number in range(WRITERS)}


@pytest.fixture
def searched(tmp_path: Path) -> Iterator[MemoryStore]:
    with open_memory(tmp_path / "memory.db") as memory:
        yield memory


def test_updates_of_many_threads_and_their_vectors(searched: MemoryStore) -> None:
    searched.commit(Fact("note", {"text": "green tea"}, id="1"))
    barrier = threading.Barrier(4)

    def run(number: int) -> None:
        barrier.wait()
        searched.update("note", "1", {"text": f"trains to berlin {number}", str(number): True})

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (fact,) = searched.search("trains to berlin")
    assert {str(number) for number in range(4)} < set(fact.payload)
    searched.flush()
    check_settled(searched, Path(searched.storage.location))


def update_many(path: str, name: str, count: int, start: Any) -> None:
    with MemoryStore.open(path) as memory:
        start.wait(60)
        for number in range(count):
            memory.update("note", "1", {f"{name}{number}": number})


def test_updates_of_two_processes_all_count(database: Path) -> None:
    with MemoryStore.open(database) as memory:
        memory.commit(Fact("note", {}, id="1"))
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=update_many, args=(str(database), name, 40, start)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    with MemoryStore.open(database) as memory:
        assert payload(memory) == {f"{name}{number}": number for name in "ab" for number in range(40)}


# -- sessions -------------------------------------------------------------------------------------


def test_a_session_is_apart(memory: MemoryStore) -> None:
    fact = memory.commit(Fact("note", {"where": "session"}, id="1"), session_id="s", actor="me")
    memory.commit([Fact("note", {"where": "long-term"}, id="1"), Fact("note", {"where": "t"}, id="1", session_id="t")])
    assert (fact.session_id, fact.namespace) == ("s", None)
    assert payload(memory) == {"where": "long-term"}
    assert payload(memory, session_id="s") == {"where": "session"}
    assert [(one.payload["where"], one.session_id, one.namespace) for one in memory.query("note", session_id="s")] == [
        ("session", "s", ("note",))
    ]
    assert [one.payload["where"] for one in memory.query()] == ["long-term"]
    assert [one.payload["where"] for one in memory.query(session_id="t")] == ["t"]
    (entry,) = memory.history("note", "1", session_id="s")
    assert entry.actor == "me"
    memory.update("note", "1", {"more": 1}, session_id="s")
    memory.delete("note", "1", session_id="t")
    assert payload(memory, session_id="s") == {"where": "session", "more": 1}
    assert payload(memory, session_id="t") is None
    assert payload(memory) == {"where": "long-term"}


def test_a_fact_that_was_read_can_be_written_back(memory: MemoryStore) -> None:
    memory.commit(Fact("note", {"n": 1}, id="1", namespace=("a", "b")), session_id="s")
    (fact,) = memory.query(session_id="s")
    assert isinstance(fact, SameFact)
    memory.commit(fact)
    assert len(memory.history(("a", "b"), "1", session_id="s")) == 2


def test_promotion(memory: MemoryStore) -> None:
    memory.commit(Fact("note", {"n": 0}, id="1", thread_id="elsewhere"))
    memory.commit(Fact("note", {"n": 1}, id="1", thread_id="t", actor="agent", reason="heard it"), session_id="s")
    memory.commit(Fact("task", {"n": 2}, id="2", namespace=("u", "tasks")), session_id="s")
    memory.commit(Fact("note", {"n": 3}, id="3"), session_id="other")
    before = memory.stats()["facts"]
    promoted = memory.promote_session("s", actor="user")
    assert [(fact.id, fact.namespace, fact.session_id) for fact in promoted] == [
        ("1", ("note",), None), ("2", ("u", "tasks"), None),
    ]  # fmt: skip
    assert memory.stats()["facts"] == before + 4
    assert payload(memory) == {"n": 1}
    assert memory.query(("u", "tasks"))[0].type == "task"
    old, new = memory.history("note", "1")
    assert (new.thread_id, new.actor, new.reason, new.supersedes) == (None, "user", "heard it", old.version)
    assert [(entry.op, entry.thread_id, entry.reason) for entry in memory.history("note", "1", session_id="s")] == [
        ("put", "t", "heard it"), ("delete", None, "promoted"),
    ]  # fmt: skip
    assert [fact.id for fact in memory.query(session_id="other")] == ["3"]
    assert memory.promote_session("s") == []
    assert memory.stats()["facts"] == before + 4


@pytest.mark.parametrize("thread_id", [None, "t"])
def test_a_promotion_is_undone_whole(memory: MemoryStore, thread_id: str | None) -> None:
    memory.commit(Fact("note", {"n": 0}, id="1"))
    memory.commit([Fact("note", {"n": n}, id=str(n)) for n in (1, 2)], session_id="s", thread_id=thread_id)
    memory.promote_session("s")
    report = memory.rollback(1)
    assert {fact.id: fact.payload for fact in memory.query()} == {"1": {"n": 0}}
    assert {fact.id: fact.payload for fact in memory.query(session_id="s")} == {"1": {"n": 1}, "2": {"n": 2}}
    memory.rollback(to=report.undone)
    assert {fact.id: fact.payload for fact in memory.query()} == {"1": {"n": 1}, "2": {"n": 2}}
    assert memory.query(session_id="s") == []


def test_a_promotion_is_one_commit(searched: MemoryStore) -> None:
    searched.commit([Fact("note", {"text": f"green tea {n}"}, id=str(n)) for n in range(3)], session_id="s")
    assert searched.search("green tea") == []
    assert len(searched.search("green tea", session_id="s")) == 3
    searched.promote_session("s")
    assert [entry.commit_id for entry in searched.log()] == [1] * 3 + [4] * 6
    assert {fact.id for fact in searched.search("green tea")} == {"0", "1", "2"}
    assert searched.search("green tea", session_id="s") == []
    searched.flush()
    check_settled(searched, Path(searched.storage.location))


def test_what_is_discarded_is_gone_from_search(searched: MemoryStore) -> None:
    searched.commit(Fact("note", {"text": "green tea"}, id="kept"))
    searched.commit([Fact("note", {"text": f"green tea {n}"}) for n in range(3)], session_id="s")
    assert searched.discard_session("s", actor="user", reason="over") == 3
    assert searched.discard_session("s") == 0
    assert [fact.id for fact in searched.search("green tea")] == ["kept"]
    assert searched.search("green tea", session_id="s") == []
    assert {(entry.actor, entry.reason) for entry in searched.log() if entry.op == "delete"} == {("user", "over")}
    searched.flush()
    check_settled(searched, Path(searched.storage.location))


def test_a_promotion_keeps_what_is_indexed_and_the_time_to_live(searched: MemoryStore) -> None:
    searched.store.put(("@session", "s", "note"), "1", {"text": "green tea"}, index=False, ttl=60)
    searched.promote_session("s")
    assert searched.search("green tea") == []
    with searched.storage.snapshot() as reader:
        (record,) = reader.items((), 0.0)
    assert (record.key, record.ttl) == ("1", 60.0)


def test_a_session_inside_a_transaction(memory: MemoryStore) -> None:
    memory.commit(Fact("note", {"n": 0}, id="0"), session_id="s")
    with memory.transaction():
        memory.commit(Fact("note", {"n": 1}, id="1"), session_id="s")
        assert [fact.id for fact in memory.promote_session("s")] == ["0", "1"]
        memory.commit(Fact("note", {"n": 2}, id="2"), session_id="s")
        assert memory.discard_session("s") == 1
        assert memory.query("note") == []  # not committed yet
    assert {fact.id for fact in memory.query("note")} == {"0", "1"}
    assert memory.query(session_id="s") == []


async def test_sessions_in_async_code(memory: MemoryStore) -> None:
    await memory.acommit([Fact("note", {"n": n}, id=str(n)) for n in range(2)], session_id="s")
    assert len(await memory.aquery(session_id="s")) == 2
    assert len(await memory.apromote_session("s", selector=lambda fact: fact.id == "0")) == 1
    assert await memory.adiscard_session("s") == 1
    assert [fact.id for fact in await memory.aquery("note")] == ["0"]


def test_an_update_during_a_promotion_is_not_lost(memory: MemoryStore) -> None:
    memory.commit(Fact("note", {"n": 0}, id="1"), session_id="s")
    updated = []

    def selector(fact: Fact) -> bool:
        if not updated:
            updated.append(fact)
            memory.update("note", "1", {"n": 1}, session_id="s")
        return True

    memory.promote_session("s", selector=selector)
    assert payload(memory) == {"n": 1}
    assert memory.query(session_id="s") == []


def test_what_became_of_a_session_can_be_undone(searched: MemoryStore) -> None:
    searched.commit([Fact("note", {"text": f"green tea {n}"}, id=str(n)) for n in range(2)], session_id="s")
    searched.promote_session("s")
    report = searched.rollback(1)
    assert searched.query("note") == searched.search("green tea") == []
    assert {fact.id for fact in searched.search("green tea", session_id="s")} == {"0", "1"}
    searched.rollback(to=report.undone)
    assert {fact.id for fact in searched.search("green tea")} == {"0", "1"}
    assert searched.query(session_id="s") == []
    searched.rollback(to=report.undone - 4)  # type: ignore[operator]
    assert searched.discard_session("s") == 2
    searched.rollback(1)
    assert len(searched.query(session_id="s")) == 2
    searched.flush()
    check_settled(searched, Path(searched.storage.location))


def test_an_update_can_be_undone(memory: MemoryStore) -> None:
    memory.commit(Fact("note", {"a": 1}, id="1"))
    memory.update("note", "1", {"a": 2, "b": 2})
    memory.rollback(1)
    assert payload(memory) == {"a": 1}
    assert memory.update("note", "1", {"b": 3}).payload == {"a": 1, "b": 3}

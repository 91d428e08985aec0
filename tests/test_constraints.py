"""Constraints of schemas: singletons, immutable facts and unique fields, on every way in and between writers."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.graph import START, StateGraph
from langgraph.store.base import PutOp
from pydantic import BaseModel, ConfigDict

sys.path.insert(0, str(Path(__file__).parent))
from truth import check_settled, open_memory

from langgraph_memstate import Constraint, Fact, MemoryStore, RollbackNode
from langgraph_memstate.errors import ConstraintError, MemStateError, RollbackConflict, SchemaError
from langgraph_memstate.facts import Origin


class User(BaseModel):
    email: str | None = None
    name: str = ""


class Counted(TypedDict):
    n: int


class Free(BaseModel):
    model_config = ConfigDict(extra="allow")


USERS = ("users", "*", "profile")


def user(id: str, email: str | None, **more: Any) -> Fact:
    return Fact("user", {"email": email, **more}, id=id)


def emails(memory: MemoryStore) -> dict[str, Any]:
    return {fact.id: fact.payload["email"] for fact in memory.query("user", limit=100)}


@pytest.fixture
def unique(memory: MemoryStore) -> MemoryStore:
    """A memory in which the email of a user is unique."""
    memory.register_schema("user", User, Constraint(unique="email"))
    return memory


@pytest.fixture
def fixed(memory: MemoryStore) -> MemoryStore:
    """A memory whose users are immutable, with one of them."""
    memory.register_schema("user", User, Constraint(immutable=True))
    memory.commit(user("u1", "a@x"))
    return memory


@pytest.fixture
def single(memory: MemoryStore) -> MemoryStore:
    """A memory with one fact per email."""
    memory.register_schema("user", User, Constraint(singleton_key="email"))
    return memory


def in_a_transaction(memory: MemoryStore, value: dict[str, Any]) -> None:
    with memory.transaction():
        memory.commit(Fact("other", {}))
        memory.commit(Fact("user", value, id="k"))


async def in_an_async_transaction(memory: MemoryStore, value: dict[str, Any]) -> None:
    async with memory.transaction():
        await memory.store.aput(("user",), "k", value)


def by_an_update(memory: MemoryStore, value: dict[str, Any]) -> None:
    if memory.get("user", "k") is None:
        memory.commit(Fact("user", {"email": "before@x"}, id="k"))
    memory.update("user", "k", value)


def from_a_session(memory: MemoryStore, value: dict[str, Any]) -> None:
    memory.commit(Fact("user", {**value, "email": "session@x"}, id="k"), session_id="s")
    memory.update("user", "k", value, session_id="s")
    memory.promote_session("s")


WAYS: dict[str, Callable[[MemoryStore, dict[str, Any]], Any]] = {
    "put": lambda memory, value: memory.store.put(("user",), "k", value),
    "aput": lambda memory, value: asyncio.run(memory.store.aput(("user",), "k", value)),
    "batch": lambda memory, value: memory.store.batch([PutOp(("free",), "k", {}), PutOp(("user",), "k", value)]),
    "commit": lambda memory, value: memory.commit([Fact("other", {}), Fact("user", value, id="k")]),
    "acommit": lambda memory, value: asyncio.run(memory.acommit(Fact("user", value, id="k"))),
    "commit_model": lambda memory, value: memory.commit_model(User(**value), id="k"),
    "update": by_an_update,
    "transaction": in_a_transaction,
    "async transaction": lambda memory, value: asyncio.run(in_an_async_transaction(memory, value)),
    "session": from_a_session,
    "elsewhere": lambda memory, value: memory.commit(Fact("user", value, id="k", namespace=("any", "where"))),
}
every_way = pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)


# -- unique ---------------------------------------------------------------------------------------


@every_way
def test_a_value_is_taken_once(unique: MemoryStore, write: Callable[[MemoryStore, dict[str, Any]], Any]) -> None:
    unique.commit(user("first", "a@x"))
    with pytest.raises(ConstraintError, match=r"email='a@x' must be unique and is that of user/first"):
        write(unique, {"email": "a@x"})
    assert emails(unique).get("k") in (None, "before@x")
    assert unique.query("other") == unique.query(("free",)) == unique.query(("any",)) == []
    write(unique, {"email": "b@x"})
    write(unique, {"email": "b@x", "name": "the same fact again"})
    assert len(unique.query("user", filter={"email": "b@x"}) + unique.query(("any",))) == 1


def test_what_is_deleted_is_free_again(unique: MemoryStore) -> None:
    unique.commit(user("first", "a@x"))
    unique.delete("user", "first")
    unique.commit(user("second", "a@x"))
    unique.update("user", "second", {"email": "b@x"})
    unique.commit(user("third", "a@x"))
    assert emails(unique) == {"second": "b@x", "third": "a@x"}


def test_what_has_expired_is_free(unique: MemoryStore) -> None:
    unique.store.put(("user",), "first", {"email": "a@x"}, ttl=0)
    unique.commit(user("second", "a@x"))


@pytest.mark.parametrize("value", [None, "missing"])
def test_nothing_is_no_value(unique: MemoryStore, value: str | None) -> None:
    facts = [Fact("user", {"name": name} if value else {"email": None}) for name in "ab"]
    unique.commit(facts)
    assert len(unique.query("user")) == 2


def test_only_the_result_of_a_commit_counts(unique: MemoryStore) -> None:
    unique.commit([user("1", "a@x"), user("2", "b@x")])
    unique.commit([user("1", "b@x"), user("2", "a@x")])
    with unique.transaction():
        unique.commit(user("3", "a@x"))
        unique.delete("user", "2")
    assert emails(unique) == {"1": "b@x", "3": "a@x"}
    with pytest.raises(ConstraintError):
        unique.commit([user("4", "c@x"), user("5", "c@x")])
    assert emails(unique) == {"1": "b@x", "3": "a@x"}


def test_a_namespace_pattern_spans_its_namespaces(memory: MemoryStore) -> None:
    memory.register_schema(USERS, User, Constraint(unique="email"))
    memory.store.put(("users", "1", "profile"), "k", {"email": "a@x"})
    with pytest.raises(ConstraintError, match=r"users/2/profile/k: email='a@x' .* users/1/profile/k"):
        memory.store.put(("users", "2", "profile"), "k", {"email": "a@x"})
    for free in [("users", "2"), ("users", "2", "profile", "old"), ("user", "2", "profile")]:
        memory.store.put(free, "k", {"email": "a@x"})


def test_several_fields_are_unique_together(memory: MemoryStore) -> None:
    memory.register_schema("user", User, Constraint(unique=("email", "name")))
    memory.commit([user("1", "a@x", name="A"), user("2", "a@x", name="B"), user("3", "b@x", name="A")])
    with pytest.raises(ConstraintError, match="email='a@x', name='B'"):
        memory.commit(user("4", "a@x", name="B"))
    memory.commit(user("4", None, name="B"))


AWKWARD = ["a", "a\x00b", "a\x00c", 'a"b', "a\\b", "é", "%", "a\n", "", 0, 1, -1, 1.5, True, False, "1", "true"]
AWKWARD += [
    2**63 - 1,
    2**63,
    2**63 + 1,
    -(2**63),
    2**53 + 1,
    float(2**53),
    10**400,
    10**400 + 1,
    -(10**400),
    1e308,
    0.1,
]


def test_values_are_compared_by_type(memory: MemoryStore) -> None:
    memory.register_schema("any", Free, Constraint(unique="v"))
    memory.commit([Fact("any", {"v": value, "decoy": AWKWARD}, id=repr(value)) for value in AWKWARD])
    for value in [*AWKWARD, 1.0, 0.0, -0.0, float(2**63)]:
        with pytest.raises(ConstraintError):
            memory.commit(Fact("any", {"v": value}, id="another"))


@given(
    st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.text(), max_size=6)
)
@settings(max_examples=60, deadline=None)
def test_unique_is_equality_of_json_values(values: list[Any]) -> None:
    with MemoryStore.open(":memory:") as memory:
        memory.register_schema("any", Free, Constraint(unique="v"))
        taken: list[Any] = []
        for value in values:
            same = any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in taken)
            try:
                memory.commit(Fact("any", {"v": value}))
            except ConstraintError:
                assert same
            else:
                assert not same
                taken.append(value)


@pytest.mark.parametrize("value", [[], {}, ["a"], {"a": 1}], ids=repr)
def test_what_cannot_be_compared_is_refused(memory: MemoryStore, value: Any) -> None:
    memory.register_schema("any", Free, Constraint(unique="v"))
    with pytest.raises(ConstraintError, match=r"v is a .*strings, numbers and booleans"):
        memory.commit(Fact("any", {"v": value}))
    assert memory.stats()["facts"] == 0


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "update", "delete"]), st.sampled_from("abc"), st.sampled_from(["x", "y", "z", None])
    ),
    min_size=1,
    max_size=4,
)


@given(st.lists(OPERATIONS, max_size=8))
@settings(max_examples=60, deadline=None)
def test_no_sequence_of_commits_makes_a_duplicate(commits: list[list[tuple[str, str, str | None]]]) -> None:
    """Transactions against a dict: each is applied whole, unless its result has a duplicate."""
    with MemoryStore.open(":memory:") as memory:
        memory.register_schema("user", User, Constraint(unique="email"))
        model: dict[str, str | None] = {}
        for operations in commits:
            after = dict(model)
            with _refused() as refused, memory.transaction():
                for name, key, email in operations:
                    if name == "put":
                        memory.commit(user(key, email))
                        after[key] = email
                    elif name == "delete":
                        memory.delete("user", key)
                        after.pop(key, None)
                    elif key in after:
                        memory.update("user", key, {"email": email})
                        after[key] = email
            held = [email for email in after.values() if email is not None]
            assert bool(refused) is (len(held) != len(set(held)))
            model = model if refused else after
            assert emails(memory) == model


class _refused:
    """Notes a `ConstraintError` and goes on."""

    def __enter__(self) -> list[ConstraintError]:
        self._errors: list[ConstraintError] = []
        return self._errors

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, ConstraintError):
            self._errors.append(error)
            return True
        return False


# -- immutable ------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[MemoryStore], Any]] = {
    "put": lambda memory: memory.store.put(("user",), "u1", {"email": "b@x"}),
    "aput": lambda memory: asyncio.run(memory.store.aput(("user",), "u1", {"email": "b@x"})),
    "commit": lambda memory: memory.commit([Fact("other", {}), user("u1", "b@x")]),
    "commit_model": lambda memory: memory.commit_model(User(email="b@x"), id="u1"),
    "update": lambda memory: memory.update("user", "u1", {"email": "b@x"}),
    "delete": lambda memory: memory.delete("user", "u1"),
    "store.delete": lambda memory: memory.store.delete(("user",), "u1"),
    "batch": lambda memory: memory.store.batch([PutOp(("free",), "k", {}), PutOp(("user",), "u1", None)]),
    "short life": lambda memory: memory.store.put(("user",), "u1", {"email": "a@x", "name": ""}, ttl=0),
    "other type": lambda memory: memory.commit(Fact("free", {"email": "b@x"}, id="u1", namespace=("user",))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_immutable_fact_stays(fixed: MemoryStore, change: Callable[[MemoryStore], Any]) -> None:
    before = fixed.get("user", "u1")
    with pytest.raises(ConstraintError, match=r"user/u1 is immutable"):
        change(fixed)
    with pytest.raises(ConstraintError), fixed.transaction():
        change(fixed)
    assert fixed.get("user", "u1") == before
    assert fixed.stats()["facts"] == 1


def test_the_same_value_again_is_no_change(fixed: MemoryStore) -> None:
    fixed.commit(Fact("user", {"name": "", "email": "a@x"}, id="u1"))
    fixed.store.put(("user",), "u1", {"email": "a@x"})
    fixed.update("user", "u1", {"email": "a@x"})
    assert [entry.value for entry in fixed.history("user", "u1")] == [{"email": "a@x", "name": ""}] * 4


def test_a_commit_cannot_change_what_it_writes(fixed: MemoryStore) -> None:
    with pytest.raises(ConstraintError, match="user/new is immutable"):
        fixed.commit([user("new", "a@x"), user("new", "b@x")])
    with _refused() as refused, fixed.transaction():
        fixed.commit(user("new", "a@x"))
        fixed.delete("user", "new")
    assert "user/new is immutable" in str(refused[0])
    assert fixed.get("user", "new") is None


def test_a_typed_fact_is_immutable_in_any_namespace(fixed: MemoryStore) -> None:
    fixed.commit(Fact("user", {"email": "c@x"}, id="k", namespace=("team", "1")))
    for change in (
        lambda: fixed.store.put(("team", "1"), "k", {"email": "d@x"}),
        lambda: fixed.store.delete(("team", "1"), "k"),
        lambda: fixed.commit(Fact("note", {}, id="k", namespace=("team", "1"))),
    ):
        with pytest.raises(ConstraintError, match="team/1/k is immutable"):
            change()
    fact = fixed.get(("team", "1"), "k")
    assert fact is not None
    assert (fact.type, fact.payload["email"]) == ("user", "c@x")


def test_expiry_is_not_held_back(fixed: MemoryStore) -> None:
    fixed.store.put(("user",), "short", {"email": "s@x"}, ttl=0)
    assert fixed.sweep() == 1
    fixed.commit(user("short", "other@x"))


def test_a_draft_that_overrides_may_change_it(fixed: MemoryStore) -> None:
    from dataclasses import replace

    draft = fixed.draft_put(("user",), "u1", {"email": "b@x"})
    fixed.write([replace(draft, overrides=True)])
    fixed.write([replace(fixed.draft_delete(("user",), "u1"), overrides=True)])
    assert fixed.get("user", "u1") is None


def test_an_undo_and_forgetting_are_not_held_back(fixed: MemoryStore) -> None:
    fixed.commit(user("u2", "b@x"))
    fixed.rollback(1)
    assert emails(fixed) == {"u1": "a@x"}
    fixed.forget("user", "u1")
    assert emails(fixed) == {}


def test_an_undo_goes_back_whatever_is_there_now(unique: MemoryStore) -> None:
    unique.commit(user("1", "a@x"), thread_id="t")
    unique.delete("user", "1")
    unique.commit(user("2", "a@x"), thread_id="t")
    unique.rollback(to=1)
    assert emails(unique) == {"1": "a@x"}


@pytest.fixture
def disputed(unique: MemoryStore) -> MemoryStore:
    """`A` has given up an email, which `B` has taken for another user."""
    unique.commit(user("1", "a@x"))
    unique.commit([user("1", "b@x"), user("more", "m@x")], thread_id="A")
    unique.commit(user("2", "z@x"))
    unique.commit(user("2", "a@x"), thread_id="B")
    return unique


def test_an_undo_that_would_share_a_unique_value_is_a_conflict(disputed: MemoryStore) -> None:
    before = disputed.log()
    with pytest.raises(RollbackConflict, match="taken their value: user '1'") as caught:
        disputed.rollback(1, thread_id="A")
    assert disputed.log() == before
    ours, theirs = (disputed.history("user", key)[-1].version for key in "12")
    assert list(caught.value.conflicts) == [(("user",), "1", ours, theirs)]
    disputed.rollback(1, thread_id="B")
    disputed.rollback(1, thread_id="A")
    assert emails(disputed) == {"1": "a@x", "2": "z@x"}


def test_an_undo_that_would_share_a_unique_value_keeps_theirs(disputed: MemoryStore) -> None:
    report = disputed.rollback(1, thread_id="A", on_conflict="keep")
    assert (report.kept, report.removed) == (((("user",), "1"),), ((("user",), "more"),))
    assert emails(disputed) == {"1": "b@x", "2": "a@x"}
    for key in "12":
        disputed.update("user", key, {"name": "N"})


def test_an_undo_that_would_share_a_unique_value_takes_theirs_back(disputed: MemoryStore) -> None:
    report = disputed.rollback(1, thread_id="A", on_conflict="overwrite")
    assert emails(disputed) == {"1": "a@x", "2": "z@x"}
    for key in "12":
        disputed.update("user", key, {"name": "N"})
    disputed.rollback(1)
    disputed.rollback(1)
    disputed.rollback(to=report.undone, thread_id="A")
    assert emails(disputed) == {"1": "b@x", "2": "a@x", "more": "m@x"}


def test_what_an_undo_keeps_may_be_in_the_way_of_more(unique: MemoryStore) -> None:
    unique.commit([user("1", "a@x"), user("2", "b@x")])
    unique.commit([user("1", "b@x"), user("2", "c@x")], thread_id="A")
    unique.commit(user("3", "a@x"))
    report = unique.rollback(1, thread_id="A", on_conflict="keep")
    assert set(report.kept) == {(("user",), "1"), (("user",), "2")}
    assert emails(unique) == {"1": "b@x", "2": "c@x", "3": "a@x"}


def test_facts_that_exchanged_unique_values_go_back_together(unique: MemoryStore) -> None:
    unique.commit([user("1", "a@x"), user("2", "b@x")])
    unique.commit([user("1", "b@x"), user("2", "a@x")])
    unique.rollback(1)
    assert emails(unique) == {"1": "a@x", "2": "b@x"}


@pytest.mark.parametrize("on_conflict", ["raise", "keep", "overwrite"])
def test_of_two_facts_that_would_share_a_value_one_comes_back(unique: MemoryStore, on_conflict: Any) -> None:
    unique.commit(user("1", "a@x"))
    unique.commit(user("1", "b@x"), thread_id="A")
    unique.commit(user("2", "a@x"), thread_id="B")
    unique.commit(user("2", "c@x"), thread_id="A")
    if on_conflict == "raise":
        with pytest.raises(RollbackConflict):
            unique.rollback(2, thread_id="A")
        return
    unique.rollback(2, thread_id="A", on_conflict=on_conflict)
    assert emails(unique) == ({"1": "b@x", "2": "c@x"} if on_conflict == "keep" else {"2": "a@x"})  # the later one


def test_a_fact_that_is_in_the_way_twice_is_taken_back_once(memory: MemoryStore) -> None:
    memory.register_schema("user", User, Constraint(unique="email"))
    memory.register_schema(("user",), User, Constraint(unique="name"))
    memory.commit([user("1", "a@x", name="A"), user("2", "b@x", name="B"), user("3", "z@x", name="Z")])
    memory.commit([user("1", "c@x", name="C"), user("2", "d@x", name="D")], thread_id="A")
    memory.commit(user("3", "a@x", name="B"))
    memory.rollback(1, thread_id="A", on_conflict="overwrite")
    assert emails(memory) == {"1": "a@x", "2": "b@x", "3": "z@x"}


@pytest.mark.parametrize("on_conflict", ["raise", "keep", "overwrite"])
def test_a_rollback_node_minds_what_is_unique(unique: MemoryStore, on_conflict: Any) -> None:
    def write(state: Counted) -> Counted:
        unique.update("user", "1", {"email": "b@x"})
        return {"n": 1}

    unique.commit(user("1", "a@x"))
    builder = StateGraph(Counted)
    builder.add_node("write", write)
    builder.add_node("back", RollbackNode(1, on_conflict=on_conflict))
    builder.add_edge(START, "write")
    builder.add_edge("write", "back")
    graph = builder.compile(checkpointer=unique.checkpointer, store=unique.store, interrupt_before=["back"])
    thread: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke({"n": 0}, thread, durability="sync")
    unique.commit(user("2", "a@x"), thread_id="B")
    if on_conflict == "raise":
        with pytest.raises(RollbackConflict):
            graph.invoke(None, thread, durability="sync")
    else:
        graph.invoke(None, thread, durability="sync")
    assert emails(unique) == ({"1": "a@x"} if on_conflict == "overwrite" else {"1": "b@x", "2": "a@x"})


def test_a_rival_that_comes_while_an_undo_is_on_its_way(unique: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    unique.commit(user("1", "a@x"))
    unique.commit(user("1", "b@x"), thread_id="A")
    commit = unique._outbox.commit

    def late(*args: Any) -> None:
        monkeypatch.setattr(unique._outbox, "commit", commit)
        unique.commit(user("2", "a@x"), thread_id="B")
        commit(*args)

    monkeypatch.setattr(unique._outbox, "commit", late)
    with pytest.raises(RollbackConflict):
        unique.rollback(1, thread_id="A")
    assert emails(unique) == {"1": "b@x", "2": "a@x"}


@pytest.mark.parametrize("on_conflict", ["raise", "keep", "overwrite"])
def test_a_replaced_singleton_comes_back_alone(single: MemoryStore, on_conflict: Any) -> None:
    for key, thread in (("1", None), ("2", "A"), ("3", "B")):
        single.write([single.draft_put(("user",), key, {"email": "a@x"}, origin=Origin(thread_id=thread))])
    if on_conflict == "raise":
        with pytest.raises(RollbackConflict):
            single.rollback(1, thread_id="A")
    else:
        single.rollback(1, thread_id="A", on_conflict=on_conflict)
    assert emails(single) == ({"1": "a@x"} if on_conflict == "overwrite" else {"3": "a@x"})


# -- singletons -----------------------------------------------------------------------------------


def test_a_new_singleton_is_a_new_version_of_the_old(single: MemoryStore) -> None:
    first = single.commit(user("first", "a@x", name="A"))
    second = single.commit(Fact("user", {"email": "a@x", "name": "B"}))
    third = single.commit_model(User(email="a@x", name="C"))
    single.commit(user("other", "b@x"))
    assert first.id == second.id == third.id == "first"
    assert emails(single) == {"first": "a@x", "other": "b@x"}
    assert [entry.value["name"] for entry in single.history("user", "first") if entry.value] == ["A", "B", "C"]
    assert [entry.version for entry in single.history("user", "first")][-1] == third.version


def test_a_replacement_is_undone_in_one(single: MemoryStore) -> None:
    for key in "12":
        single.store.put(("user",), key, {"email": "a@x"})
    single.rollback(1)
    assert emails(single) == {"1": "a@x"}


def test_several_singletons_of_one_commit(single: MemoryStore) -> None:
    written = single.commit([user("1", "a@x", name="A"), user("2", "a@x", name="B"), user("3", "b@x")])
    assert [fact.id for fact in written] == ["1", "1", "3"]
    with single.transaction():
        single.commit(user("4", "c@x", name="C"))
        single.commit(user("5", "c@x", name="D"))
    assert {fact.id: fact.payload["name"] for fact in single.query("user")} == {"1": "B", "3": "", "4": "D"}


def test_an_item_under_a_key_of_its_own_replaces(single: MemoryStore) -> None:
    single.store.put(("user",), "1", {"email": "a@x", "name": "A"})
    single.store.put(("user",), "2", {"email": "a@x", "name": "B"})
    assert emails(single) == {"2": "a@x"}
    (_, entry) = single.history("user", "1")
    assert (entry.op, entry.reason) == ("delete", "replaced by 2")
    single.store.batch([PutOp(("user",), "3", {"email": "b@x"}), PutOp(("user",), "4", {"email": "b@x"})])
    assert emails(single) == {"2": "a@x", "4": "b@x"}
    single.update("user", "4", {"email": "a@x"})
    assert emails(single) == {"4": "a@x"}


def test_each_namespace_has_its_own(memory: MemoryStore) -> None:
    memory.register_schema(("users", "*"), User, Constraint(singleton_key="email"))
    for owner in "ab":
        for name in "xy":
            memory.store.put(("users", owner), name, {"email": "same@x"})
    assert {(fact.namespace, fact.id) for fact in memory.query(("users",))} == {
        (("users", "a"), "y"), (("users", "b"), "y"),
    }  # fmt: skip


def test_a_session_has_its_own_until_it_is_promoted(single: MemoryStore) -> None:
    single.commit(user("1", "a@x", name="long-term"))
    single.commit(user("2", "a@x", name="session"), session_id="s")
    assert emails(single) == {"1": "a@x"}
    single.promote_session("s")
    assert {fact.id: fact.payload["name"] for fact in single.query("user")} == {"2": "session"}


def test_an_immutable_singleton_is_written_once(memory: MemoryStore) -> None:
    memory.register_schema("user", User, Constraint(singleton_key="email", immutable=True))
    memory.commit(user("1", "a@x", name="A"))
    for change in (
        lambda: memory.commit(Fact("user", {"email": "a@x", "name": "B"})),
        lambda: memory.store.put(("user",), "2", {"email": "a@x", "name": "A"}),
    ):
        with pytest.raises(ConstraintError, match="user/1 is immutable"):
            change()
    memory.commit(Fact("user", {"email": "a@x", "name": "A"}))
    assert emails(memory) == {"1": "a@x"}


# -- between writers ------------------------------------------------------------------------------

WRITERS = 12


def compete(count: int, write: Callable[[int], Any]) -> list[BaseException | None]:
    """Call `write` from many threads at once; what each of them got."""
    barrier = threading.Barrier(count)
    outcomes: list[BaseException | None] = [None] * count

    def run(number: int) -> None:
        barrier.wait()
        try:
            write(number)
        except MemStateError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_of_many_threads_one_takes_a_value(unique: MemoryStore) -> None:
    for turn in range(5):
        email = f"{turn}@x"
        outcomes = compete(WRITERS, lambda number, email=email: unique.commit(user(f"{email}/{number}", email)))  # type: ignore[misc]
        assert outcomes.count(None) == 1
        assert all(isinstance(one, ConstraintError) for one in outcomes if one is not None)
    assert sorted(emails(unique).values()) == sorted(f"{turn}@x" for turn in range(5))


def test_of_many_threads_one_singleton_stays(single: MemoryStore) -> None:
    assert compete(WRITERS, lambda number: single.commit(user(str(number), "a@x"))) == [None] * WRITERS
    assert compete(WRITERS, lambda n: single.store.put(("user",), f"b{n}", {"email": "b@x"})) == [None] * WRITERS
    assert sorted(emails(single).values()) == ["a@x", "b@x"]


def test_of_many_threads_one_writes_an_immutable_fact(memory: MemoryStore) -> None:
    memory.register_schema("user", User, Constraint(immutable=True))
    outcomes = compete(WRITERS, lambda number: memory.commit(user("one", f"{number}@x")))
    assert outcomes.count(None) == 1
    assert emails(memory) == {"one": f"{outcomes.index(None)}@x"}
    assert memory.stats()["facts"] == 1


def take_values(path: str, name: str, count: int, start: Any, results: Any) -> None:
    with MemoryStore.open(path) as memory:
        memory.register_schema("user", User, Constraint(unique="email"))
        memory.register_schema("one", User, Constraint(singleton_key="email"))
        start.wait(60)
        won = []
        for number in range(count):
            memory.commit(Fact("one", {"email": "shared@x", "name": f"{name}{number}"}))
            try:
                memory.commit(user(f"{name}{number}", f"{number}@x"))
            except ConstraintError:
                continue
            won.append(number)
        results.put(won)


def test_of_two_processes_one_takes_a_value(database: Path) -> None:
    MemoryStore.open(database).close()
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    count = 40
    processes = [
        context.Process(target=take_values, args=(str(database), name, count, start, results)) for name in "ab"
    ]
    for process in processes:
        process.start()
    won = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted([*won[0], *won[1]]) == list(range(count))
    with MemoryStore.open(database) as memory:
        assert sorted(emails(memory).values()) == sorted(f"{number}@x" for number in range(count))
        assert len(memory.query("one")) == 1


def test_a_refused_commit_spares_those_it_shares_a_transaction_with(unique: MemoryStore) -> None:
    unique.commit(user("first", "a@x"))
    facts = [user(str(number), "a@x" if number % 3 == 0 else f"{number}@x") for number in range(WRITERS)]
    outcomes = compete(WRITERS, lambda number: unique.commit(facts[number]))
    assert [isinstance(one, ConstraintError) for one in outcomes] == [number % 3 == 0 for number in range(WRITERS)]
    assert len(emails(unique)) == 1 + WRITERS - WRITERS // 3


# -- vectors --------------------------------------------------------------------------------------


@pytest.fixture(params=["atomic", "deferred"])
def searched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryStore]:
    with open_memory(tmp_path / "memory.db", vector_sync=request.param) as memory:
        memory.register_schema("user", Free, Constraint(unique="email"))
        memory.register_schema("one", Free, Constraint(singleton_key="owner"))
        yield memory


def test_a_refused_commit_leaves_no_vector(searched: MemoryStore) -> None:
    searched.commit(Fact("user", {"email": "a@x", "text": "green tea"}, id="1"))
    with pytest.raises(ConstraintError):
        searched.commit(Fact("user", {"email": "a@x", "text": "trains to berlin"}, id="2"))
    searched.flush()
    check_settled(searched, Path(searched.storage.location))
    assert [fact.id for fact in searched.search("trains to berlin", limit=5)] == ["1"]


def test_a_replaced_singleton_leaves_the_search(searched: MemoryStore) -> None:
    searched.store.put(("one",), "1", {"owner": "o", "text": "green tea"})
    searched.store.put(("one",), "2", {"owner": "o", "text": "trains to berlin"})
    assert [fact.id for fact in searched.search("green tea", limit=5)] == ["2"]
    searched.flush()
    check_settled(searched, Path(searched.storage.location))


# -- bad constraints ------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", ["", "a b", 'x"', ("email", 5), 5, [("email",)]], ids=repr)
@pytest.mark.parametrize("name", ["unique", "singleton_key"])
def test_fields_are_names(name: str, fields: Any) -> None:
    with pytest.raises(SchemaError, match=name):
        Constraint(**{name: fields})


def test_a_constraint_names_fields_of_its_model(memory: MemoryStore) -> None:
    with pytest.raises(SchemaError, match="User has no field 'mail'"):
        memory.register_schema("user", User, Constraint(unique="mail"))
    with pytest.raises(SchemaError, match="a constraint is a Constraint"):
        memory.register_schema("user", User, "email")  # type: ignore[arg-type]


def test_registering_again_replaces_the_constraint(unique: MemoryStore) -> None:
    unique.register_schema("user", User)
    unique.commit([user("1", "a@x"), user("2", "a@x")])
    unique.register_schema("user", User, Constraint(unique="email"))
    unique.commit(user("3", "b@x"))
    with pytest.raises(ConstraintError):
        unique.commit(user("1", "a@x", name="still there twice"))


def test_the_constraints_of_all_schemas_hold(unique: MemoryStore) -> None:
    unique.register_schema(("team", "*"), Free)  # it decides what a value looks like there
    unique.commit(user("1", "a@x"))
    with pytest.raises(ConstraintError):
        unique.commit(Fact("user", {"email": "a@x", "free": True}, namespace=("team", "1")))

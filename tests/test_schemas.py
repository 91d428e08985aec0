"""Schemas on every way in, their versions, and rows that no longer fit. See also test_memory.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import PutOp
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator

from langgraph_memstate import Constraint, Fact, MemoryStore
from langgraph_memstate.errors import NamespaceError, SchemaError, SerializationError

USER = ("users", "u1", "profile")
ANY_USER = ("users", "*", "profile")


class First(BaseModel):
    """Version 1 of a profile."""

    name: str
    age: str = "0"


class Second(BaseModel):
    """Version 2: the age is a number."""

    name: str
    age: int = Field(ge=0)


class Third(BaseModel):
    """Version 3: the name is in two fields."""

    first: str
    last: str
    age: int = Field(ge=0)


def to_second(value: dict[str, Any]) -> dict[str, Any]:
    value["age"] = int(value["age"])  # its own copy
    return value


def to_third(value: dict[str, Any]) -> dict[str, Any]:
    first, _, last = value["name"].partition(" ")
    return {"first": first, "last": last, "age": value["age"]}


def register(memory: MemoryStore, version: int, pattern: Any = "profile") -> None:
    models: dict[int, type[BaseModel]] = {1: First, 2: Second, 3: Third}
    steps = {1: to_second, 2: to_third}
    memory.register_schema(pattern, models[version], version=version, upcast={v: steps[v] for v in range(1, version)})


@pytest.fixture
def aged(memory: MemoryStore) -> MemoryStore:
    """A memory with a fact of each version of its schema, the third of which is registered."""
    register(memory, 1)
    memory.commit(Fact("profile", {"name": "Ann Lee", "age": "7"}, id="1"))
    register(memory, 2)
    memory.commit(Fact("profile", {"name": "Bo Ray", "age": 8}, id="2"))
    register(memory, 3)
    memory.commit(Fact("profile", {"first": "Cy", "last": "Orr", "age": 9}, id="3"))
    return memory


ANN = {"first": "Ann", "last": "Lee", "age": 7}
ALL = {"1": ANN, "2": {"first": "Bo", "last": "Ray", "age": 8}, "3": {"first": "Cy", "last": "Orr", "age": 9}}


# -- every way in ---------------------------------------------------------------------------------


class Rejects(BaseModel):
    """What the ways below write first is not this."""

    name: str
    age: int = 0


def in_a_transaction(memory: MemoryStore, value: dict[str, Any]) -> None:
    with memory.transaction():
        memory.commit(Fact("other", {}))
        memory.store.put(USER, "k", value)


async def in_an_async_transaction(memory: MemoryStore, value: dict[str, Any]) -> None:
    async with memory.transaction():
        await memory.acommit(Fact("profile", value, id="k", namespace=USER))


def by_an_update(memory: MemoryStore, value: dict[str, Any]) -> None:
    if memory.get(USER, "k") is None:
        memory.commit(Fact("profile", {"name": "before"}, id="k", namespace=USER))
    memory.update(USER, "k", value)


WAYS: dict[str, Callable[[MemoryStore, dict[str, Any]], Any]] = {
    "put": lambda memory, value: memory.store.put(USER, "k", value),
    "aput": lambda memory, value: asyncio.run(memory.store.aput(USER, "k", value)),
    "batch": lambda memory, value: memory.store.batch([PutOp(("free",), "k", {}), PutOp(USER, "k", value)]),
    "abatch": lambda memory, value: asyncio.run(memory.store.abatch([PutOp(USER, "k", value)])),
    "commit": lambda memory, value: memory.commit([Fact("free", {}), Fact("profile", value, namespace=USER)]),
    "acommit": lambda memory, value: asyncio.run(memory.acommit(Fact("profile", value, namespace=USER))),
    "update": by_an_update,
    "aupdate": lambda memory, value: (
        by_an_update(memory, {"name": "a"}), asyncio.run(memory.aupdate(USER, "k", value)),
    ),
    "commit_model": lambda memory, value: memory.commit_model(
        First.model_construct(**value), type="profile", namespace=USER
    ),
    "transaction": in_a_transaction,
    "async transaction": lambda memory, value: asyncio.run(in_an_async_transaction(memory, value)),
    "session": lambda memory, value: memory.commit(Fact("profile", value, namespace=USER, session_id="s")),
}  # fmt: skip


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("pattern", ["type", "namespace"])
def test_a_schema_holds_on_every_way_in(
    memory: MemoryStore, pattern: str, write: Callable[[MemoryStore, dict[str, Any]], Any]
) -> None:
    memory.register_schema("profile" if pattern == "type" else ANY_USER, Rejects)
    if pattern == "type":  # an item without a type is of the type of what it replaces
        memory.commit(Fact("profile", {"name": "before"}, id="k", namespace=USER))
    with pytest.raises(SchemaError, match=r"users/u1/profile: Rejects rejects the value: age"):
        write(memory, {"name": "Ann", "age": "old"})
    assert {fact.payload["name"] for fact in memory.query()} <= {"before", "a"}
    assert memory.query(session_id="s") == []
    write(memory, {"name": "Ann", "age": "7"})
    (fact,) = memory.query(USER, filter={"name": "Ann"}) or memory.query(USER, session_id="s")
    assert fact.payload == {"name": "Ann", "age": 7}
    assert memory.history(USER, fact.id, session_id=fact.session_id)[-1].schema == "Rejects"


def test_what_replaces_a_typed_fact_is_of_its_type(memory: MemoryStore) -> None:
    memory.register_schema("profile", Rejects)
    memory.commit(Fact("profile", {"name": "Ann"}, id="k", namespace=("any", "where")))
    memory.store.put(("any", "where"), "k", {"name": "Bo"})
    fact = memory.get(("any", "where"), "k")
    assert fact is not None
    assert (fact.type, fact.payload) == ("profile", {"name": "Bo", "age": 0})
    memory.commit(Fact("note", {"free": 1}, id="k", namespace=("any", "where")))  # unless it says otherwise


# -- versions -------------------------------------------------------------------------------------


def test_old_facts_are_read_in_the_present_shape(aged: MemoryStore) -> None:
    assert {fact.id: fact.payload for fact in aged.query("profile")} == ALL
    assert {item.key: item.value for item in aged.store.search(("profile",))} == ALL
    for key, value in ALL.items():
        fact, item = aged.get("profile", key), aged.store.get(("profile",), key)
        assert fact is not None
        assert item is not None
        assert fact.payload == item.value == value


async def test_and_so_are_they_in_async_code(aged: MemoryStore) -> None:
    assert {fact.id: fact.payload for fact in await aged.aquery("profile")} == ALL
    item = await aged.store.aget(("profile",), "1")
    assert item is not None
    assert item.value == ANN


def test_a_filter_compares_the_present_shape(aged: MemoryStore) -> None:
    assert [fact.id for fact in aged.query("profile", filter={"first": "Ann"})] == ["1"]
    assert [fact.id for fact in aged.query("profile", filter={"age": {"$gte": 8}})] == ["3", "2"]
    assert aged.query("profile", filter={"name": "Ann Lee"}) == []


def test_nothing_is_rewritten(aged: MemoryStore) -> None:
    aged.query("profile")
    entries = [aged.history("profile", key)[0] for key in ALL]
    assert [(entry.schema, entry.schema_version) for entry in entries] == [("First", 1), ("Second", 2), ("Third", 3)]
    assert entries[0].value == {"name": "Ann Lee", "age": "7"}
    assert aged.stats()["facts"] == 3


def test_an_update_of_an_old_fact_writes_a_new_one(aged: MemoryStore) -> None:
    fact = aged.update("profile", "1", {"last": "Low"})
    assert fact.payload == {**ANN, "last": "Low"}
    old, new = aged.history("profile", "1")
    assert (old.schema_version, new.schema_version, new.value) == (1, 3, {**ANN, "last": "Low"})


def test_records_say_what_they_were_written_under(aged: MemoryStore) -> None:
    with aged.storage.snapshot() as reader:
        found = {record.key: (record.schema, record.schema_version) for record in reader.items((), 0.0)}
    assert found == {"1": ("First", 1), "2": ("Second", 2), "3": ("Third", 3)}
    aged.commit(Fact("free", {}, id="f"))
    record = aged.view().get(("free",), "f")
    assert record is not None
    assert (record.schema, record.schema_version) == (None, None)


def test_search_finds_old_facts_in_the_present_shape(tmp_path: Path) -> None:
    def embed(texts: list[str]) -> list[list[float]]:
        return [[1.0, float(len(text))] for text in texts]

    with MemoryStore.open(":memory:", index={"dims": 2, "embed": embed, "fields": ["$"]}) as memory:
        register(memory, 1)
        memory.commit(Fact("profile", {"name": "Ann Lee", "age": "7"}, id="1"))
        register(memory, 3)
        (fact,) = memory.search("Ann", filter={"first": "Ann"})
        assert fact.payload == ANN
        (item,) = memory.store.search(("profile",), query="Ann", filter={"age": 7})
        assert item.value == ANN


def test_a_version_may_do_without_an_upcaster(memory: MemoryStore) -> None:
    class Wider(First):
        tags: list[str] = []

    register(memory, 1)
    memory.commit(Fact("profile", {"name": "Ann"}, id="1"))
    memory.register_schema("profile", Wider, version=2)
    fact = memory.get("profile", "1")
    assert fact is not None
    assert fact.payload == {"name": "Ann", "age": "0", "tags": []}


def test_facts_without_a_schema_are_version_0(memory: MemoryStore) -> None:
    memory.store.put(USER, "k", {"n": "Ann"})
    memory.register_schema(ANY_USER, First)
    assert memory.query(USER)[0].payload == {"n": "Ann"}
    memory.register_schema(ANY_USER, First, upcast={0: lambda value: {"name": value["n"]}})
    assert memory.query(USER)[0].payload == {"name": "Ann", "age": "0"}
    assert memory.check_schemas() == []


def test_an_upcaster_cannot_change_what_is_stored(memory: MemoryStore) -> None:
    def clears(value: dict[str, Any]) -> dict[str, Any]:
        value.clear()
        return {"name": "new", "age": 1}

    register(memory, 1)
    memory.commit(Fact("profile", {"name": "Ann"}, id="1"))
    memory.register_schema("profile", Second, version=2, upcast={1: clears})
    assert [memory.query("profile")[0].payload for _ in range(2)] == [{"name": "new", "age": 1}] * 2


# -- rows that no longer fit ----------------------------------------------------------------------


@pytest.fixture
def unfit(memory: MemoryStore) -> MemoryStore:
    """A memory with a row that cannot be brought to version 2, one that can, and one that nothing governs."""
    register(memory, 1)
    memory.commit([Fact("profile", {"name": "Ann", "age": age}, id=age) for age in ("old", "-1", "7")])
    memory.commit(Fact("free", {"age": "old"}))
    register(memory, 2)
    return memory


def test_a_row_that_no_longer_fits_is_read_as_it_was_written(
    unfit: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "langgraph_memstate"):
        for _ in range(3):
            assert {fact.id: fact.payload["age"] for fact in unfit.query("profile")} == {
                "old": "old",
                "-1": "-1",
                "7": 7,
            }
            item = unfit.store.get(("profile",), "old")
            assert item is not None
            assert item.value["age"] == "old"
            assert unfit.query("profile", filter={"age": 7})[0].id == "7"
    (record,) = caplog.records
    assert "cannot be read as version 2 of Second" in record.getMessage()
    assert "check_schemas" in record.getMessage()


def test_what_no_longer_fits_is_listed(unfit: MemoryStore) -> None:
    faults = {fault.key: fault for fault in unfit.check_schemas()}
    assert set(faults) == {"old", "-1"}
    assert faults["old"].problem.startswith("ValueError")
    assert faults["-1"].problem == "age: Input should be greater than or equal to 0"
    assert (faults["-1"].namespace, faults["-1"].schema) == (("profile",), "Second")
    assert faults["-1"].version == unfit.history("profile", "-1")[-1].version
    unfit.commit([Fact("profile", {"name": "Ann", "age": 1}, id=key) for key in faults])
    assert unfit.check_schemas() == asyncio.run(unfit.acheck_schemas()) == []


def test_a_row_of_a_newer_release_is_listed_and_left_alone(aged: MemoryStore) -> None:
    register(aged, 2)
    fact = aged.get("profile", "3")
    assert fact is not None
    assert fact.payload == ALL["3"]
    assert [fault.problem for fault in aged.check_schemas()] == [
        "written under version 3; version 2 is registered here"
    ]


def test_a_row_that_its_own_schema_rejects_is_listed(memory: MemoryStore) -> None:
    memory.commit(Fact("profile", {"name": 5}, id="before"))
    register(memory, 1)
    (fault,) = memory.check_schemas()
    assert (fault.key, fault.problem) == ("before", "name: Input should be a valid string")


def test_a_model_that_breaks_down_is_no_reason_not_to_read(memory: MemoryStore) -> None:
    class Breaks(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def breaks(cls, name: str) -> str:
            raise ZeroDivisionError

    register(memory, 1)
    memory.commit(Fact("profile", {"name": "Ann"}, id="1"))
    memory.register_schema("profile", Breaks, version=2)
    assert memory.query("profile")[0].payload["name"] == "Ann"
    assert "ZeroDivisionError" in memory.check_schemas()[0].problem


# -- what may be registered -----------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, -1, 1.5, True, "2", None, 2**40])
def test_a_version_is_a_positive_number(memory: MemoryStore, version: Any) -> None:
    with pytest.raises(SchemaError, match="version="):
        memory.register_schema("profile", First, version=version)


@pytest.mark.parametrize("upcast", [{2: dict}, {-1: dict}, {1: "no function"}, {"1": dict}, {True: dict}], ids=repr)
def test_an_upcaster_is_of_a_version_before(memory: MemoryStore, upcast: Any) -> None:
    with pytest.raises(SchemaError, match="upcast"):
        memory.register_schema("profile", First, version=2, upcast=upcast)


def test_a_pattern_is_a_namespace_that_can_be_stored(memory: MemoryStore) -> None:
    patterns: list[Any] = ["\ud800", "", (), None, 5, ("a", 5)]
    for pattern in patterns:
        with pytest.raises(NamespaceError):
            memory.register_schema(pattern, First)


# -- models as facts ------------------------------------------------------------------------------


class Line(BaseModel):
    line: str


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Task", "task"), ("UserProfile", "user_profile"), ("HTTPServerLog2", "http_server_log2"), ("so", "so")],
)
def test_a_model_is_a_fact_of_its_name(memory: MemoryStore, name: str, expected: str) -> None:
    model: Any = type(name, (Line,), {"__module__": __name__})
    fact = memory.commit_model(model(line="x"), id="1", actor="me", reason="because", thread_id="t")
    assert (fact.type, fact.id, fact.namespace) == (expected, "1", None)
    (entry,) = memory.history(expected, "1")
    assert (entry.value, entry.actor, entry.reason, entry.thread_id) == ({"line": "x"}, "me", "because", "t")


def test_a_model_is_a_fact_of_the_type_it_is_registered_for(memory: MemoryStore) -> None:
    memory.register_schema("first", First)
    memory.register_schema("profile", First)
    memory.register_schema(ANY_USER, First)
    assert memory.commit_model(First(name="Ann")).type == "profile"
    fact = asyncio.run(memory.acommit_model(First(name="Ann"), type="own", namespace=("a", "b"), session_id="s"))
    assert (fact.type, fact.namespace, fact.session_id) == ("own", ("a", "b"), "s")
    assert memory.query(("a",), session_id="s")[0].payload == {"name": "Ann", "age": "0"}


@pytest.mark.parametrize("model", [{"name": "Ann"}, First, None, "Ann"], ids=repr)
def test_only_a_model_is_one(memory: MemoryStore, model: Any) -> None:
    with pytest.raises(SchemaError, match="Pydantic model"):
        memory.commit_model(model)


def test_a_model_that_is_not_json(memory: MemoryStore) -> None:
    class Odd(BaseModel):
        value: Any

    with pytest.raises(SerializationError):
        memory.commit_model(Odd(value=object()))


class Strict(BaseModel):
    """What is stored of it has other names and types, and more fields, than it takes by default."""

    model_config = ConfigDict(strict=True, extra="forbid")

    born: date = Field(alias="dateOfBirth")
    name: str = Field("", alias="fullName")

    @computed_field
    def initial(self) -> str:
        return self.name[:1]


@pytest.mark.parametrize("born", [date(1815, 12, 10), "1815-12-10"])
def test_what_is_stored_can_be_written_again(memory: MemoryStore, born: Any) -> None:
    memory.register_schema("person", Strict)
    memory.commit(Fact("person", {"dateOfBirth": born}, id="1"))
    memory.update("person", "1", {"name": "Ada King"})
    fact = memory.get("person", "1")
    assert fact is not None
    assert memory.commit(fact).payload["initial"] == "A"
    again = memory.commit_model(Strict(dateOfBirth=date(1815, 12, 10), fullName="Bob"))
    stored = {one.id: one.payload for one in memory.query("person")}
    assert stored["1"] == {"born": "1815-12-10", "name": "Ada King", "initial": "A"}
    assert stored[again.id] == {"born": "1815-12-10", "name": "Bob", "initial": "B"}
    memory.register_schema("person", Strict, version=2)
    assert memory.check_schemas() == []


def test_a_text_that_a_model_takes_stays_one(memory: MemoryStore) -> None:
    class Event(BaseModel):
        when: datetime | str

    memory.register_schema("event", Event)
    for when in ("12", "1815-12-10"):
        fact = memory.commit_model(Event(when=when))
        assert memory.update("event", fact.id, {}).payload == {"when": when}


def test_the_public_name_is_a_value() -> None:
    assert Constraint(unique="email") == Constraint(unique=["email"])
    assert hash(Constraint(unique="email")) == hash(Constraint(unique=("email",)))
    with pytest.raises(AttributeError):
        Constraint().immutable = True  # type: ignore[misc]

"""State is stored by what changed, and what is read is what was written."""

from __future__ import annotations

import gc
import math
import operator
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.graph import START, StateGraph
from langgraph.graph.message import _messages_delta_reducer, add_messages
from langgraph.types import Send
from pydantic import BaseModel

from langgraph_memstate import MemoryStore, MemStateCheckpointer
from langgraph_memstate.errors import CorruptRowError, MemStateError, SerializationError
from langgraph_memstate.graph.allocation import gc_paused, made_ahead
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.graph.lists import Lists
from langgraph_memstate.graph.outlines import Outline, is_same
from langgraph_memstate.graph.templates import copy_into, template_of
from langgraph_memstate.storage.packing import packed, unpacked
from langgraph_memstate.storage.rows import load_ids
from tests.crash.audit import audit

serde = MemStateSerializer()
Config = dict[str, Any]


def at(thread: str, checkpoint_id: str | None = None) -> Config:
    place = {"thread_id": thread, "checkpoint_ns": ""}
    return {"configurable": place if checkpoint_id is None else {**place, "checkpoint_id": checkpoint_id}}


def put(saver: MemStateCheckpointer, values: dict[str, Any], after: Config, *, run: str | None = None) -> Config:
    """A checkpoint in which every channel has a new version."""
    checkpoint = empty_checkpoint()
    checkpoint["id"] = str(uuid6())
    checkpoint["channel_values"] = values
    checkpoint["channel_versions"] = {name: saver.get_next_version(None, None) for name in values}
    metadata: Any = {"source": "loop", "step": 1, **({"run_id": run} if run else {})}
    return saver.put(after, checkpoint, metadata, checkpoint["channel_versions"])


def values_at(saver: MemStateCheckpointer, config: Config) -> dict[str, Any]:
    found = saver.get_tuple(config)
    assert found is not None
    return found.checkpoint["channel_values"]


def rows(database: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def talk(count: int, start: int = 0) -> list[AnyMessage]:
    kinds = (HumanMessage, AIMessage)
    return [kinds[n % 2](f"message {n} " + "words " * 20, id=f"m{n}") for n in range(start, start + count)]


TOOL_CALL = {"name": "f", "args": {"a": [1, {"b": 2.0}]}, "id": "c1", "type": "tool_call"}


# -- templates: never miss a change, never share what can change ----------------------------------------------

texts = st.text(max_size=6)
atoms = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(allow_nan=True), texts, st.binary(max_size=3)
)
plain = st.recursive(
    atoms, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)), max_leaves=8
)
objects = st.dictionaries(texts, plain, max_size=3)
messages = st.one_of(
    st.builds(HumanMessage, content=texts, id=st.one_of(st.none(), texts), additional_kwargs=objects),
    st.builds(AIMessage, content=texts, response_metadata=objects, name=st.one_of(st.none(), texts)),
    st.builds(AIMessage, content=texts, tool_calls=st.builds(lambda: [deepcopy(TOOL_CALL)]), additional_kwargs=objects),
    st.builds(AIMessageChunk, content=texts, id=texts),
    st.builds(SystemMessage, content=texts),
    st.builds(ToolMessage, content=texts, tool_call_id=texts, artifact=plain),
    st.builds(lambda id: RemoveMessage(id=id), texts),
    st.builds(lambda content: HumanMessage(content=[{"type": "text", "text": content}, content]), texts),
    st.builds(lambda content, more: HumanMessage(content=content, unknown=more), texts, plain),
)
items_of_any_kind = st.one_of(messages, messages, plain, objects)


class Text(str):
    __slots__ = ()


def twins(value: Any) -> list[Any]:
    """Values that Python takes for equal to this one, or nearly."""
    found: list[Any] = [None, "", 0, "other", [value], {"k": value}]
    if isinstance(value, bool | int | float) and not (isinstance(value, float) and not math.isfinite(value)):
        found += [int(value), float(value), -float(value), bool(value)]
    if type(value) is bytes:
        found += [bytearray(value), memoryview(value)]
    if type(value) is str:
        found += [Text(value), value + "!", "".join(list(value))]
    if type(value) is dict:
        found += [OrderedDict(value), dict(reversed(value.items())), {**value, "more": 1}, dict(value)]
    if type(value) is list:
        found += [tuple(value), [*value, 1], value[::-1], list(value)]
    return found


def holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything inside a value that can be changed in place, and where."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield value, key
            yield from holders(each)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield value, index
            yield from holders(each)
    elif hasattr(value, "__pydantic_fields_set__"):
        yield from holders(value.__dict__)
        yield value, "fields set"
        yield from holders(value.__pydantic_extra__)


def change(holder: Any, place: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    if place == "fields set" and not isinstance(holder, dict):
        names = holder.__pydantic_fields_set__
        names ^= {draw(st.sampled_from(["content", "id", "name"]))}
        return
    how = draw(st.sampled_from(["replace", "remove", "again", "another key", "keep"]))
    value = holder[place]
    if how == "replace":
        holder[place] = draw(st.sampled_from(twins(value)))
    elif how == "remove":
        del holder[place]
    elif how == "again" and isinstance(holder, dict):  # the same items in another order
        holder[place] = holder.pop(place)
    elif how == "another key" and isinstance(holder, dict):
        holder[Text(place)] = holder.pop(place)


def encoded(items: list[Any]) -> bytes | None:
    try:
        return serde.dumps_typed(items)[1]
    except SerializationError:
        return None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_change_that_serialising_would_show_is_never_missed(data: st.DataObject) -> None:
    items = [data.draw(items_of_any_kind)]
    before = encoded(items)
    template = template_of(items)
    if template is None or before is None:
        return
    places = list(holders(items))
    for _ in range(data.draw(st.integers(1, 3))):
        holder, place = data.draw(st.sampled_from(places))
        try:
            change(holder, place, data.draw)
        except (KeyError, IndexError):  # an earlier change took it away
            continue
    outline = Outline()
    outline.add(template)
    if len(items) == 1 and is_same(items, template):
        assert encoded(items) == before
    if outline.begins(items):
        assert encoded(items[:1]) == before


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_change_is_not_missed_in_a_list_that_was_recognised_before(data: st.DataObject) -> None:
    items = data.draw(st.lists(items_of_any_kind, min_size=1, max_size=4))
    blob = serde.dumps_typed(items)
    outline = Outline()
    for item in serde.loads_typed(blob):
        template = template_of([item])
        assert template is not None
        outline.add(template)
    seen = serde.loads_typed(blob)
    assert outline.begins(seen), "equal, and made of other objects"
    items = seen if data.draw(st.booleans()) else serde.loads_typed(blob)
    places = list(holders(items))
    for _ in range(data.draw(st.integers(1, 3)) if places else 0):
        holder, place = data.draw(st.sampled_from(places))
        try:
            change(holder, place, data.draw)
        except (KeyError, IndexError):  # an earlier change took it away
            continue
    if len(items) > 1 and isinstance(items[0], BaseMessage) and isinstance(items[1], BaseMessage):
        first, second = items[0].__dict__, items[1].__dict__
        if first and data.draw(st.booleans()):  # the last attribute of one becomes the first of the next
            name, value = first.popitem()
            later = {**second}
            second.clear()
            second.update({name: value, **later})
    if outline.begins(items):
        assert encoded(items) == blob[1]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(items_of_any_kind)
def test_what_did_not_change_is_recognised_and_copies_are_what_decoding_gives(item: Any) -> None:
    blob = serde.dumps_typed([item])
    decoded = serde.loads_typed(blob)
    template = template_of(decoded)
    assert template is not None
    assert is_same(serde.loads_typed(blob), template)
    copies: list[Any] = []
    copy_into(copies, template)
    copy_into(copies, template)
    outline = Outline()
    outline.add(template)
    for copy in copies:
        assert serde.dumps_typed([copy]) == blob
        assert type(copy) is type(decoded[0])
        assert is_same([copy], template)
        assert outline.begins([copy])
    assert not mutable_parts(copies[0]) & mutable_parts(copies[1])
    assert not mutable_parts(copies[0]) & mutable_parts(list(template))


def set_attributes(message: BaseMessage, attributes: dict[str, Any]) -> None:
    vars(BaseModel)["__dict__"].__set__(message, attributes)


def rename(names: set[str], name: str) -> None:
    names.remove(name)
    names.add(Text(name))


CHANGES: dict[str, Callable[[BaseMessage, BaseMessage], Any]] = {
    "an attribute of a subclass": lambda one, _: one.__dict__.update(content=Text(one.content)),
    "another number": lambda one, _: one.__dict__.update(count=True),
    "another zero": lambda one, _: one.__dict__.update(zero=-0.0),
    "a name of a subclass": lambda one, _: one.__dict__.update({Text("last"): one.__dict__.pop("last")}),
    "another order": lambda one, _: one.__dict__.update(nothing=one.__dict__.pop("nothing")),
    "a field that was set, by a subclass": lambda one, _: rename(one.__pydantic_fields_set__, "content"),
    "other attributes": lambda one, _: set_attributes(one, OrderedDict(one.__dict__)),
    "bytes that change": lambda _, two: two.additional_kwargs.update(raw=bytearray(b"raw")),
    "an attribute that changes": lambda _, two: two.__dict__.update(raw=bytearray(b"raw")),
    "inside": lambda one, _: one.additional_kwargs["deep"].append(2),
    "an attribute of the next": lambda one, two: set_attributes(
        two, {"last": one.__dict__.pop("last"), **two.__dict__}
    ),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("was_seen", [True, False])
def test_each_way_to_change_a_message_is_seen(what: str, was_seen: bool) -> None:
    def made() -> list[BaseMessage]:
        one = HumanMessage("hello", additional_kwargs={"deep": [1]})
        one.__dict__.update(count=1, zero=0.0, nothing=None, last=None)
        two = HumanMessage("hello", additional_kwargs={"raw": b"raw"})
        two.__dict__.update(raw=b"raw")
        return [one, two]

    outline = Outline()
    templates = [template for message in made() if (template := template_of([message])) is not None]
    for template in templates:
        outline.add(template)
    seen = made()
    assert outline.begins(seen)
    changed = seen if was_seen else made()
    CHANGES[what](*changed)
    assert not outline.begins(changed)
    assert outline.begins(made()), "what is not the same leaves no trace"
    assert [is_same([message], template) for message, template in zip(changed, templates, strict=True)] != [True, True]
    assert [is_same([message], template) for message, template in zip(made(), templates, strict=True)] == [True, True]


@pytest.mark.parametrize("item", [{"raw": b"raw"}, [b"raw"]], ids=repr)
def test_bytes_that_change_are_no_bytes(item: Any) -> None:
    template = template_of([item])
    assert template is not None
    assert is_same([deepcopy(item)], template)
    changed = {"raw": bytearray(b"raw")} if isinstance(item, dict) else [bytearray(b"raw")]
    assert not is_same([changed], template)


def mutable_parts(value: Any) -> set[int]:
    found: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif hasattr(one, "__pydantic_fields_set__"):
            waiting += [one.__dict__, one.__pydantic_extra__]
            found.add(id(one.__pydantic_fields_set__))
        elif not isinstance(one, set):
            continue
        if not isinstance(one, tuple):
            found.add(id(one))
    return found


@pytest.mark.parametrize(
    "item",
    [("a", "tuple"), {1: "key"}, {"s"}, bytearray(b"x"), Text("sub"), OrderedDict(a=1), object, [[[[()]]]]],
    ids=repr,
)
def test_other_types_have_no_template(item: Any) -> None:
    assert template_of([item]) is None


def test_a_message_whose_attributes_decoding_would_drop_is_not_copied() -> None:
    message = HumanMessage("hello")
    message.__dict__["cached"] = "computed"
    template = template_of([message])
    assert template is not None
    assert not is_same(serde.loads_typed(serde.dumps_typed([message])), template)


def test_the_garbage_collector_goes_on_afterwards() -> None:
    assert gc.isenabled()
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with gc_paused():
            pass
        assert not gc.isenabled(), "somebody else had switched it off"
    finally:
        gc.enable()


def test_rows_are_made_ahead_of_who_takes_them_within_limits() -> None:
    made: list[int] = []

    def make(row: int) -> int:
        assert not gc.isenabled()
        made.append(row)
        return -row

    taken = made_ahead(iter(range(100)), make, lambda row: 1)
    assert made == []
    assert [next(taken), next(taken)] == [0, -1]
    assert gc.isenabled()
    assert made == [0, 1, 2, 3, 4]
    assert list(taken) == [-row for row in range(2, 100)]
    made.clear()
    heavy = made_ahead(iter(range(100)), make, lambda row: 20 * 1024 * 1024)
    for row in range(10):
        assert next(heavy) == -row
        assert len(made) <= row + 2


def test_an_error_of_a_row_made_ahead_comes_in_its_turn() -> None:
    def rows() -> Iterator[int]:
        yield from (1, 2, 3, 0, 4)

    taken = made_ahead(rows(), lambda row: 6 // row, lambda row: 1)
    assert [next(taken), next(taken), next(taken)] == [6, 3, 2]
    with pytest.raises(ZeroDivisionError):
        next(taken)
    assert list(taken) == []
    assert gc.isenabled()


def test_deep_values_are_copied_by_decoding_only() -> None:
    deep: Any = "end"
    for _ in range(100):
        deep = [deep]
    assert template_of([deep]) is None
    assert template_of([[[["end"]]]]) is not None


# -- packing -----------------------------------------------------------------------------------------------------


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=4).map(lambda part: part * 100)))
def test_packing_gives_back_what_it_was_given(content: bytes) -> None:
    assert unpacked(packed(content)) == content
    assert len(packed(content)) <= len(content) + 1


def test_damaged_packing_is_refused() -> None:
    whole = packed(serde.dumps_typed(talk(1))[1])
    assert len(whole) < 200
    damaged = [b"", b"\x07abc", None, "text", 1, whole[:-1], whole + b"x"]
    damaged += [bytes([*whole[:place], whole[place] ^ 0x10, *whole[place + 1 :]]) for place in range(1, len(whole))]
    for stored in damaged:
        try:
            assert unpacked(stored) == unpacked(whole), "padding, perhaps, but never another value"
        except CorruptRowError:
            continue
        assert isinstance(stored, bytes)
        assert len(stored) == len(whole)


# -- lists: stored by what changed ---------------------------------------------------------------------------------


def test_a_list_that_grows_adds_one_element_a_turn(database: Path) -> None:
    turns = 300
    with MemoryStore.open(database) as memory:
        saver, config, said = memory.checkpointer, at("t"), []
        for turn in range(turns):
            said = [*said, *talk(1, turn)]
            config = put(saver, {"messages": said}, config)
        assert values_at(saver, config) == {"messages": said}
    with MemoryStore.open(database) as memory:
        history = [one.checkpoint["channel_values"]["messages"] for one in memory.checkpointer.list(at("t"))]
    assert history == [said[:count] for count in range(turns, 0, -1)]
    assert rows(database, "SELECT count(*) FROM elements") == [(turns,)]
    ((longest, total),) = rows(database, "SELECT max(length(elements)), sum(length(elements)) FROM lists")
    assert longest < 100
    assert total < turns * 30
    bases = dict(rows(database, "SELECT id, base FROM lists"))
    for base in bases:
        steps = 0
        while (base := bases[base]) is not None:
            steps += 1
        assert steps <= math.log2(turns) + 1
    assert audit(database) == []


@pytest.mark.parametrize("kind", ["texts", "numbers", "dicts", "objects in tuples"])
def test_lists_of_anything_grow_by_what_is_new(kind: str, database: Path) -> None:
    def item(n: int) -> Any:
        return {
            "texts": f"line {n}", "numbers": n / 7, "dicts": {"n": n, "tags": [str(n)]},
            "objects in tuples": (n, {n}),
        }[kind]  # fmt: skip

    turns = 200
    with MemoryStore.open(database) as memory:
        config = at("t")
        for turn in range(turns):
            config = put(memory.checkpointer, {"log": [item(n) for n in range(turn)]}, config)
        written = values_at(memory.checkpointer, config)
    with MemoryStore.open(database) as memory:
        assert values_at(memory.checkpointer, config) == written == {"log": [item(n) for n in range(turns - 1)]}
    ((size,),) = rows(database, "SELECT sum(length(data)) FROM elements")
    assert size < turns * 200
    assert audit(database) == []


def test_equal_lists_are_stored_once(database: Path) -> None:
    with MemoryStore.open(database) as memory:
        config = at("t")
        for _ in range(4):
            config = put(memory.checkpointer, {"a": talk(5), "b": talk(5)}, config)
        stats = memory.stats()
    assert (stats["lists"], stats["elements"], stats["channel_values"]) == (1, 5, 0)


class Counting(JsonPlusSerializer):
    """Counts what is serialised, in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.dumped = self.loaded = 0

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        self.dumped += 1
        return super().dumps_typed(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        self.loaded += 1
        return super().loads_typed(data)


def test_a_turn_encodes_and_decodes_what_is_new(memory: MemoryStore) -> None:
    counting = Counting()
    saver = MemStateCheckpointer(memory, serde=counting)
    tools = [AIMessage("", id="call", tool_calls=[TOOL_CALL]), ToolMessage("done", id="tool", tool_call_id="c1")]
    config = put(saver, {"messages": [*talk(150), *tools, *talk(150, 150)]}, at("t"))
    for turn in range(3):
        counting.dumped = counting.loaded = 0
        said = values_at(saver, config)["messages"]
        config = put(saver, {"messages": [*said, *talk(1, 400 + turn)]}, config)
        assert counting.dumped <= 3, "the new message, the head, and no more"
        assert counting.loaded <= 3
    counting.loaded = 0
    history = list(saver.list(at("t")))
    assert len(history) == 4
    assert counting.loaded <= 4, "snapshots of one history share decoding"


def test_a_message_changed_in_place_is_stored_as_changed(memory: MemoryStore) -> None:
    saver = memory.checkpointer
    said = [*talk(100), AIMessage("", id="call", tool_calls=[{**TOOL_CALL, "args": {"deep": [{"x": 1}]}}])]
    config = put(saver, {"messages": said}, at("t"))
    changes: list[Callable[[], Any]] = [
        lambda: setattr(said[50], "content", "edited"),
        lambda: said[3].additional_kwargs.update(seen=True),
        lambda: said[-1].tool_calls[0]["args"]["deep"][0].update(x=True),
        lambda: said[-1].tool_calls[0]["args"]["deep"].append(2),
        lambda: setattr(said[7], "extra_field", "e"),
    ]
    expected = [said[50].content]
    for make in changes:
        make()
        config = put(saver, {"messages": said}, config)
        expected.append(serde.dumps_typed(said))
        assert serde.dumps_typed(values_at(saver, config)["messages"]) == serde.dumps_typed(said)
    history = [serde.dumps_typed(one.checkpoint["channel_values"]["messages"]) for one in saver.list(at("t"))]
    assert history[:-1] == expected[:0:-1]
    assert len(set(history)) == len(changes) + 1


def test_readers_share_nothing_that_can_change(memory: MemoryStore) -> None:
    saver = memory.checkpointer
    values = {"messages": [*talk(100), AIMessage("", tool_calls=[TOOL_CALL])], "log": [{"a": [1]}, {"b": 2}]}
    config = put(saver, values, at("t"))
    whole = serde.dumps_typed(values)
    for _ in range(3):
        one, other = values_at(saver, config), values_at(saver, config)
        assert not mutable_parts(one) & mutable_parts(other)
        assert not mutable_parts(one) & mutable_parts(values)
        assert serde.dumps_typed(one) == serde.dumps_typed(other) == whole
        one["messages"][-1].tool_calls[0]["args"].clear()
        one["messages"][0].content = "spoilt"
        one["messages"].clear()
        one["log"][0]["a"].append("spoilt")
    assert serde.dumps_typed(values_at(saver, config)) == whole


def test_a_value_that_cannot_be_stored_is_named_by_its_place_in_the_list(memory: MemoryStore) -> None:
    with pytest.raises(SerializationError, match=r"at \[2\]"):
        put(memory.checkpointer, {"log": [{"a": 1}, "b" * 300, {"c": object}]}, at("t"))


def test_the_cache_is_bounded_and_does_without() -> None:
    lists = Lists(budget=100_000)
    parent = None
    for count in range(1, 100):
        parent, _ = lists.encode(serde, "list", talk(count), parent)
        lists.remember("t", parent)
    assert sum(version.weight for version in lists._versions.values()) <= 100_000
    assert lists.recall("t", parent.value_id) is parent
    lists.forget("t")
    assert not lists._versions
    assert lists._held == 0


@pytest.mark.parametrize("budget", [0, 5_000])
def test_without_a_cache_everything_is_the_same(budget: int, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryStore.open(database) as memory:
        saver = memory.checkpointer
        monkeypatch.setattr(saver._values, "_lists", Lists(budget))
        config, said = at("t"), []
        for turn in range(40):
            said = [*said, *talk(1, turn)]
            config = put(saver, {"messages": said}, config)
            assert values_at(saver, config) == {"messages": said}
    assert rows(database, "SELECT count(*) FROM elements") == [(40,)]
    assert audit(database) == []


# -- forks, deletes and copies in any order ----------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "put", "fork", "again", "prune", "delete", "runs", "copy", "cold"]),
        st.integers(0, 1 << 16),
        st.integers(0, 1 << 16),
    ),
    max_size=14,
)


def edited(said: list[Any], how: int, fresh: int) -> list[Any]:
    new = [*talk(1 + fresh % 3, fresh), f"text {fresh}", {"n": fresh}, *map(str, range(fresh % 90))]
    where = fresh % (len(said) + 1)
    match how % 7:
        case 0 | 1 | 2:
            return [*said, *new]
        case 3:
            return [*said[:where], *new, *said[where:]]
        case 4:
            return said[:where] + said[where + 2 :]
        case 5:
            return said[where:]
        case _:
            for item in said[where : where + 1]:
                if isinstance(item, dict):
                    item["n"] = fresh
                elif not isinstance(item, str):
                    item.content = f"changed {fresh}"
            return list(said)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_no_reference_dangles_and_nothing_leaks(steps: list[tuple[str, int, int]], tmp_path_factory: Any) -> None:
    database = tmp_path_factory.mktemp("any") / "memory.db"
    memory = MemoryStore.open(database)
    model: dict[tuple[str, str], tuple[str, bytes]] = {}  # (thread, checkpoint) -> (run, serialised values)
    try:
        for number, (what, how, which) in enumerate(steps):
            saver = memory.checkpointer
            thread = "tu"[which % 2]
            known = sorted(one for name, one in model if name == thread)
            run = f"run-{number % 3}"
            if what in ("put", "fork", "again"):
                parent = None if not known else known[-1] if what != "fork" else known[how % len(known)]
                before = {} if parent is None else values_at(saver, at(thread, parent))
                said = edited(before.get("said", []), how, number + which % 200)
                values = {"said": said, "also": _DeltaSnapshot(list(said)), "n": number % 4, "few": said[:2]}
                config = put(saver, values, at(thread, parent), run=run)
                model[thread, config["configurable"]["checkpoint_id"]] = (run, serde.dumps_typed(values)[1])
                if what == "again":  # the same checkpoint with other values
                    checkpoint = saver.get_tuple(config).checkpoint
                    checkpoint["channel_values"] = {"said": said[1:]}
                    saver.put(at(thread, parent), checkpoint, {"run_id": run}, checkpoint["channel_versions"])
                    model[thread, checkpoint["id"]] = (run, serde.dumps_typed({"said": said[1:]})[1])
            elif what == "prune":
                saver.prune([thread])
                model = {key: value for key, value in model.items() if key[0] != thread or key[1] == known[-1]}
            elif what == "delete":
                saver.delete_thread(thread)
                model = {key: value for key, value in model.items() if key[0] != thread}
            elif what == "runs":
                saver.delete_for_runs([run])
                model = {key: value for key, value in model.items() if value[0] != run}
            elif what == "copy":
                other = "tu"[(which + 1) % 2]
                saver.copy_thread(thread, other)
                model |= {(other, one): model[thread, one] for one in known}
            else:
                memory.close()
                memory = MemoryStore.open(database)
            found = {
                (one.config["configurable"]["thread_id"], one.checkpoint["id"]):
                    serde.dumps_typed(one.checkpoint["channel_values"])[1]
                for one in memory.checkpointer.list(None)
            }  # fmt: skip
            assert found == {key: content for key, (_, content) in model.items()}
            assert audit(database) == []
    finally:
        memory.close()


def test_pruning_frees_the_messages_that_were_removed(database: Path) -> None:
    with MemoryStore.open(database) as memory:
        config = put(memory.checkpointer, {"messages": talk(50)}, at("t"))
        for cut in range(1, 40):
            config = put(memory.checkpointer, {"messages": talk(50 - cut, cut)}, config)
        memory.checkpointer.prune(["t"])
        assert memory.stats()["elements"] == 11
        config = put(memory.checkpointer, {"messages": talk(12, 39)}, config)
        assert values_at(memory.checkpointer, config) == {"messages": talk(12, 39)}
    assert audit(database) == []


@pytest.mark.parametrize("what", ["prune", "delete_thread"])
def test_a_list_whose_parent_another_memory_deleted_is_written_whole(what: str, database: Path) -> None:
    with MemoryStore.open(database) as memory, MemoryStore.open(database) as other:
        config, said = at("t"), talk(70)
        for turn in range(20):
            said = [*said, *talk(1, 70 + turn)]
            config = put(memory.checkpointer, {"messages": said}, config)
        newest = put(other.checkpointer, {"messages": ["other " * 60, {}]}, config)
        getattr(other.checkpointer, what)(["t"] if what == "prune" else "t")
        for turn in range(3):
            said = [*said, *talk(1, 100 + turn)]
            config = put(memory.checkpointer, {"messages": said}, config)
            assert values_at(memory.checkpointer, config) == {"messages": said}
            assert values_at(other.checkpointer, config) == {"messages": said}
        assert (other.checkpointer.get_tuple(newest) is not None) is (what == "prune")
    assert audit(database) == []


# -- damage ------------------------------------------------------------------------------------------------------


def test_damaged_rows_never_make_another_value(database: Path) -> None:
    with MemoryStore.open(database) as memory:
        config, said = at("t"), talk(6)
        for turn in range(5):
            said = [*said, *talk(1, 6 + turn)]
            config = put(memory.checkpointer, {"messages": said}, config)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    intact = database.read_bytes()
    damages = [
        "UPDATE elements SET data = substr(data, 1, length(data) - 3)",
        "UPDATE elements SET data = zeroblob(length(data))",
        "UPDATE elements SET data = (SELECT data FROM elements ORDER BY id DESC LIMIT 1)",
        "UPDATE elements SET type = 'bytes'",
        "UPDATE elements SET digest = randomblob(16)",
        "UPDATE elements SET thread_id = 'other'",
        "DELETE FROM elements WHERE id = 3",
        "UPDATE lists SET keep = keep - 1 WHERE keep > 0",
        "UPDATE lists SET keep = keep + 1",
        "UPDATE lists SET base = id",
        "UPDATE lists SET base = NULL",
        "UPDATE lists SET base = 999 WHERE base IS NOT NULL",
        "UPDATE lists SET elements = x'005b5d'",
        "UPDATE lists SET elements = x'006e756c6c'",
        "UPDATE lists SET elements = x'005b22785d'",
        "UPDATE lists SET elements = x''",
        "UPDATE lists SET kind = 'delta'",
        "DELETE FROM lists WHERE id = 1",
        "DELETE FROM lists",
    ]
    harmless = {
        "UPDATE lists SET keep = keep + 1",  # more than the base has
        "UPDATE elements SET digest = randomblob(16)",  # computed again from what is stored
    }
    for damage in damages:
        database.write_bytes(intact)
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute(damage)
        with MemoryStore.open(database) as memory:
            if damage in harmless:
                assert values_at(memory.checkpointer, config) == {"messages": said}
                continue
            with pytest.raises(CorruptRowError, match=str(config["configurable"]["checkpoint_id"])):
                memory.checkpointer.get_tuple(config)
            with pytest.raises(CorruptRowError):
                list(memory.checkpointer.list(at("t")))
    database.write_bytes(intact)
    with MemoryStore.open(database) as memory:
        assert values_at(memory.checkpointer, config) == {"messages": said}


# -- graphs -------------------------------------------------------------------------------------------------------


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class DeltaChat(TypedDict):
    messages: Annotated[list[AnyMessage], DeltaChannel(_messages_delta_reducer, snapshot_frequency=7)]


def answering(state: Any) -> dict[str, Any]:
    said = state["messages"]
    if len(said) > 12 and isinstance(said[-1], HumanMessage):
        said[1].content = f"shortened at {len(said)}"  # in place
        return {"messages": [RemoveMessage(id=said[0].id), AIMessage("again", id=f"a{len(said)}")]}
    return {"messages": [AIMessage("answer", id=f"a{len(said)}", tool_calls=[TOOL_CALL])]}


def graph_of(saver: Any, state: type) -> Any:
    graph = StateGraph(state)
    graph.add_node("answer", answering)
    graph.add_edge(START, "answer")
    return graph.compile(checkpointer=saver)


@pytest.mark.parametrize("state", [Chat, DeltaChat])
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_chat_is_what_langgraphs_own_saver_makes_of_it(state: type, durability: Any, database: Path) -> None:
    from langgraph.checkpoint.memory import InMemorySaver

    with MemoryStore.open(database) as memory:
        ours, theirs = graph_of(memory.checkpointer, state), graph_of(InMemorySaver(), state)
        for turn in range(30):
            said = {"messages": [HumanMessage("hello " * 30, id=f"h{turn}")]}
            results = [graph.invoke(dict(said), at("t"), durability=durability) for graph in (ours, theirs)]
            assert results[0] == results[1]
    with MemoryStore.open(database) as memory:
        again = graph_of(memory.checkpointer, state)
        assert again.get_state(at("t")).values == theirs.get_state(at("t")).values
        if durability != "async":  # with it, what a node changes in place races with what is saved behind its back
            histories = [[one.values for one in graph.get_state_history(at("t"))] for graph in (again, theirs)]
            assert histories[0] == histories[1]
    assert audit(database) == []


def test_the_history_of_a_delta_channel_is_one_query(database: Path) -> None:
    queries: list[str] = []
    with MemoryStore.open(database) as memory:
        graph = graph_of(memory.checkpointer, DeltaChat)
        for turn in range(12):
            graph.invoke({"messages": [HumanMessage("hello", id=f"h{turn}")]}, at("t"))
        newest = memory.checkpointer.get_tuple(at("t")).config
        reader = memory.storage._readers[-1]  # type: ignore[attr-defined]
        reader.set_trace_callback(queries.append)
        found = memory.checkpointer.get_delta_channel_history(config=newest, channels=["messages"])
        reader.set_trace_callback(None)
        walked = BaseCheckpointSaver.get_delta_channel_history(
            memory.checkpointer, config=newest, channels=["messages"]
        )
    assert found == walked
    assert len([query for query in queries if "FROM checkpoints" in query]) == 1
    assert rows(database, "SELECT count(*) FROM lists WHERE kind = 'delta'") != [(0,)]


def test_many_threads_read_and_write_their_chats_at_once(file_memory: MemoryStore, database: Path) -> None:
    graph = graph_of(file_memory.checkpointer, Chat)
    errors: list[BaseException] = []

    def talk_alone(thread: str) -> None:
        try:
            for turn in range(12):
                graph.invoke({"messages": [HumanMessage(f"{thread} {turn}", id=f"h{turn}")]}, at(thread))
                said = graph.get_state(at(thread)).values["messages"]
                assert {one.content for one in said if isinstance(one, HumanMessage)} <= {
                    f"{thread} {n}" for n in range(turn + 1)
                } | {one.content for one in said if one.content.startswith("shortened")}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk_alone, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert audit(database) == []


def test_elements_are_listed_by_small_differences() -> None:
    assert load_ids(packed(b"[5,1,1,-3]")) == (5, 6, 7, 4)


def test_a_stricter_clone_refuses_what_the_cache_holds(memory: MemoryStore) -> None:
    """Copies come from the cache only for types that every serializer loads."""
    loose = MemStateCheckpointer(memory)
    config = put(loose, {"log": [Unlisted("x"), "text " * 60, {"a": 1}]}, at("t"))
    assert values_at(loose, config)["log"][0] == Unlisted("x")
    strict = MemStateCheckpointer(memory, serde=MemStateSerializer(allowed_msgpack_modules=None))
    strict._values, strict._manifests = loose._values, loose._manifests
    with pytest.raises(MemStateError, match="Unlisted"):
        strict.get_tuple(config)


class Unlisted(OrderedDict[str, str]):
    def __init__(self, *args: Any) -> None:
        super().__init__({"k": str(args)})


# -- few transactions --------------------------------------------------------------------------------------------


class Fan(TypedDict):
    found: Annotated[list[int], operator.add]


def commits_of(memory: MemoryStore, work: Callable[[], object]) -> int:
    seen: list[str] = []
    writer = memory.storage._writer  # type: ignore[attr-defined]
    writer.set_trace_callback(seen.append)
    try:
        work()
    finally:
        writer.set_trace_callback(None)
    return seen.count("COMMIT")


def test_the_writes_of_a_wide_fan_out_share_transactions(
    file_memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that takes its time, so that not the machine's mood decides who comes while another is written."""
    apply = file_memory.storage.apply

    def slowly(commits: Any) -> Any:
        time.sleep(0.005)
        return apply(commits)

    monkeypatch.setattr(file_memory.storage, "apply", slowly)
    graph = StateGraph(Fan)
    graph.add_node("find", lambda state: {"found": [state["n"]]})
    graph.add_conditional_edges(START, lambda state: [Send("find", {"n": n}) for n in range(50)])
    compiled = graph.compile(checkpointer=file_memory.checkpointer)
    results: list[Any] = []
    commits = commits_of(file_memory, lambda: results.append(compiled.invoke({"found": []}, at("t"))))
    assert results == [{"found": list(range(50))}]
    assert commits <= 30, "of 51 tasks and 3 checkpoints"


def test_a_tasks_writes_that_nothing_follows_land_all_the_same(file_memory: MemoryStore) -> None:
    saver = file_memory.checkpointer
    config = put(saver, {"a": 1}, at("t"))
    for number in range(30):
        saver.put_writes(config, [("a", number)], f"task-{number:02}")
    found = saver.get_tuple(config)
    assert found is not None
    assert [value for _, _, value in found.pending_writes or ()] == list(range(30))

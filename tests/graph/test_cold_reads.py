"""A process that has seen nothing of a thread reads it, and goes on with it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.graph import START, StateGraph

from langgraph_memstate import MemoryStore, MemStateCheckpointer
from langgraph_memstate.errors import CorruptRowError, DeserializationError
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.storage.packing import packed, unpacked
from tests.graph.test_state_by_change import (
    DeltaChat,
    Unlisted,
    at,
    items_of_any_kind,
    mutable_parts,
    put,
    rows,
    serde,
    talk,
    values_at,
)


def fresh(memory: MemoryStore) -> MemStateCheckpointer:
    """A checkpointer with nothing in its caches."""
    return MemStateCheckpointer(memory)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(items=st.lists(items_of_any_kind, min_size=1, max_size=6), more=st.lists(items_of_any_kind, max_size=3))
def test_every_read_gives_what_was_written(items: list[Any], more: list[Any], memory: MemoryStore) -> None:
    thread = str(uuid4())
    whole = serde.dumps_typed({"log": items})
    config = put(memory.checkpointer, {"log": items}, at(thread))
    saver = fresh(memory)
    found = [values_at(saver, config) for _ in range(3)]
    assert [serde.dumps_typed(each) for each in found] == [whole] * 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not mutable_parts(found[one]) & mutable_parts(found[other])
    later = put(saver, {"log": [*found[0]["log"], *more]}, config)
    assert serde.dumps_typed(values_at(fresh(memory), later)) == serde.dumps_typed({"log": [*items, *more]})
    assert serde.dumps_typed(values_at(fresh(memory), config)) == whole


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_what_a_cold_process_adds_is_stored_alone(reads: int, database: Path) -> None:
    said = talk(100)
    with MemoryStore.open(database) as memory:
        config = put(memory.checkpointer, {"messages": said}, at("t"))
    with MemoryStore.open(database) as memory:
        saver = memory.checkpointer
        before = [values_at(saver, config)["messages"] for _ in range(reads + 1)][-1]
        put(saver, {"messages": [*before, *talk(1, 100)]}, config)
    assert rows(database, "SELECT count(*) FROM elements") == [(101,)]
    assert rows(database, "SELECT keep, base IS NULL FROM lists ORDER BY id") == [(0, 1), (100, 0)]


def test_histories_share_the_elements_that_they_load(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, config = talk(80), at("t")
    with MemoryStore.open(database) as memory:
        for turn in range(6):
            said = [*said, *talk(1, 80 + turn)]
            config = put(memory.checkpointer, {"messages": said}, config)
    loaded: list[int] = []
    loads = MemStateSerializer.loads_all

    def counted(self: MemStateSerializer, contents: Sequence[bytes]) -> list[Any]:
        loaded.append(len(contents))
        return loads(self, contents)

    monkeypatch.setattr(MemStateSerializer, "loads_all", counted)
    with MemoryStore.open(database) as memory:
        found = [each.checkpoint["channel_values"]["messages"] for each in memory.checkpointer.list(at("t"))]
    assert [len(each) for each in found] == [86, 85, 84, 83, 82, 81]
    assert found[0] == said
    assert not mutable_parts(found[0]) & mutable_parts(found[1])
    assert sum(loaded) <= 6 * 86
    with MemoryStore.open(database) as memory:
        loaded.clear()
        assert [values_at(memory.checkpointer, config)["messages"] for _ in range(4)] == [said] * 4
    assert loaded.count(86) == 2, "once to read it, once for templates"


def test_threads_that_read_at_once_each_get_it_whole(file_memory: MemoryStore) -> None:
    said = talk(200)
    config = put(file_memory.checkpointer, {"messages": said}, at("t"))
    for _ in range(5):
        saver = fresh(file_memory)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: values_at(saver, config)["messages"], range(12)))  # noqa: B023
        assert found == [said] * 12
        assert len({id(message) for each in found for message in each}) == 12 * 200


def test_a_stricter_clone_goes_on_with_what_it_may_not_read(memory: MemoryStore) -> None:
    """What it only compares need not be decoded by it."""
    log = [Unlisted("x"), {"a": 1}, HumanMessage("hello")]
    config = put(memory.checkpointer, {"log": log}, at("t"))
    loose = fresh(memory)
    read = values_at(loose, config)["log"]
    strict = MemStateCheckpointer(memory, serde=MemStateSerializer(allowed_msgpack_modules=None))
    strict._values, strict._manifests = loose._values, loose._manifests
    later = put(strict, {"log": [*read, "more"]}, config)
    assert values_at(loose, later)["log"] == [*log, "more"]
    with pytest.raises(DeserializationError, match="Unlisted"):
        strict.get_tuple(later)


def test_a_snapshot_of_a_delta_channel_is_based_on_the_one_before(database: Path) -> None:
    length = 0
    for turns in (9, 8):  # the second process has seen nothing of the first
        with MemoryStore.open(database) as memory:
            graph = StateGraph(DeltaChat)
            graph.add_node("answer", lambda state: {"messages": [AIMessage("answer", id=f"a{len(state['messages'])}")]})
            graph.add_edge(START, "answer")
            app = graph.compile(checkpointer=memory.checkpointer)
            for _ in range(turns):
                app.invoke({"messages": [HumanMessage("hello", id=f"h{length}")]}, at("t"))
                length += 2
            assert len(app.get_state(at("t")).values["messages"]) == length
    lists = rows(database, "SELECT depth, base IS NULL FROM lists WHERE kind = 'delta' ORDER BY id")
    assert len(lists) > 3
    assert lists == [(depth, depth == 0) for depth in range(len(lists))]
    assert rows(database, "SELECT count(*) FROM elements")[0][0] <= length


# -- packing -----------------------------------------------------------------------------------------------------

DEFLATED = "0178bbfeb77ff1434e6c560ae5a0245d0e4ca8c5899929c0349b9caa40070518691800d4983684"


def test_rows_that_were_deflated_are_still_read() -> None:
    assert unpacked(bytes.fromhex(DEFLATED)) == b"HumanMessage: what was said once " * 4 + b"response_metadata"
    with pytest.raises(CorruptRowError, match="cut off"):
        unpacked(bytes.fromhex(DEFLATED)[:-2])


@pytest.mark.parametrize(
    "stored",
    [
        b"\x02",
        b"\x02\x00",
        b"\x02\xe4" + b"\xff" * 8 + b"\x01\x00\x00",  # says that it is 16 EiB long
        b"\x02\x04\x00\x01\x00\x00",  # does not say how long it is
        packed(b"some words " * 20) * 2,
        packed(b"some words " * 20) + b"\x28\xb5\x2f\xfd",
    ],
)
def test_a_frame_that_no_writer_of_ours_made_is_refused(stored: bytes) -> None:
    with pytest.raises(CorruptRowError):
        unpacked(stored)

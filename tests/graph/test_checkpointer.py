"""What `MemStateCheckpointer` does beyond LangGraph's conformance suite, through its sync and its async methods."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED, _DeltaSnapshot

from langgraph_memstate import Fact, MemoryStore, MemStateCheckpointer, MemStateError
from langgraph_memstate.errors import CommitRaced, FilterError, KeyTypeError, SerializationError, StorageClosedError
from langgraph_memstate.storage.operations import Commit
from langgraph_memstate.storage.sqlite import SQLiteStorage

Config = dict[str, Any]


class Face:
    """A checkpointer through one of its faces: the sync methods, or the async ones, each awaited."""

    def __init__(self, saver: MemStateCheckpointer, *, use_async: bool = False) -> None:
        self.saver = saver
        self.use_async = use_async

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not self.use_async:
            return getattr(self.saver, name)  # type: ignore[no-any-return]
        awaited = getattr(self.saver, f"a{name}")
        return lambda *args, **kwargs: asyncio.run(awaited(*args, **kwargs))

    def list(self, config: Config | None, **options: Any) -> list[CheckpointTuple]:
        if not self.use_async:
            return list(self.saver.list(config, **options))

        async def collect() -> list[CheckpointTuple]:
            return [found async for found in self.saver.alist(config, **options)]

        return asyncio.run(collect())

    def step(
        self,
        thread_id: Any,
        values: Mapping[str, Any] | None = None,
        *,
        after: Config | None = None,
        ns: str = "",
        checkpoint_id: str | None = None,
        versions: Mapping[str, Any] | None = None,
        changed: Sequence[str] | None = None,
        config: Config | None = None,
        **metadata: Any,
    ) -> Config:
        """Put a checkpoint. Channels have version 1 unless `versions` says otherwise; all of them are new to it
        unless `changed` names those that are."""
        values = values or {}
        versions = versions or dict.fromkeys(values, 1)
        checkpoint = {
            **empty_checkpoint(),
            "channel_values": dict(values),
            "channel_versions": dict(versions),
        }
        if checkpoint_id is not None:
            checkpoint["id"] = checkpoint_id
        configurable = {"thread_id": thread_id, "checkpoint_ns": ns}
        if after is not None:
            configurable["checkpoint_id"] = after["configurable"]["checkpoint_id"]
        new = {channel: versions[channel] for channel in (values if changed is None else changed)}
        where = {**(config or {}), "configurable": {**(config or {}).get("configurable", {}), **configurable}}
        stored: Config = self.put(where, checkpoint, {"source": "update", "step": 0, "parents": {}, **metadata}, new)
        return stored


@pytest.fixture(params=["sync", "async"])
def saver(request: pytest.FixtureRequest, memory: MemoryStore) -> Face:
    return Face(memory.checkpointer, use_async=request.param == "async")


def at(thread_id: Any, ns: str | None = "", checkpoint_id: str | None = None) -> Config:
    named = {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
    return {"configurable": {name: value for name, value in named.items() if value is not None}}


def id_of(found: CheckpointTuple | Config) -> str:
    config = found.config if isinstance(found, CheckpointTuple) else found
    return str(config["configurable"]["checkpoint_id"])


def values_of(found: CheckpointTuple | None) -> dict[str, Any]:
    assert found is not None
    return found.checkpoint["channel_values"]


# -- get_tuple ------------------------------------------------------------------------------------------


def test_the_latest_checkpoint_and_a_named_one(saver: Face) -> None:
    first = saver.step("t", {"a": 1})
    second = saver.step("t", {"a": 2}, after=first)
    inner = saver.step("t", {"b": 3}, ns="child:1")

    latest = saver.get_tuple(at("t"))
    assert (id_of(latest), values_of(latest)) == (id_of(second), {"a": 2})
    assert latest.parent_config == at("t", "", id_of(first))
    assert latest.config == at("t", "", id_of(second))
    named = saver.get_tuple(at("t", "", id_of(first)))
    assert (values_of(named), named.parent_config) == ({"a": 1}, None)
    assert values_of(saver.get_tuple(at("t", None))) == {"a": 2}, "no namespace means the root"
    assert values_of(saver.get_tuple(at("t", "child:1"))) == {"b": 3}
    assert id_of(inner) != id_of(second)
    assert saver.get_tuple(at("nobody")) is None
    assert saver.get_tuple(at("t", "", "no-such-checkpoint")) is None
    assert saver.get_tuple(at("t", "child", id_of(inner))) is None, "a namespace is not a prefix"


def test_a_number_as_thread_id_is_its_text(saver: Face) -> None:
    stored = saver.step(7, {"a": 1})
    saver.put_writes(at(7, "", id_of(stored)), [("a", 2)], "task")

    for thread_id in (7, "7"):
        found = saver.get_tuple(at(thread_id))
        assert values_of(found) == {"a": 1}
        assert found.pending_writes == [("task", "a", 2)]
        assert [id_of(one) for one in saver.list(at(thread_id))] == [id_of(stored)]
    saver.copy_thread(7, 8)
    saver.delete_thread(7)
    assert saver.get_tuple(at("7")) is None
    assert values_of(saver.get_tuple(at(8))) == {"a": 1}


def test_nul_quotes_and_surrogate_free_unicode_in_every_name(saver: Face) -> None:
    odd = "a\x00b'c\"d%_\\ é \U0001f600"
    stored = saver.step(odd, {odd: odd}, ns=f"{odd}:1", note="kept")
    saver.put_writes(stored, [(odd, odd)], odd, odd)

    found = saver.get_tuple(at(odd, f"{odd}:1"))
    assert values_of(found) == {odd: odd}
    assert found.pending_writes == [(odd, odd, odd)]
    assert saver.get_tuple(at("a", f"{odd}:1")) is None, "a name does not end at its NUL"
    saver.delete_thread("a")
    assert [id_of(one) for one in saver.list(at(odd, None))] == [id_of(stored)]

    after = saver.step(odd, {}, ns=f"{odd}:1", after=stored)
    histories = saver.saver.get_delta_channel_history(config=after, channels=["a", odd, "\ud800"])
    nothing = {"writes": []}
    assert histories == {"a": nothing, odd: {"writes": [(odd, odd, odd)], "seed": odd}, "\ud800": nothing}


# -- metadata -------------------------------------------------------------------------------------------


def test_metadata_takes_what_langgraph_puts_in_a_config(saver: Face) -> None:
    config = {
        "metadata": {"run_id": "run-1", "user": "ann\x00", "score": 2.5, "flag": True, "__private": "x", "list": [1]},
        "configurable": {"tenant": "acme", "__pregel_x": "y"},
    }
    saver.step("t", {"a": 1}, config=config, writes={"dropped": 1}, nested={"k": [1, None, {"é": "\U0001f600"}]})

    metadata = saver.get_tuple(at("t")).metadata
    assert metadata == {
        "source": "update", "step": 0, "parents": {}, "nested": {"k": [1, None, {"é": "\U0001f600"}]},
        "run_id": "run-1", "user": "ann", "score": 2.5, "flag": True, "tenant": "acme",
    }  # fmt: skip


def test_nul_inside_metadata_survives_or_is_dropped_as_upstream_drops_it(saver: Face) -> None:
    saver.step("t", {"a": 1}, top="x\x00y", deep={"k\x00": "v\x00"})

    metadata = saver.get_tuple(at("t")).metadata
    assert metadata["top"] == "xy"
    assert metadata["deep"] == {"k\x00": "v\x00"}
    assert len(saver.list(at("t"), filter={"deep": {"k\x00": "v\x00"}})) == 1


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(saver: Face, memory: MemoryStore) -> None:
    with pytest.raises(SerializationError, match="metadata"):
        saver.step("t", {"a": 1}, bad=object())
    assert saver.get_tuple(at("t")) is None
    assert memory.stats()["channel_values"] == 0


@pytest.mark.parametrize("where", ["thread_id", "checkpoint_ns", "checkpoint_id"])
def test_whoever_asks_for_a_lone_surrogate_is_told_where(saver: Face, where: str) -> None:
    asked: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "", where: "x\ud800"}}
    with pytest.raises(KeyTypeError, match=where):
        saver.get_tuple(asked)
    with pytest.raises(KeyTypeError, match=where):
        saver.list(asked)


@pytest.mark.parametrize("where", ["thread", "namespace", "channel", "metadata", "task"])
def test_a_lone_surrogate_is_stored_or_named_and_hurts_nobody_else(
    saver: Face, memory: MemoryStore, where: str
) -> None:
    """No text encoding holds a lone surrogate; whatever else commits at that moment must not fail with it."""
    bad = "x\ud800"
    good = saver.step("good", {"a": 0})
    arguments = {
        "thread": lambda: saver.step(bad, {"a": 1}),
        "namespace": lambda: saver.step("t", {"a": 1}, ns=bad),
        "channel": lambda: saver.step("t", {bad: 1}),
        "metadata": lambda: saver.step("t", {"a": 1}, note=bad),
        "task": lambda: saver.put_writes(good, [("a", 1)], bad),
    }
    errors: list[BaseException] = []
    others = threading.Barrier(9, timeout=20)

    def poison() -> None:
        others.wait()
        try:
            arguments[where]()
        except BaseException as error:
            errors.append(error)

    def healthy(number: int) -> None:
        others.wait()
        try:
            memory.checkpointer.put_writes(good, [("a", number)], f"task-{number}")
        except BaseException as error:
            errors.append(AssertionError(f"an innocent commit failed: {error!r}"))

    threads = [threading.Thread(target=poison)]
    threads += [threading.Thread(target=healthy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error for error in errors if not isinstance(error, MemStateError)] == []
    written = {task for task, _, _ in saver.get_tuple(good).pending_writes}
    assert written >= {f"task-{number}" for number in range(8)}
    if where == "metadata":
        assert saver.get_tuple(at("t")).metadata["note"] == bad


# -- list -----------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(saver: Face) -> list[tuple[str, str, str]]:
    """(checkpoint id, thread, namespace) of 270 checkpoints; each id is used in two threads and two namespaces."""
    keys = []
    for number in range(60):
        checkpoint_id = f"{number:08}"
        for thread in ("a", "b"):
            for ns in ("", "n"):
                keys.append((checkpoint_id, thread, ns))
    keys += [(f"{number:08}", "c", "") for number in range(30, 60)]
    put = Face(saver.saver)
    for checkpoint_id, thread, ns in keys:
        put.step(thread, {"k": checkpoint_id}, ns=ns, checkpoint_id=checkpoint_id, number=int(checkpoint_id))
    return sorted(keys, reverse=True)


def found_keys(found: Sequence[CheckpointTuple]) -> list[tuple[str, str, str]]:
    keys = []
    for one in found:
        configurable = one.config["configurable"]
        assert values_of(one) == {"k": configurable["checkpoint_id"]}
        keys.append((configurable["checkpoint_id"], configurable["thread_id"], configurable["checkpoint_ns"]))
    return keys


def test_list_is_complete_and_newest_first_over_many_pages(saver: Face, crowd: list[tuple[str, str, str]]) -> None:
    assert found_keys(saver.list(None)) == crowd
    assert found_keys(saver.list({"configurable": {}})) == crowd
    for thread in ("a", "c", "nobody"):
        assert found_keys(saver.list(at(thread, None))) == [key for key in crowd if key[1] == thread]
    assert found_keys(saver.list(at("a"))) == [key for key in crowd if key[1:] == ("a", "")]
    assert found_keys(saver.list(at("a", "n"))) == [key for key in crowd if key[1:] == ("a", "n")]
    assert found_keys(saver.list(at("a", None, "00000007"))) == [("00000007", "a", "n"), ("00000007", "a", "")]


def test_list_limit_at_the_edges_of_pages(saver: Face, crowd: list[tuple[str, str, str]]) -> None:
    for limit in (0, 1, 49, 50, 51, 100, 101, 269, 270, 1000):
        assert found_keys(saver.list(None, limit=limit)) == crowd[:limit]


def test_list_before_filter_and_limit_together(saver: Face, crowd: list[tuple[str, str, str]]) -> None:
    before = at("a", "", "00000055")
    older = [key for key in crowd if key[0] < "00000055"]
    assert found_keys(saver.list(None, before=before)) == older
    assert found_keys(saver.list(None, before=before, limit=120)) == older[:120]
    assert found_keys(saver.list(None, before=at("a"))) == crowd, "a config without a checkpoint is no bound"
    odd = [key for key in older if int(key[0]) in (3, 54)]
    sparse = {"number": {"$eq": 3}}, {"number": {"$eq": 54}}
    assert [found_keys(saver.list(None, filter=one, before=before)) for one in sparse] == [odd[5:], odd[:5]]
    few = saver.list(None, filter={"number": {"$lt": 2}, "source": "update"}, limit=3)
    assert found_keys(few) == [key for key in crowd if int(key[0]) < 2][:3]
    assert saver.list(None, filter={"number": 3, "source": "loop"}) == []
    assert saver.list(None, filter={"no such key": 1}) == []
    assert found_keys(saver.list(at("c"), filter={})) == [key for key in crowd if key[1] == "c"]
    with pytest.raises(FilterError, match=r"\$near"):
        saver.list(None, filter={"number": {"$near": 3}})


@pytest.fixture(params=["sync", "async"])
def paused(request: pytest.FixtureRequest) -> Callable[[MemStateCheckpointer, int], Iterator[Any]]:
    """A listing that has yielded a number of checkpoints and goes on when asked, as a plain iterator."""

    def start(saver: MemStateCheckpointer, count: int) -> Iterator[Any]:
        if request.param == "sync":
            listing = saver.list(None)
            for _ in range(count):
                next(listing)
            return listing
        runner = asyncio.Runner()
        alisting = saver.alist(None)

        async def take() -> Any:
            return await anext(alisting)

        def rest() -> Iterator[Any]:
            try:
                while True:
                    yield runner.run(take())
            except StopAsyncIteration:
                return
            finally:
                runner.close()

        for _ in range(count):
            runner.run(take())
        return rest()

    return start


def test_a_paused_list_holds_nothing_and_goes_on(
    memory: MemoryStore, paused: Callable[[MemStateCheckpointer, int], Iterator[Any]]
) -> None:
    """Writes commit while a caller thinks about one checkpoint; the rest of the listing stays in order."""
    saver = Face(memory.checkpointer)
    ids = [id_of(saver.step("t", {"n": number})) for number in range(120)]
    listing = paused(memory.checkpointer, 3)

    newest = saver.step("t", {"n": "written meanwhile"})
    saver.put_writes(at("t", "", ids[0]), [("n", "late")], "task")

    rest = list(listing)
    assert [id_of(one) for one in rest] == ids[::-1][3:], "a newer checkpoint is not part of an older list"
    assert rest[-1].pending_writes == [("task", "n", "late")]
    assert id_of(saver.get_tuple(at("t"))) == id_of(newest)


def test_a_thread_deleted_while_it_is_listed(
    memory: MemoryStore, paused: Callable[[MemStateCheckpointer, int], Iterator[Any]]
) -> None:
    saver = Face(memory.checkpointer)
    for number in range(120):
        saver.step(f"t{number % 2}", {"n": number})
    listing = paused(memory.checkpointer, 3)

    saver.delete_thread("t0")

    rest = list(listing)
    assert all("n" in values_of(one) for one in rest), "what is listed is whole"
    beyond_first_page = rest[47:]
    assert {one.config["configurable"]["thread_id"] for one in beyond_first_page} == {"t1"}


def test_a_paused_list_keeps_no_snapshot_of_the_file(file_memory: MemoryStore, database: Path) -> None:
    """A snapshot left open would keep the write-ahead log from being emptied, and it would grow without end."""
    saver = Face(file_memory.checkpointer)
    for number in range(60):
        saver.step("t", {"n": number})
    listing = file_memory.checkpointer.list(None)
    next(listing)
    saver.step("t", {"n": "more"})

    conn = sqlite3.connect(database)
    busy, log_frames, moved = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    conn.close()
    assert (busy, log_frames, moved) == (0, 0, 0)
    assert next(listing) is not None


# -- put_writes -----------------------------------------------------------------------------------------


def test_put_writes_twice_is_once_and_the_first_regular_write_stays(saver: Face) -> None:
    stored = saver.step("t", {"a": 0})
    for value in ("first", "second"):
        saver.put_writes(stored, [("a", value), ("b", value)], "task", "path")
    saver.put_writes(stored, [("a", "third"), ("b", "third"), ("c", "new")], "task", "path")

    assert saver.get_tuple(stored).pending_writes == [
        ("task", "a", "first"),
        ("task", "b", "first"),
        ("task", "c", "new"),
    ]


def test_special_writes_are_replaced_alone_and_among_others(saver: Face) -> None:
    stored = saver.step("t", {"a": 0})
    for value in (1, 2):
        for channel in (ERROR, INTERRUPT, RESUME, SCHEDULED):
            saver.put_writes(stored, [(channel, value)], "task")
    assert sorted(saver.get_tuple(stored).pending_writes) == sorted(
        ("task", channel, 2) for channel in (ERROR, INTERRUPT, RESUME, SCHEDULED)
    )
    saver.put_writes(stored, [("a", "kept"), (RESUME, "old")], "mixed")
    saver.put_writes(stored, [("a", "lost"), (RESUME, "new")], "mixed")
    mixed = [write for write in saver.get_tuple(stored).pending_writes if write[0] == "mixed"]
    assert sorted(mixed) == [("mixed", RESUME, "new"), ("mixed", "a", "kept")]


def test_put_writes_and_put_in_either_order(saver: Face) -> None:
    results = []
    for thread, writes_first in (("before", True), ("after", False)):
        target = at(thread, "", str(uuid6()))
        put = lambda target=target: saver.step(  # noqa: E731
            target["configurable"]["thread_id"], {"a": 1}, checkpoint_id=id_of(target)
        )
        if writes_first:
            saver.put_writes(target, [("a", 2)], "task", "p")
            assert saver.get_tuple(target) is None
            put()
        else:
            put()
            saver.put_writes(target, [("a", 2)], "task", "p")
        found = saver.get_tuple(target)
        results.append((values_of(found), found.pending_writes))
        put()
        assert saver.get_tuple(target).pending_writes == found.pending_writes, "a repeated put keeps the writes"
    assert results[0] == results[1] == ({"a": 1}, [("task", "a", 2)])


def test_pending_writes_come_in_task_path_task_id_and_index_order(saver: Face) -> None:
    stored = saver.step("t", {"a": 0})
    tasks = [("~2", "task-a"), ("~10", "task-b"), ("~1", "task-z"), ("~1", "task-c"), ("", "task-0")]
    for path, task in tasks:
        saver.put_writes(stored, [(f"c{number}", number) for number in range(12)], task, path)

    expected = [(task, f"c{number}", number) for path, task in sorted(tasks) for number in range(12)]
    assert saver.get_tuple(stored).pending_writes == expected
    assert saver.list(at("t"))[0].pending_writes == expected


# -- put: values are stored once, and never missed --------------------------------------------------------


def test_equal_values_are_stored_once(saver: Face, memory: MemoryStore) -> None:
    big = {"text": "x" * 1000, "list": list(range(100))}
    stored = saver.step("t", {"a": big, "b": dict(big), "c": 1})
    for _ in range(5):
        stored = saver.step("t", {"a": dict(big), "b": big, "c": 1}, after=stored)
    assert memory.stats()["channel_values"] == 2
    saver.step("another", {"a": big})
    assert memory.stats()["channel_values"] == 3, "threads share nothing, so one can be deleted alone"
    assert [values_of(one) for one in saver.list(at("t"))] == [{"a": big, "b": big, "c": 1}] * 6


def test_values_that_are_equal_in_python_and_not_in_type_stay_apart(saver: Face) -> None:
    values = {"int": 1, "float": 1.0, "bool": True, "text": "1", "bytes": b"1", "none": None, "list": [1], "set": {1}}
    saver.step("t", values)
    found = values_of(saver.get_tuple(at("t")))
    assert {name: (type(value), value) for name, value in found.items()} == {
        name: (type(value), value) for name, value in values.items()
    }


class CountingSerializer(JsonPlusSerializer):
    """Counts what is serialised, by value."""

    def __init__(self) -> None:
        super().__init__()
        self.dumped: list[Any] = []

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        self.dumped.append(obj)
        return super().dumps_typed(obj)


def test_a_channel_that_kept_its_version_is_not_serialised_again(memory: MemoryStore) -> None:
    serde = CountingSerializer()
    saver = Face(MemStateCheckpointer(memory, serde=serde))
    first = saver.step("t", {"kept": "K", "changed": "C1"}, versions={"kept": 1, "changed": 1})
    serde.dumped.clear()
    second = saver.step(
        "t", {"kept": "K", "changed": "C2"}, after=first, versions={"kept": 1, "changed": 2}, changed=["changed"]
    )
    assert "K" not in serde.dumped
    assert "C2" in serde.dumped
    assert values_of(saver.get_tuple(second)) == {"kept": "K", "changed": "C2"}


def test_a_channel_with_a_new_version_is_read_anew_even_if_it_is_not_announced(saver: Face) -> None:
    """`update_state(as_node="__copy__")` puts changed versions beside an empty `new_versions`."""
    first = saver.step("t", {"a": "old"}, versions={"a": 1})
    second = saver.step("t", {"a": "new"}, after=first, versions={"a": 2}, changed=[])
    assert values_of(saver.get_tuple(second)) == {"a": "new"}
    assert values_of(saver.get_tuple(first)) == {"a": "old"}


def test_branches_of_a_fork_with_equal_integer_versions_keep_their_own_values(saver: Face) -> None:
    root = saver.step("t", {"a": 0, "b": "shared"}, versions={"a": 1, "b": 1})
    branches = [
        saver.step("t", {"a": side, "b": "shared"}, after=root, versions={"a": 2, "b": 1}, changed=["a"])
        for side in ("left", "right")
    ]
    leaves = [
        saver.step("t", {"a": side, "b": f"{side} b"}, after=branch, versions={"a": 2, "b": 2}, changed=["b"])
        for side, branch in zip(("left", "right"), branches, strict=True)
    ]
    assert [values_of(saver.get_tuple(one)) for one in (*branches, *leaves)] == [
        {"a": "left", "b": "shared"},
        {"a": "right", "b": "shared"},
        {"a": "left", "b": "left b"},
        {"a": "right", "b": "right b"},
    ]


def test_versions_of_a_channel_grow_and_branches_differ(memory: MemoryStore) -> None:
    saver = memory.checkpointer
    version = None
    seen = []
    for _ in range(12):
        version = saver.get_next_version(version, None)
        seen.append(version)
    assert seen == sorted(set(seen))
    assert saver.get_next_version(seen[0], None) != seen[1], "the other branch of a fork"
    assert saver.get_next_version(9, None) > saver.get_next_version(8, None), "a thread that had integers"


def test_another_process_continues_a_thread_it_has_not_loaded(database: Path) -> None:
    """The parent's values are known only where they were written or read; elsewhere the put sends them all."""
    with MemoryStore.open(database) as memory:
        first = Face(memory.checkpointer).step("t", {"kept": "K", "a": 1})
    with MemoryStore.open(database) as memory:
        saver = Face(memory.checkpointer)
        second = saver.step("t", {"kept": "K", "a": 2}, after=first, versions={"kept": 1, "a": 2}, changed=["a"])
        assert values_of(saver.get_tuple(second)) == {"kept": "K", "a": 2}
        assert memory.stats()["channel_values"] == 3


DELETE = """
import sys
from langgraph_memstate import MemoryStore
with MemoryStore.open(sys.argv[1]) as memory:
    getattr(memory.checkpointer, sys.argv[2])(*eval(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("method", "argument"),
    [("delete_thread", "t"), ("prune", ["t"]), ("delete_for_runs", ["run-1"])],
)
@pytest.mark.parametrize("where", ["instance", "process"])
def test_what_another_memory_deletes_between_two_puts_is_written_again(
    database: Path, method: str, argument: Any, where: str
) -> None:
    """The second put refers to values of the first, which are gone; it must notice and bring them itself."""
    with MemoryStore.open(database) as memory:
        saver = Face(memory.checkpointer)
        saver.step("t", {"kept": "K", "a": 1}, run_id="run-1", checkpoint_id="1")
        if method == "prune":  # then the latest checkpoint holds other values
            saver.step("t", {"other": 1}, run_id="run-0", checkpoint_id="3")
        if where == "process":
            subprocess.run(
                [sys.executable, "-c", DELETE, str(database), method, repr((argument,))], check=True, timeout=60
            )
        else:
            with MemoryStore.open(database) as other:
                getattr(other.checkpointer, method)(argument)
        assert saver.get_tuple(at("t", "", "1")) is None

        second = saver.step(
            "t", {"kept": "K", "a": 2}, after=at("t", "", "1"), checkpoint_id="2", versions={"kept": 1, "a": 2},
            changed=["a"],
        )  # fmt: skip
        assert values_of(saver.get_tuple(second)) == {"kept": "K", "a": 2}
        third = saver.step("t", {"kept": "K", "a": 2}, after=second, checkpoint_id="4", changed=[])
        assert values_of(saver.get_tuple(third)) == {"kept": "K", "a": 2}


class DeletingStorage(SQLiteStorage):
    """Another process deletes the thread right before each commit of a checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.armed = False
        self.raced = 0

    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        if self.armed:
            conn = sqlite3.connect(self._path, timeout=10)
            for table in ("checkpoints", "channel_values", "writes"):
                conn.execute(f"DELETE FROM {table}")
            conn.commit()
            conn.close()
        outcomes = super().apply(commits)
        self.raced += sum(isinstance(outcome, CommitRaced) for outcome in outcomes)
        return outcomes


def test_a_put_that_lost_the_race_tries_again_with_all_its_values(database: Path) -> None:
    storage = DeletingStorage(database)
    with MemoryStore(storage) as memory:
        saver = Face(memory.checkpointer)
        parent = saver.step("t", {"kept": "K", "a": 0}, versions={"kept": 1, "a": 1})
        storage.armed = True
        for number in range(3):
            parent = saver.step(
                "t", {"kept": "K", "a": number}, after=parent, versions={"kept": 1, "a": number + 2}, changed=["a"]
            )
            assert values_of(saver.get_tuple(parent)) == {"kept": "K", "a": number}
    assert storage.raced == 3


def test_checkpoints_stay_whole_while_another_memory_keeps_deleting_the_thread(database: Path) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def guarded(work: Callable[[MemoryStore], None]) -> None:
        try:
            with MemoryStore.open(database) as memory:
                work(memory)
        except BaseException as error:
            errors.append(error)
            stop.set()

    def delete(memory: MemoryStore) -> None:
        while not stop.is_set():
            memory.checkpointer.delete_thread("t")

    def read(memory: MemoryStore) -> None:
        while not stop.is_set():
            for found in memory.checkpointer.list(None):
                assert values_of(found)["kept"] == "K"

    def write(memory: MemoryStore) -> None:
        saver, parent = Face(memory.checkpointer), None
        for number in range(150):
            parent = saver.step(
                "t", {"kept": "K", "a": number}, after=parent, versions={"kept": 1, "a": number}, changed=["a"]
            )
        stop.set()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (delete, read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# -- upkeep ---------------------------------------------------------------------------------------------

THREAD_TABLES = ("checkpoints", "channel_values", "writes", "staged")


def test_delete_thread_leaves_no_row_of_the_thread_and_all_of_others(saver: Face, memory: MemoryStore) -> None:
    memory.commit(Fact(type="note", payload={"text": "stays"}, thread_id="t"))
    for thread in ("t", "u"):
        for ns in ("", "inner:1"):
            stored = saver.step(thread, {"a": thread, "b": [1, 2]}, ns=ns)
            saver.put_writes(stored, [("a", 1)], "task")
    whole = memory.stats()
    saver.delete_thread("t")

    left = memory.stats()
    assert {table: left[table] * 2 for table in THREAD_TABLES} == {table: whole[table] for table in THREAD_TABLES}
    assert left["facts"] == left["items"] == 1, "facts are not thread state"
    assert saver.list(at("t", None)) == []
    assert [values_of(one) for one in saver.list(at("u", None))] == [{"a": "u", "b": [1, 2]}] * 2
    saver.delete_thread("u")
    saver.delete_thread("nobody")
    assert [memory.stats()[table] for table in THREAD_TABLES] == [0] * 4


def test_delete_for_runs_frees_only_what_nothing_else_refers_to(saver: Face, memory: MemoryStore) -> None:
    config = lambda run: {"metadata": {"run_id": run}}  # noqa: E731
    for thread in ("t", "u"):
        first = saver.step(thread, {"shared": "S", "own": 1}, config=config("run-1"))
        saver.put_writes(first, [("own", 2)], "task")
        saver.step(thread, {"shared": "S", "own": 2}, after=first, config=config("run-2"))
    saver.delete_for_runs(["run-1", "no such run"])

    assert [values_of(one) for one in saver.list(None)] == [{"shared": "S", "own": 2}] * 2
    stats = memory.stats()
    assert (stats["channel_values"], stats["writes"]) == (4, 0)
    saver.delete_for_runs([])
    saver.delete_for_runs(["run-2"])
    assert [memory.stats()[table] for table in THREAD_TABLES] == [0] * 4


def test_a_copied_thread_and_its_source_go_their_own_ways(saver: Face) -> None:
    first = saver.step("source", {"a": 1, "kept": "K"})
    second = saver.step("source", {"a": 2, "kept": "K"}, after=first, versions={"a": 2, "kept": 1}, changed=["a"])
    inner = saver.step("source", {"b": 1}, ns="inner:1")
    saver.put_writes(second, [("a", "pending")], "task", "path")
    saver.copy_thread("source", "target")

    def listed(thread: str) -> list[Any]:
        return [
            (id_of(one), one.config["configurable"]["checkpoint_ns"], one.checkpoint, one.metadata, one.pending_writes,
             one.parent_config and id_of(one.parent_config))
            for one in saver.list(at(thread, None))
        ]  # fmt: skip

    assert listed("target") == listed("source")
    assert len(listed("target")) == 3
    parent = saver.get_tuple(at("target")).parent_config
    assert parent == at("target", "", id_of(first)), "the parent is the copy's own"

    for thread in ("source", "target"):
        after = at(thread, "", id_of(second))
        saver.step(thread, {"a": thread, "kept": "K"}, after=after, versions={"a": 3, "kept": 1}, changed=["a"])
    assert values_of(saver.get_tuple(at("target"))) == {"a": "target", "kept": "K"}
    saver.delete_thread("source")
    assert values_of(saver.get_tuple(at("target"))) == {"a": "target", "kept": "K"}
    assert values_of(saver.get_tuple(at("target", "inner:1", id_of(inner)))) == {"b": 1}
    assert [len(saver.list(at("target", ns))) for ns in ("", "inner:1")] == [3, 1]


def test_copying_a_thread_onto_itself_or_from_nothing_changes_nothing(saver: Face) -> None:
    stored = saver.step("t", {"a": 1})
    saver.copy_thread("t", "t")
    saver.copy_thread("nobody", "t")
    assert [(id_of(one), values_of(one)) for one in saver.list(None)] == [(id_of(stored), {"a": 1})]


def test_prune_keeps_the_latest_of_each_namespace_with_its_values(saver: Face, memory: MemoryStore) -> None:
    for ns in ("", "inner:1"):
        stored = None
        for number in range(60):
            values = {"n": number, "shared": "S"}
            stored = saver.step("t", values, after=stored, ns=ns, versions={"n": number, "shared": 1})
            saver.put_writes(stored, [("n", number + 1)], "task")
    saver.prune(["t", "nobody"])

    kept = saver.list(at("t", None))
    assert [values_of(one) for one in kept] == [{"n": 59, "shared": "S"}] * 2
    assert [one.pending_writes for one in kept] == [[("task", "n", 60)]] * 2
    stats = memory.stats()
    assert (stats["channel_values"], stats["writes"]) == (2, 2)
    saver.prune(["t"], strategy="delete")
    assert saver.list(None) == []
    with pytest.raises(ValueError, match="keep_latest"):
        saver.prune(["t"], strategy="keep_some")


# -- delta channels ---------------------------------------------------------------------------------------


def test_delta_history_is_what_langgraphs_own_walk_finds(saver: Face) -> None:
    """Each channel ends at its own nearest stored value; other branches and the checkpoint's own writes stay out."""
    trunk: list[Config] = []
    for number, stored in enumerate([{}, {"a": ["A"]}, {}, {"b": _DeltaSnapshot(["B"])}, {}, {}]):
        trunk.append(saver.step("t", stored, after=trunk[-1] if trunk else None))
        for task, path in (("z", "~1"), ("a", "~2")):
            saver.put_writes(trunk[-1], [("a", f"a{number}{task}"), ("b", f"b{number}{task}"), ("x", 0)], task, path)
    branch = saver.step("t", {}, after=trunk[2])
    saver.put_writes(branch, [("a", "own"), ("b", "own")], "task")

    names = ["a", "b", "never"]
    for config in (*trunk, branch, at("t"), at("nobody"), at("t", "", "no-such-checkpoint")):
        found = saver.get_delta_channel_history(config=config, channels=names)
        walked = BaseCheckpointSaver.get_delta_channel_history(saver.saver, config=config, channels=names)
        assert found == walked
    histories = saver.get_delta_channel_history(config=trunk[-1], channels=names)
    assert histories["a"]["seed"] == ["A"], "a plain value, of a thread from before the channel was a delta channel"
    assert [value for _, _, value in histories["a"]["writes"]] == [
        "a1z", "a1a", "a2z", "a2a", "a3z", "a3a", "a4z", "a4a",
    ]  # fmt: skip
    assert histories["b"] == {
        "seed": _DeltaSnapshot(["B"]),
        "writes": [("z", "b", "b3z"), ("a", "b", "b3a"), ("z", "b", "b4z"), ("a", "b", "b4a")],
    }
    assert histories["never"] == {"writes": []}
    assert saver.get_delta_channel_history(config=trunk[-1], channels=[]) == {}


# -- wiring ---------------------------------------------------------------------------------------------


def test_a_clone_with_an_allowlist_shares_the_memory(memory: MemoryStore) -> None:
    """LangGraph copies the saver when it compiles a graph whose state has types of its own."""
    original = MemStateCheckpointer(memory, serde=JsonPlusSerializer(allowed_msgpack_modules=None))
    clone = original.with_allowlist([("somewhere", "Model")])
    assert clone is not original
    assert isinstance(clone, MemStateCheckpointer)
    stored = Face(clone).step("t", {"a": 1})
    assert values_of(original.get_tuple(stored)) == {"a": 1}
    assert (clone.memory, clone._staging, clone._manifests) == (original.memory, original._staging, original._manifests)


def test_the_default_serializer_survives_with_allowlist(memory: MemoryStore) -> None:
    stored = Face(memory.checkpointer).step("t", {"a": (1, {2})})
    clone = memory.checkpointer.with_allowlist([("somewhere", "Model")])
    assert values_of(clone.get_tuple(stored)) == {"a": (1, {2})}


def test_from_conn_string_and_setup(url: str) -> None:
    with MemStateCheckpointer.from_conn_string(url) as saver:
        saver.setup()
        stored = Face(saver).step("t", {"a": 1})
        assert values_of(saver.get_tuple(stored)) == {"a": 1}
    with pytest.raises(StorageClosedError):
        saver.get_tuple(stored)


async def test_from_conn_string_and_setup_async(url: str) -> None:
    async with MemStateCheckpointer.from_conn_string(url) as saver:
        await saver.setup()
        stored = await saver.aput(at("t", ""), empty_checkpoint(), {}, {})
        assert (await saver.aget_tuple(stored)) is not None
    with pytest.raises(StorageClosedError):
        await saver.aget_tuple(stored)


def test_from_conn_string_opens_what_an_earlier_one_wrote(database: Path) -> None:
    with MemStateCheckpointer.from_conn_string(f"sqlite:///{database}") as saver:
        stored = Face(saver).step("t", {"a": 1})
    with MemStateCheckpointer.from_conn_string(str(database)) as saver:
        assert values_of(saver.get_tuple(stored)) == {"a": 1}


def test_metadata_is_stored_as_json_that_any_tool_reads(file_memory: MemoryStore, database: Path) -> None:
    Face(file_memory.checkpointer).step("t", {"a": 1}, note="é")
    conn = sqlite3.connect(database)
    (note,) = conn.execute("SELECT metadata ->> 'note' FROM checkpoints").fetchone()
    (text,) = conn.execute("SELECT metadata FROM checkpoints").fetchone()
    conn.close()
    assert note == json.loads(text)["note"] == "é"

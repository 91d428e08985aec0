"""Time to live: expired items are invisible at once, and swept as entries of the log."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from langgraph.store.base import GetOp, ListNamespacesOp, PutOp, SearchOp

from langgraph_memstate import MemoryStore, MemStateStore
from langgraph_memstate.errors import StorageClosedError
from langgraph_memstate.facts import Draft, new_version
from langgraph_memstate.storage.operations import Append, Touch

NS = ("session",)
Age = Callable[[float], None]


@pytest.fixture
def store(file_memory: MemoryStore) -> MemStateStore:
    return file_memory.store


@pytest.fixture
def age(database: Path) -> Age:
    """Let minutes pass, as the database sees it."""

    def pass_minutes(minutes: float) -> None:
        with sqlite3.connect(database) as conn:
            conn.execute(
                "UPDATE items SET created_at = created_at - ?1, updated_at = updated_at - ?1, "
                "expires_at = expires_at - ?1",
                (minutes * 60,),
            )
        conn.close()

    return pass_minutes


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in ten seconds"
        time.sleep(0.005)


def test_an_item_lives_as_long_as_it_was_given(store: MemStateStore, age: Age) -> None:
    store.put(NS, "short", {}, ttl=10)
    store.put(NS, "long", {}, ttl=20)
    store.put(NS, "ever", {})
    age(9.5)
    assert store.get(NS, "short", refresh_ttl=False) is not None
    age(1)
    assert store.get(NS, "short") is None
    assert {item.key for item in store.search(NS)} == {"long", "ever"}


def test_an_expired_item_is_invisible_before_it_is_swept(store: MemStateStore, age: Age) -> None:
    store.put(("gone",), "k", {"a": 1}, ttl=5)
    age(6)
    assert store.batch([GetOp(("gone",), "k"), SearchOp(()), ListNamespacesOp()]) == [None, [], []]
    assert store.memory.get("gone", "k") is None
    assert store.memory.query("gone") == []
    assert store.memory.stats()["items"] == 1
    assert [entry.op for entry in store.memory.history("gone", "k")] == ["put"]


def test_a_fraction_of_a_minute_is_a_time_to_live(memory: MemoryStore) -> None:
    memory.store.put(NS, "k", {}, ttl=0.0005)  # 30 ms
    memory.store.put(NS, "other", {}, ttl=0.5)
    time.sleep(0.04)
    assert memory.store.get(NS, "k") is None
    assert memory.store.get(NS, "other") is not None
    assert memory.sweep() == 1


def test_zero_is_over_at_once(store: MemStateStore) -> None:
    store.put(NS, "k", {"a": 1})
    store.put(NS, "k", {"a": 2}, ttl=0)
    assert store.get(NS, "k") is None


def test_reading_starts_the_time_again(store: MemStateStore, age: Age) -> None:
    for key, read in [
        ("get", lambda: store.get(NS, "get")),
        ("search", lambda: store.search(NS, filter={"key": "search"})),
        ("aget", lambda: asyncio.run(store.aget(NS, "aget"))),
        ("batch", lambda: store.batch([GetOp(NS, "batch")])),
    ]:
        store.put(NS, key, {"key": key}, ttl=10)
        store.put(NS, f"un{key}", {"key": ""}, ttl=10)
        age(8)
        read()
        age(8)
        assert store.get(NS, key, refresh_ttl=False) is not None, key
        assert store.get(NS, f"un{key}", refresh_ttl=False) is None, key
        age(3)
        assert store.get(NS, key) is None, key


def test_reading_without_refresh_does_not(store: MemStateStore, age: Age) -> None:
    store.put(NS, "k", {}, ttl=10)
    age(8)
    store.get(NS, "k", refresh_ttl=False)
    store.search(NS, refresh_ttl=False)
    store.batch([GetOp(NS, "k", refresh_ttl=False), SearchOp(NS, refresh_ttl=False)])
    age(3)
    assert store.get(NS, "k") is None


def test_only_what_a_search_returns_is_refreshed(store: MemStateStore, age: Age) -> None:
    for key in ("first", "second"):
        store.put(NS, key, {}, ttl=10)
    age(8)
    assert [item.key for item in store.search(NS, limit=1)] == ["second"]
    age(3)
    assert [item.key for item in store.search(NS)] == ["second"]


def test_refreshing_never_shortens_a_life(file_memory: MemoryStore) -> None:
    file_memory.store.put(NS, "k", {}, ttl=10)
    file_memory.storage.apply([(Touch(((NS, "k"),), time.time() - 3_600),)])
    assert file_memory.store.get(NS, "k") is not None


def test_a_successor_with_another_time_is_refreshed_by_its_own(file_memory: MemoryStore, age: Age) -> None:
    """A refresh that was decided on the version before must not hand its shorter time to the successor."""
    file_memory.store.put(NS, "k", {"v": 1}, ttl=1)
    touch = Touch(((NS, "k"),), time.time())
    file_memory.store.put(NS, "k", {"v": 2}, ttl=60)
    file_memory.store.put(NS, "ever", {"v": 2})
    file_memory.storage.apply([(touch, Touch(((NS, "ever"),), time.time()))])
    age(30)
    assert file_memory.store.get(NS, "k") is not None
    assert file_memory.store.get(NS, "ever") is not None


def test_the_configured_time_is_the_default(file_memory: MemoryStore, age: Age) -> None:
    store = MemStateStore(file_memory, ttl={"default_ttl": 10, "refresh_on_read": False})
    store.put(NS, "default", {})
    store.put(NS, "longer", {}, ttl=100)
    store.put(NS, "ever", {}, ttl=None)
    age(8)
    assert store.get(NS, "default") is not None
    age(3)  # reading did not refresh
    assert store.get(NS, "default") is None
    assert {item.key for item in store.search(NS)} == {"longer", "ever"}
    assert store.get(NS, "longer", refresh_ttl=True) is not None
    age(99)
    assert store.get(NS, "longer") is not None


def test_an_update_decides_the_time_anew(store: MemStateStore, age: Age) -> None:
    store.put(NS, "k", {}, ttl=10)
    store.put(NS, "k", {})
    age(100)
    assert store.get(NS, "k") is not None
    store.put(NS, "k", {}, ttl=10)
    age(11)
    assert store.get(NS, "k") is None


def test_a_put_after_the_end_is_a_new_item(store: MemStateStore, age: Age) -> None:
    store.put(NS, "k", {"v": 1}, ttl=10)
    store.put(NS, "live", {"v": 1}, ttl=30)
    born = store.get(NS, "live", refresh_ttl=False).created_at
    age(11)
    store.put(NS, "k", {"v": 2})
    store.put(NS, "live", {"v": 2})
    item, live = store.get(NS, "k"), store.get(NS, "live")
    assert item.created_at == item.updated_at
    assert (born - live.created_at).total_seconds() == pytest.approx(11 * 60, abs=0.01)


# -- sweeping -------------------------------------------------------------------------------------


def test_sweeping_deletes_in_the_log_and_says_why(store: MemStateStore, age: Age) -> None:
    store.put(NS, "k", {"a": 1}, ttl=5)
    store.put(NS, "other", {"a": 1}, ttl=50)
    assert store.sweep_ttl() == 0
    age(6)
    assert store.sweep_ttl() == 1
    assert store.sweep_ttl() == 0
    put, delete = store.memory.history(NS, "k")
    assert (put.op, put.reason, delete.op, delete.reason, delete.value) == ("put", None, "delete", "ttl", None)
    assert delete.supersedes == put.version
    assert store.memory.stats()["items"] == 1


def test_sweeping_never_deletes_a_successor(file_memory: MemoryStore, age: Age) -> None:
    store = file_memory.store
    store.put(NS, "replaced", {"v": 1}, ttl=5)
    store.put(NS, "revived", {"v": 1}, ttl=5)
    age(6)
    with file_memory.storage.snapshot() as reader:
        expired = reader.expired(time.time())
    assert len(expired) == 2
    # Between the sweep's look and its commit, one item is replaced and the time of the other starts again.
    store.put(NS, "replaced", {"v": 2})
    file_memory.storage.apply([(Touch(((NS, "revived"),), time.time()),)])
    drafts = tuple(Draft(new_version(), record.namespace, record.key, "delete", None) for record in expired)
    versions = frozenset(record.version for record in expired)
    assert file_memory.storage.apply([(Append(drafts, (), if_expired=versions),)]) == [None]
    assert {item.key: item.value["v"] for item in store.search(NS)} == {"replaced": 2, "revived": 1}
    assert file_memory.stats()["facts"] == 3


def test_the_sweeper_sweeps_until_it_is_stopped(memory: MemoryStore) -> None:
    store = MemStateStore(memory, ttl={"sweep_interval_minutes": 0.0002})  # type: ignore[typeddict-item]
    store.put(NS, "k", {}, ttl=0)
    thread = store.start_ttl_sweeper()
    assert store.start_ttl_sweeper() is thread  # one is enough
    wait_until(lambda: len(memory.history(NS, "k")) == 2)
    assert store.stop_ttl_sweeper(timeout=5) is True
    assert not thread.is_alive()
    store.put(NS, "k2", {}, ttl=0)
    time.sleep(0.05)
    assert len(memory.history(NS, "k2")) == 1
    assert store.stop_ttl_sweeper() is True
    store.start_ttl_sweeper(0.0002)  # and it can start again
    wait_until(lambda: len(memory.history(NS, "k2")) == 2)


def test_the_sweeper_survives_a_failure(file_memory: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    writer = file_memory.storage._writer  # type: ignore[attr-defined]
    store = file_memory.store
    store.put(NS, "k", {}, ttl=0)
    writer.execute("PRAGMA query_only=ON")
    store.start_ttl_sweeper(0.0002)
    wait_until(lambda: "sweeping expired items failed" in caplog.text)
    writer.execute("PRAGMA query_only=OFF")
    wait_until(lambda: len(file_memory.history(NS, "k")) == 2)


def test_closing_the_memory_ends_the_sweeper(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = MemoryStore.open(database)
    long, short = MemStateStore(memory).start_ttl_sweeper(), MemStateStore(memory).start_ttl_sweeper(0.0001)
    before = threading.active_count()
    memory.close()
    assert not long.is_alive()
    assert not short.is_alive()
    assert threading.active_count() < before
    assert caplog.text == ""
    with pytest.raises(StorageClosedError):
        memory.store.start_ttl_sweeper()


@pytest.mark.parametrize("ttl", [-1, float("nan"), float("inf"), "5", True])
def test_a_time_to_live_that_is_none_is_refused(store: MemStateStore, ttl: float) -> None:
    for call in (lambda: store.put(NS, "k", {}, ttl=ttl), lambda: store.batch([PutOp(NS, "k", {}, ttl=ttl)])):
        with pytest.raises(TypeError, match="ttl"):
            call()
    assert store.memory.stats()["facts"] == 0

"""MemStateStore as a LangGraph store: batches, items, pages and namespaces, called both ways on both storages."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.store.base import (
    GetOp,
    InvalidNamespaceError,
    Item,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchItem,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore

from langgraph_memstate import MemoryStore, MemStateStore
from langgraph_memstate.errors import FilterError, KeyTypeError, MemStateError, NamespaceError, SerializationError

NS = ("users", "u1")


class Face:
    """The store's methods, by their sync or their async twins: ``face.put(…)`` is `put`, or a run of `aput`."""

    def __init__(self, store: Any, run: Callable[[Any], Any] | None) -> None:
        self._store = store
        self._run = run

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self._run is None:
            return getattr(self._store, name)
        run, twin = self._run, getattr(self._store, f"a{name}")
        return lambda *args, **kwargs: run(twin(*args, **kwargs))


@pytest.fixture(params=["sync", "async"])
def store(request: pytest.FixtureRequest, memory: MemoryStore) -> Iterator[Any]:
    if request.param == "sync":
        yield Face(memory.store, None)
    else:
        with asyncio.Runner() as runner:
            yield Face(memory.store, runner.run)


def keys(items: list[Any]) -> list[str]:
    return [item.key for item in items]


# -- items ----------------------------------------------------------------------------------------


def test_what_was_put_is_what_is_read(store: Any) -> None:
    before = datetime.now(UTC)
    value = {"text": "é\U0001f600\0", "n": 1, "x": 1.5, "t": True, "none": None, "list": [1, {"a": [2]}], "": {}}
    assert store.put(NS, "k", value) is None
    item = store.get(NS, "k")
    assert type(item) is Item
    assert (item.namespace, item.key, item.value) == (NS, "k", value)
    assert before <= item.created_at == item.updated_at <= datetime.now(UTC)
    assert item.created_at.tzinfo is not None


def test_what_is_not_there_is_none(store: Any) -> None:
    store.put(NS, "k", {"a": 1})
    assert store.get(NS, "other") is None
    assert store.get((*NS, "deeper"), "k") is None
    assert store.get(NS[:1], "k") is None


def test_an_update_replaces_the_value_and_keeps_when_it_was_created(store: Any) -> None:
    store.put(NS, "k", {"a": 1, "b": 2})
    first = store.get(NS, "k")
    store.put(NS, "k", {"a": 3})
    second = store.get(NS, "k")
    assert second.value == {"a": 3}
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at


def test_a_deleted_item_is_gone_and_starts_anew(store: Any) -> None:
    store.put(NS, "k", {"a": 1})
    first = store.get(NS, "k")
    store.delete(NS, "k")
    assert store.get(NS, "k") is None
    assert store.search(NS) == []
    store.delete(NS, "k")  # deleting what is not there is no error
    store.put(NS, "k", {"a": 2})
    assert store.get(NS, "k").created_at > first.created_at


def test_putting_none_deletes(store: Any) -> None:
    store.put(NS, "k", {"a": 1})
    store.put(NS, "k", None)
    assert store.get(NS, "k") is None


def test_an_item_is_the_readers_own_copy(store: Any) -> None:
    value = {"list": [1]}
    store.put(NS, "k", value)
    value["list"].append(2)
    store.get(NS, "k").value["list"].append(3)
    assert store.get(NS, "k").value == {"list": [1]}


def test_keys_are_made_strings_as_upstream_does(store: Any) -> None:
    store.put(NS, 5, {"a": 1})
    assert store.get(NS, 5).key == "5"
    assert store.get(NS, "5").value == {"a": 1}


@pytest.mark.parametrize("key", ["%", "_", ".", "*", "a/b", "\x1f", "\0", " ", "'; DROP TABLE items; --", "é" * 5_000])
def test_any_text_is_a_key(store: Any, key: str) -> None:
    store.put(NS, key, {"a": 1})
    store.put(NS, key + "x", {"a": 2})
    assert store.get(NS, key).value == {"a": 1}
    store.delete(NS, key)
    assert keys(store.search(NS)) == [key + "x"]


def test_a_face_in_another_thread_and_another_process_face_sees_it(file_memory: MemoryStore, database: Path) -> None:
    file_memory.store.put(NS, "k", {"a": 1})
    with MemoryStore.open(database) as other:
        assert other.store.get(NS, "k").value == {"a": 1}
        other.store.put(NS, "k", {"a": 2})
    assert file_memory.store.get(NS, "k").value == {"a": 2}


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_answers_each_operation_in_its_place(store: Any) -> None:
    store.put(NS, "k", {"a": 1})
    answers = store.batch([
        PutOp(NS, "new", {"a": 2}),
        GetOp(NS, "k"),
        SearchOp(NS),
        ListNamespacesOp(),
        GetOp(NS, "none"),
        PutOp(NS, "k", None),
    ])  # fmt: skip
    assert [type(answer).__name__ for answer in answers] == ["NoneType", "Item", "list", "list", "NoneType", "NoneType"]
    assert answers[1].value == {"a": 1}
    assert keys(answers[2]) == ["k"]
    assert answers[3] == [NS]
    assert store.batch([]) == []


def test_reads_of_a_batch_see_the_state_before_its_writes(store: Any) -> None:
    store.put(NS, "k", {"v": "old"})
    put, got, found, names, gone = store.batch([
        PutOp(NS, "k", {"v": "new"}),
        GetOp(NS, "k"),
        SearchOp((), filter={"v": "new"}),
        ListNamespacesOp(),
        PutOp(("other",), "k", {}),
    ])  # fmt: skip
    assert (put, got.value, found, names, gone) == (None, {"v": "old"}, [], [NS], None)
    assert store.get(NS, "k").value == {"v": "new"}
    assert store.list_namespaces() == [("other",), NS]


def test_the_last_write_of_a_key_wins(store: Any, memory: MemoryStore) -> None:
    store.batch([
        PutOp(NS, "a", {"v": 1}), PutOp(NS, "b", {"v": 1}), PutOp(NS, "a", None), PutOp(NS, "b", None),
        PutOp(NS, "c", {"v": 3}), PutOp(NS, "a", {"v": 2}),
    ])  # fmt: skip
    found = [(item.key, item.value["v"]) for item in store.search(NS)]
    assert found == [("a", 2), ("c", 3)]  # and is the one whose turn counts
    assert [entry.op for entry in memory.history(NS, "a")] == ["put"]
    assert [entry.op for entry in memory.history(NS, "b")] == ["delete"]


def test_the_writes_of_a_batch_are_one_commit(file_memory: MemoryStore, database: Path) -> None:
    file_memory.store.put(NS, "before", {})
    file_memory.store.batch([PutOp(NS, "a", {}), PutOp(("x",), "b", {}), PutOp(NS, "before", None)])
    with sqlite3.connect(database) as conn:
        rows = conn.execute("SELECT seq, commit_id FROM facts ORDER BY seq").fetchall()
    assert rows == [(1, 1), (2, 2), (3, 2), (4, 2)]


def test_a_batch_with_one_bad_write_writes_nothing(store: Any, memory: MemoryStore) -> None:
    store.put(NS, "k", {"v": 1})
    counts = memory.stats()
    for bad in (
        PutOp(NS, "b", {"when": datetime.now(UTC)}),
        PutOp((), "b", {}),
        PutOp(("",), "b", {}),
        PutOp(NS, "", {}),
        PutOp(NS, "b", {}, ttl=-1),
        PutOp(NS, "b", {}, index=["a[0"]),
        PutOp(NS, "b", {}, index="text"),  # type: ignore[arg-type]
        SearchOp(NS, filter={"a": {"$nope": 1}}),
        SearchOp((1,)),  # type: ignore[arg-type]
        SearchOp(NS, limit=-1),
        GetOp(NS, ""),
        ListNamespacesOp(limit=-1),
        ListNamespacesOp((MatchCondition("infix", ("a",)),)),  # type: ignore[arg-type]
        "no operation",
    ):
        with pytest.raises(MemStateError):
            store.batch([PutOp(NS, "a", {}), PutOp(NS, "k", None), bad])
    assert memory.stats() == counts
    assert store.get(NS, "k").value == {"v": 1}


def test_operations_may_come_from_a_generator(store: Any) -> None:
    store.batch(PutOp(NS, str(n), {"n": n}) for n in range(3))
    assert [item.value["n"] for item in store.batch(GetOp(NS, str(n)) for n in range(3))] == [0, 1, 2]


async def test_many_tasks_write_at_once(memory: MemoryStore) -> None:
    await asyncio.gather(*(memory.store.aput(("n", str(n % 7)), str(n), {"n": n}) for n in range(200)))
    assert sorted(item.value["n"] for item in memory.store.search(("n",), limit=500)) == list(range(200))


def test_many_threads_write_at_once(memory: MemoryStore) -> None:
    def write(number: int) -> None:
        for turn in range(20):
            memory.store.put(("n",), f"{number}/{turn}", {"n": turn})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memory.store.search(("n",), limit=1_000)) == 160


async def test_the_sync_methods_work_inside_a_running_loop(memory: MemoryStore) -> None:
    memory.store.put(NS, "k", {"a": 1})
    await memory.store.aput(NS, "k2", {"a": 2})
    assert memory.store.get(NS, "k2").value == {"a": 2}
    assert (await memory.store.aget(NS, "k")).value == {"a": 1}


async def test_a_write_does_not_block_the_loop(file_memory: MemoryStore, database: Path) -> None:
    other = sqlite3.connect(database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    put = asyncio.create_task(file_memory.store.aput(NS, "k", {}))
    started = time.monotonic()
    for _ in range(5):
        await asyncio.sleep(0.01)
    assert time.monotonic() - started < 2
    assert not put.done()
    other.execute("ROLLBACK")
    other.close()
    await put
    assert file_memory.store.get(NS, "k") is not None


# -- search by filter -----------------------------------------------------------------------------


def test_search_yields_the_last_written_first(store: Any) -> None:
    for key in ("a", "b", "c"):
        store.put(NS, key, {})
    store.put(NS, "a", {"again": True})
    found = store.search(NS)
    assert keys(found) == ["a", "c", "b"]
    assert {type(item) for item in found} == {SearchItem}
    assert {item.score for item in found} == {None}


def test_search_looks_below_its_prefix_and_nowhere_else(store: Any) -> None:
    for namespace in [("a",), ("a", "b"), ("a", "b", "c"), ("ab",), ("b", "a")]:
        store.put(namespace, "k", {"at": list(namespace)})
    assert {item.namespace for item in store.search(("a",))} == {("a",), ("a", "b"), ("a", "b", "c")}
    assert {item.namespace for item in store.search(("a", "b"))} == {("a", "b"), ("a", "b", "c")}
    assert store.search(("a", "c")) == []
    assert len(store.search(())) == 5


def test_pages_cover_everything_once(store: Any) -> None:
    store.batch([PutOp(NS, f"{n:02}", {"n": n, "odd": bool(n % 2)}) for n in range(25)])
    pages = [store.search(NS, limit=10, offset=offset) for offset in (0, 10, 20, 30)]
    assert [len(page) for page in pages] == [10, 10, 5, 0]
    assert [item.key for page in pages for item in page] == [f"{n:02}" for n in reversed(range(25))]
    odd = [store.search(NS, filter={"odd": True}, limit=5, offset=offset) for offset in (0, 5, 10)]
    assert [item.value["n"] for page in odd for item in page] == list(range(23, 0, -2))
    assert len(store.search(NS)) == 10  # the default limit
    assert store.search(NS, limit=0) == []
    assert len(store.search(NS, limit=10**30)) == 25
    assert store.search(NS, offset=10**30) == []


@pytest.mark.parametrize("page", [{"limit": -1}, {"offset": -1}, {"limit": None}, {"limit": "5"}, {"offset": 1.5}])
def test_a_page_that_is_no_number_is_refused(store: Any, page: dict[str, Any]) -> None:
    with pytest.raises(FilterError, match=r"limit|offset"):
        store.search(NS, **page)
    with pytest.raises(FilterError, match=r"limit|offset"):
        store.list_namespaces(**page)


def test_a_query_without_an_index_lists_by_time_as_upstream(store: Any) -> None:
    store.put(NS, "a", {"text": "x"})
    store.put(NS, "b", {"text": "y"}, index=["text"])
    assert keys(store.search(NS, query="x")) == ["b", "a"]
    assert keys(store.search(NS, query="")) == ["b", "a"]


# -- namespaces -----------------------------------------------------------------------------------

TRICKY = [
    ("a",), ("ab",), ("a", "b"), ("a\x1fb",), ("a\x1f", "b"), ("a", "\x1fb"), ("a\x1b",), ("a\x1bu",), ("a\x1b", "u"),
    ("%",), ("a%",), ("_",), ("a_",), ("aXb",), ("a:b",), ("a*",), ("*",), ("a", "*"), ("A",), ("ä",), ("a ",), ("a!",),
    ("\U0010ffff",), ("\U0010ffffa", "b"), ("a", "b", "c"), ("a/b",), ("a\\b",), ("[a]",), ("a?",), ("a\nb",),
]  # fmt: skip


@pytest.mark.parametrize("prefix", TRICKY, ids=repr)
def test_no_namespace_is_taken_for_another(memory: MemoryStore, prefix: tuple[str, ...]) -> None:
    memory.store.batch([PutOp(namespace, "k", {"at": list(namespace)}) for namespace in TRICKY])
    expected = {namespace for namespace in TRICKY if namespace[: len(prefix)] == prefix}
    found = memory.store.search(prefix, limit=100)
    assert {item.namespace for item in found} == expected
    assert all(item.value["at"] == list(item.namespace) for item in found)
    assert memory.store.get(prefix, "k").value == {"at": list(prefix)}
    if "*" not in prefix:
        assert set(memory.store.list_namespaces(prefix=prefix)) == expected
    memory.store.delete(prefix, "k")
    assert len(memory.store.search((), limit=100)) == len(TRICKY) - 1


TREE = [("a", "b", "c"), ("a", "b", "d", "e"), ("a", "b", "d", "i"), ("a", "b", "f"), ("a", "c", "f"), ("x",)]


@pytest.fixture
def tree(store: Any) -> Any:
    store.batch([PutOp(namespace, key, {}) for namespace in TREE for key in ("k1", "k2")])
    return store


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({}, TREE),
        ({"prefix": ("a", "b")}, TREE[:4]),
        ({"prefix": ("a", "b"), "max_depth": 3}, [("a", "b", "c"), ("a", "b", "d"), ("a", "b", "f")]),
        ({"max_depth": 1}, [("a",), ("x",)]),
        ({"max_depth": 9}, TREE),
        ({"suffix": ("f",)}, [("a", "b", "f"), ("a", "c", "f")]),
        ({"suffix": ("b", "f")}, [("a", "b", "f")]),
        ({"prefix": ("a", "*", "f")}, [("a", "b", "f"), ("a", "c", "f")]),
        ({"prefix": ("*", "c")}, [("a", "c", "f")]),
        ({"prefix": ("*",)}, TREE),
        ({"suffix": ("*", "e")}, [("a", "b", "d", "e")]),
        ({"suffix": ("d", "*")}, [("a", "b", "d", "e"), ("a", "b", "d", "i")]),
        ({"prefix": ("a", "b"), "suffix": ("f",)}, [("a", "b", "f")]),
        ({"prefix": ("a", "b", "f", "g")}, []),
        ({"prefix": ("b",)}, []),
        ({"prefix": ()}, TREE),
        ({"prefix": ["a", "c"]}, [("a", "c", "f")]),
        ({"limit": 2}, TREE[:2]),
        ({"limit": 2, "offset": 2}, TREE[2:4]),
        ({"offset": 5}, TREE[5:]),
        ({"limit": 10**30}, TREE),
        ({"offset": 10**30}, []),
        ({"prefix": ("a", "b"), "limit": 2, "offset": 1}, TREE[1:3]),
        ({"limit": 0}, []),
        ({"max_depth": 2, "limit": 1, "offset": 1}, [("a", "c")]),
    ],
    ids=str,
)
def test_list_namespaces(tree: Any, question: dict[str, Any], answer: list[tuple[str, ...]]) -> None:
    assert tree.list_namespaces(**question) == sorted(answer)


def test_pages_of_namespaces_make_the_whole_list(memory: MemoryStore) -> None:
    def check() -> None:
        whole = memory.store.list_namespaces(limit=1000)
        pages = [memory.store.list_namespaces(limit=3, offset=offset) for offset in range(0, len(whole) + 3, 3)]
        assert [namespace for page in pages for namespace in page] == whole
        assert set(whole) == {item.namespace for item in memory.store.search((), limit=1000)}

    memory.store.batch([PutOp(namespace, "k", {}) for namespace in TRICKY])
    check()
    with memory.transaction():
        memory.store.delete(TRICKY[0], "k")
        memory.store.put(("between",), "k", {})
        memory.store.put(("a\nb", "c"), "k", {})
        check()
    check()


def test_list_namespaces_with_conditions_of_a_batch(tree: Any) -> None:
    conditions = (MatchCondition("suffix", ("f",)), MatchCondition("prefix", ("a", "*")), MatchCondition("prefix", ()))
    assert tree.batch([ListNamespacesOp(conditions)]) == [[("a", "b", "f"), ("a", "c", "f")]]


def test_a_namespace_is_listed_as_long_as_it_holds_an_item(tree: Any) -> None:
    tree.delete(("x",), "k1")
    assert ("x",) in tree.list_namespaces()
    tree.delete(("x",), "k2")
    assert ("x",) not in tree.list_namespaces()


@pytest.mark.parametrize("depth", [0, -1, "1"])
def test_a_depth_that_is_no_number_of_labels_is_refused(store: Any, depth: Any) -> None:
    with pytest.raises(FilterError, match="max_depth"):
        store.list_namespaces(max_depth=depth)


INVALID = [("",), ("a", ""), ("a", 1), ("a.b",), ("a\0b",), ("\ud800",)]


@pytest.mark.parametrize("namespace", [*INVALID, (), ("langgraph", "x")])
def test_put_refuses_an_invalid_namespace(store: Any, memory: MemoryStore, namespace: Any) -> None:
    with pytest.raises(NamespaceError) as caught:
        store.put(namespace, "k", {})
    assert isinstance(caught.value, ValueError)
    assert memory.stats()["facts"] == 0


@pytest.mark.parametrize("namespace", INVALID)
def test_reads_and_deletes_refuse_an_invalid_namespace(store: Any, namespace: Any) -> None:
    for call in (
        lambda: store.get(namespace, "k"),
        lambda: store.search(namespace),
        lambda: store.delete(namespace, "k"),
        lambda: store.list_namespaces(prefix=namespace),
        lambda: store.list_namespaces(suffix=namespace),
    ):
        with pytest.raises(NamespaceError):
            call()


def test_what_langgraph_refuses_is_also_its_own_error(store: Any) -> None:
    with pytest.raises(InvalidNamespaceError) as caught:
        store.get(("a.b",), "k")
    assert isinstance(caught.value, MemStateError)


@pytest.mark.parametrize("key", ["", "\ud800"])
def test_an_invalid_key_is_refused(store: Any, memory: MemoryStore, key: str) -> None:
    for call in (lambda: store.put(NS, key, {}), lambda: store.get(NS, key), lambda: store.delete(NS, key)):
        with pytest.raises(KeyTypeError):
            call()
    assert memory.stats()["facts"] == 0


@pytest.mark.parametrize("value", [[1], "text", 5, {1: 2}, {"a": {1, 2}}])
def test_a_value_that_is_no_json_object_is_refused(store: Any, value: Any) -> None:
    with pytest.raises(SerializationError):
        store.put(NS, "k", value)
    assert store.get(NS, "k") is None


# -- opening --------------------------------------------------------------------------------------


def test_from_conn_string_opens_and_closes(database: Path) -> None:
    with MemStateStore.from_conn_string(str(database)) as store:
        store.setup()
        store.put(NS, "k", {"a": 1})
    assert store.memory.closed
    with MemStateStore.from_conn_string(f"sqlite:///{database}") as store:
        assert store.get(NS, "k").value == {"a": 1}


async def test_from_conn_string_opens_and_closes_asynchronously(database: Path) -> None:
    async with MemStateStore.from_conn_string(str(database)) as store:
        await store.setup()
        await store.aput(NS, "k", {"a": 1})
        assert (await store.aget(NS, "k")).value == {"a": 1}
    assert store.memory.closed


def test_an_error_inside_the_context_closes_the_memory(database: Path) -> None:
    with pytest.raises(FilterError), MemStateStore.from_conn_string(str(database)) as store:
        store.search(NS, limit=-1)
    assert store.memory.closed


# -- beside LangGraph's in-memory store -----------------------------------------------------------
# Differences on purpose: ours yields the last written first and theirs in order of insertion, so whole answers are
# compared as sets; theirs goes on listing a namespace that has become empty, so it is asked afresh; theirs renews
# `created_at` with every put.

LABEL = st.sampled_from(["a", "b", "ab", "%", "*", "\x1f"])
NAMESPACE = st.lists(LABEL, min_size=1, max_size=3).map(tuple)
KEY = st.sampled_from(["k", "l", "m"])
SCALAR = st.none() | st.integers(-2, 11) | st.sampled_from(["", "a", "9", "10"])
VALUE = st.fixed_dictionaries(
    {"n": st.integers(-2, 11)},
    optional={"x": SCALAR | st.lists(SCALAR, max_size=2) | st.dictionaries(LABEL, SCALAR, max_size=2)},
)
OPERATOR = st.sampled_from(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"])
FILTER = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(-2, 11) | st.dictionaries(OPERATOR, st.integers(-2, 11), min_size=1),
        "x": SCALAR | st.lists(SCALAR, max_size=2) | st.fixed_dictionaries({"$ne": SCALAR | st.lists(SCALAR)}),
    },
)
CONDITION = st.tuples(st.sampled_from(["prefix", "suffix"]), NAMESPACE).map(lambda parts: MatchCondition(*parts))
OPS = st.lists(
    st.tuples(NAMESPACE, KEY, st.none() | VALUE).map(lambda parts: PutOp(*parts))
    | st.tuples(NAMESPACE, KEY).map(lambda parts: GetOp(*parts))
    | st.tuples(st.just(()) | NAMESPACE, FILTER, st.just(1_000)).map(lambda parts: SearchOp(*parts))
    | st.tuples(st.none() | st.lists(CONDITION, max_size=2).map(tuple), st.none() | st.integers(1, 3)).map(
        lambda parts: ListNamespacesOp(*parts)
    ),
    max_size=6,
)


def simple(answer: Any) -> Any:
    """An answer without times and order."""
    if isinstance(answer, Item):
        return (answer.namespace, answer.key, repr(answer.value))
    if isinstance(answer, list):
        return sorted(map(simple, answer))
    return answer


@given(batches=st.lists(OPS, max_size=6))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_batches_agree_with_upstream(batches: list[list[Any]]) -> None:
    upstream = InMemoryStore()
    with MemoryStore.open(":memory:") as memory:
        for batch in batches:
            fresh = InMemoryStore()
            held = upstream.search((), limit=10_000)
            fresh.batch([PutOp(item.namespace, item.key, item.value) for item in held])
            expected = [
                (fresh if isinstance(op, ListNamespacesOp) else upstream).batch([op])[0]
                for op in batch
                if not isinstance(op, PutOp)
            ]
            answers = memory.store.batch(batch)
            assert [simple(answer) for op, answer in zip(batch, answers, strict=True) if not isinstance(op, PutOp)] == [
                simple(answer) for answer in expected
            ]
            upstream.batch(batch)
            assert simple(memory.store.search((), limit=10_000)) == simple(upstream.search((), limit=10_000))

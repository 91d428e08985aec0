"""The contract of a hook by itself: what each of its methods must do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import pytest

from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.testing.hook_making import SPEC, HookMaking, needs_fork
from langgraph_memstate.testing.kills import Children, die_in, say

AWKWARD = (
    ("a",), ("ab",), ("a", "b"), ("a.b",), ("a/b",), ("a:b",), ("a\x1f",), ("a\x1fb",), ("a\x1b", "u"), ("a\x1bu",),
    ("%",), ("_",), ("a*", "b"), ("A",), ("a ", "b"), ("\x00", "b"), ("\u00e9",), ("e\u0301",), ("$eq",), ("*",),
    ("'; DROP TABLE x",), ("[a-z]",), ("\U0001f4be" * 300, "b"), ("\U0010ffff",), ("\ud7ff",), ("0",), ("null",),
)  # fmt: skip
"""Namespaces that a careless filter confuses."""


def id_of(name: object) -> str:
    """A vector's id: always a UUID, which is all that a hook may count on."""
    return str(uuid5(NAMESPACE_OID, str(name)))


def axis(number: int, towards: int | None = None, share: float = 0.0) -> Vector:
    """A unit vector along one axis, leaning a little towards another."""
    vector = np.zeros(SPEC.dims, np.float32)
    vector[number % SPEC.dims] = 1.0
    if towards is not None:
        vector[towards] = share
    return vector / np.linalg.norm(vector)


def record(name: object, vector: Vector | None = None, namespace: tuple[str, ...] = ("users", "u1")) -> VectorRecord:
    return VectorRecord(id_of(name), axis(0) if vector is None else vector, namespace)


def many(count: int, start: int = 0) -> list[VectorRecord]:
    vectors = np.random.default_rng(7).normal(size=(start + count, SPEC.dims)).astype(np.float32)[start:]
    return [record(n, vector / np.linalg.norm(vector)) for n, vector in enumerate(vectors, start)]


def apply_all(hook: SyncHook, upserts: Sequence[VectorRecord] = (), deletes: Sequence[str] = ()) -> None:
    """Hand work over as the outbox does: never more than `max_batch` at once."""
    size = hook.capabilities.max_batch
    for start in range(0, len(upserts), size):
        hook.apply(upserts[start : start + size], ())
    for start in range(0, len(deletes), size):
        hook.apply((), deletes[start : start + size])


def ids_of(names: Iterable[object]) -> list[str]:
    return [id_of(name) for name in names]


class HookCalls(HookMaking):
    """Tests of the methods of one hook."""

    # -- writing ----------------------------------------------------------------------------------------

    def test_applying_twice_is_applying_once(self, hook: SyncHook) -> None:
        batch = [record("a", axis(0)), record("b", axis(1))]
        for _ in range(2):
            hook.apply(batch, ids_of(["gone", "never there"]))
        hook.apply([record("c", axis(2)), record("c", axis(2))], [])
        assert sorted(hook.ids()) == sorted(ids_of("abc"))
        for _ in range(2):
            hook.apply([], ids_of("bb"))
        assert sorted(hook.ids()) == sorted(ids_of("ac"))
        assert hook.count() == 2

    def test_applying_again_hides_no_vector(self, hook: SyncHook) -> None:
        """A graph loses its way between groups of equal vectors where some are put in their places once more."""
        records = [record(n, axis(1, 2 + n // 20 % 6, 0.3) if n % 20 == 0 else axis(0)) for n in range(200)]
        apply_all(hook, records)
        queries = [axis(0), *(odd.vector for odd in records[::20])]
        before = [set(hook.query(query, 200)) for query in queries]
        for start in range(5):
            hook.apply(records[start::20], [])
            hook.query(axis(0), 1)
        for query, found in zip(queries, before, strict=True):
            assert found <= set(hook.query(query, 200))

    def test_an_upsert_and_a_delete_of_one_id_leave_nothing(self, hook: SyncHook) -> None:
        hook.apply([record("a")], ids_of("a"))
        assert list(hook.ids()) == []
        assert hook.query(axis(0), 5) == []

    def test_a_removed_id_may_come_back(self, hook: SyncHook) -> None:
        """A commit that failed is tried again with the same ids."""
        hook.apply([record("a"), record("b", axis(1))], [])
        hook.apply([], ids_of("a"))
        hook.apply([record("a")], [])
        assert hook.query(axis(0), 5) == ids_of("ab")
        assert hook.count() == 2

    def test_nothing_to_do(self, hook: SyncHook) -> None:
        hook.apply([], [])
        assert hook.count() == 0

    def test_many_vectors(self, hook: SyncHook) -> None:
        size = hook.capabilities.max_batch
        assert size >= 1
        count = min(3 * size, 1_100) + 1
        apply_all(hook, many(count))
        assert hook.count() == count
        assert sorted(hook.ids()) == sorted(ids_of(range(count)))
        apply_all(hook, deletes=ids_of(range(count - 5)))
        assert sorted(hook.ids()) == sorted(ids_of(range(count - 5, count)))
        assert set(hook.query(axis(0), count)) == set(ids_of(range(count - 5, count)))

    def test_metadata_and_documents_do_no_harm(self, hook: SyncHook) -> None:
        """Whatever the fields hold that the hook asks for: they are a copy for whoever looks."""
        odd: tuple[str | int | float | bool, ...] = (
            "\x00 \U0001f4be '",
            "",
            True,
            -0.5,
            10**400,
            2**63,
            -(2**63),
            1e308,
        )
        records = [record(n, axis(n)) for n in range(len(odd))]
        hook.apply(
            [
                replace(record, metadata=dict.fromkeys(hook.metadata_fields, value), document=document)
                for record, value, document in zip(records, odd, ["likes tea", "", None, "\x00"] * 2, strict=True)
            ],
            [],
        )
        assert sorted(hook.ids()) == sorted(record.id for record in records)
        assert hook.query(axis(2), 1, ("users",)) == [records[2].id]

    # -- asking -----------------------------------------------------------------------------------------

    def test_nearest_first_and_no_more_than_k(self, hook: SyncHook) -> None:
        hook.apply([record("far", axis(3)), record("near", axis(0, 1, 0.2)), record("exact", axis(0))], [])
        assert hook.query(axis(0), 1) == ids_of(["exact"])
        assert hook.query(axis(0), 2) == ids_of(["exact", "near"])
        assert hook.query(axis(0), 1_000) == ids_of(["exact", "near", "far"])
        assert hook.query(axis(0), 0) == []

    def test_the_opposite_is_farther_than_the_unrelated(self, hook: SyncHook) -> None:
        hook.apply([record("opposite", -axis(0)), record("unrelated", axis(1)), record("close", axis(0, 1, 0.9))], [])
        assert hook.query(axis(0), 3) == ids_of(["close", "unrelated", "opposite"])

    def test_the_nearest_of_many(self, hook: SyncHook) -> None:
        records = many(200)
        apply_all(hook, records)
        for query in (axis(0), axis(1, 2, 0.5), -axis(3)):
            best = sorted(records, key=lambda record: float(query @ record.vector), reverse=True)
            assert hook.query(query, 20) == [record.id for record in best[:20]]

    def test_removed_vectors_make_room(self, hook: SyncHook) -> None:
        """Of k vectors asked for, k are found, however many nearer ones there were."""
        apply_all(hook, [record(n, axis(0, 1, n / 1_000)) for n in range(100)])
        hook.apply([record("far", axis(5))], [])
        apply_all(hook, deletes=ids_of(range(100)))
        assert hook.query(axis(0), 1) == ids_of(["far"])

    def test_an_empty_index_answers(self, hook: SyncHook) -> None:
        for _ in range(2):
            assert hook.query(axis(0), 10) == []
            assert hook.query(axis(0), 10, ("users",)) == []
            assert (hook.count(), list(hook.ids())) == (0, [])
            hook.apply([record("a")], [])
            hook.apply([], ids_of("a"))

    def test_namespaces_cannot_be_confused(self, hook: SyncHook) -> None:
        hook.apply([record(n, axis(0), namespace) for n, namespace in enumerate(AWKWARD)], [])
        for prefix in AWKWARD:
            under = {id_of(n) for n, namespace in enumerate(AWKWARD) if namespace[: len(prefix)] == prefix}
            assert set(hook.query(axis(0), 100, prefix)) == under, prefix
        assert hook.query(axis(0), 100, ("nowhere",)) == []
        assert hook.query(axis(0), 100, ("a", "b", "c")) == []
        assert len(hook.query(axis(0), 100)) == len(AWKWARD)

    def test_deep_namespaces(self, hook: SyncHook) -> None:
        path = tuple(f"level {depth}" for depth in range(40))
        apply_all(hook, [record(depth, axis(0), path[:depth]) for depth in range(1, 41)])
        for depth in (1, 2, 17, 39, 40):
            assert set(hook.query(axis(0), 100, path[:depth])) == set(ids_of(range(depth, 41)))
        assert hook.query(axis(0), 100, (*path, "below")) == []

    def test_a_prefix_finds_what_is_far_away(self, hook: SyncHook) -> None:
        """A filter that is applied after the search would find nothing here."""
        apply_all(hook, [record(n, axis(0, 1, n / 1_000), ("crowd",)) for n in range(150)])
        hook.apply([record("alone", axis(4), ("quiet", "corner"))], [])
        assert hook.query(axis(0), 3, ("quiet",)) == ids_of(["alone"])

    def test_any_thread_may_call(self, hook: SyncHook) -> None:
        """One at a time, but not always the same."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                hook.apply([record("b", axis(1))], ids_of("a"))
                assert hook.query(axis(0), 5) == ids_of("b")
                assert list(hook.ids()) == ids_of("b")
            except BaseException as error:
                failed.append(error)

        hook.apply([record("a")], [])
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failed
        assert hook.count() == 1

    # -- opening ----------------------------------------------------------------------------------------

    def test_what_open_finds(self, restart: Callable[[], SyncHook]) -> None:
        hook = self.filled(restart())
        assert hook.open(SPEC) in (IndexState.EMPTY, IndexState.OK)
        hook.reset(SPEC)
        hook.apply([record("a")], [])
        assert hook.open(SPEC) is IndexState.OK
        assert list(hook.ids()) == ids_of("a")

    def test_a_restart(self, restart: Callable[[], SyncHook]) -> None:
        hook = self.filled(restart())
        name = hook.name
        records = many(30)
        apply_all(hook, records, ids_of(range(10)))
        hook = restart()
        assert hook.name == name, "rows of the outbox carry the name"
        found = hook.open(SPEC)
        if self.persists:
            assert found is IndexState.OK
        if found is not IndexState.OK:
            assert found is IndexState.EMPTY
            hook.reset(SPEC)
            apply_all(hook, records[10:])
        assert sorted(hook.ids()) == sorted(ids_of(range(10, 30)))
        best = max(records[10:], key=lambda record: float(axis(0) @ record.vector))
        assert hook.query(axis(0), 1) == [best.id]
        hook.apply([record("later", axis(0))], [])
        assert hook.query(axis(0), 1) == ids_of(["later"])

    @pytest.mark.parametrize(
        "other",
        [
            replace(SPEC, generation=2),
            replace(SPEC, store_id="another store"),
            replace(SPEC, model="another model"),
            replace(SPEC, dims=SPEC.dims + 1),
        ],
        ids=["generation", "store", "model", "dims"],
    )
    @pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
    def test_built_from_something_else(self, restart: Callable[[], SyncHook], other: IndexSpec, closed: bool) -> None:
        hook = self.filled(restart())
        hook.apply([record("a")], [])
        if closed:
            if not self.persists:
                pytest.skip("nothing is left to differ")
            hook = restart()
        assert hook.open(other) is IndexState.MISMATCH
        hook.reset(other)
        assert (hook.count(), list(hook.ids())) == (0, [])
        vector = np.ones(other.dims, np.float32) / np.float32(np.sqrt(other.dims))
        hook.apply([record("b", vector)], [])
        assert hook.open(other) is IndexState.OK
        assert hook.query(vector, 5) == ids_of("b")
        assert hook.open(SPEC) is IndexState.MISMATCH

    def test_reset_leaves_nothing(self, restart: Callable[[], SyncHook]) -> None:
        hook = self.filled(restart())
        apply_all(hook, many(20))
        hook.reset(SPEC)
        assert (hook.count(), list(hook.ids()), hook.query(axis(0), 9)) == (0, [], [])
        hook = restart()
        found = hook.open(SPEC)
        assert found in (IndexState.EMPTY, IndexState.OK)
        if found is IndexState.EMPTY:
            hook.reset(SPEC)
        assert (hook.count(), list(hook.ids()), hook.query(axis(0), 9)) == (0, [], [])

    def test_two_hooks_in_one_process(self, hook: SyncHook, tmp_path: Path) -> None:
        """They share the index, or one is told that it is busy. Neither goes on with what the other has dropped."""
        if not self.persists:
            pytest.skip("nothing is shared")
        hook.apply([record("a")], [])
        second = self.make_hook(tmp_path)
        found = second.open(SPEC)
        if found is not IndexState.BUSY:
            assert found is IndexState.OK
            second.apply([record("b", axis(1))], [])
            hook.apply([record("c", axis(2))], [])
            for one in (hook, second):
                assert sorted(one.ids()) == sorted(ids_of("abc"))
                assert one.query(axis(1), 1) == ids_of("b")
            other = replace(SPEC, store_id="another store")
            assert second.open(other) is IndexState.MISMATCH
            second.reset(other)
            second.apply([record("d")], [])
            for call in (hook.count, lambda: hook.query(axis(0), 1), lambda: hook.apply([record("e")], [])):
                with pytest.raises(Exception, match=r"."):
                    call()
            assert list(second.ids()) == ids_of("d")
        second.close()

    # -- processes --------------------------------------------------------------------------------------

    def write_until_killed(self, folder: str, start: str, delay: str) -> None:
        """In a child: say what was acknowledged, one line a batch."""
        hook = self.make_hook(Path(folder))
        if hook.open(SPEC) is not IndexState.OK:
            hook.reset(SPEC)
        first = int(start)
        die_in(float(delay))
        while True:
            hook.apply(many(10, first), ())
            hook.apply((), ids_of(range(first, first + 2)))
            say(first)
            first += 10

    @needs_fork
    def test_killed_while_it_writes(self, tmp_path: Path, children: Children) -> None:
        """An index that lacks what it had acknowledged never says that it is well."""
        if not self.persists:
            pytest.skip("nothing outlives a process")
        first = 0
        kept: set[str] = set()
        for delay in (0.02, 0.051, 0.11, 0.173):
            lines, status = children.call("write_until_killed", tmp_path, first, delay)
            assert status < 0, "it was to be killed"
            for start in map(int, lines):
                kept |= set(ids_of(range(start + 2, start + 10)))
                first = start + 10
            hook = self.make_hook(tmp_path)
            found = hook.open(SPEC)
            assert found is not IndexState.BUSY, "the lock of a process that was killed is free"
            if found is IndexState.OK:
                held = set(hook.ids())
                assert kept <= held <= kept | set(ids_of(range(first, first + 10)))
                assert set(hook.query(axis(0), len(held))) == held
                kept = held
            else:
                hook.reset(SPEC)
                assert list(hook.ids()) == []
                kept = set()
            first += 10
            hook.apply([record(first)], [])
            kept.add(id_of(first))
            first += 1
            hook.close()

    def hold(self, folder: str, until: str) -> None:
        """In a child: be the owner until a file is there."""
        hook = self.filled(self.make_hook(Path(folder)))
        hook.apply([record("a")], [])
        say("ready")
        deadline = time.monotonic() + 60
        while not Path(until).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        hook.close()

    @needs_fork
    def test_two_processes(self, tmp_path: Path, children: Children) -> None:
        """Both use it, or one is told that it is busy."""
        if not self.persists:
            pytest.skip("nothing is shared")
        enough = tmp_path / "enough"
        children.start("hold", tmp_path, enough)
        assert children.line() == "ready"
        hook = self.make_hook(tmp_path)
        try:
            found = hook.open(SPEC)
            if hook.capabilities.multiprocess:
                assert found is IndexState.OK
                hook.apply([record("b")], [])
                assert set(hook.ids()) == set(ids_of("ab"))
            else:
                assert found is IndexState.BUSY
        finally:
            enough.touch()
            ended = children.line()
        assert ended.endswith(" 0")
        assert hook.open(SPEC) is IndexState.OK
        assert id_of("a") in set(hook.ids())
        hook.close()

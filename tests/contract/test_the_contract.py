"""The contract of a hook catches what a hook may do wrong: each seeded mistake fails the test that is there for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.hooks.faiss import FaissSyncHook
from langgraph_memstate.hooks.faiss_files import FaissFiles
from langgraph_memstate.testing import SyncHookContract
from langgraph_memstate.testing.faults import FaultyHook
from langgraph_memstate.testing.hook_search import index_is_asked
from langgraph_memstate.testing.kills import Children


class Sound(FaissSyncHook):
    """A hook without a mistake."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path / "index")


class NotIdempotent(Sound):
    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        held = set(self.ids()) | {record.id for record in upserts}
        for id_ in deletes:
            if id_ not in held:
                raise AssertionError(f"{id_} is not there")
        super().apply(upserts, deletes)


class DeletesFirst(Sound):
    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        super().apply((), deletes)
        super().apply(upserts, ())


class JoinsLabels(Sound):
    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        super().apply([replace(one, namespace=tuple("/".join(one.namespace))) for one in upserts], deletes)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        return super().query(vector, k, tuple("/".join(namespace)))


class FiltersAfterwards(Sound):
    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        under = set(super().query(vector, 10_000, namespace))
        return [id_ for id_ in super().query(vector, k) if id_ in under]


class FarthestFirst(Sound):
    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        return super().query(vector, k, namespace)[::-1]


class IgnoresSign(Sound):
    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        first, *rest = super().query(vector, k, namespace)
        return [first, *rest[::-1]]


class IgnoresK(Sound):
    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        return super().query(vector, max(k, 100), namespace)


class ShortOfIds(Sound):
    def ids(self) -> Iterator[str]:
        return iter(list(super().ids())[:200])


class IgnoresTheSpec(Sound):
    def open(self, spec: IndexSpec) -> IndexState:
        found = super().open(spec)
        return IndexState.OK if found is IndexState.MISMATCH else found


class KeepsAfterReset(Sound):
    def reset(self, spec: IndexSpec) -> None:
        if self._collection is None or self._collection._vectors is None:
            super().reset(spec)


class LosesTheLast(Sound):
    """Acknowledges what it has not written."""

    kept: Any = None

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        append, written = FaissFiles.append, type(self).kept or 0
        type(self).kept = written + 1
        if written % 3:
            FaissFiles.append = lambda *args: None  # type: ignore[method-assign]
        try:
            super().apply(upserts, deletes)
        finally:
            FaissFiles.append = append  # type: ignore[method-assign]


class LosesSome(Sound):
    """Forgets every other vector, and says nothing."""

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        super().apply(upserts[::2], deletes)


CALLS: list[tuple[Callable[[Path], SyncHook], str]] = [
    (NotIdempotent, "test_applying_twice_is_applying_once"),
    (DeletesFirst, "test_an_upsert_and_a_delete_of_one_id_leave_nothing"),
    (LosesSome, "test_many_vectors"),
    (ShortOfIds, "test_many_vectors"),
    (FarthestFirst, "test_nearest_first_and_no_more_than_k"),
    (IgnoresK, "test_nearest_first_and_no_more_than_k"),
    (IgnoresSign, "test_the_opposite_is_farther_than_the_unrelated"),
    (FarthestFirst, "test_the_nearest_of_many"),
    (JoinsLabels, "test_namespaces_cannot_be_confused"),
    (FiltersAfterwards, "test_a_prefix_finds_what_is_far_away"),
]


def contract_of(make: Callable[[Path], SyncHook]) -> Any:
    class Contract(SyncHookContract):
        def make_hook(self, tmp_path: Path) -> SyncHook:
            return make(tmp_path)

    return Contract()


@pytest.mark.parametrize(("mistake", "test"), CALLS)
def test_a_mistake_in_a_call(tmp_path: Path, mistake: Callable[[Path], SyncHook], test: str) -> None:
    for make, caught in ((Sound, False), (mistake, True)):
        folder = tmp_path / make.__name__  # type: ignore[attr-defined]
        contract = contract_of(make)
        hook = contract.filled(contract.make_hook(folder))
        if caught:
            with pytest.raises(AssertionError):
                getattr(contract, test)(hook)
        else:
            getattr(contract, test)(hook)
        hook.close()


@pytest.mark.parametrize(
    ("mistake", "test"),
    [(IgnoresTheSpec, "test_built_from_something_else"), (KeepsAfterReset, "test_reset_leaves_nothing")],
)
def test_a_mistake_at_open(tmp_path: Path, mistake: Callable[[Path], SyncHook], test: str) -> None:
    made: list[SyncHook] = []

    def restart() -> SyncHook:
        for hook in made:
            hook.close()
        made[:] = [mistake(tmp_path)]
        return made[0]

    other = (IndexSpec("store", 2, 8, "model"), False) if test == "test_built_from_something_else" else ()
    with pytest.raises(AssertionError):
        getattr(contract_of(mistake), test)(restart, *other)
    made[0].close()


class Unsaved(SyncHookContract):
    def make_hook(self, tmp_path: Path) -> SyncHook:
        return LosesTheLast(tmp_path)


def test_an_acknowledgement_that_comes_too_early(tmp_path: Path) -> None:
    children = Children(Unsaved, ("faiss",))
    try:
        with pytest.raises(AssertionError):
            Unsaved().test_killed_while_it_writes(tmp_path, children)
    finally:
        children.close()


def test_a_vector_that_a_memory_misses(tmp_path: Path) -> None:
    with index_is_asked(), pytest.raises(AssertionError):
        contract_of(LosesSome).test_search_says_what_sql_holds(tmp_path, "atomic")


def test_the_index_is_asked(tmp_path: Path) -> None:
    """Or the tests of search would test a scan of SQL."""
    hook = FaultyHook(Sound(tmp_path))

    class Contract(SyncHookContract):
        def make_hook(self, tmp_path: Path) -> SyncHook:
            return hook

    with index_is_asked():
        Contract().test_search_says_what_sql_holds(tmp_path, "atomic")
    assert [method for method, _ in hook.calls].count("query") > 10


def test_pytest_is_imported_with_a_contract_only() -> None:
    script = """
import sys
import langgraph_memstate.testing.faults
assert "pytest" not in sys.modules
from langgraph_memstate.testing import SyncHookContract
assert "pytest" in sys.modules
import langgraph_memstate.testing
try:
    langgraph_memstate.testing.Contract
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "Contract" in done.stdout, done.stderr

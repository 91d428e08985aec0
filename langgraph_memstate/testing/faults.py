"""A vector database and a storage that fail when a test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

from langgraph_memstate.hooks.base import Capabilities, IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.storage.base import IndexTable, Reader, Storage
from langgraph_memstate.storage.operations import Commit
from langgraph_memstate.storage.values import OutboxRow

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Fault:
    """What goes wrong in the calls of one method, and how often still (None: until it is healed)."""

    method: str
    error: BaseException | None
    left: int | None
    late: bool
    only: Callable[..., bool]
    then: Callable[[], object] | None

    def strike(self, args: Sequence[Any], *, late: bool) -> None:
        if self.late is not late or self.left == 0 or not self.only(*args):
            return
        if self.left is not None:
            self.left -= 1
        if self.then is not None:
            self.then()
        if self.error is not None:
            raise self.error


class FaultyHook(SyncHook):
    """Another hook, with faults.

    `calls` notes every call that reached this hook: the method and its arguments.
    """

    def __init__(self, inner: SyncHook) -> None:
        self.inner = inner
        self.name = inner.name
        self.fields = inner.fields
        self.metadata_fields = inner.metadata_fields
        self.store_documents = inner.store_documents
        self.embedding = inner.embedding
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._faults: list[Fault] = []

    def fail(
        self,
        *methods: str,
        error: BaseException | None = None,
        times: int | None = None,
        late: bool = False,
        only: Callable[..., bool] = lambda *args: True,
    ) -> None:
        """Fail in these methods: before the call reaches the database or, when `late`, after it did its work.

        Default error: `ConnectionError`. `only` looks at the arguments of a call.
        """
        for method in methods:
            fault = error if error is not None else ConnectionError(f"{method}: the vector database is away")
            self._faults.append(Fault(method, fault, times, late, only, None))

    def meanwhile(self, method: str, then: Callable[[], object], *, times: int | None = 1, late: bool = False) -> None:
        """Run something in the middle of a call, as another thread or process might."""
        self._faults.append(Fault(method, None, times, late, lambda *args: True, then))

    def go_away(self) -> None:
        """Fail in everything but `close`, until `heal`."""
        self.fail("open", "reset", "apply", "query", "ids", "count")

    def heal(self) -> None:
        self._faults.clear()

    def _call(self, method: str, inner: Callable[..., T], *args: Any) -> T:
        self.calls.append((method, args))
        for fault in list(self._faults):
            if fault.method == method:
                fault.strike(args, late=False)
        result = inner(*args)
        for fault in list(self._faults):
            if fault.method == method:
                fault.strike(args, late=True)
        return result

    # -- the seam -----------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # the inner hook may learn it as it opens
        return self.inner.capabilities

    def join(self, table: Any) -> None:
        self.inner.join(table)

    def open(self, spec: IndexSpec) -> IndexState:
        return self._call("open", self.inner.open, spec)

    def reset(self, spec: IndexSpec) -> None:
        self._call("reset", self.inner.reset, spec)

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        self._call("apply", self.inner.apply, upserts, deletes)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        return self._call("query", self.inner.query, vector, k, namespace)

    def ids(self) -> Iterator[str]:
        return self._call("ids", self.inner.ids)

    def count(self) -> int:
        return self._call("count", self.inner.count)

    def close(self) -> None:
        self._call("close", self.inner.close)


class FaultPoints:
    """Counts the points a run passes, from any thread, and raises at number `at` (0: never).

    A run that is repeated with `at` = 1, 2, 3 … until it does not raise any more has failed at every one of its points.
    `for_ever`: also raise at all later points, until `heal`.
    """

    def __init__(self, at: int = 0, error: BaseException | None = None, *, for_ever: bool = False) -> None:
        self.passed = 0
        self.struck = False
        self._at = at
        self._error = error if error is not None else OSError("a fault that a test asked for")
        self._for_ever = for_ever
        self._healed = False
        self._lock = Lock()

    def point(self) -> None:
        with self._lock:
            self.passed += 1
            strikes = self.passed == self._at or (self._for_ever and self.passed > self._at > 0)
            if strikes and not self._healed:
                self.struck = True
                raise self._error

    def heal(self) -> None:
        self._healed = True

    def watch(self, hook: FaultyHook) -> None:
        """Make a point of every call of a hook, before and after the database did its work."""
        for method in ("open", "reset", "apply", "query", "ids", "count"):
            for late in (False, True):
                hook.meanwhile(method, self.point, times=None, late=late)


class FaultyStorage(Storage):
    """Another storage, which calls `point` before and after every group of commits and every snapshot.

    What `point` raises after a group strikes when it has landed: its callers are told of an error, and cannot know.
    """

    def __init__(self, inner: Storage, point: Callable[[], object]) -> None:
        self.inner = inner
        self._point = point

    def open(self) -> str:
        return self.inner.open()

    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        self._point()
        outcomes = self.inner.apply(commits)
        self._point()
        return outcomes

    @contextmanager
    def snapshot(self) -> Iterator[Reader]:
        self._point()
        with self.inner.snapshot() as reader:
            yield reader
        self._point()

    def claim(self, index: str, *, due: float, limit: int, lease: float) -> list[OutboxRow]:
        self._point()
        return self.inner.claim(index, due=due, limit=limit, lease=lease)

    def scrub(self) -> None:
        self._point()
        self.inner.scrub()
        self._point()

    def vacuum(self) -> None:
        self._point()
        self.inner.vacuum()
        self._point()

    def close(self) -> None:
        self.inner.close()

    def index_table(self, name: str) -> IndexTable:
        return self.inner.index_table(name)

    @property
    def keeps_indexes(self) -> bool:
        return self.inner.keeps_indexes

    @property
    def location(self) -> Any:
        return self.inner.location

"""Vectors of every current version in one array of this process: an exact search that does not read them from SQL.

It follows the log: what was committed since it looked last, by this process or another, is added and removed before
each search, under a snapshot that is as new. It gives candidates; their records, and whether they match and have not
expired, are SQL's.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from langgraph_memstate.facts import namespace_range
from langgraph_memstate.storage.base import Reader, Snapshots
from langgraph_memstate.storage.values import VectorMark

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from langgraph_memstate.hooks.base import Vector

BUDGET = 256 * 2**20  # bytes; what does not fit is scanned in SQL
_FIRST_ROWS = 1024
_GATHER = 8  # copying so small a part of the rows together is cheaper than a product with all of them


class VectorMatrix:
    """The vectors of one index and model. One search at a time."""

    def __init__(self, index: str, model: str) -> None:
        self._index = index
        self._model = model
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._mark: VectorMark | None = None
        self._too_many = 0
        self._rows: NDArray[np.float32] | None = None
        self._versions: list[str | None] = []
        self._namespaces: list[str] = []
        self._free: list[int] = []
        self._of_version: dict[str, list[int]] = {}
        self._under: dict[str, set[int]] = {}
        self._sorted: list[str] | None = None
        self._arrays: dict[str, NDArray[np.intp]] = {}

    @contextmanager
    def following(self, storage: Snapshots) -> Iterator[tuple[Reader, VectorMatrix | None]]:
        """A snapshot, and the matrix as of it; None where the vectors do not fit into the budget."""
        with self._lock, storage.snapshot() as reader:
            yield reader, self if self._follow(reader) else None

    def _follow(self, reader: Reader) -> bool:
        mark = reader.vector_mark()
        if self._mark is not None and self._mark.epoch != mark.epoch:
            self._clear()  # vectors were erased, and with them the numbers by which new ones are told
        if mark == self._mark:
            return True
        if self._mark is None:
            if mark.vector < 2 * self._too_many:
                return False  # there were too many, and as many again would have to go
            if reader.vector_bytes(self._index, self._model, BUDGET) > BUDGET:
                self._too_many = mark.vector
                return False
        try:
            self._catch_up(reader, self._mark or VectorMark(mark.seq, 0, mark.epoch))
        except BaseException:
            self._clear()  # half of what is new would be added again
            raise
        self._mark = mark
        if self._rows is not None and self._rows.nbytes > 2 * BUDGET:
            self._clear()
            self._too_many = mark.vector
            return False
        return True

    def _catch_up(self, reader: Reader, since: VectorMark) -> None:
        for version in reader.superseded(after=since.seq):
            self._remove(version)
        for namespace, version, vector in reader.new_vectors(self._index, self._model, after=since.vector):
            self._add(namespace, version, vector)

    def _add(self, namespace: str, version: str, data: bytes) -> None:
        import numpy as np

        vector = np.frombuffer(data, dtype="<f4")
        if self._free:
            row = self._free.pop()
        else:
            row = len(self._versions)
            self._versions.append(None)
            self._namespaces.append("")
            if self._rows is None or row >= len(self._rows):
                grown = np.zeros((max(_FIRST_ROWS, 2 * row), len(vector)), dtype=np.float32)
                if self._rows is not None:
                    grown[:row] = self._rows
                self._rows = grown
        assert self._rows is not None
        self._rows[row] = vector
        self._versions[row], self._namespaces[row] = version, namespace
        self._of_version.setdefault(version, []).append(row)
        if namespace not in self._under:
            self._under[namespace], self._sorted = set(), None
        self._under[namespace].add(row)
        self._arrays.pop(namespace, None)

    def _remove(self, version: str) -> None:
        for row in self._of_version.pop(version, ()):
            namespace = self._namespaces[row]
            self._under[namespace].discard(row)
            self._arrays.pop(namespace, None)
            if not self._under[namespace]:
                del self._under[namespace]
                self._sorted = None
            self._versions[row] = None
            self._free.append(row)

    # -- asking -------------------------------------------------------------------------------------

    def count(self, prefix: Sequence[str]) -> int:
        """How many vectors lie under a namespace prefix."""
        if not prefix:
            return len(self._versions) - len(self._free)
        return sum(len(self._under[namespace]) for namespace in self._labels(prefix))

    def nearest(self, query: Vector, prefix: Sequence[str], count: int) -> tuple[dict[str, float], bool]:
        """Versions under a prefix by the score of their nearest vector, and whether those are all there are.

        At least those of the `count` nearest vectors, and every one as near as the last of them.
        """
        import numpy as np

        if self._rows is None:
            return {}, True
        rows = self._selection(prefix)
        if rows is None:
            scores: Any = self._rows[: len(self._versions)] @ query
            scores[self._free] = -np.inf
        elif len(rows) * _GATHER > len(self._versions):
            scores = (self._rows[: len(self._versions)] @ query)[rows]
        else:
            scores = self._rows[rows] @ query
        held = len(scores) - (len(self._free) if rows is None else 0)
        if count < held:
            bound = np.partition(scores, len(scores) - count)[len(scores) - count]
            chosen = np.flatnonzero(scores >= bound - _ROUNDING)
        else:
            chosen = np.flatnonzero(scores > -np.inf)
        found: dict[str, float] = {}
        for position in chosen:
            row = int(position if rows is None else rows[position])
            version = self._versions[row]
            assert version is not None
            # One product a vector: that of a matrix may differ in the last bit from row to row.
            score = float(query @ self._rows[row])
            found[version] = max(score, found.get(version, -2.0))
        return found, len(chosen) == held

    def score(self, query: Vector, version: str) -> float | None:
        """The score of a version's nearest vector; None where it has none."""
        if self._rows is None:
            return None
        return max((float(query @ self._rows[row]) for row in self._of_version.get(version, ())), default=None)

    def _selection(self, prefix: Sequence[str]) -> NDArray[np.intp] | None:
        """The rows under a prefix; None for all."""
        import numpy as np

        if not prefix:
            return None
        parts = []
        for namespace in self._labels(prefix):
            if namespace not in self._arrays:
                under = self._under[namespace]
                self._arrays[namespace] = np.fromiter(under, dtype=np.intp, count=len(under))
            parts.append(self._arrays[namespace])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.intp)

    def _labels(self, prefix: Sequence[str]) -> list[str]:
        if self._sorted is None:
            self._sorted = sorted(self._under)
        low, high = namespace_range(prefix)
        return self._sorted[bisect_left(self._sorted, low) : bisect_left(self._sorted, high)]


_ROUNDING = 1e-5  # how far two ways to add up the same products may differ, generously

"""Vectors in memory, searched by FAISS: exactly (flat), or along a graph of neighbours (HNSW)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from langgraph_memstate.facts import encode_namespace, namespace_range
from langgraph_memstate.hooks.base import Vector, VectorRecord

Kind = Literal["flat", "hnsw"]

_NEIGHBOURS = 16
_BREADTH = 200  # candidates that a graph search keeps, at least
_SCAN_BELOW = 5_000  # so few are scanned faster than a graph is walked, and with recall 1
_WASTE = 1_000  # removed vectors that are tolerated, beyond as many as there are live ones


class FaissVectors:
    """Each vector has a position in the FAISS index, which is never given to another.

    A removed vector stays at its position, masked, until there are more removed than live ones: HNSW cannot remove, and
    removing from a flat index moves everything behind.
    """

    def __init__(self, dims: int, kind: Kind) -> None:
        self.dims = dims
        self.kind = kind
        self._clear()

    def _clear(self) -> None:
        self._index = _make_index(self.dims, self.kind)
        self._ids: list[str | None] = []  # by position; None where the vector was removed
        self._paths: list[str] = []  # by position: the encoded namespace
        self._positions: dict[str, int] = {}
        self._live = np.zeros(0, bool)
        self._members: dict[str, set[int]] = {}  # positions of live vectors by encoded namespace
        self._sorted: list[str] = []  # those namespaces, so that a prefix is a range of them

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._positions))

    # -- writing --------------------------------------------------------------------------------------

    def put(self, records: Sequence[VectorRecord]) -> None:
        self.add(
            [record.id for record in records],
            [encode_namespace(record.namespace) for record in records],
            np.stack([record.vector for record in records]).astype(np.float32, copy=False),
        )

    def add(self, ids: Sequence[str], paths: Sequence[str], vectors: npt.NDArray[np.float32]) -> None:
        """Store vectors, shape (len(ids), dims); the last of several with one id counts."""
        self._index.add(np.ascontiguousarray(vectors))
        self._live = np.concatenate([self._live, np.zeros(len(ids), bool)])
        for id_, path in zip(ids, paths, strict=True):
            self._forget(id_)
            self._remember(id_, path)
        self._compact()

    def remove(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            self._forget(id_)
        self._compact()

    def _remember(self, id_: str, path: str) -> None:
        position = len(self._ids)
        self._ids.append(id_)
        self._paths.append(path)
        self._positions[id_] = position
        self._live[position] = True
        if path not in self._members:
            self._members[path] = set()
            insort(self._sorted, path)
        self._members[path].add(position)

    def _forget(self, id_: str) -> None:
        position = self._positions.pop(id_, None)
        if position is None:
            return
        self._ids[position] = None
        self._live[position] = False
        path = self._paths[position]
        self._members[path].discard(position)
        if not self._members[path]:
            del self._members[path]
            del self._sorted[bisect_left(self._sorted, path)]

    def _compact(self) -> None:
        if len(self._ids) - len(self) <= len(self) + _WASTE:
            return
        positions = np.flatnonzero(self._live)
        ids = [cast(str, self._ids[position]) for position in positions]
        paths = [self._paths[position] for position in positions]
        vectors = self._index.reconstruct_batch(positions) if ids else np.zeros((0, self.dims), np.float32)
        self._clear()
        self.add(ids, paths, vectors)

    # -- searching ------------------------------------------------------------------------------------

    def nearest(self, vector: Vector, k: int, namespace: Sequence[str]) -> list[str]:
        """Ids of up to `k` vectors under a namespace prefix, nearest first."""
        allowed = self._under(namespace) if namespace else self._live
        wanted = min(k, int(np.count_nonzero(allowed)))
        if wanted < 1:
            return []
        query = np.asarray(vector, np.float32)[None, :]
        found = self._ask(query, wanted, allowed)
        return [cast(str, self._ids[position]) for position in found]

    def _ask(self, query: npt.NDArray[np.float32], k: int, allowed: npt.NDArray[np.bool_]) -> list[int]:
        import faiss

        scanned: Any = self._index
        selector = None if allowed.all() else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self.kind == "hnsw":
            if np.count_nonzero(allowed) > _SCAN_BELOW:
                breadth = faiss.SearchParametersHNSW(efSearch=max(_BREADTH, k), sel=selector)
                found = self._index.search(query, k, params=breadth)[1][0]
                if (found >= 0).all():
                    return [int(position) for position in found]
            scanned = faiss.downcast_index(self._index.storage)  # what the graph could not reach
        params = None if selector is None else faiss.SearchParameters(sel=selector)
        found = scanned.search(query, k, params=params)[1][0]
        return [int(position) for position in found if position >= 0]

    def _under(self, namespace: Sequence[str]) -> npt.NDArray[np.bool_]:
        low, high = namespace_range(namespace)
        mask = np.zeros(len(self._ids), bool)
        for path in self._sorted[bisect_left(self._sorted, low) : bisect_left(self._sorted, high)]:
            mask[list(self._members[path])] = True
        return mask

    # -- as bytes -------------------------------------------------------------------------------------

    def dump(self) -> tuple[dict[str, Any], bytes]:
        """What `load` takes: a description that is JSON, and FAISS's own form of the index."""
        import faiss

        return {"ids": self._ids, "paths": self._paths}, faiss.serialize_index(self._index).tobytes()

    @classmethod
    def load(cls, dims: int, kind: Kind, described: dict[str, Any], index: bytes) -> FaissVectors:
        """The inverse of `dump`.

        Raises:
            ValueError: the two do not belong together.
        """
        import faiss

        loaded = cls(dims, kind)
        loaded._index = faiss.deserialize_index(np.frombuffer(index, np.uint8))
        ids, paths = described["ids"], described["paths"]
        dims_found, count = loaded._index.d, loaded._index.ntotal
        if (dims_found, count) != (dims, len(ids)):
            raise ValueError(f"{count} vectors of {dims_found} dimensions, not {len(ids)} of {dims}")
        loaded._live = np.zeros(len(ids), bool)
        for id_, path in zip(ids, paths, strict=True):
            if id_ is None:
                loaded._ids.append(None)
                loaded._paths.append(path)
            else:
                loaded._remember(id_, path)
        return loaded


def _make_index(dims: int, kind: Kind) -> Any:
    import faiss

    if kind == "hnsw":
        return faiss.IndexHNSWFlat(dims, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexFlatIP(dims)

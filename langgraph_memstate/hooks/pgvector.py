"""The index in the PostgreSQL database that holds the facts: one transaction writes both.

There is nothing here to replay: the database writes the vectors of a commit, and removes those of what it supersedes,
in the transaction that publishes the facts. What is left of a hook is whose index it is, and how it is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.hooks.base import Capabilities, IndexSpec, IndexState, SyncHook, Vector, VectorRecord

_BATCH = 250
_NAME = re.compile(r"[^\x00-\x1f]{1,255}")


class Table(Protocol):
    """An index in a database; see `storage.base.IndexTable`."""

    def find(self) -> tuple[str, int, int, str] | None: ...
    def make(self, built: IndexSpec) -> None: ...
    def put(
        self, built: IndexSpec, rows: Sequence[tuple[str, tuple[str, ...], bytes]], deletes: Sequence[str]
    ) -> None: ...
    def nearest(self, built: IndexSpec, vector: bytes, count: int, prefix: Sequence[str]) -> list[str]: ...
    def ids(self, built: IndexSpec) -> list[str]: ...
    def count(self, built: IndexSpec) -> int: ...


class PgvectorSyncHook(SyncHook):
    """Keeps the vectors of a memory in its own PostgreSQL database, with the extension pgvector (0.8 or later).

    Args:
        collection_name: tells the indexes of one memory apart.
        text_field: path of the value that is embedded; None leaves it to the memory's index.
        embedding: a LangChain `Embeddings` or a function from texts to vectors; None leaves it to the memory's index.

    Facts and vectors land in one transaction, so `vector_sync` makes no difference. An HNSW index serves up to 2,000
    dimensions, and up to 4,000 with vectors of half precision; with more, every vector is compared. The extension is
    made where it is missing and the role may.

    Raises:
        IndexConfigError: the arguments make no sense, or (from `add_hook`) the memory is not on PostgreSQL, or its
            server lacks the extension.
    """

    capabilities = Capabilities(transactional=True, multiprocess=True, max_batch=_BATCH)

    def __init__(
        self,
        collection_name: str = "memory",
        text_field: str | None = None,
        embedding: Any = None,
    ) -> None:
        if not isinstance(collection_name, str) or not _NAME.fullmatch(collection_name):
            raise IndexConfigError(
                f"collection_name {collection_name!r} is no name: 1 to 255 characters, and no control characters"
            )
        self.name = f"pgvector:{collection_name}"
        self.fields = (text_field,) if text_field else None
        self.embedding = embedding
        self._table: Table | None = None
        self._spec: IndexSpec | None = None

    def join(self, table: Any) -> None:
        self._table = table

    def open(self, spec: IndexSpec) -> IndexState:
        self._spec = None
        found = self._joined().find()
        if found is None:
            return IndexState.EMPTY
        if IndexSpec(*found) != spec:
            return IndexState.MISMATCH
        self._spec = spec
        return IndexState.OK

    def reset(self, spec: IndexSpec) -> None:
        self._spec = None
        self._joined().make(spec)
        self._spec = spec

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        """Beside the log; commits of the memory need no such call."""
        table, spec = self._opened()
        rows = [(record.id, record.namespace, record.vector.astype("<f4").tobytes()) for record in upserts]
        table.put(spec, rows, deletes)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        table, spec = self._opened()
        return table.nearest(spec, vector.astype("<f4").tobytes(), k, namespace) if k > 0 else []

    def ids(self) -> Iterator[str]:
        table, spec = self._opened()
        return iter(table.ids(spec))

    def count(self) -> int:
        table, spec = self._opened()
        return table.count(spec)

    def close(self) -> None:
        self._table = self._spec = None

    def _joined(self) -> Table:
        if self._table is None:
            raise VectorSyncError(f"index {self.name} is closed, or was never added to a memory")
        return self._table

    def _opened(self) -> tuple[Table, IndexSpec]:
        table = self._joined()
        if self._spec is None:
            raise VectorSyncError(f"index {self.name} has yet to be rebuilt")
        return table, self._spec

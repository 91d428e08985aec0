"""The seam to a vector database: what a hook must do so that the index can follow the log.

An index is derived and never trusted. A vector's id belongs to one version of a fact; versions never change, so
applying the same operation twice is the same as once, and SQL alone decides what a reader sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from langgraph_memstate.errors import IndexConfigError

if TYPE_CHECKING:  # numpy is imported with the first vector: a memory without an index does not wait for it
    import numpy as np
    import numpy.typing as npt

Vector: TypeAlias = "npt.NDArray[np.float32]"
"""One embedding: shape (dims,), float32, of length 1."""


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """What an index must have been built from to be usable.

    `store_id` names the SQL database, `generation` counts its rebuilds, `model` names the embedding model.
    """

    store_id: str
    generation: int
    dims: int
    model: str


class IndexState(Enum):
    """What `open` found."""

    OK = "ok"
    EMPTY = "empty"  # nothing there yet, or lost: rebuild from SQL
    MISMATCH = "mismatch"  # built from another database, generation, model or dims: rebuild
    SUSPECT = "suspect"  # its last writer did not finish: drop without loading it, rebuild
    BUSY = "busy"  # another process owns it: this process searches SQL


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a hook can do.

    `transactional`: the storage keeps the index and writes it in the transaction of the facts; see `SyncHook.join`.
    `multiprocess`: several processes may write and read the same index at once.
    `max_batch`: vectors per `apply` call.
    `keeps_removed`: what was removed stays in its files until `reset`, which leaves nothing of it.
    """

    transactional: bool = False
    multiprocess: bool = False
    max_batch: int = 50
    keeps_removed: bool = False


@dataclass(frozen=True, slots=True)
class VectorRecord:
    """One vector to store. `metadata` holds the value's metadata fields; `document` is set only when asked for."""

    id: str
    vector: Vector
    namespace: tuple[str, ...]
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    document: str | None = None


class SyncHook(ABC):
    """A vector database that follows the log. Methods are called from one thread at a time, never an event loop.

    They raise whatever the client library raises; the caller maps it to `VectorSyncError`.
    """

    name: str
    """Stable and unique among the hooks of one memory: rows of the outbox carry it."""
    fields: tuple[str, ...] | None = None
    """Paths of the value that are embedded; None leaves them to the memory's index."""
    metadata_fields: tuple[str, ...] = ()
    """Top-level fields of the value copied into the index's metadata (only str, int, float, bool)."""
    store_documents: bool = False
    embedding: Any = None
    """A LangChain `Embeddings` or a function from texts to vectors; None leaves it to the memory's index."""
    capabilities: Capabilities = Capabilities()

    def join(self, table: Any) -> None:
        """Be handed the index that the storage keeps (`IndexTable`), before `open`. Only transactional hooks are."""
        raise IndexConfigError(f"{type(self).__name__} says that it is transactional; it has to implement `join`")

    @abstractmethod
    def open(self, spec: IndexSpec) -> IndexState:
        """Find the index and compare it with `spec`, without loading one that may be damaged."""

    @abstractmethod
    def reset(self, spec: IndexSpec) -> None:
        """Leave an empty index that carries `spec`; a transactional one holds what its database says."""

    @abstractmethod
    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        """Store `upserts`, then remove `deletes`. Idempotent; ids that are not there are no error."""

    @abstractmethod
    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        """Ids of up to `k` nearest vectors under a namespace prefix, nearest first."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Every id the index holds, in any order."""

    @abstractmethod
    def count(self) -> int:
        """How many vectors the index holds."""

    @abstractmethod
    def close(self) -> None:
        """Release clients and locks; the hook is not used again."""

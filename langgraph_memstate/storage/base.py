"""The seam to a database: what a snapshot can be asked, and what a storage does.

A commit is a tuple of operations (`operations`). A storage applies all of them in one transaction or none, and may land
several commits in one transaction of its own as long as each stays whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from langgraph_memstate.errors import IndexConfigError
from langgraph_memstate.facts import Draft, IndexPaths, LogEntry, Namespace, Record
from langgraph_memstate.filters import Condition
from langgraph_memstate.storage.operations import (
    Commit,
    PutIndexMeta,
)
from langgraph_memstate.storage.tables import Row
from langgraph_memstate.storage.values import (
    AncestorWrite,
    Blob,
    BuiltFrom,
    Claim,
    Nearest,
    Neighbours,
    OutboxRow,
    PreparedRow,
    ScoredRow,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredHead,
    StoredList,
    VectorMark,
)

COUNTED = (
    "checkpoints", "channel_values", "lists", "elements", "writes", "staged", "facts", "items", "vectors", "embeddings",
    "outbox", "prepared",
)  # fmt: skip
"""What a storage counts, by the names that `MemoryStore.stats` shows."""


class Reader(ABC):
    """One consistent snapshot. Every method answers from the same moment."""

    # checkpoints
    @abstractmethod
    def checkpoint(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> StoredCheckpoint | None:
        """That checkpoint, or the latest of the namespace; its writes in the order LangGraph applies them."""

    @abstractmethod
    def checkpoints(
        self,
        *,
        thread_id: str | None,
        checkpoint_ns: str | None,
        checkpoint_id: str | None,
        before: tuple[str, str, str] | str | None,
        limit: int,
    ) -> list[StoredCheckpoint]:
        """Newest first. `before` is a checkpoint id, or (checkpoint id, thread id, namespace) of a page's last row."""

    @abstractmethod
    def ancestors(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str | None) -> Iterator[StoredHead]:
        """That checkpoint, or the latest of the namespace, then its parent, and so on."""

    @abstractmethod
    def heads(self, thread_id: str, checkpoint_ns: str) -> Iterator[StoredHead]:
        """Every checkpoint of a namespace, newest first, whatever branch it is on."""

    @abstractmethod
    def checkpoint_namespaces(self, thread_id: str) -> list[str]:
        """Where a thread has checkpoints: the graph's own namespace and those of its subgraphs."""

    @abstractmethod
    def latest_id(self, thread_id: str, checkpoint_ns: str) -> str | None:
        """The id of the latest checkpoint of a namespace."""

    @abstractmethod
    def values(self, thread_id: str, value_ids: Sequence[str]) -> dict[str, Blob]:
        """Those of a thread's values that are stored whole."""

    @abstractmethod
    def list_chain(self, thread_id: str, value_id: str) -> list[StoredList]:
        """A list, the version it is based on, and so on; nothing where the thread has no such list."""

    @abstractmethod
    def digests(self, thread_id: str, ids: Sequence[int]) -> dict[int, bytes]:
        """Digests of elements, by the ids a `StoredList` names."""

    @abstractmethod
    def elements(self, thread_id: str, ids: Sequence[int]) -> dict[int, Blob]: ...

    @abstractmethod
    def ancestor_writes(self, step: StepKey, channels: Sequence[str]) -> list[AncestorWrite]:
        """Pending writes of some channels at the ancestors of a checkpoint, in the order LangGraph applied them.

        Each channel is followed up to and including the nearest ancestor that holds a value of it.
        """

    @abstractmethod
    def staged(self, step: StepKey) -> list[StagedDraft]:
        """Memory writes of finished tasks whose step has not landed, in task path order."""

    # items and the log
    @abstractmethod
    def as_of(self, seq: int) -> Reader:
        """The same snapshot, with items, namespaces and vectors as they were at that sequence of the log."""

    @abstractmethod
    def item(self, namespace: Namespace, key: str, now: float) -> Record | None: ...

    @abstractmethod
    def items(self, prefix: Sequence[str], now: float, conditions: Sequence[Condition] = ()) -> Iterator[Record]:
        """Unexpired items under a namespace prefix, last written first; any that breaks a condition may be left out."""

    @abstractmethod
    def namespaces(self, prefix: Sequence[str], now: float, limit: int | None = None) -> list[Namespace]:
        """Namespaces under a prefix that hold an unexpired item, in the order of `encode_namespace`."""

    @abstractmethod
    def expired(self, now: float) -> list[Record]: ...

    @abstractmethod
    def log(
        self,
        *,
        prefix: Namespace = (),
        key: str | None = None,
        origin: Mapping[str, str] | None = None,
        after: int = 0,
        until: int | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[LogEntry]:
        """Entries with a sequence above `after` and not above `until`; `origin` names fields of `Origin`."""

    @abstractmethod
    def versions(self, namespace: Namespace, key: str) -> Iterator[LogEntry]:
        """Every entry of one item, newest first."""

    @abstractmethod
    def seq_at(self, ts: float) -> int:
        """The log's last sequence at a time, in seconds since 1970."""

    @abstractmethod
    def draft(self, version: str) -> Draft | None:
        """The write that made a version, as it was."""

    @abstractmethod
    def holders(self, claim: Claim, now: float) -> list[Record]:
        """Unexpired items that make a claim."""

    @abstractmethod
    def last_seq(self) -> int: ...

    # vectors
    @abstractmethod
    def embeddings(self, model: str, hashes: Sequence[bytes]) -> dict[bytes, bytes]: ...

    @abstractmethod
    def vector_count(self, index: str, prefix: Sequence[str], ceiling: int) -> int:
        """How many current vectors lie under a prefix, counting no further than `ceiling`."""

    @abstractmethod
    def vectors(self, index: str, model: str, prefix: Sequence[str], now: float) -> Iterator[ScoredRow]:
        """Every current, unexpired version under a prefix with its vectors."""

    @abstractmethod
    def vectors_by_id(self, index: str, model: str, ids: Sequence[str], now: float) -> list[ScoredRow]:
        """Every vector of the current, unexpired versions that the ids belong to."""

    def nearest(self, question: Nearest) -> Neighbours | None:
        """What an index that the database keeps answers; None where it keeps none, or has another since this moment.

        Where it is not `exact`, fewer vectors than asked for need not be all there are.
        """
        return None

    @abstractmethod
    def vector_ids(self, index: str, after: int = 0) -> Iterator[str]:
        """Ids of the vectors of every current version with a sequence above `after`."""

    @abstractmethod
    def vector_mark(self) -> VectorMark: ...

    @abstractmethod
    def vector_bytes(self, index: str, model: str, ceiling: int) -> int:
        """What the current vectors take, counting no further than `ceiling` bytes."""

    @abstractmethod
    def new_vectors(self, index: str, model: str, after: int) -> Iterator[tuple[str, str, bytes]]:
        """Vectors of current versions numbered above `after`: encoded namespace, version, vector."""

    @abstractmethod
    def superseded(self, after: int) -> Iterator[str]:
        """Versions that entries with a sequence above `after` have replaced or deleted."""

    @abstractmethod
    def records(self, versions: Sequence[str], now: float) -> list[Record]:
        """Those of the versions that are current and have not expired."""

    @abstractmethod
    def vectors_of(self, versions: Sequence[str]) -> int:
        """How many vectors these versions have, current or not."""

    @abstractmethod
    def unindexed(self, index: str) -> list[tuple[Record, IndexPaths]]:
        """Current items without a vector in `index`, and which paths they asked to embed."""

    @abstractmethod
    def outbox(self, index: str, *, due: float | None, limit: int) -> list[OutboxRow]:
        """Upserts and deletes, oldest first; with `due`, those whose turn has come and that are not quarantined."""

    @abstractmethod
    def pending_upserts(self, index: str) -> list[str]:
        """Vector ids that the index may not hold yet, quarantined ones included."""

    @abstractmethod
    def pending_deletes(self, index: str) -> int: ...

    @abstractmethod
    def to_embed(self, index: str, limit: int) -> list[tuple[int, Record | None, IndexPaths]]:
        """Versions committed by processes without this index: outbox id, item if current, paths it asked to embed.

        Without those that were quarantined.
        """

    @abstractmethod
    def upsert_rows(self, index: str, model: str, ids: Sequence[str]) -> dict[str, ScoredRow]:
        """What an upsert of those ids must send: current versions only."""

    @abstractmethod
    def prepared(self) -> list[PreparedRow]: ...

    def prepared_ids(self, index: str) -> set[str]:
        """Vectors that a commit under way has sent to the index: it decides what becomes of them."""
        return {id_ for row in self.prepared() if row.index_name == index for id_ in row.vector_ids}

    def applicable(self, index: str, *, due: float, limit: int) -> list[OutboxRow]:
        """What `outbox` says, without the vectors that a commit under way has prepared."""
        prepared, size = self.prepared_ids(index), limit
        while True:
            rows = self.outbox(index, due=due, limit=size)
            free = [row for row in rows if row.vector_id not in prepared]
            if len(free) >= limit or len(rows) < size:
                return free[:limit]
            size *= 2

    @abstractmethod
    def index_meta(self, index: str) -> PutIndexMeta | None: ...

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Rows by table (`COUNTED`)."""

    def sizes(self) -> dict[str, int]:
        """Bytes by table, without indexes, and ``"total"``: what the whole database takes. Empty where unknown."""
        return {}

    @abstractmethod
    def dump(self, table: str) -> Iterator[Row]:
        """Every row of a table that `tables` describes, by its key: texts by code point, bytes by value."""


class Snapshots(Protocol):
    """What can be read at one moment."""

    def snapshot(self) -> AbstractContextManager[Reader]: ...


class AsOf:
    """A database as it was at a sequence of its log."""

    def __init__(self, snapshots: Snapshots, seq: int) -> None:
        self._snapshots = snapshots
        self._seq = seq

    @contextmanager
    def snapshot(self) -> Iterator[Reader]:
        with self._snapshots.snapshot() as reader:
            yield reader.as_of(self._seq)


class IndexTable(ABC):
    """An index that the database keeps itself, under a name. A call names what the index was built from.

    Commits write it in their own transaction; these calls are for whoever opens, fills or compares it.
    """

    @abstractmethod
    def find(self) -> tuple[str, int, int, str] | None:
        """What it was built from: store id, generation, dims, model. None where there is none."""

    @abstractmethod
    def make(self, built: BuiltFrom) -> None:
        """A new one in place of what is there. It holds the vectors of what is current; those calls put in are gone."""

    @abstractmethod
    def put(self, built: BuiltFrom, rows: Sequence[tuple[str, Namespace, bytes]], deletes: Sequence[str]) -> None:
        """Store vectors (id, namespace, vector), then remove some, whatever the log says."""

    @abstractmethod
    def nearest(self, built: BuiltFrom, vector: bytes, count: int, prefix: Sequence[str]) -> list[str]:
        """Ids of the nearest vectors under a prefix, nearest first."""

    @abstractmethod
    def ids(self, built: BuiltFrom) -> list[str]: ...

    @abstractmethod
    def count(self, built: BuiltFrom) -> int: ...


class Storage(ABC):
    """A database. `apply` is called by one thread at a time; `snapshot` by any."""

    @abstractmethod
    def open(self) -> str:
        """Connect, migrate, and return the id this database keeps for life."""

    def exists(self) -> bool:
        """Whether `open` finds a database rather than making one; asked before. True where that is not known."""
        return True

    @abstractmethod
    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        """Land each commit whole or not at all, durably before returning; None where it landed, else why not."""

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[Reader]:
        """A consistent view; leaving the context ends it."""

    def claim(self, index: str, *, due: float, limit: int, lease: float) -> list[OutboxRow]:
        """Entries that are due, for this process to apply, oldest first.

        Where processes share the database, no other is given an entry of the same vector until these are confirmed or
        have failed, or `lease` seconds are over. Else they are what `Reader.applicable` says.
        """
        with self.snapshot() as reader:
            return reader.applicable(index, due=due, limit=limit)

    def scrub(self) -> None:
        """Leave no copy of what was erased behind. Nothing to do where deleting leaves none."""
        return

    def vacuum(self) -> None:
        """Give the space of what was deleted back to the disk. Called while nothing is written."""
        return

    @abstractmethod
    def close(self) -> None: ...

    def index_table(self, name: str) -> IndexTable:
        """An index in the database itself, whose vectors are written by the commits of the facts they belong to.

        Raises:
            IndexConfigError: the database keeps no vectors, and what would make it.
        """
        raise IndexConfigError(
            f"index {name!r} lives in PostgreSQL, with the facts it belongs to, and this memory is kept elsewhere: "
            "open the memory on PostgresStorage, or add another hook"
        )

    @property
    def keeps_indexes(self) -> bool:
        """Whether `index_table` is worth a try."""
        return False

    @property
    def location(self) -> Any:
        """The database's file, where it has one: the default index lives beside it."""
        return None

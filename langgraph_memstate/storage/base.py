"""The seam to a database: what one atomic commit may hold, and what a snapshot can be asked.

A commit is a tuple of operations. A storage applies all of them in one transaction or none, and may land several
commits in one transaction of its own as long as each stays whole. Operations are plain values: no callback, no
query text, so a backend is free to run them as SQL, as a script or in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from langgraph_memstate.errors import IndexConfigError
from langgraph_memstate.facts import Draft, IndexPaths, LogEntry, Namespace, Pattern, Record
from langgraph_memstate.filters import Condition, equal
from langgraph_memstate.storage.tables import Row

EXACT = "exact"  # the name of an index without a vector database: searched in SQL, nothing follows it
COUNTED = (
    "checkpoints", "channel_values", "lists", "elements", "writes", "staged", "facts", "items", "vectors", "embeddings",
    "outbox", "prepared",
)  # fmt: skip
"""What a storage counts, by the names that `MemoryStore.stats` shows."""

# -- values -----------------------------------------------------------------------------------------


class StepKey(NamedTuple):
    """The checkpoint a step starts from."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str


class Blob(NamedTuple):
    """A serialised value: the serializer's type tag and its bytes."""

    type: str
    data: bytes


class ListValue(NamedTuple):
    """A version of a list, by the digests of its elements: the first `keep` of the version `base`, then `tail`."""

    kind: str
    depth: int
    """how many versions led here; a base has a smaller depth"""
    base: str | None
    """value id"""
    keep: int
    tail: tuple[bytes, ...]


class StoredList(NamedTuple):
    """A `ListValue` as it is stored: `tail` holds ids of elements, which mean something in this snapshot only."""

    value_id: str
    kind: str
    depth: int
    keep: int
    tail: tuple[int, ...]


class WriteRow(NamedTuple):
    """One pending channel write of a task. Special channels have negative indexes."""

    idx: int
    channel: str
    value: Blob


class StoredWrite(NamedTuple):
    task_id: str
    task_path: str
    channel: str
    value: Blob
    idx: int


class StagedDraft(NamedTuple):
    task_id: str
    task_path: str
    draft: Draft


class VectorRow(NamedTuple):
    """Which embedding belongs to which version: `ord` numbers the texts of one value."""

    index_name: str
    vector_id: str
    version: str
    ord: int
    text_hash: bytes


class EmbeddingRow(NamedTuple):
    """`vector`: float32, little endian, of length 1."""

    model: str
    text_hash: bytes
    vector: bytes


class OutboxRow(NamedTuple):
    """Index work that is committed and not yet applied."""

    id: int
    index_name: str
    op: Literal["upsert", "delete", "embed"]
    vector_id: str
    version: str | None
    attempts: int
    is_held: bool = False
    """whether another process has claimed it"""


class PreparedRow(NamedTuple):
    """Vectors that were sent to the index ahead of their commit. `owner` is the process, `expires_at` its lease."""

    id: str
    index_name: str
    vector_ids: tuple[str, ...]
    owner: str
    expires_at: float


class VectorMark(NamedTuple):
    """How far one has followed the vectors: the log's last sequence, the last vector's number, and the erasures."""

    seq: int
    vector: int
    epoch: int


class ScoredRow(NamedTuple):
    """A current version with one of its vectors."""

    record: Record
    vector_id: str
    ord: int
    vector: bytes
    paths: IndexPaths = None


class IndexedRow(NamedTuple):
    """A vector as an index in the database holds it: float32, little endian, of length 1."""

    vector_id: str
    version: str
    vector: bytes


class BuiltFrom(Protocol):
    """What an index was built from."""

    @property
    def store_id(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def dims(self) -> int: ...
    @property
    def model(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Nearest:
    """A question to an index that the database keeps: what current items under a prefix are nearest to a vector?

    Any that breaks a condition may be left out. `exact`: every vector is compared, whatever it takes.
    """

    index: str
    model: str
    vector: bytes
    prefix: Sequence[str]
    conditions: Sequence[Condition]
    now: float
    count: int
    """how many vectors"""
    exact: bool = False


class Neighbours(NamedTuple):
    """The answer: the ids of the nearest vectors, and all vectors of the versions that they belong to."""

    ids: frozenset[str]
    rows: list[ScoredRow]


class AncestorWrite(NamedTuple):
    """What one ancestor of a checkpoint says about a channel: one of its writes, or none of them."""

    channel: str
    value_id: str | None
    """the channel's value there; an ancestor that has one is the last that is asked"""
    write: StoredWrite | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The values that one current fact alone may have, among those a pattern covers (and in one namespace)."""

    pattern: Pattern
    values: tuple[tuple[str, str | int | float | bool], ...]
    """field -> value"""
    namespace: Namespace | None = None

    def made_by(self, value: Mapping[str, Any]) -> bool:
        """Whether a fact's value has these values."""
        return all(field in value and equal(value[field], wanted) for field, wanted in self.values)


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A checkpoint without its values and writes."""

    step: StepKey
    parent_id: str | None
    seq: int
    """the log's last sequence when it committed, its own step's memory writes included"""
    ts: str
    head: Blob
    metadata: str
    manifest: Mapping[str, str]
    """channel -> the id of its value"""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint(StoredHead):
    writes: Sequence[StoredWrite]


# -- operations -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutCheckpoint:
    """Store a checkpoint: its head without channel values, and the values that are new to the thread.

    What it refers to and does not bring must be there, or the commit is refused with `CommitRaced`.

    `ts` is ISO 8601. The head holds neither that nor the id, so that a rollback can store it again as another's.
    """

    step: StepKey
    parent_id: str | None
    ts: str
    head: Blob
    metadata: str
    run_id: str | None
    manifest: Mapping[str, str]
    values: Mapping[str, Blob]
    """value id -> value; one the thread already holds is stored once"""
    lists: Mapping[str, ListValue] = field(default_factory=dict)
    """value id -> list; a base comes before what is based on it"""
    elements: Mapping[bytes, Blob] = field(default_factory=dict)
    """digest -> element of a list; one the thread already holds is stored once"""


@dataclass(frozen=True, slots=True)
class PutWrites:
    """Store a task's pending writes. The first regular write of an index stays; special ones are replaced."""

    step: StepKey
    task_id: str
    task_path: str
    rows: tuple[WriteRow, ...]


@dataclass(frozen=True, slots=True)
class DropWrites:
    """Forget pending writes of a task, by index: those that a channel refused."""

    step: StepKey
    task_id: str
    idxs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Keep a finished task's memory writes until its step lands; drafts already in the log are skipped."""

    step: StepKey
    task_id: str
    task_path: str
    drafts: tuple[Draft, ...]


@dataclass(frozen=True, slots=True)
class Unstage:
    """Forget what was staged for a step, or for one task of it."""

    step: StepKey
    task_id: str | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """Remove what was staged for a step. What of it is not in the log must be among `expected`; else `CommitRaced`."""

    step: StepKey
    expected: frozenset[str]


@dataclass(frozen=True, slots=True)
class Expect:
    """The commit was prepared from these current versions (None: no item) and latest checkpoints.

    Where they are not so any more, it is not applied: `FactRaced`, or `CommitRaced` for a checkpoint.
    """

    versions: tuple[tuple[Namespace, str, str | None], ...] = ()
    latest: tuple[StepKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Append:
    """Append drafts to the log and make them current. A version that is in the log already is skipped.

    What it means for the indexes goes to their outboxes: vectors of superseded versions must go, and an index that this
    process does not know (`indexes` names those it does) is left to embed the new versions itself. An index that the
    database keeps has no outbox: what belongs there is in it, or gone, with the operation.
    `if_expired`: skip a draft unless it replaces one of these versions and that has expired (not its successor, and
    not an item whose time to live began again).
    """

    drafts: tuple[Draft, ...]
    indexes: tuple[str, ...] = ()
    if_expired: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class CheckUnchanged:
    """Before an `Append`: no draft changes a current fact that one of the patterns covers, or `ConstraintError`.

    To write the same value again is no change; a fact whose time to live is over is not there.
    """

    drafts: tuple[Draft, ...]
    patterns: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class CheckUnique:
    """After an `Append`: where the draft is current, no other current fact makes its claim, or `ConstraintError`.

    `replaces`: the commit deletes those that do; one that it did not know of means `FactRaced`.
    """

    draft: Draft
    claim: Claim
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class PutEmbeddings:
    rows: tuple[EmbeddingRow, ...]


@dataclass(frozen=True, slots=True)
class PutVectors:
    """Bind vectors to versions; for an index in `deferred`, leave the upserts in its outbox.

    A removal that waits for one of these vectors, from an earlier try of the commit, becomes an upsert.
    """

    rows: tuple[VectorRow, ...]
    deferred: frozenset[str]


@dataclass(frozen=True, slots=True)
class PutIndexed:
    """After an `Append`: vectors for an index that the database keeps itself, which gets those of current versions."""

    index: str
    rows: tuple[IndexedRow, ...]


@dataclass(frozen=True, slots=True)
class Prepare:
    row: PreparedRow


@dataclass(frozen=True, slots=True)
class Settle:
    """Remove a prepare record, which must exist. Vectors of it that belong to no current version have to go."""

    id: str


@dataclass(frozen=True, slots=True)
class OutboxDone:
    """Strike out applied entries; one whose operation changed since stays.

    A vector that was removed and now belongs to a current version, or to a commit under way, is to be looked at again;
    so is one that was stored and belongs to no current version any more. No claim on the entries is left.
    """

    rows: tuple[OutboxRow, ...]


@dataclass(frozen=True, slots=True)
class OutboxFailed:
    """Count a failure and wait until `retry_at` (seconds since 1970); None quarantines the entry."""

    ids: tuple[int, ...]
    error: str
    retry_at: float | None


@dataclass(frozen=True, slots=True)
class QueueIndex:
    """Leave upserts and removals of these vectors in an index's outbox."""

    index: str
    upserts: tuple[str, ...]
    deletes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RebuildIndex:
    """The index is empty: queue everything current. Commits that had prepared vectors in it have to start again.

    One that the database keeps has been made of what is current, and has no queue.
    """

    index: str


@dataclass(frozen=True, slots=True)
class PutIndexMeta:
    """What an index was built from; `generation` counts its rebuilds. A new index has to embed what is current."""

    index: str
    model: str
    dims: int
    generation: int


@dataclass(frozen=True, slots=True)
class Touch:
    """Start the time to live of items again at `now` (seconds since 1970)."""

    addresses: tuple[tuple[Namespace, str], ...]
    now: float


@dataclass(frozen=True, slots=True)
class Forget:
    """Erase contents for good: of every version whose namespace, key and thread are these, current or not.

    Their entries stay in the log without value. Staged work goes, and vectors with the embeddings that no other version
    uses; the indexes are told to remove them.
    """

    prefix: Namespace = ()
    key: str | None = None
    thread_id: str | None = None
    copies: tuple[str, ...] = ()
    """further versions: those by which an undo has brought such content back"""


@dataclass(frozen=True, slots=True)
class DeleteThread:
    thread_id: str


@dataclass(frozen=True, slots=True)
class DeleteRuns:
    run_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CopyThread:
    """Copy a thread's checkpoints, values, writes and staged work; drafts keep their versions, so they land once."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class DeleteCheckpoints:
    """Delete checkpoints with their writes and staged work, and free the values nothing refers to any more."""

    steps: tuple[StepKey, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Take over rows of another storage as they are, in a form that `tables` describes; numbers that the storage gives
    out by itself go on after theirs. Nothing else follows from them, and none of them is there.

    Only where `meta` says that the database is unfinished, else `CommitRaced`. `meta` itself takes rows at any time;
    they replace those of the same key.
    """

    table: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Clear:
    """Empty every table but `meta`, which must say that the database is unfinished, else `CommitRaced`."""


Op = (
    PutCheckpoint | PutWrites | DropWrites | Stage | Unstage | Drain | Append | CheckUnchanged | CheckUnique
    | PutEmbeddings | PutVectors | PutIndexed | Prepare | Settle
    | OutboxDone | OutboxFailed | QueueIndex | RebuildIndex | PutIndexMeta | Touch | DeleteThread | DeleteRuns
    | CopyThread | DeleteCheckpoints | Expect | Forget | Load | Clear
)  # fmt: skip

Commit = tuple[Op, ...]


# -- the seam ---------------------------------------------------------------------------------------


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
    def namespaces(self, prefix: Sequence[str], now: float) -> list[Namespace]:
        """Namespaces under a prefix that hold an unexpired item, sorted."""

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
        have failed, or `lease` seconds are over. Else they are what `Reader.outbox` says.
        """
        with self.snapshot() as reader:
            return reader.outbox(index, due=due, limit=limit)

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

"""What one atomic commit may hold.

Operations are plain values: no callback, no query text, so a backend is free to run them as SQL, as a script or in
memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from langgraph_memstate.facts import Draft, Namespace, Pattern
from langgraph_memstate.storage.tables import Row
from langgraph_memstate.storage.values import (
    Blob,
    Claim,
    EmbeddingRow,
    IndexedRow,
    ListValue,
    OutboxRow,
    PreparedRow,
    StepKey,
    VectorRow,
    WriteRow,
)


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
    """Bind vectors to versions; for an index in `deferred`, leave the upserts of those that are new in its outbox.

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

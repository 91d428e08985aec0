"""What a storage is handed and hands out: rows of checkpoints, of the outbox and of the indexes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, Protocol

from langgraph_memstate.facts import Draft, IndexPaths, Namespace, Pattern, Record
from langgraph_memstate.filters import Condition, equal

EXACT = "exact"  # the name of an index without a vector database: searched in SQL, nothing follows it


class StepKey(NamedTuple):
    """The checkpoint a step starts from."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str


class Blob(NamedTuple):
    """A serialised value: the serializer's type tag and its bytes."""

    type: str
    data: bytes


def digest_of(blob: Blob) -> bytes:
    """16 bytes that say which value it is."""
    type_, data = blob
    hash = _hash_of(type_).copy()
    hash.update(data)
    return hash.digest()


@lru_cache(maxsize=16)
def _hash_of(type_: str) -> blake2b:
    return blake2b(type_.encode() + b"\0", digest_size=16)


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
    """The answer: the ids of the nearest vectors, and all vectors of the versions that they belong to.

    `are_exact`: every vector in question was compared.
    """

    ids: frozenset[str]
    rows: list[ScoredRow]
    are_exact: bool


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

    def with_writes(self, writes: Sequence[StoredWrite]) -> StoredCheckpoint:
        return StoredCheckpoint(
            self.step, self.parent_id, self.seq, self.ts, self.head, self.metadata, self.manifest, writes
        )


@dataclass(frozen=True, slots=True)
class StoredCheckpoint(StoredHead):
    writes: Sequence[StoredWrite]

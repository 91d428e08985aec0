"""What LangGraph's own savers and stores have written, as plain values: nothing of it is made into an object here."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from langgraph_memstate.errors import CorruptRowError, DeserializationError, MemStateError, MigrationError
from langgraph_memstate.facts import Draft, Origin, check_key, check_namespace, check_ttl, encode_value, new_version
from langgraph_memstate.storage.values import Blob, StepKey

REASON = "imported from LangGraph"


class UpstreamWrite(NamedTuple):
    """A pending write of a task."""

    task_id: str
    task_path: str
    idx: int
    channel: str
    value: Blob


@dataclass(frozen=True, slots=True)
class UpstreamCheckpoint:
    """`head` is the serialised checkpoint without id, time and channel values, `metadata` JSON text."""

    step: StepKey
    parent_id: str | None
    ts: str
    head: Blob
    values: Mapping[str, Blob]
    metadata: str
    writes: Sequence[UpstreamWrite]


class UpstreamItem(NamedTuple):
    """A memory, as a write; where its time to live was begun again since, then `expires_at` (seconds since 1970)."""

    draft: Draft
    expires_at: float | None


class Upstream(ABC):
    """One snapshot of a database of LangGraph's."""

    name: str

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """How many `checkpoints` and `items` there are; without those that the database has no table for."""

    @abstractmethod
    def checkpoints(self) -> Iterator[UpstreamCheckpoint]:
        """All of them: thread after thread, of each namespace the oldest first."""

    @abstractmethod
    def items(self) -> Iterator[UpstreamItem]:
        """All memories, last written last."""


def upstream_at(url: str | Path) -> AbstractContextManager[Upstream]:
    """The database at a path, ``sqlite:///path`` or ``postgresql://…``, opened for reading only.

    Raises:
        MigrationError: there is none, or it is not LangGraph's.
    """
    scheme, colon, rest = str(url).partition("://")
    if colon and scheme in ("postgresql", "postgres"):
        try:
            from langgraph_memstate.graph.upstream_postgres import open_postgres
        except ImportError as error:
            raise MigrationError(
                "to read PostgreSQL needs psycopg, which is not installed: pip install 'langgraph-memstate[postgres]'"
            ) from error
        return open_postgres(str(url))
    from langgraph_memstate.graph.upstream_sqlite import open_sqlite

    if not colon:
        return open_sqlite(Path(url))
    if scheme == "sqlite":
        return open_sqlite(Path(rest[1:] if rest.startswith("/") else rest))
    raise MigrationError(f"{scheme}:// is nothing to import from; there are a path, sqlite:/// and postgresql://")


def is_upstream(url: str | Path) -> bool:
    """Whether a database of LangGraph's is there, and can be read."""
    try:
        with upstream_at(url):
            return True
    except MemStateError:
        return False


def blob_of(place: str, type_: str | None, content: object) -> Blob:
    """A serialised value.

    Raises:
        DeserializationError: it is a pickle, which nobody will read.
        CorruptRowError: it is no bytes.
    """
    if type_ == "pickle":
        raise DeserializationError(f"{place} is a pickle, which this package neither reads nor stores")
    if not isinstance(content, bytes | None):
        raise CorruptRowError(f"{place} holds {type(content).__name__} instead of bytes")
    return Blob(type_ or "null", content or b"")


def place_of(step: StepKey, channel: str) -> str:
    return f"thread {step.thread_id!r}, checkpoint {step.checkpoint_id}: channel {channel!r}"


def metadata_of(step: StepKey, text: str | None) -> dict[str, Any]:
    try:
        metadata = json.loads(text or "{}")
    except ValueError as error:
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: its metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise CorruptRowError(f"checkpoint {step.checkpoint_id}: its metadata is no object")
    return metadata


def item_of(
    prefix: str, key: str, value: str, created_at: float, updated_at: float, ttl: float | None, expires_at: float | None
) -> UpstreamItem:
    """A row of a store; times are seconds since 1970, `ttl` minutes."""
    try:
        fields = json.loads(value)
    except ValueError as error:
        raise CorruptRowError(f"the memory {prefix!r} {key!r} is not JSON: {error}") from error
    if ttl is None and expires_at is not None:
        ttl = max(0.0, expires_at - updated_at) / 60
    draft = Draft(
        new_version(), check_namespace(tuple(prefix.split("."))), check_key(key), "put", encode_value(fields),
        ttl=check_ttl(ttl), ts=updated_at, created_at=created_at, origin=Origin(reason=REASON),
    )  # fmt: skip
    return UpstreamItem(draft, expires_at)

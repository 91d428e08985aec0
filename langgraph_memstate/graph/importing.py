"""Brings threads and memories of LangGraph's own savers and stores into a new memory.

Values move as the bytes LangGraph serialised: no class has to be there, nothing is imported or called, and the
checkpointer later reads them by its own rules. Memories come first, so that every checkpoint knows all of them: the log
of before is not in LangGraph's database.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

from langgraph_memstate.errors import CorruptRowError, MigrationError
from langgraph_memstate.graph import slices
from langgraph_memstate.graph.channel_values import Encoded
from langgraph_memstate.graph.lists import ListVersion, version_of
from langgraph_memstate.graph.upstream import (
    Upstream,
    UpstreamCheckpoint,
    UpstreamItem,
    UpstreamWrite,
    metadata_of,
    upstream_at,
)
from langgraph_memstate.migration import Progress, claim, opened, release, silent
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Append, Clear, Commit, Op, PutCheckpoint, PutWrites, Touch
from langgraph_memstate.storage.values import Blob, WriteRow

_CHECKPOINTS, _ITEMS, _BYTES = 100, 1_000, 4_000_000  # of one commit, at most


def import_langgraph(
    sources: Sequence[str | Path], destination: str | Path | Storage, *, on_progress: Progress | None = None
) -> dict[str, int]:
    """Make a new memory of what LangGraph's savers and stores hold; returns how many checkpoints and items those were.

    A source is the file of a `SqliteSaver` or `SqliteStore`, or of both, or the URL of a database with `PostgresSaver`,
    `PostgresStore` or both. It is only read, in one snapshot. Vectors are not copied: an index that is added to the
    memory embeds the texts. What was broken off begins anew when it is called again.

    Raises:
        MigrationError: there is nothing to import, two sources have the same to offer, or the destination is in use.
        DeserializationError, CorruptRowError, NamespaceError: a row cannot be taken over; the message names it.
    """
    with ExitStack() as stack:
        upstreams = [stack.enter_context(upstream_at(source)) for source in sources]
        counts = _counted(upstreams)
        storage, _ = stack.enter_context(opened(destination))
        names = " and ".join(upstream.name for upstream in upstreams)
        if claim(storage, f"an import of {names}"):
            _land(storage, (Clear(),))
        report = on_progress or silent
        total, done = sum(counts.values()), 0
        for upstream in upstreams:
            for number, commit in _item_commits(upstream) if "items" in upstream.counts() else ():
                _land(storage, commit)
                report("items", done := done + number, total)
        for upstream in upstreams:
            for number, commit in _checkpoint_commits(upstream) if "checkpoints" in upstream.counts() else ():
                _land(storage, commit)
                report("checkpoints", done := done + number, total)
        _check(storage, counts)
        release(storage)
    return counts


def _counted(upstreams: Sequence[Upstream]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for upstream in upstreams:
        for table, rows in upstream.counts().items():
            if counts.get(table, 0) and rows:
                raise MigrationError(f"{upstream.name} has {table}, and so has a source before it; import one of them")
            counts[table] = counts.get(table, 0) + rows
    if not counts:
        raise MigrationError("nothing was named to import from")
    return counts


def _land(storage: Storage, commit: Commit) -> None:
    (outcome,) = storage.apply((commit,))
    if outcome is not None:
        raise outcome


def _check(storage: Storage, counts: dict[str, int]) -> None:
    with storage.snapshot() as reader:
        found = reader.counts()
    for table in ("items", "checkpoints"):
        if found[table] != counts.get(table, 0):
            raise MigrationError(
                f"the import is not complete: {found[table]} {table} of {counts.get(table, 0)}. Did somebody write to "
                "the destination? Run it again: it begins anew"
            )


# -- memories ---------------------------------------------------------------------------------------


def _item_commits(upstream: Upstream) -> Iterator[tuple[int, Commit]]:
    """How many items a commit brings, and the commit."""
    batch: list[UpstreamItem] = []
    size = 0
    for item in upstream.items():
        batch.append(item)
        size += len(item.draft.value or "")
        if len(batch) >= _ITEMS or size >= _BYTES:
            yield len(batch), _of_items(batch)
            batch, size = [], 0
    if batch:
        yield len(batch), _of_items(batch)


def _of_items(items: Sequence[UpstreamItem]) -> Commit:
    again = [
        Touch((draft.address,), expires_at - draft.ttl * 60)  # it was read since, and lives that much longer
        for draft, expires_at in items
        if draft.ttl is not None and expires_at is not None
    ]
    return (Append(tuple(item.draft for item in items)), *again)


# -- threads ----------------------------------------------------------------------------------------


def _checkpoint_commits(upstream: Upstream) -> Iterator[tuple[int, Commit]]:
    """How many checkpoints a commit brings, and the commit."""
    ops: list[Op] = []
    number = size = 0
    values = _Values()
    for checkpoint in upstream.checkpoints():
        put = values.put(checkpoint)
        ops += (put, *_written(checkpoint))
        number += 1
        size += sum(len(blob.data) for blob in (*put.values.values(), *put.elements.values()))
        size += sum(len(write.value.data) for write in checkpoint.writes)
        if number >= _CHECKPOINTS or size >= _BYTES:
            yield number, tuple(ops)
            ops, number, size = [], 0, 0
    if ops:
        yield number, tuple(ops)


def _written(checkpoint: UpstreamCheckpoint) -> Iterator[PutWrites]:
    for (task_id, task_path), writes in groupby(sorted(checkpoint.writes, key=_of_task), key=_of_task):
        rows = tuple(WriteRow(write.idx, write.channel, write.value) for write in writes)
        yield PutWrites(checkpoint.step, task_id, task_path, rows)


def _of_task(write: UpstreamWrite) -> tuple[str, str]:
    return write.task_id, write.task_path


class _Last(NamedTuple):
    """The last value of a channel; of a list that was split, also its items."""

    blob: Blob
    value_id: str
    items: Sequence[bytes] = ()
    version: ListVersion | None = None


class _Values:
    """Encodes channel values, each by what it adds to the one before it in the same channel."""

    def __init__(self) -> None:
        self._thread_id: str | None = None
        self._last: dict[tuple[str, str], _Last] = {}

    def put(self, checkpoint: UpstreamCheckpoint) -> PutCheckpoint:
        step = checkpoint.step
        if step.thread_id != self._thread_id:
            self._thread_id = step.thread_id
            self._last.clear()
        encoded = Encoded()
        try:
            manifest = {
                channel: self._value_id((step.checkpoint_ns, channel), blob, encoded)
                for channel, blob in checkpoint.values.items()
            }
        except CorruptRowError as error:
            raise CorruptRowError(f"thread {step.thread_id!r}, checkpoint {step.checkpoint_id}: {error}") from error
        run_id = metadata_of(step, checkpoint.metadata).get("run_id")
        return PutCheckpoint(
            step=step,
            parent_id=checkpoint.parent_id,
            ts=checkpoint.ts,
            head=checkpoint.head,
            metadata=checkpoint.metadata,
            run_id=None if run_id is None else str(run_id),
            manifest=manifest,
            values=encoded.values,
            lists=encoded.lists,
            elements=encoded.elements,
        )

    def _value_id(self, place: tuple[str, str], blob: Blob, encoded: Encoded) -> str:
        before = self._last.get(place)
        if before is not None and blob == before.blob:
            return before.value_id
        known, parent = ((), None) if before is None else (before.items, before.version)
        items = slices.items(blob.data, known) if blob.type == "msgpack" else None
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], zip(known, items or (), strict=False)))
        if not items or any(map(slices.is_atom, items[kept:])):
            value_id = blake2b(blob.type.encode() + b"\0" + blob.data, digest_size=16).hexdigest()
            encoded.values[value_id] = blob
            self._last[place] = _Last(blob, value_id)
            return value_id
        fresh = [Blob("msgpack", slices.packed_array([item])) for item in items[kept:]]
        version = version_of("list", parent, kept, fresh)
        encoded.versions.append(version)
        stored = version.chain[0].keep if version.chain else 0
        for element in version.elements[stored:]:
            if element.blob is not None:
                encoded.elements[element.digest] = element.blob
        self._last[place] = _Last(blob, version.value_id, items, version)
        return version.value_id

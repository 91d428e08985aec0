"""Commits in small, for the contracts: drafts, checkpoints and the names that are hard to store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from langgraph_memstate.facts import Draft, IndexPaths, Namespace, Origin, new_version
from langgraph_memstate.storage.base import Reader, Storage
from langgraph_memstate.storage.operations import Append, Op, PutCheckpoint, PutWrites
from langgraph_memstate.storage.values import Blob, ListValue, StepKey, StoredList, WriteRow

NOW = 1_750_000_000.0  # seconds since 1970: when the drafts of the contracts were written
NOTES = ("notes",)

ODD = (
    "\0", "a\0b", "\1", "\1\1\2", "\x1b\x1f", "\x1bu", "%_*?[]", "'; DROP TABLE facts; --", '"\\', "$.a[0]", " ",
    "\n\t\r", "é", "e\u0301", "\ud7ff\ue000", "\U0010ffff", "😀", "null", "{}", "a" * 600, ":memory:", "%s", "{0}",
)  # fmt: skip
"""Names of keys, labels and ids that a storage has to take for what they are."""


def put(
    key: str = "k",
    value: Mapping[str, Any] | None = None,
    *,
    ns: Namespace = NOTES,
    ts: float = NOW,
    ttl: float | None = None,
    type: str | None = None,
    index: IndexPaths = None,
    origin: Origin | None = None,
) -> Draft:
    """A write of an item; its value is JSON without spaces."""
    text = json.dumps(value if value is not None else {"n": 1}, ensure_ascii=False, separators=(",", ":"))
    return Draft(new_version(), ns, key, "put", text, type=type, index=index, ttl=ttl, ts=ts, origin=origin or Origin())


def delete(key: str = "k", *, ns: Namespace = NOTES, ts: float = NOW) -> Draft:
    return Draft(new_version(), ns, key, "delete", None, ts=ts)


def commit(storage: Storage, *ops: Op) -> None:
    """Land operations as one commit, or raise what it was refused with."""
    (outcome,) = storage.apply((ops,))
    if outcome is not None:
        raise outcome


def append(storage: Storage, *drafts: Draft) -> None:
    commit(storage, Append(drafts))


@contextmanager
def unchanged(storage: Storage) -> Iterator[None]:
    """Nothing that a reader can count or order changes inside."""
    before = _census(storage)
    yield
    assert _census(storage) == before


def _census(storage: Storage) -> object:
    with storage.snapshot() as reader:
        return reader.counts(), reader.last_seq(), reader.vector_mark(), list(reader.items((), NOW))


# -- checkpoints ------------------------------------------------------------------------------------


def step(number: int, thread_id: str = "t", checkpoint_ns: str = "") -> StepKey:
    return StepKey(thread_id, checkpoint_ns, f"{number:032}")


def checkpoint(
    number: int,
    values: Mapping[str, Blob] | None = None,
    *,
    thread_id: str = "t",
    checkpoint_ns: str = "",
    parent: int | None = None,
    reused: Mapping[str, str] | None = None,
    lists: Mapping[str, tuple[str, ListValue]] | None = None,
    elements: Mapping[bytes, Blob] | None = None,
    run_id: str | None = None,
) -> PutCheckpoint:
    """Checkpoint `number` of a thread; a value's id is made of its bytes. `lists`: channel -> (value id, list)."""
    fresh = {value_id(blob): blob for blob in (values or {}).values()}
    named = {channel: value_id(blob) for channel, blob in (values or {}).items()}
    list_ids = {channel: id_ for channel, (id_, _) in (lists or {}).items()}
    return PutCheckpoint(
        step(number, thread_id, checkpoint_ns),
        None if parent is None else step(parent).checkpoint_id,
        "2026-01-01T00:00:00+00:00",
        Blob("msgpack", b"head %d" % number),
        json.dumps({"step": number}),
        run_id,
        {**named, **list_ids, **(reused or {})},
        fresh,
        dict((lists or {}).values()),
        elements or {},
    )


def value_id(blob: Blob) -> str:
    return hashlib.blake2b(repr(blob).encode(), digest_size=8).hexdigest()


def writes(number: int, task_id: str, *rows: tuple[int, str, bytes], thread_id: str = "t", path: str = "") -> PutWrites:
    return PutWrites(
        step(number, thread_id), task_id, path,
        tuple(WriteRow(idx, channel, Blob("bytes", data)) for idx, channel, data in rows),
    )  # fmt: skip


def listed(*digests: bytes, base: str | None = None, keep: int = 0, depth: int = 1) -> ListValue:
    return ListValue("list", depth, base, keep, digests)


def elements(*digests: bytes) -> dict[bytes, Blob]:
    return {digest: Blob("bytes", b"element " + digest) for digest in digests}


def read_list(reader: Reader, list_id: str, thread_id: str = "t") -> list[bytes]:
    """The elements of a list, through its chain."""
    chain: Sequence[StoredList] = reader.list_chain(thread_id, list_id)
    ids: tuple[int, ...] = ()
    for version in reversed(chain):
        ids = ids[: version.keep] + version.tail
    held = reader.elements(thread_id, ids)
    return [held[id_].data for id_ in ids]

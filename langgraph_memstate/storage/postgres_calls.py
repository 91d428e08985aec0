"""What commits do to the state of threads, as calls of the database's own functions (see sql/postgres_0002.sql).

A commit of nothing else is one statement. A call says, as text, which thread has to be swept after it, or NULL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.storage.operations import (
    Commit,
    Drain,
    DropWrites,
    PutCheckpoint,
    PutWrites,
    Stage,
    Unstage,
)
from langgraph_memstate.storage.postgres_link import bytea_array, integer_array, text_array
from langgraph_memstate.storage.postgres_packing import with_time, with_type, write_of
from langgraph_memstate.storage.rows import dump_manifest
from langgraph_memstate.storage.values import WriteRow

Call = tuple[str, tuple[Any, ...]]
"""A function with marks for its parameters, and these"""

_PUT_LIST = "put_list(%s, %s, %s, %s::integer, %s, %s::integer, %s::bytea[], %s::bytea[], %s::bytea[])"
_PUT_CHECKPOINT = "put_checkpoint(%s, %s, %s, %s, %s, %s, %s, %s::text[], %s::text[], %s::bytea[])"
_PUT_WRITES = "put_writes(%s, %s, %s, %s, %s, %s::integer[], %s::text[], %s::bytea[], %s::bytea[])"
_DROP_WRITES = "drop_writes(%s, %s, %s, %s, %s::integer[])"
_STAGE = "stage(%s, %s, %s, %s, %s, %s::text[], %s::text[], %s::text[], %s::text[])"
_UNSTAGE = "unstage(%s, %s, %s, %s)"
_DRAIN = "drain(%s, %s, %s, %s::text[])"


def calls_of(op: object) -> list[Call] | None:
    """None where an operation is more than that."""
    make = _CALLS.get(type(op))
    return None if make is None else list(make(op))


def only_calls(commit: Commit | tuple[object]) -> list[Call] | None:
    """Those of a whole commit; None where it is more than that."""
    calls: list[Call] = []
    for op in commit:
        if (made := calls_of(op)) is None:
            return None
        calls += made
    return calls


def _put_checkpoint(op: PutCheckpoint) -> Iterator[Call]:
    thread_id = op.step.thread_id
    for value_id, version in op.lists.items():
        fresh = {digest: with_type(op.elements[digest]) for digest in version.tail if digest in op.elements}
        yield _PUT_LIST, (
            thread_id, value_id, version.kind, version.depth, version.base, version.keep, bytea_array(version.tail),
            bytea_array(list(fresh)), bytea_array(list(fresh.values())),
        )  # fmt: skip
    reused = set(op.manifest.values()) - op.values.keys() - op.lists.keys()
    ids, values = None, None
    if op.values:
        ids, values = text_array(list(op.values)), bytea_array(list(map(with_type, op.values.values())))
    yield _PUT_CHECKPOINT, (
        *op.step, op.parent_id, op.run_id, dump_manifest(op.manifest), with_time(op.ts, op.metadata, op.head),
        text_array(list(reused)), ids, values,
    )  # fmt: skip


def _put_writes(op: PutWrites) -> Iterator[Call]:
    rows: dict[int, WriteRow] = {}
    for row in op.rows:
        if row.idx < 0 or row.idx not in rows:
            rows[row.idx] = row
    values = [write_of(row.idx, row.value) for row in rows.values()]
    yield _PUT_WRITES, (
        *op.step, op.task_id, op.task_path, integer_array(list(rows)),
        text_array([row.channel for row in rows.values()]),
        bytea_array([digest for _, digest in values]), bytea_array([value for value, _ in values]),
    )  # fmt: skip


def _drop_writes(op: DropWrites) -> Iterator[Call]:
    yield _DROP_WRITES, (*op.step, op.task_id, integer_array(op.idxs))


def _stage(op: Stage) -> Iterator[Call]:
    yield _STAGE, (
        *op.step, op.task_id, op.task_path,
        text_array([draft.version for draft in op.drafts]),
        text_array([encode_namespace(draft.namespace) for draft in op.drafts]),
        text_array([draft.key for draft in op.drafts]),
        text_array([draft.dumps() for draft in op.drafts]),
    )  # fmt: skip


def _unstage(op: Unstage) -> Iterator[Call]:
    yield _UNSTAGE, (*op.step, op.task_id)


def _drain(op: Drain) -> Iterator[Call]:
    yield _DRAIN, (*op.step, text_array(list(op.expected)))


_CALLS: dict[type, Callable[[Any], Iterator[Call]]] = {
    PutCheckpoint: _put_checkpoint,
    PutWrites: _put_writes,
    DropWrites: _drop_writes,
    Stage: _stage,
    Unstage: _unstage,
    Drain: _drain,
}

"""How SQLite runs each operation of a commit. Values are bound; no statement contains data.

What an operation leaves behind follows from the rows that were there, the operation and the time it is given, down to
the ids of rows: whoever runs the same commits in the same order holds the same database.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, cast

from langgraph_memstate.errors import CommitRaced, FactRaced
from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.storage.operations import (
    Append,
    CheckUnchanged,
    CheckUnique,
    Clear,
    CopyThread,
    DeleteCheckpoints,
    DeleteRuns,
    DeleteThread,
    Drain,
    DropWrites,
    Expect,
    Forget,
    Load,
    Op,
    OutboxDone,
    OutboxFailed,
    Prepare,
    PutCheckpoint,
    PutEmbeddings,
    PutIndexMeta,
    PutVectors,
    PutWrites,
    QueueIndex,
    RebuildIndex,
    Settle,
    Stage,
    Touch,
    Unstage,
)
from langgraph_memstate.storage.packing import packed
from langgraph_memstate.storage.rows import NOT_LANDED, dump_manifest
from langgraph_memstate.storage.sqlite_checks import check_unchanged, check_unique
from langgraph_memstate.storage.sqlite_log import (
    append,
    forget,
    outbox_done,
    outbox_failed,
    prepare,
    put_embeddings,
    put_index_meta,
    put_vectors,
    queue_index,
    rebuild_index,
    settle,
    touch,
)
from langgraph_memstate.storage.sqlite_rows import clear, load
from langgraph_memstate.storage.sqlite_values import copy_values, put_values, sweep
from langgraph_memstate.storage.values import StepKey

_INSERT_CHECKPOINT = (
    "INSERT OR {} INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_id, run_id, ts, seq, "
    "head_type, head, metadata, manifest) "
    "VALUES (?, ?, ?, ?, ?, ?, (SELECT coalesce(max(seq), 0) FROM facts), ?, ?, ?, ?)"
)

Run = Callable[[sqlite3.Connection, Any], None]

THIS_STEP = "thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?"


def run_ops(conn: sqlite3.Connection, ops: Iterable[Op], now: float) -> None:
    """Run operations inside the caller's transaction, which commits at `now` (seconds since 1970).

    Those of a kind that follow each other share their statements: every statement makes way for other threads.
    """
    for kind, run in groupby(ops, type):
        if kind is Append:
            append(conn, cast(Sequence[Append], list(run)), now)
        elif kind is PutWrites:
            _put_writes(conn, cast(Iterable[PutWrites], run))
        else:
            for op in run:
                _RUN[kind](conn, op)


# -- checkpoints ------------------------------------------------------------------------------------


def _put_checkpoint(conn: sqlite3.Connection, op: PutCheckpoint) -> None:
    put_values(conn, op)
    row = (
        *op.step, op.parent_id, op.run_id, op.ts, op.head.type, packed(op.head.data), op.metadata,
        dump_manifest(op.manifest),
    )  # fmt: skip
    inserted = conn.execute(_INSERT_CHECKPOINT.format("IGNORE"), row).rowcount
    if not inserted:  # put again, perhaps with other values
        conn.execute(_INSERT_CHECKPOINT.format("REPLACE"), row)
        sweep(conn, op.step.thread_id)


def _put_writes(conn: sqlite3.Connection, ops: Iterable[PutWrites]) -> None:
    regular: list[tuple[Any, ...]] = []
    special: list[tuple[Any, ...]] = []
    for op in ops:
        for row in op.rows:
            (regular if row.idx >= 0 else special).append(
                (*op.step, op.task_path, op.task_id, row.idx, row.channel, row.value.type, packed(row.value.data))
            )
    for verb, rows in (("REPLACE", special), ("IGNORE", regular)):
        if rows:
            conn.executemany(
                f"INSERT OR {verb} INTO writes (thread_id, checkpoint_ns, checkpoint_id, task_path, task_id, idx, "
                "channel, type, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )


def _drop_writes(conn: sqlite3.Connection, op: DropWrites) -> None:
    conn.executemany(
        f"DELETE FROM writes WHERE {THIS_STEP} AND task_id = ? AND idx = ?",
        [(*op.step, op.task_id, idx) for idx in op.idxs],
    )


def _delete_thread(conn: sqlite3.Connection, op: DeleteThread) -> None:
    for table in ("checkpoints", "channel_values", "lists", "elements", "writes", "staged"):
        conn.execute(f"DELETE FROM {table} WHERE thread_id = ?", (op.thread_id,))


def _delete_runs(conn: sqlite3.Connection, op: DeleteRuns) -> None:
    steps = [
        StepKey(*row)
        for run_id in op.run_ids
        for row in conn.execute(
            "SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints WHERE run_id = ?", (run_id,)
        )
    ]
    _delete_checkpoints(conn, DeleteCheckpoints(tuple(steps)))


def _delete_checkpoints(conn: sqlite3.Connection, op: DeleteCheckpoints) -> None:
    for table in ("checkpoints", "writes", "staged"):
        conn.executemany(f"DELETE FROM {table} WHERE {THIS_STEP}", op.steps)
    for thread_id in {step.thread_id for step in op.steps}:
        sweep(conn, thread_id)


def _copy_thread(conn: sqlite3.Connection, op: CopyThread) -> None:
    if op.source == op.target:
        return
    columns = {
        "checkpoints": "checkpoint_ns, checkpoint_id, parent_id, run_id, ts, seq, head_type, head, metadata, manifest",
        "writes": "checkpoint_ns, checkpoint_id, task_path, task_id, idx, channel, type, data",
        "staged": "checkpoint_ns, checkpoint_id, task_id, ord, task_path, version, ns, key, draft",
    }
    for table, copied in columns.items():
        conn.execute(
            f"INSERT OR REPLACE INTO {table} (thread_id, {copied}) SELECT ?, {copied} FROM {table} WHERE thread_id = ?",
            (op.target, op.source),
        )
    copy_values(conn, op.source, op.target)
    sweep(conn, op.target)  # a checkpoint may have taken the place of another


# -- staged work ------------------------------------------------------------------------------------


def _stage(conn: sqlite3.Connection, op: Stage) -> None:
    known = conn.execute(f"SELECT 1 FROM staged WHERE {THIS_STEP} AND task_id = ?", (*op.step, op.task_id)).fetchone()
    if known:
        return  # like the task's writes: the first account of a finished task stays
    conn.executemany(
        "INSERT INTO staged (thread_id, checkpoint_ns, checkpoint_id, task_id, ord, task_path, version, ns, key, "
        "draft) SELECT ?, ?, ?, ?, ?, ?, ?7, ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM facts WHERE version = ?7)",
        [
            (
                *op.step,
                op.task_id,
                ord_,
                op.task_path,
                draft.version,
                encode_namespace(draft.namespace),
                draft.key,
                draft.dumps(),
            )
            for ord_, draft in enumerate(op.drafts)
        ],
    )


def _unstage(conn: sqlite3.Connection, op: Unstage) -> None:
    if op.task_id is None:
        conn.execute(f"DELETE FROM staged WHERE {THIS_STEP}", op.step)
    else:
        conn.execute(f"DELETE FROM staged WHERE {THIS_STEP} AND task_id = ?", (*op.step, op.task_id))


def _drain(conn: sqlite3.Connection, op: Drain) -> None:
    rows = conn.execute(f"DELETE FROM staged WHERE {THIS_STEP} RETURNING version, {NOT_LANDED}", op.step).fetchall()
    if unknown := {version for version, waits in rows if waits} - op.expected:
        raise CommitRaced(f"{len(unknown)} memory writes were staged while the step was committed")


# -- what a commit expects ---------------------------------------------------------------------------


def _expect(conn: sqlite3.Connection, op: Expect) -> None:
    for namespace, key, version in op.versions:
        row = conn.execute(
            "SELECT version FROM items WHERE ns = ? AND key = ?", (encode_namespace(namespace), key)
        ).fetchone()
        if (row[0] if row else None) != version:
            raise FactRaced(f"{'/'.join(namespace)} {key!r} was changed meanwhile")
    for step in op.latest:
        (latest,) = conn.execute(
            "SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = ?", step[:2]
        ).fetchone()
        if latest != step.checkpoint_id:
            raise CommitRaced(f"thread {step.thread_id} went on meanwhile")


_RUN: dict[type, Run] = {
    Expect: _expect,
    Forget: forget,
    PutCheckpoint: _put_checkpoint,
    DropWrites: _drop_writes,
    Stage: _stage,
    Unstage: _unstage,
    Drain: _drain,
    CheckUnchanged: check_unchanged,
    CheckUnique: check_unique,
    Touch: touch,
    PutEmbeddings: put_embeddings,
    PutVectors: put_vectors,
    Prepare: prepare,
    Settle: settle,
    OutboxDone: outbox_done,
    OutboxFailed: outbox_failed,
    QueueIndex: queue_index,
    RebuildIndex: rebuild_index,
    PutIndexMeta: put_index_meta,
    DeleteThread: _delete_thread,
    DeleteRuns: _delete_runs,
    CopyThread: _copy_thread,
    DeleteCheckpoints: _delete_checkpoints,
    Load: load,
    Clear: clear,
}

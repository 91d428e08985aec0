"""How PostgreSQL runs each operation of a commit, and what a commit has to lock. No statement contains data.

Most operations read and write what belongs to everybody: the log, its items, the outbox. Commits of them take turns,
across all machines, so that the log is numbered in the order of commits and every check sees what came before. Those
that only save the state of a thread share their turn, and only that thread waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from langgraph_memstate.errors import CommitRaced, FactRaced
from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.storage.operations import (
    Append,
    CheckUnchanged,
    CheckUnique,
    Clear,
    Commit,
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
    PutIndexed,
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
from langgraph_memstate.storage.postgres_checks import check_unchanged, check_unique
from langgraph_memstate.storage.postgres_link import Connection, Cursor, run, run_rows
from langgraph_memstate.storage.postgres_log import (
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
from langgraph_memstate.storage.postgres_rows import clear, load
from langgraph_memstate.storage.postgres_values import copy_values, put_values, sweep
from langgraph_memstate.storage.postgres_vectors import Places, put_indexed
from langgraph_memstate.storage.values import StepKey


@dataclass(frozen=True, slots=True)
class Sweep:
    """Free what no checkpoint of a thread refers to: one has been replaced."""

    thread_id: str


Run = Callable[[Connection, Any], Cursor | None]
RunWithPlaces = Callable[[Connection, Any, Places], None]

THIS_STEP = "thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s"


def run_op(conn: Connection, op: Op | Sweep, places: Places) -> Cursor | None:
    """Run one operation inside the caller's transaction. Returns, as rows to come, the threads to be swept after it."""
    if (run_it := _RUN.get(type(op))) is not None:
        return run_it(conn, op)
    _RUN_WITH_PLACES[type(op)](conn, op, places)
    return None


# -- locks ------------------------------------------------------------------------------------------


def locks(schema: str, commits: Sequence[Commit | tuple[Sweep]]) -> tuple[int, list[int] | None]:
    """What these commits wait for: the key of what belongs to everybody, and those of threads if they save no more.

    The locks end with the transaction, as a pooler needs it.
    """
    threads = [_thread_of(op) for commit in commits for op in commit]
    if None in threads:
        return lock_key(schema), None
    keys = {lock_key(schema, thread) for thread in threads if thread is not None}
    return lock_key(schema), sorted(keys)  # one order: no deadlock


def lock_key(schema: str, thread_id: str | None = None) -> int:
    name = f"memstate\0{schema}" if thread_id is None else f"memstate\0{schema}\0{thread_id}"
    return int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big", signed=True)


def _thread_of(op: Op | Sweep) -> str | None:
    """The thread whose state alone an operation reads and writes; None where it may be more."""
    match op:
        case Sweep():
            return op.thread_id
        case PutCheckpoint() | PutWrites() | DropWrites() | Stage() | Unstage() | Drain():
            return op.step.thread_id
        case _:
            return None


# -- checkpoints ------------------------------------------------------------------------------------

# The database fills in the sequence.
_PUT_CHECKPOINT = (
    "SELECT thread_id FROM (VALUES (%s)) AS put (thread_id) WHERE put_checkpoint("
    "ROW(thread_id, %s, %s, %s, %s, 0, %s, %s, %s, %s, %s::text[], %s::text[])::checkpoints)"
)
_CHECKPOINT_KEY = ("thread_id", "checkpoint_ns", "checkpoint_id")
_CHECKPOINT_REST = (
    "parent_id", "run_id", "seq", "ts", "head_type", "head", "metadata", "channels", "value_ids",
)  # fmt: skip


def _replacing(key: Sequence[str], rest: Sequence[str]) -> str:
    return f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {', '.join(f'{name} = EXCLUDED.{name}' for name in rest)}"


def _put_checkpoint(conn: Connection, op: PutCheckpoint) -> Cursor:
    put_values(conn, op)
    return run(
        conn, _PUT_CHECKPOINT,
        *op.step, op.parent_id, op.run_id, op.ts, op.head.type, packed(op.head.data), op.metadata,
        list(op.manifest), list(op.manifest.values()),
    )  # fmt: skip


def _sweep(conn: Connection, op: Sweep) -> None:
    sweep(conn, op.thread_id)


def _put_writes(conn: Connection, op: PutWrites) -> None:
    special = {row.idx: row for row in op.rows if row.idx < 0}
    regular = [row for row in op.rows if row.idx >= 0]
    key = (*_CHECKPOINT_KEY, "task_id", "idx")
    for rows, conflict in (
        (list(special.values()), _replacing(key, ("task_path", "channel", "type", "data"))),
        (regular, "ON CONFLICT DO NOTHING"),
    ):
        run_rows(
            conn,
            "INSERT INTO writes SELECT %(thread)s, %(ns)s, %(id)s, %(path)s, %(task)s, * FROM {rows} AS fresh "
            + conflict,
            "int text text bytea",
            [(row.idx, row.channel, row.value.type, packed(row.value.data)) for row in rows],
            **_of_task(op.step, op.task_id), path=op.task_path,
        )  # fmt: skip


def _of_task(step: StepKey, task_id: str) -> dict[str, str]:
    return {"thread": step.thread_id, "ns": step.checkpoint_ns, "id": step.checkpoint_id, "task": task_id}


def _drop_writes(conn: Connection, op: DropWrites) -> None:
    query = f"DELETE FROM writes WHERE {THIS_STEP} AND task_id = %s AND idx = ANY(%s::int[])"
    run(conn, query, *op.step, op.task_id, list(op.idxs))


def _delete_thread(conn: Connection, op: DeleteThread) -> None:
    for table in ("checkpoints", "channel_values", "lists", "elements", "writes", "staged"):
        run(conn, f"DELETE FROM {table} WHERE thread_id = %s", op.thread_id)


def _delete_runs(conn: Connection, op: DeleteRuns) -> None:
    rows = run(
        conn,
        "SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints WHERE run_id = ANY(%s::text[])",
        list(op.run_ids),
    )
    _delete_checkpoints(conn, DeleteCheckpoints(tuple(StepKey(*row) for row in rows.fetchall())))


def _delete_checkpoints(conn: Connection, op: DeleteCheckpoints) -> None:
    key = ", ".join(_CHECKPOINT_KEY)
    for table in ("checkpoints", "writes", "staged"):
        run_rows(
            conn,
            f"DELETE FROM {table} WHERE ({key}) IN (SELECT * FROM {{rows}} AS gone)",
            "text text text",
            op.steps,
        )
    for thread_id in {step.thread_id for step in op.steps}:
        sweep(conn, thread_id)


def _copy_thread(conn: Connection, op: CopyThread) -> None:
    if op.source == op.target:
        return
    columns: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "checkpoints": (("checkpoint_ns", "checkpoint_id"), _CHECKPOINT_REST),
        "writes": (
            ("checkpoint_ns", "checkpoint_id", "task_id", "idx"),
            ("task_path", "channel", "type", "data"),
        ),
        "staged": (
            ("checkpoint_ns", "checkpoint_id", "task_id", "ord"),
            ("task_path", "version", "ns", "key", "draft"),
        ),
    }
    for table, (key, rest) in columns.items():
        copied = ", ".join((*key, *rest))
        run(
            conn,
            f"INSERT INTO {table} (thread_id, {copied}) SELECT %s, {copied} FROM {table} WHERE thread_id = %s "
            + _replacing(("thread_id", *key), rest),
            op.target, op.source,
        )  # fmt: skip
    copy_values(conn, op.source, op.target)
    sweep(conn, op.target)  # a checkpoint may have taken the place of another


# -- staged work ------------------------------------------------------------------------------------


def _stage(conn: Connection, op: Stage) -> None:
    """Like the task's writes: the first account of a finished task stays."""
    run_rows(
        conn,
        "INSERT INTO staged SELECT %(thread)s, %(ns)s, %(id)s, %(task)s, ord, %(path)s, version, ns, key, draft "
        "FROM {rows} AS fresh (ord, version, ns, key, draft) "
        "WHERE NOT EXISTS (SELECT 1 FROM facts WHERE facts.version = fresh.version) AND NOT EXISTS (SELECT 1 "
        "FROM staged AS known WHERE known.thread_id = %(thread)s AND known.checkpoint_ns = %(ns)s "
        "AND known.checkpoint_id = %(id)s AND known.task_id = %(task)s)",
        "int text text text text",
        [
            (ord_, draft.version, encode_namespace(draft.namespace), draft.key, draft.dumps())
            for ord_, draft in enumerate(op.drafts)
        ],
        **_of_task(op.step, op.task_id), path=op.task_path,
    )  # fmt: skip


def _unstage(conn: Connection, op: Unstage) -> None:
    if op.task_id is None:
        run(conn, f"DELETE FROM staged WHERE {THIS_STEP}", *op.step)
    else:
        run(conn, f"DELETE FROM staged WHERE {THIS_STEP} AND task_id = %s", *op.step, op.task_id)


def _drain(conn: Connection, op: Drain) -> None:
    run(conn, "SELECT drain(%s, %s, %s, %s::text[])", *op.step, list(op.expected))


def _expect(conn: Connection, op: Expect) -> None:
    changed = run_rows(
        conn,
        "SELECT expected.number FROM {rows} AS expected (number, ns, key, version) LEFT JOIN items USING (ns, key) "
        "WHERE items.version IS DISTINCT FROM expected.version ORDER BY 1 LIMIT 1",
        "int text text text",
        [
            (number, encode_namespace(namespace), key, version)
            for number, (namespace, key, version) in enumerate(op.versions)
        ],
    )
    latest = [
        run(conn, "SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s", *step[:2])
        for step in op.latest
    ]
    if changed is not None and (row := changed.fetchone()) is not None:
        namespace, key, _ = op.versions[row[0]]
        raise FactRaced(f"{'/'.join(namespace)} {key!r} was changed meanwhile")
    for step, found in zip(op.latest, latest, strict=True):
        if found.fetchone() != (step.checkpoint_id,):
            raise CommitRaced(f"thread {step.thread_id} went on meanwhile")


_RUN: dict[type, Run] = {
    Expect: _expect,
    PutCheckpoint: _put_checkpoint,
    Sweep: _sweep,
    PutWrites: _put_writes,
    DropWrites: _drop_writes,
    Stage: _stage,
    Unstage: _unstage,
    Drain: _drain,
    CheckUnchanged: check_unchanged,
    CheckUnique: check_unique,
    Append: append,
    Touch: touch,
    PutEmbeddings: put_embeddings,
    PutVectors: put_vectors,
    Prepare: prepare,
    Settle: settle,
    OutboxDone: outbox_done,
    OutboxFailed: outbox_failed,
    PutIndexMeta: put_index_meta,
    DeleteThread: _delete_thread,
    DeleteRuns: _delete_runs,
    CopyThread: _copy_thread,
    DeleteCheckpoints: _delete_checkpoints,
    Load: load,
    Clear: clear,
}
_RUN_WITH_PLACES: dict[type, RunWithPlaces] = {
    Forget: forget,
    PutIndexed: put_indexed,
    QueueIndex: queue_index,
    RebuildIndex: rebuild_index,
}

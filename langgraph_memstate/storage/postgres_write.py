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
from langgraph_memstate.storage.postgres_checks import check_unchanged, check_unique
from langgraph_memstate.storage.postgres_link import (
    Connection,
    Cursor,
    Encoded,
    bytea_array,
    integer_array,
    run,
    run_rows,
    text_array,
)
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
from langgraph_memstate.storage.postgres_packing import with_time, with_type, write_of
from langgraph_memstate.storage.postgres_rows import clear, load
from langgraph_memstate.storage.postgres_values import (
    NUMBER,
    THREAD,
    copy_rows,
    dump_manifest,
    number_of,
    put_lists,
    sweep,
)
from langgraph_memstate.storage.postgres_vectors import Places, put_indexed
from langgraph_memstate.storage.values import StepKey, WriteRow


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

# The database fills in the sequence and the number of the thread.
_PUT_CHECKPOINT = (
    "SELECT put_checkpoint(%s, ROW(0, 0, %s, %s, id_key(%s), %s, %s, %s)::checkpoints, %s::text[], %s::bytea[])"
)


def _put_checkpoint(conn: Connection, op: PutCheckpoint) -> Cursor:
    put_lists(conn, op)
    fresh: tuple[Encoded | None, Encoded | None] = (None, None)
    if op.values:
        fresh = text_array(list(op.values)), bytea_array(list(map(with_type, op.values.values())))
    thread_id, ns, id_ = op.step
    return run(
        conn, _PUT_CHECKPOINT,
        thread_id, ns, id_, op.parent_id, op.run_id, dump_manifest(op.manifest),
        with_time(op.ts, op.metadata, op.head), *fresh,
    )  # fmt: skip


def _sweep(conn: Connection, op: Sweep) -> None:
    sweep(conn, op.thread_id)


def _put_writes(conn: Connection, op: PutWrites) -> None:
    rows: dict[int, WriteRow] = {}
    for row in op.rows:
        if row.idx < 0 or row.idx not in rows:
            rows[row.idx] = row
    values = [write_of(row.idx, row.value) for row in rows.values()]
    run(
        conn,
        "SELECT put_writes(%s, %s, %s, %s, %s, %s::integer[], %s::text[], %s::bytea[], %s::bytea[])",
        *op.step, op.task_id, op.task_path, integer_array(list(rows)),
        text_array([row.channel for row in rows.values()]),
        bytea_array([digest for _, digest in values]), bytea_array([value for value, _ in values]),
    )  # fmt: skip


def _drop_writes(conn: Connection, op: DropWrites) -> Cursor:
    """Says the thread if an element may be free now."""
    return run(
        conn,
        f"WITH gone AS (DELETE FROM writes WHERE thread = {NUMBER} AND checkpoint_ns = %(ns)s "
        "AND checkpoint_id = id_key(%(id)s) AND task_id = id_key(%(task)s) AND idx = ANY(%(idxs)s::int[]) "
        "RETURNING digest) SELECT %(thread)s::text FROM gone WHERE digest <> '' LIMIT 1",
        idxs=list(op.idxs), **_of_task(op.step, op.task_id),
    )  # fmt: skip


def _of_task(step: StepKey, task_id: str) -> dict[str, str]:
    return {"thread": step.thread_id, "ns": step.checkpoint_ns, "id": step.checkpoint_id, "task": task_id}


def _delete_thread(conn: Connection, op: DeleteThread) -> None:
    for table in ("checkpoints", "channel_values", "lists", "elements", "writes"):
        run(conn, f"DELETE FROM {table} WHERE thread = {NUMBER}", thread=op.thread_id)
    for table in ("staged", "threads"):
        run(conn, f"DELETE FROM {table} WHERE thread_id = %s", op.thread_id)


def _delete_runs(conn: Connection, op: DeleteRuns) -> None:
    rows = run(
        conn,
        f"SELECT {THREAD}, checkpoint_ns, checkpoint_id FROM checkpoints WHERE run_id = ANY(%s::text[])",
        list(op.run_ids),
    )
    _delete_checkpoints(conn, DeleteCheckpoints(tuple(StepKey(*row) for row in rows.fetchall())))


def _delete_checkpoints(conn: Connection, op: DeleteCheckpoints) -> None:
    numbers = {thread_id: number_of(conn, thread_id) for thread_id in {step.thread_id for step in op.steps}}
    numbered = [(numbers[thread_id], ns, id_) for thread_id, ns, id_ in op.steps]
    for table, id_ in (("checkpoints", "id"), ("writes", "id_key(id)")):
        run_rows(
            conn,
            f"DELETE FROM {table} WHERE (thread, checkpoint_ns, checkpoint_id) IN "
            f"(SELECT thread, ns, {id_} FROM {{rows}} AS gone (thread, ns, id))",
            "int text text",
            numbered,
        )
    run_rows(
        conn,
        "DELETE FROM staged WHERE (thread_id, checkpoint_ns, checkpoint_id) IN (SELECT * FROM {rows} AS gone)",
        "text text text",
        op.steps,
    )
    for thread_id in numbers:
        sweep(conn, thread_id)


def _copy_thread(conn: Connection, op: CopyThread) -> None:
    if op.source == op.target:
        return
    copied = "checkpoint_ns, checkpoint_id, task_id, ord, task_path, version, ns, key, draft"
    run(
        conn,
        f"INSERT INTO staged (thread_id, {copied}) SELECT %s, {copied} FROM staged WHERE thread_id = %s "
        "ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, ord) DO UPDATE SET "
        "task_path = EXCLUDED.task_path, version = EXCLUDED.version, ns = EXCLUDED.ns, key = EXCLUDED.key, "
        "draft = EXCLUDED.draft",
        op.target, op.source,
    )  # fmt: skip
    copy_rows(conn, op.source, op.target)
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
        run(
            conn,
            f"SELECT max(checkpoint_id) FROM checkpoints WHERE thread = {NUMBER} AND checkpoint_ns = %(ns)s",
            thread=step.thread_id,
            ns=step.checkpoint_ns,
        )
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

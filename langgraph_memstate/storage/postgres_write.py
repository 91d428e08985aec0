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
from langgraph_memstate.storage.postgres_calls import calls_of
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
from langgraph_memstate.storage.postgres_values import NUMBER, THREAD, copy_rows, number_of, sweep
from langgraph_memstate.storage.postgres_vectors import Places, put_indexed
from langgraph_memstate.storage.values import StepKey


@dataclass(frozen=True, slots=True)
class Sweep:
    """Free what no checkpoint of a thread refers to: one has been replaced."""

    thread_id: str


Run = Callable[[Connection, Any], None]
RunWithPlaces = Callable[[Connection, Any, Places], None]


def run_op(conn: Connection, op: Op | Sweep, places: Places) -> list[Cursor]:
    """Run one operation inside the caller's transaction. Returns, as rows to come, the threads to be swept after it."""
    if (calls := calls_of(op)) is not None:
        return [run(conn, f"SELECT {function}", *parameters) for function, parameters in calls]
    if (run_it := _RUN.get(type(op))) is not None:
        run_it(conn, op)
    else:
        _RUN_WITH_PLACES[type(op)](conn, op, places)
    return []


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


def _sweep(conn: Connection, op: Sweep) -> None:
    sweep(conn, op.thread_id)


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
    copy_rows(conn, op.source, op.target)
    sweep(conn, op.target)  # a checkpoint may have taken the place of another


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
    Sweep: _sweep,
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

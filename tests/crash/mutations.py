"""Seeded bugs, and for each the check that has to find it. A check that finds none of them would prove nothing."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from census import Cell, Count, take_census
from seams import KINDS, STATEMENTS, fail_everywhere
from writers import Setup, kill_everywhere

from langgraph_memstate.commit import Writer
from langgraph_memstate.graph import pregel
from langgraph_memstate.index import VectorIndex
from langgraph_memstate.outbox import Outbox
from langgraph_memstate.storage import sqlite_write
from langgraph_memstate.storage.operations import Commit, Drain, PutEmbeddings, PutVectors, Settle, Stage, Unstage
from langgraph_memstate.storage.sqlite import SQLiteStorage
from langgraph_memstate.storage.sqlite_read import SQLiteReader

Check = Callable[[str], list[str]]


# -- the checks, in a size that suits one bug -------------------------------------------------------


def _told(count: Count) -> list[str]:
    wrong = {"ghosts": count.ghosts, "losses": count.losses, "duplicates": count.duplicates}
    return [*count.violations, *(f"{number} {what}" for what, number in wrong.items() if number)]


def kills(root: str) -> list[str]:
    return kill_everywhere(root, Setup(("one",)), until=3, stride=3)[1]


def kills_closely(root: str) -> list[str]:
    return kill_everywhere(root, Setup(("one",)), until=3, stride=2)[1]


def kills_deferred(root: str) -> list[str]:
    return kill_everywhere(root, Setup(("one",), "deferred"), until=3, stride=3)[1]


def faults_of_calls(root: str) -> list[str]:
    return fail_everywhere(root, "facts", KINDS[0], stride=2)[1]


def faults_of_statements(root: str) -> list[str]:
    return fail_everywhere(root, "facts", STATEMENTS[2], stride=3)[1]


def killed_runs(root: str) -> list[str]:
    return _told(take_census(Cell("memstate", "line", True, "sync"), root, stride=8))


def resumed_runs(root: str) -> list[str]:
    return _told(take_census(Cell("memstate", "fan out", True, "async"), root, phase=1, stride=12))


CHECKS: tuple[Check, ...] = (
    kills, kills_deferred, faults_of_calls, faults_of_statements, killed_runs, resumed_runs,
)  # fmt: skip


# -- the bugs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    name: str
    seed: Callable[[], None]
    check: Check


def _no_transaction() -> None:
    def apply(self: SQLiteStorage, commits: Sequence[Commit]) -> list[BaseException | None]:
        conn = self._open_writer()
        for commit in commits:
            sqlite_write.run_ops(conn, commit, time.time())
        return [None] * len(commits)

    SQLiteStorage.apply = apply  # type: ignore[method-assign]


def _swallowed_error() -> None:
    def apply_one(
        self: SQLiteStorage, conn: sqlite3.Connection, commit: Commit, now: float, *, apart: bool
    ) -> BaseException | None:
        try:
            sqlite_write.run_ops(conn, commit, time.time())
        except Exception as error:
            return error  # and what the commit did before it stays in the transaction
        return None

    SQLiteStorage._apply_one = apply_one  # type: ignore[method-assign]


def _early_acknowledgement() -> None:
    def acknowledge_first(self: Writer, group: Any) -> list[None]:
        self._background.submit(self._storage.apply, [landing.commit for landing in group])
        return [None] * len(group)

    Writer._land = acknowledge_first  # type: ignore[method-assign,assignment]


def _no_prepare_record() -> None:
    def land(self: Outbox, plan: Any, atomic: Any, commit: Commit) -> None:
        for index in atomic:
            self._send(index, plan.upserts[index.name])
        embeddings = PutEmbeddings(tuple(plan.fresh))
        self._writer.submit((embeddings, *commit)).result()

    Outbox._land = land  # type: ignore[method-assign]


def _log_first() -> None:
    """The step is committed before its vectors are stored, and nobody notes that they are missing."""

    def land(self: Outbox, plan: Any, atomic: Any, commit: Commit) -> None:
        embeddings = PutEmbeddings(tuple(plan.fresh))
        self._writer.submit((embeddings, *commit)).result()
        for index in atomic:
            self._send(index, plan.upserts[index.name])

    Outbox._land = land  # type: ignore[method-assign]


def _old_vector_goes_first() -> None:
    send = Outbox._send

    def delete_before_upsert(self: Outbox, index: VectorIndex, records: Any) -> None:
        with self._storage.snapshot() as reader:
            current = list(reader.vectors(index.name, index.model, (), 0.0))
        places = {record.namespace for record in records}
        index.apply((), [row.vector_id for row in current if row.record.namespace in places])
        send(self, index, records)

    Outbox._send = delete_before_upsert  # type: ignore[method-assign]


def _no_replay() -> None:
    Outbox.settle_abandoned = lambda self: None  # type: ignore[method-assign]


def _deferred_work_forgotten() -> None:
    put_vectors = sqlite_write._RUN[PutVectors]

    def without_outbox(conn: sqlite3.Connection, op: PutVectors) -> None:
        put_vectors(conn, PutVectors(op.rows, frozenset()))

    sqlite_write._RUN[PutVectors] = without_outbox


def _search_trusts_the_index() -> None:
    SQLiteReader.pending_upserts = lambda self, index: []  # type: ignore[method-assign]


def _aborted_commit_keeps_its_vectors() -> None:
    def only_remove(conn: sqlite3.Connection, op: Settle) -> None:
        conn.execute("DELETE FROM prepared WHERE id = ?", (op.id,))

    sqlite_write._RUN[Settle] = only_remove


def _marker_of_a_failed_task() -> None:
    pregel.without_tokens = list  # type: ignore[assignment]


def _writes_of_a_failed_task() -> None:
    pregel.unfinished = lambda writes: False  # type: ignore[assignment]
    pregel.failed = lambda writes: False  # type: ignore[assignment]


def _staged_work_ignored() -> None:
    def delete_without_looking(conn: sqlite3.Connection, op: Drain) -> None:
        conn.execute(f"DELETE FROM staged WHERE {sqlite_write.THIS_STEP}", op.step)

    sqlite_write._RUN[Drain] = delete_without_looking


def _staged_work_stays() -> None:
    sqlite_write._RUN[Drain] = lambda conn, op: None
    sqlite_write._RUN[Unstage] = lambda conn, op: None


def _finished_work_not_staged() -> None:
    sqlite_write._RUN[Stage] = lambda conn, op: None


def _checkpoint_apart() -> None:
    """The step's memory and its checkpoint are two transactions."""

    def land(self: Any, drafts: Any, before: Commit = (), after: Commit = ()) -> None:
        self._outbox.commit(drafts, before, ())
        if after:
            self._outbox.commit((), (), after)

    from langgraph_memstate.memory import MemoryStore

    MemoryStore.land = land  # type: ignore[method-assign]


MUTATIONS = (
    Mutation("no transaction", _no_transaction, kills),
    Mutation("an error is swallowed, then commit", _swallowed_error, faults_of_statements),
    Mutation("acknowledged before it is committed", _early_acknowledgement, kills),
    Mutation("the index is written with no prepare record", _no_prepare_record, kills),
    Mutation("the index is written after the commit", _log_first, kills_closely),  # it shows at few points
    Mutation("the old vector is deleted before the new one is committed", _old_vector_goes_first, faults_of_calls),
    Mutation("what a crash left is not settled", _no_replay, kills),
    Mutation("a commit that failed leaves its vectors", _aborted_commit_keeps_its_vectors, kills),
    Mutation("deferred work is not in the outbox", _deferred_work_forgotten, kills_deferred),
    Mutation("search trusts an index that lags", _search_trusts_the_index, kills_deferred),
    Mutation("the checkpoint is a transaction of its own", _checkpoint_apart, killed_runs),
    Mutation("the marker of a failed task is stored", _marker_of_a_failed_task, resumed_runs),
    Mutation("the memory of a failed task is stored", _writes_of_a_failed_task, resumed_runs),
    Mutation("work staged by an earlier process is ignored", _staged_work_ignored, resumed_runs),
    Mutation("landed work stays staged", _staged_work_stays, resumed_runs),
    Mutation("finished work is not staged", _finished_work_not_staged, resumed_runs),
)


def find(root: str, number: int) -> list[str]:
    """What the check finds with the mutation of that number; only for a process that ends with it."""
    mutation = MUTATIONS[number]
    mutation.seed()
    try:
        return mutation.check(root)
    except RuntimeError as error:  # a child died of the bug
        return [str(error)]

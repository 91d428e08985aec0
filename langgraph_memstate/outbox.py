"""Prepare, apply, settle, replay: how the vector indexes follow the log.

Atomic mode runs a two-phase commit with SQL as the coordinator (Gray 1978): the decision record is in the log before
the index hears of the vectors, and the SQL commit decides. Deferred mode is a transactional outbox: the work is
committed with the step and applied afterwards. Either way a version that SQL does not show as current is invisible,
so a crash leaves only vectors that nobody can see, and they are removed when the memory is opened again.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from uuid import uuid4

from langgraph_memstate.commit import Writer
from langgraph_memstate.errors import IndexConfigError, MemStateError, StorageClosedError, VectorSyncError
from langgraph_memstate.facts import Draft, IndexPaths, Record, new_version
from langgraph_memstate.hooks.base import IndexState, Vector, VectorRecord
from langgraph_memstate.index import VectorIndex
from langgraph_memstate.storage.base import (
    Append,
    Commit,
    EmbeddingRow,
    Op,
    OutboxDone,
    OutboxFailed,
    OutboxRow,
    Prepare,
    PreparedRow,
    PutEmbeddings,
    PutVectors,
    QueueIndex,
    Settle,
    Storage,
    VectorRow,
)

logger = logging.getLogger("langgraph_memstate")

VectorSync = Literal["atomic", "deferred"]

LEASE = 120.0  # seconds after which anybody may take back what an unfinished commit sent to the index
POISON_AFTER = 8  # failures of one entry, with the database up, before it is served from SQL for good
_POLL = 0.5  # seconds between looks for work that another process committed
_REOPEN = 2.0  # seconds between tries to open an index that is away
_BATCH = 50

_alive: set[str] = set()
"""The owners of prepare records in this process whose memory is open."""


@dataclass(slots=True)
class _Plan:
    """What a commit's drafts mean for every index."""

    rows: list[VectorRow] = field(default_factory=list)
    fresh: list[EmbeddingRow] = field(default_factory=list)
    upserts: dict[str, list[VectorRecord]] = field(default_factory=dict)


class Outbox:
    """Commits drafts together with what they mean for the indexes, and applies what was deferred."""

    def __init__(self, storage: Storage, writer: Writer, mode: VectorSync, store_id: str) -> None:
        self.mode = mode
        self.indexes: list[VectorIndex] = []
        self._store_id = store_id
        self._storage = storage
        self._writer = writer
        self._wake = threading.Event()
        self._stopping = False
        self._follower: threading.Thread | None = None
        self._turn = threading.Lock()  # one replay at a time: the follower's or a flush
        # Made here and not at import, which a forked process shares with its parent.
        self._owner = f"{socket.gethostname()}/{os.getpid()}/{uuid4().hex}"
        _alive.add(self._owner)

    # -- opening ------------------------------------------------------------------------------------

    def attach(self, index: VectorIndex) -> None:
        """Follow the log with one more index. A database that is away is tried again in the background."""
        if index.name in {known.name for known in self.indexes}:
            raise IndexConfigError(f"index {index.name!r} is attached already; give the hook another collection_name")
        try:
            self._open(index)
        except VectorSyncError as error:
            logger.warning("%s; search scans SQL meanwhile", error)
        self.indexes.append(index)
        if index.hook is not None:
            self.settle_abandoned()
            self._start()

    def _open(self, index: VectorIndex) -> None:
        """Open an index and queue a rebuild where one is needed."""
        with self._storage.snapshot() as reader:
            meta = reader.index_meta(index.name)
        recorded, rebuild = index.open(self._store_id, meta)
        ops: list[Op] = [] if meta == recorded else [recorded]
        if rebuild:
            with self._storage.snapshot() as reader:
                current = tuple(reader.vector_ids(index.name))
            ops.append(QueueIndex(index.name, current, (), replace=True))
        if ops:
            self._writer.submit(tuple(ops)).result()

    def _reopen(self) -> None:
        """Try indexes again that were away, or owned by another process."""
        for index in self.indexes:
            if index.state in (None, IndexState.BUSY):
                try:
                    self._open(index)
                except VectorSyncError as error:
                    logger.debug("still: %s", error)

    def settle_abandoned(self) -> None:
        """Take back the vectors of commits whose process is gone."""
        with self._storage.snapshot() as reader:
            abandoned = [row for row in reader.prepared() if _is_abandoned(row)]
        for row in abandoned:
            logger.info("taking back %d vectors of an unfinished commit", len(row.vector_ids))
            self._writer.submit((Settle(row.id, take_back=True),)).result()

    # -- committing ---------------------------------------------------------------------------------

    def is_plain(self, drafts: Sequence[Draft]) -> bool:
        """Whether a commit of these drafts touches neither a model nor a vector database."""
        return not any(index.texts(draft) for index in self.indexes for draft in drafts)

    def plain(self, drafts: Sequence[Draft], before: Commit = (), after: Commit = ()) -> Commit:
        """The operations of a plain commit, to be submitted as they are."""
        if not drafts:
            return (*before, *after)
        names = tuple(index.name for index in self.indexes)
        return (*before, Append(tuple(drafts), names), *after)

    def commit(self, drafts: Sequence[Draft], before: Commit = (), after: Commit = ()) -> None:
        """Land drafts and their vectors with the operations around them, or nothing of it.

        Raises:
            EmbeddingError: before anything was written.
            VectorSyncError: the vector database failed; the vectors were taken back.
        """
        if self.is_plain(drafts):
            self._writer.submit(self.plain(drafts, before, after)).result()
        else:
            plan = self._plan(drafts)
            atomic = [index for index in self.indexes if self._is_atomic(index) and plan.upserts.get(index.name)]
            deferred = frozenset(plan.upserts) - {index.name for index in atomic}
            # Vectors come before the log, so that a version superseded in this very commit gives its vector back.
            vectors = PutVectors(tuple(plan.rows), deferred)
            self._land(plan, atomic, self.plain(drafts, (*before, vectors), after))
        if drafts:
            self._wake.set()

    def _is_atomic(self, index: VectorIndex) -> bool:
        if index.hook is None or self.mode == "deferred" or index.state is IndexState.BUSY:
            return False
        if index.state is None:
            raise VectorSyncError(f"index {index.name} is not open; nothing was written. Try memory.repair()")
        return True

    def _plan(self, drafts: Sequence[Draft]) -> _Plan:
        plan = _Plan()
        for index in self.indexes:
            rows, fresh, vectors = index.embed(drafts, self._storage)
            plan.rows += rows
            plan.fresh += fresh
            if index.hook is not None:
                plan.upserts[index.name] = _records(index, drafts, rows, vectors)
        return plan

    def _land(self, plan: _Plan, atomic: Sequence[VectorIndex], commit: Commit) -> None:
        embeddings = (PutEmbeddings(tuple(plan.fresh)),) if plan.fresh else ()
        if not atomic:
            self._writer.submit((*embeddings, *commit)).result()
            return
        prepared = [
            PreparedRow(
                new_version(), index.name, tuple(record.id for record in plan.upserts[index.name]),
                self._owner, time.time() + LEASE,
            )
            for index in atomic
        ]  # fmt: skip
        self._writer.submit((*embeddings, *map(Prepare, prepared))).result()
        try:
            for index in atomic:
                self._send(index, plan.upserts[index.name])
            settles = tuple(Settle(row.id) for row in prepared)
            self._writer.submit((*settles, *commit)).result()
        except Exception:
            self._take_back(atomic, prepared)
            raise

    def _send(self, index: VectorIndex, records: Sequence[VectorRecord]) -> None:
        try:
            index.apply(records, ())
        except Exception as error:
            raise VectorSyncError(
                f"index {index.name} failed: {error!r}; the commit was taken back and can be tried again"
            ) from error

    def _take_back(self, atomic: Sequence[VectorIndex], prepared: Sequence[PreparedRow]) -> None:
        """Undo the first phase. What the index cannot forget now, the outbox removes later."""
        for index, row in zip(atomic, prepared, strict=True):
            try:
                index.apply((), row.vector_ids)
                gone = True
            except Exception as error:
                logger.warning("vectors of a failed commit stay in %s for now: %r", index.name, error)
                gone = False
            try:
                self._writer.submit((Settle(row.id, take_back=not gone),)).result()
            except MemStateError as error:  # its lease ends, and whoever opens the memory settles it
                logger.warning("a failed commit is not settled yet: %s", error)

    # -- replay -------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._follower is None:
            self._follower = threading.Thread(target=self._follow, name="memstate-outbox", daemon=True)
            self._follower.start()
        self._wake.set()

    def _follow(self) -> None:
        reopen_at = 0.0
        while not self._stopping:
            self._wake.wait(_POLL)
            self._wake.clear()
            if self._stopping:
                return
            try:
                if time.monotonic() > reopen_at:
                    self._reopen()
                    reopen_at = time.monotonic() + _REOPEN
                while self.replay() and not self._stopping:
                    continue
            except StorageClosedError:
                return
            except Exception as error:  # keep following: the next round may find the database well again
                logger.warning("replaying the outbox failed: %r", error)

    def replay(self, *, force: bool = False) -> bool:
        """Apply one batch of due work to each index (`force`: also what waits for a retry). False when idle."""
        busy = any([self._embed_batch(index) for index in self.indexes])
        with self._turn:
            for index in self.indexes:
                if index.follows:
                    busy = self._replay_index(index, force) or busy
        return busy

    def catch_up(self, index: VectorIndex) -> None:
        """Embed what processes without this index have committed, so that search does not miss it."""
        while self._embed_batch(index):
            continue

    def _embed_batch(self, index: VectorIndex) -> bool:
        # Takes no turn: an async model may need the very thread that waits for it. Twice is the same as once.
        with self._storage.snapshot() as reader:
            waiting = reader.to_embed(index.name, _BATCH)
        if not waiting:
            return False
        drafts = [draft_of(record, paths) for _, record, paths in waiting if record is not None]
        rows, fresh, _ = index.embed(drafts, self._storage)
        done = OutboxDone(tuple(id_ for id_, _, _ in waiting))
        self._writer.submit((*self._bind(index, rows, fresh), done)).result()
        return True

    @staticmethod
    def _bind(index: VectorIndex, rows: Sequence[VectorRow], fresh: Sequence[EmbeddingRow]) -> Commit:
        """Give versions that are in the log already their vectors; the index gets them through the outbox."""
        deferred = frozenset((index.name,)) if index.hook is not None else frozenset()
        return (PutEmbeddings(tuple(fresh)), PutVectors(tuple(rows), deferred))

    def _replay_index(self, index: VectorIndex, force: bool) -> bool:
        with self._storage.snapshot() as reader:
            due = reader.outbox(index.name, due=time.time() + (86_400 if force else 0), limit=_BATCH)
            rows = [row for row in due if row.op != "embed"]
            # An entry that failed before goes alone, so that it cannot hold back its neighbours.
            rows = rows[:1] if rows and rows[0].attempts else [row for row in rows if not row.attempts]
            last = {row.vector_id: row for row in rows}
            current = reader.upsert_rows(index.name, index.model, list(last))
        if not rows:
            return False
        upserts = [index.record_of(current[id_]) for id_, row in last.items() if row.op == "upsert" and id_ in current]
        deletes = [id_ for id_, row in last.items() if row.op == "delete" and id_ not in current]
        try:
            index.apply(upserts, deletes)
        except Exception as error:
            self._note_failure(index, rows, error)
            return False
        self._writer.submit((OutboxDone(tuple(row.id for row in rows)),)).result()
        return True

    def _note_failure(self, index: VectorIndex, rows: Sequence[OutboxRow], error: Exception) -> None:
        attempts = max(row.attempts for row in rows) + 1
        poison = len(rows) == 1 and attempts >= POISON_AFTER and index.answers()
        retry_at = None if poison else time.time() + min(30.0, 0.05 * 2**attempts)
        what = "is quarantined and served from SQL" if poison else "will be retried"
        logger.warning("index %s: %r; %d entries, %s", index.name, error, len(rows), what)
        ids = tuple(row.id for row in rows)
        self._writer.submit((OutboxFailed(ids, repr(error)[:500], retry_at),)).result()

    def waiting(self) -> int:
        """Entries of indexes this process follows that are neither applied nor quarantined."""
        with self._storage.snapshot() as reader:
            horizon = time.time() + 86_400
            return sum(
                len(reader.outbox(index.name, due=horizon, limit=1_000_000))
                for index in self.indexes
                if index.follows
            )

    def flush(self) -> None:
        """Apply everything that waits.

        Raises:
            VectorSyncError: an index refused; its work stays in the outbox and search stays right.
        """
        while self.replay(force=True):
            continue
        if left := self.waiting():
            raise VectorSyncError(f"{left} index entries could not be applied; they stay queued and are retried")

    def mend(
        self, index: VectorIndex, missing: Sequence[str], orphaned: Sequence[str], unembedded: Sequence[Draft]
    ) -> None:
        """Queue what makes an index equal to SQL: entries that failed for good are tried again."""
        if index.hook is None or not index.follows:
            self._open(index)
        rows, fresh, _ = index.embed(unembedded, self._storage)
        with self._storage.snapshot() as reader:
            held_back = [row for row in reader.outbox(index.name, due=None, limit=1_000_000)]
        retry = OutboxFailed(tuple(row.id for row in held_back), "repair", 0.0)
        self._writer.submit(
            (
                *self._bind(index, rows, fresh),
                QueueIndex(index.name, tuple(missing), tuple(orphaned), replace=False),
                retry,
            )
        ).result()
        self._wake.set()

    def drain(self) -> None:
        """Stop following, apply what waits, and close the indexes."""
        self._stopping = True
        self._wake.set()
        if self._follower is not None and threading.current_thread() is not self._follower:
            self._follower.join()
        try:
            if any(index.follows for index in self.indexes):
                self.flush()
        except MemStateError as error:
            logger.warning("closing with index work left, which the next open applies: %s", error)
        _alive.discard(self._owner)
        for index in self.indexes:
            index.close()


def _records(
    index: VectorIndex, drafts: Sequence[Draft], rows: Sequence[VectorRow], vectors: dict[str, Vector]
) -> list[VectorRecord]:
    by_version = {draft.version: draft for draft in drafts}
    records = []
    for row in rows:
        draft = by_version[row.version]
        assert draft.value is not None
        records.append(
            index.record(row.vector_id, row.ord, vectors[row.vector_id], draft.namespace, draft.value, draft.index)
        )
    return records


def draft_of(record: Record, paths: IndexPaths) -> Draft:
    """The draft a current item was, as far as an index is concerned."""
    return Draft(record.version, record.namespace, record.key, "put", record.value, type=record.type, index=paths)


def _is_abandoned(row: PreparedRow) -> bool:
    if row.expires_at < time.time():
        return True
    host, _, process = row.owner.partition("/")
    pid = process.partition("/")[0]
    if host != socket.gethostname() or not pid.isdecimal():
        return False  # another machine: only its lease can tell
    if int(pid) == os.getpid():  # or of one that had our number before, as containers often do
        return row.owner not in _alive
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # somebody else's process, but alive
    return False

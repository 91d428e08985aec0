"""Replay: a thread that applies the outbox to the vector indexes.

An entry of the outbox says that an index may be wrong about a vector; what is right, SQL says when it is applied. Only
here are vectors removed, and never one that a commit under way has prepared: a commit that failed may be tried again
with the same ids at any moment, in another process too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from langgraph_memstate import prepared
from langgraph_memstate.commit import Writer
from langgraph_memstate.errors import (
    EmbeddingError,
    IndexConfigError,
    MemStateError,
    StorageClosedError,
    TransientError,
    VectorSyncError,
)
from langgraph_memstate.facts import Draft, IndexPaths, Record
from langgraph_memstate.hooks.base import IndexState, SyncHook, Vector
from langgraph_memstate.index import VectorIndex, to_bytes
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import (
    Commit,
    Op,
    OutboxDone,
    OutboxFailed,
    PutEmbeddings,
    PutIndexed,
    PutVectors,
    QueueIndex,
    RebuildIndex,
    Settle,
)
from langgraph_memstate.storage.values import EmbeddingRow, IndexedRow, OutboxRow, PreparedRow, ScoredRow, VectorRow

logger = logging.getLogger("langgraph_memstate")

POISON_AFTER = 8  # failures of one entry, with the database up, before it is served from SQL for good
_POLL = 0.5  # seconds between looks for work that another process committed
_REOPEN = 2.0  # seconds between tries to open an index that is away
_BATCH = 50
_LEASE = 30.0  # seconds after which another process may apply what one has claimed
_ASIDE = 0.05  # seconds between looks whether another process is through with what it has claimed
_HORIZON = 86_400.0  # seconds; every retry is nearer


class Follower:
    """Keeps indexes open and equal to SQL."""

    def __init__(self, storage: Storage, writer: Writer, store_id: str) -> None:
        self.indexes: list[VectorIndex] = []
        self._store_id = store_id
        self._storage = storage
        self._writer = writer
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # one at a time opens or writes an index: the thread or a flush
        self._rests: dict[str, tuple[int, float]] = {}  # by index or model: failures in a row, when it is tried again
        self._failures: dict[str, Exception] = {}  # by index: the last, of which a flush tells

    # -- opening ------------------------------------------------------------------------------------

    def attach(self, index: VectorIndex) -> None:
        """Take one more index in. A database that is away is tried again in the background.

        Raises:
            IndexConfigError: it does not fit the database, or the other indexes.
        """
        for known in self.indexes:
            if known.name == index.name:
                raise IndexConfigError(
                    f"index {index.name!r} is attached already; give the hook another collection_name"
                )
            if known.embedder.is_confused_with(index.embedder):
                raise IndexConfigError(
                    f"indexes {known.name!r} and {index.name!r} embed with different models that are both called "
                    f"{index.model!r}; give each function or Embeddings object a `model` attribute of its own"
                )
        try:
            self._open(index)
        except VectorSyncError as error:
            logger.warning("%s; search scans SQL meanwhile", error)
        self.indexes.append(index)
        if index.hook is not None:
            self.settle_abandoned()
            self._start()

    def _open(self, index: VectorIndex, *, anew: bool = False) -> None:
        """Open an index and queue a rebuild where one is needed."""
        with self._storage.snapshot() as reader:
            meta = reader.index_meta(index.name)
        recorded, rebuild = index.open(self._store_id, meta, anew=anew)
        ops: list[Op] = [] if meta == recorded else [recorded]
        if rebuild:
            ops.append(RebuildIndex(index.name))
        if ops:
            self._writer.land(tuple(ops))
        index.ready()

    def _reopen(self, *states: IndexState | None) -> None:
        """Try indexes again that were away, or owned by another process."""
        for index in self.indexes:
            with self._turn:
                if index.state in states and not index.is_taken:
                    try:
                        self._open(index)
                    except (VectorSyncError, IndexConfigError) as error:
                        self._failures[index.name] = error
                        logger.debug("still: %s", error)

    def scrub(self) -> None:
        """Rebuild from SQL the indexes whose files keep what was removed from them.

        Raises:
            VectorSyncError: one cannot be reached.
        """
        self.rebuild(lambda hook: hook.capabilities.keeps_removed)

    def rebuild(self, which: Callable[[SyncHook], bool] = lambda hook: True) -> None:
        """Empty the indexes that are not another process's and queue everything for them; search scans SQL until then.

        Raises:
            VectorSyncError: one cannot be reached.
        """
        for index in self.indexes:
            with self._turn:
                if index.hook is not None and index.state is not IndexState.BUSY and which(index.hook):
                    self._open(index, anew=True)

    def reopen(self, index: VectorIndex) -> None:
        """Open an index anew, and rebuild it where what is found is not what SQL expects.

        Raises:
            VectorSyncError: it cannot be reached.
        """
        with self._turn:
            self._open(index)

    def settle_abandoned(self) -> None:
        """Take back the vectors of commits whose process is gone."""
        with self._storage.snapshot() as reader:
            abandoned = [row for row in reader.prepared() if prepared.is_abandoned(row)]
        for row in abandoned:
            logger.info("taking back %d vectors of an unfinished commit", len(row.vector_ids))
            self._settle(row)

    def _settle(self, row: PreparedRow) -> None:
        try:
            self._writer.land((Settle(row.id),))
        except TransientError as error:
            logger.debug("a prepare record is not settled by us: %s", error)

    # -- the thread ---------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="memstate-outbox", daemon=True)
            self._thread.start()
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
                    reopen_at = time.monotonic() + _REOPEN
                    self._reopen(None, IndexState.BUSY)
                    self.settle_abandoned()
                while self.replay() and not self._stopping:
                    continue
            except StorageClosedError:
                return
            except Exception as error:  # keep following: the next round may find the database well again
                logger.warning("replaying the outbox failed: %r", error)

    # -- replay -------------------------------------------------------------------------------------

    def replay(self) -> bool:
        """Apply one batch of due work to each index that is not resting after a failure. False when idle."""
        busy = False
        for index in self.indexes:
            if self._is_rested(index.model):
                try:
                    busy = self._embed_batch(index) or busy
                    self._rests.pop(index.model, None)
                except EmbeddingError as error:
                    self._rest(index.model, error)
            if self._is_rested(index.name):
                busy = self._replay(index) or busy
        return busy

    def catch_up(self, index: VectorIndex) -> None:
        """Embed what processes without this index have committed, so that search does not miss it."""
        while self._embed_batch(index):
            continue

    def _embed_batch(self, index: VectorIndex) -> bool:
        # Takes no turn: an async model may need the very thread that waits for it. Twice is the same as once.
        with self._storage.snapshot() as reader:
            waiting = reader.to_embed(index.name, _BATCH)
        try:
            self._embed(index, waiting)
        except EmbeddingError:
            if not index.embedder.answers():
                raise
            for entry in waiting:
                try:
                    self._embed(index, (entry,))
                except EmbeddingError as error:
                    logger.warning("a value cannot be embedded and is quarantined: %s", error)
                    self._writer.land((OutboxFailed((entry[0],), repr(error)[:500], None),))
        return bool(waiting)

    def _embed(self, index: VectorIndex, waiting: Sequence[tuple[int, Record | None, IndexPaths]]) -> None:
        if waiting:
            drafts = [draft_of(record, paths) for _, record, paths in waiting if record is not None]
            rows, fresh, vectors = index.embed(drafts, self._storage)
            done = tuple(OutboxRow(id_, index.name, "embed", "", None, 0) for id_, _, _ in waiting)
            self._writer.land((*self._bind(index, rows, fresh, vectors), OutboxDone(done)))

    @staticmethod
    def _bind(
        index: VectorIndex, rows: Sequence[VectorRow], fresh: Sequence[EmbeddingRow], vectors: Mapping[str, Vector]
    ) -> Commit:
        """Give versions that are in the log already their vectors; the index gets them through the outbox, if at all"""
        if index.is_kept:
            return (PutEmbeddings(tuple(fresh)), PutVectors(tuple(rows), frozenset()), indexed(index, rows, vectors))
        deferred = frozenset((index.name,)) if index.hook is not None else frozenset()
        return (PutEmbeddings(tuple(fresh)), PutVectors(tuple(rows), deferred))

    def _replay(self, index: VectorIndex, tried: set[int] | None = None) -> bool:
        """Apply one batch; False when there is nothing left to do now.

        With `tried`, entries that wait for a retry are due as well, once: it collects those that failed again.
        """
        with self._turn:
            if not index.follows:
                return False
            seen = tried or set()
            due, limit = time.time() + (0.0 if tried is None else _HORIZON), _BATCH + len(seen)
            with self._storage.snapshot() as reader:
                if not index.is_current(reader):
                    return False
                rows = reader.applicable(index.name, due=due, limit=limit)
                current = reader.upsert_rows(index.name, index.model, [row.vector_id for row in rows])
            if rows and index.is_shared:
                claimed = self._storage.claim(index.name, due=due, limit=limit, lease=_LEASE)
                with self._storage.snapshot() as reader:
                    taken = reader.prepared_ids(index.name)
                    rows = [row for row in claimed if row.vector_id not in taken]
                    current = reader.upsert_rows(index.name, index.model, [row.vector_id for row in rows])
            rows = [row for row in rows if row.id not in seen]
            if not rows:
                return False
            failed = self._apply(index, rows, current)
            if tried is not None:
                tried.update(row.id for row in failed)
            return len(failed) < len(rows) or index.name not in self._rests

    def _apply(
        self, index: VectorIndex, rows: Sequence[OutboxRow], current: dict[str, ScoredRow]
    ) -> Sequence[OutboxRow]:
        """Apply entries, one by one where they fail together; returns those that failed."""
        last = {row.vector_id: row for row in rows}
        upserts = [index.record_of(current[id_]) for id_, row in last.items() if row.op == "upsert" and id_ in current]
        deletes = [id_ for id_, row in last.items() if row.op == "delete" and id_ not in current]
        try:
            index.apply(upserts, deletes)
        except Exception as error:
            self._failures[index.name] = error
            if not index.answers():
                self._rest(index.name, error)
                return rows
            self._rests.pop(index.name, None)
            if len(rows) > 1:
                return self._apply_singly(index, rows, current)
            self._note_failure(index, rows[0], error)
            return rows
        if upserts or deletes:
            self._rests.pop(index.name, None)
        self._writer.land((OutboxDone(tuple(rows)),))
        return ()

    def _apply_singly(
        self, index: VectorIndex, rows: Sequence[OutboxRow], current: dict[str, ScoredRow]
    ) -> Sequence[OutboxRow]:
        failed: list[OutboxRow] = []
        for position, row in enumerate(rows):
            failed += self._apply(index, (row,), current)
            if index.name in self._rests:
                return [*failed, *rows[position + 1 :]]
        return failed

    def _rest(self, name: str, error: Exception) -> None:
        """Leave an index or a model that is away alone for a while."""
        failures = self._rests.get(name, (0, 0.0))[0] + 1
        if failures == 1:
            logger.warning("%s does not answer (%r); its work is kept and tried again", name, error)
        self._rests[name] = (failures, time.monotonic() + min(30.0, 0.05 * 2**failures))

    def _is_rested(self, name: str) -> bool:
        return time.monotonic() >= self._rests.get(name, (0, 0.0))[1]

    def _note_failure(self, index: VectorIndex, row: OutboxRow, error: Exception) -> None:
        """Put an entry off that fails although the database is up."""
        attempts = row.attempts + 1
        retry_at = None if attempts >= POISON_AFTER else time.time() + min(30.0, 0.05 * 2**attempts)
        what = "is quarantined and served from SQL" if retry_at is None else "will be retried"
        logger.warning("index %s: %r; the %s of vector %s %s", index.name, error, row.op, row.vector_id, what)
        self._writer.land((OutboxFailed((row.id,), repr(error)[:500], retry_at),))

    def waiting(self) -> dict[int, bool]:
        """Entries that could be applied and are not, of indexes that no other process alone follows.

        With each, whether another process is about to apply it.
        """
        with self._storage.snapshot() as reader:
            return {
                row.id: row.is_held
                for index in self.indexes
                if index.hook is not None and index.state is not IndexState.BUSY
                for row in reader.applicable(index.name, due=time.time() + _HORIZON, limit=1_000_000_000)
            }

    def flush(self) -> None:
        """Apply everything that waits.

        Raises:
            EmbeddingError: the model failed on what processes without an index had left to embed.
            VectorSyncError: an index refused or is away; its work stays in the outbox and search stays right.
        """
        self._failures.clear()
        self._reopen(None)
        for index in self.indexes:
            self.catch_up(index)
        self._apply_all()

    def _apply_all(self, *, waits: bool = True) -> None:
        tried: dict[str, set[int]] = {index.name: set() for index in self.indexes}
        seen: set[int] = set()
        while True:
            for index in self.indexes:
                while self._replay(index, tried[index.name]):
                    continue
            left = self.waiting()
            if not left or (all(left.values()) and not waits):
                return
            held = {id_ for id_, is_held in left.items() if is_held}
            free = left.keys() - held
            if free <= seen:
                if not (waits and held):
                    why = "; ".join(f"{name}: {error!r}" for name, error in dict(self._failures).items())
                    raise VectorSyncError(
                        f"{len(left)} index entries could not be applied; they stay queued and are retried ({why})"
                    )
                time.sleep(_ASIDE)
            # Some may have come since, such as from texts that the thread has embedded beside us; what another process
            # held is to be tried once its lease has ended.
            seen = (seen | free) - held

    def mend(
        self, index: VectorIndex, missing: Sequence[str], orphaned: Sequence[str], unembedded: Sequence[Draft]
    ) -> None:
        """Queue what makes an index equal to SQL: entries that failed for good are tried again."""
        rows, fresh, vectors = index.embed(unembedded, self._storage)
        with self._storage.snapshot() as reader:
            failed = [row for row in reader.outbox(index.name, due=None, limit=1_000_000_000) if row.attempts]
        self._writer.land(
            (
                *self._bind(index, rows, fresh, vectors),
                QueueIndex(index.name, tuple(missing), tuple(orphaned)),
                OutboxFailed(tuple(row.id for row in failed), "repair", 0.0),
            )
        )
        self._wake.set()

    def drain(self) -> None:
        """Stop following, apply what waits, and close the indexes."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        try:
            self._apply_all(waits=False)
        except MemStateError as error:
            logger.warning("closing with index work left, which the next open applies: %s", error)
        finally:
            for index in self.indexes:
                try:
                    index.close()
                except Exception as error:  # nothing of ours is lost with it, and the database has to be closed yet
                    logger.warning("closing index %s failed: %r", index.name, error)


def indexed(index: VectorIndex, rows: Sequence[VectorRow], vectors: Mapping[str, Vector]) -> PutIndexed:
    """What a commit puts into an index that the database keeps itself."""
    return PutIndexed(
        index.name,
        tuple(IndexedRow(row.vector_id, row.version, to_bytes(vectors[row.vector_id])) for row in rows),
    )


def draft_of(record: Record, paths: IndexPaths) -> Draft:
    """The draft a current item was, as far as an index is concerned."""
    return Draft(record.version, record.namespace, record.key, "put", record.value, type=record.type, index=paths)

"""What a memory was and how it came to be: history, moments of the past, undo, and forgetting."""

from __future__ import annotations

import time
from typing import Any

from langgraph_memstate.awaited import awaited
from langgraph_memstate.diff import Change, diff_moments
from langgraph_memstate.errors import RollbackError
from langgraph_memstate.facts import (
    LogEntry,
    Namespace,
    Origin,
    check_key,
    check_namespace,
    check_text,
    in_session,
    prefix_of,
)
from langgraph_memstate.forget import ForgetReport, plan_forget, subject_of
from langgraph_memstate.moments import Moment, When, find_moment
from langgraph_memstate.opened import OpenedMemory
from langgraph_memstate.reading import check_page
from langgraph_memstate.timeline import Timeline, read_timeline
from langgraph_memstate.undo import OnConflict, RollbackReport, RollbackRequest, plan_commits


class Hindsight(OpenedMemory):
    """The log of a memory, read and taken back."""

    def history(self, namespace: str | Namespace, key: str, *, session_id: str | None = None) -> list[LogEntry]:
        """Every version a fact ever had, oldest first."""
        self._check_open()
        namespace, key = in_session(check_namespace(namespace), session_id), check_key(key)
        with self.storage.snapshot() as reader:
            return list(reader.versions(namespace, key))[::-1]

    def log(
        self,
        *,
        since: When = 0,
        until: When | None = None,
        namespace: str | Namespace = (),
        key: str | None = None,
        thread_id: str | None = None,
        checkpoint_id: str | None = None,
        node: str | None = None,
        run_id: str | None = None,
        actor: str | None = None,
        limit: int | None = None,
    ) -> list[LogEntry]:
        """Entries of the log after `since`, up to `until`, oldest first; with a `limit`, the latest ones.

        Args:
            since, until: a sequence, an aware datetime, or a checkpoint (its id or config).
            namespace: a prefix.
            checkpoint_id: the checkpoint that an entry landed with.

        Raises:
            UnknownMomentError: the memory has no such moment.
            FilterError: the limit is no number of entries.
        """
        self._check_open()
        check_page(0 if limit is None else limit, 0)
        origin = {
            "thread_id": thread_id, "checkpoint_id": checkpoint_id, "node": node, "run_id": run_id, "actor": actor,
        }  # fmt: skip
        with self.storage.snapshot() as reader:
            entries = reader.log(
                prefix=prefix_of(namespace),
                key=check_text("key", key),
                origin={
                    name: text for name, wanted in origin.items() if (text := check_text(name, wanted)) is not None
                },
                after=find_moment(reader, since).seq,
                until=None if until is None else find_moment(reader, until).seq,
                limit=limit,
                newest_first=limit is not None,
            )
            return list(entries) if limit is None else list(entries)[::-1]

    def diff(self, a: When, b: When | None = None, *, namespace: str | Namespace = ()) -> list[Change]:
        """What changed in memory from moment `a` to moment `b` (now), by namespace and key."""
        self._check_open()
        with self.storage.snapshot() as reader:
            until = Moment(reader.last_seq(), time.time()) if b is None else find_moment(reader, b)
            return diff_moments(reader, find_moment(reader, a), until, prefix_of(namespace))

    def timeline(self, thread_id: str) -> Timeline:
        """A thread's checkpoints, branches and rollbacks, with what each remembered; a picture in a notebook."""
        self._check_open()
        check_text("thread_id", thread_id)
        with self.storage.snapshot() as reader:
            return read_timeline(reader, thread_id)

    # -- undoing ------------------------------------------------------------------------------------

    def rollback(
        self,
        steps: int | None = None,
        *,
        turns: int | None = None,
        to: Any = None,
        thread_id: str | None = None,
        on_conflict: OnConflict = "raise",
        actor: str | None = None,
        reason: str | None = "rollback",
    ) -> RollbackReport:
        """Undo the last `steps` (default 1) in one commit: thread state, facts and vectors.

        With `thread_id`, a step is a checkpoint of the thread, a turn an invocation of its graph, and `to` a
        checkpoint. The state of the target becomes the thread's head, as a new checkpoint, and memory is again what
        the thread had left there. Without, a step is a commit that no graph made, and `to` a sequence of the log. A
        rollback can be undone as well: ``rollback(to=report.undone)``. No run of the thread may be under way. A turn
        goes on when it is resumed, but with ``durability="exit"``, where several steps after an answer are their own.

        What is undone already is passed over, whoever undid it. A fact that comes back has its time to live from now
        on; one that had expired before it was replaced stays absent.

        Args:
            on_conflict: what becomes of a fact that others have changed since: ``"raise"``, ``"keep"`` theirs, or
                ``"overwrite"`` it with the version before ours. A change that has been undone is none; what another
                fact has taken that is unique (see `Constraint`) is one, and is overwritten there: should that delete
                it, undoing the rollback may bring back another version of it. A commit that others have changed whole
                is not counted with ``"keep"``.

        Raises:
            RollbackConflict, RollbackError, UnknownMomentError: nothing changed.
        """
        self._check_open()
        if self._open_transaction() is not None or self._running() is not None:
            raise RollbackError(
                "a rollback is a commit of its own: call it outside of a transaction and of a graph's nodes; "
                "inside a graph, add a RollbackNode"
            )
        origin = Origin(thread_id=thread_id, actor=actor, reason=reason)
        request = RollbackRequest(steps, turns, to, thread_id, on_conflict, origin, self.claims_of)
        return self._prepared(lambda: self._roll_back(request))

    def _roll_back(self, request: RollbackRequest) -> RollbackReport:
        from langgraph_memstate.graph.rollback import plan_thread

        with self.storage.snapshot() as reader:
            plan = plan_thread(reader, request) or plan_commits(reader, request)
        self._outbox.commit(plan.drafts, plan.before, plan.after)
        return plan.report

    def forget(
        self,
        namespace: str | Namespace = (),
        key: str | None = None,
        *,
        thread_id: str | None = None,
        checkpoints: bool = False,
        actor: str | None = None,
        reason: str | None = "forget",
    ) -> ForgetReport:
        """Erase a subject's content for good: items, versions in the log, staged work, embeddings and vectors.

        The log keeps the entries without their content; undo and `as_of` find nothing there any more. What is named
        is a namespace prefix (in sessions too), a key under it, what a thread wrote, or any of these together. No file
        of the database holds it afterwards: an embedded Chroma of our own is rebuilt from SQL for that, one to three
        seconds for 1,000 vectors, none of which is embedded again. One that was given as a client keeps its files as
        it likes.

        Args:
            checkpoints: also delete the checkpoints of the threads that wrote what is erased.

        Raises:
            ForgetError: nobody is named.
            VectorSyncError: the content is erased, and an index did not take the removal of its vectors yet; they stay
                queued and invisible.
        """
        self._check_open()
        subject = subject_of(
            prefix_of(namespace), None if key is None else check_key(key), check_text("thread_id", thread_id)
        )
        origin = Origin(actor=actor, reason=reason)

        def erase() -> ForgetReport:
            with self.storage.snapshot() as reader:
                erasure = plan_forget(reader, subject, checkpoints=checkpoints, origin=origin)
            self._outbox.commit(erasure.drafts, erasure.before, erasure.after)
            return erasure.report

        report = self._prepared(erase)
        self.storage.scrub()
        self._outbox.scrub()
        self.flush()
        return report

    # -- the async face: the same calls, awaited ----------------------------------------------------

    ahistory = awaited(history)
    alog = awaited(log)
    adiff = awaited(diff)
    atimeline = awaited(timeline)
    arollback = awaited(rollback)
    aforget = awaited(forget)

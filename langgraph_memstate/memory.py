"""MemoryStore: opens, wires, commits and searches. The graph's checkpointer and store are faces of it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from pydantic import BaseModel

from langgraph_memstate.awaited import awaited
from langgraph_memstate.commit import Writer
from langgraph_memstate.diff import Change, diff_moments
from langgraph_memstate.embedding import Embedder, home_loop
from langgraph_memstate.errors import CommitRaced, IndexConfigError, RollbackError, StorageClosedError
from langgraph_memstate.facts import (
    Draft,
    Fact,
    IndexPaths,
    LogEntry,
    Namespace,
    Origin,
    Record,
    check_key,
    check_namespace,
    check_text,
    check_ttl,
    encode_value,
    new_version,
)
from langgraph_memstate.filters import compile_filter
from langgraph_memstate.forget import ForgetReport, plan_forget, subject_of
from langgraph_memstate.hooks.base import SyncHook
from langgraph_memstate.index import VectorIndex, check_index_config
from langgraph_memstate.moments import Moment, When, find_moment
from langgraph_memstate.outbox import Outbox, VectorSync
from langgraph_memstate.reading import View
from langgraph_memstate.schemas import Pattern, SchemaRegistry
from langgraph_memstate.storage.base import Append, Commit, Storage, Touch
from langgraph_memstate.transaction import Transaction
from langgraph_memstate.undo import OnConflict, RollbackReport, RollbackRequest, plan_commits
from langgraph_memstate.urls import storage_at
from langgraph_memstate.verify import VerifyReport, repair_index, verify_index

if TYPE_CHECKING:
    from langgraph_memstate.graph.checkpointer import MemStateCheckpointer
    from langgraph_memstate.graph.past import PastStore
    from langgraph_memstate.graph.store import MemStateStore

logger = logging.getLogger("langgraph_memstate")

_RACES = 8  # how often a commit is prepared anew when the database moved under it

T = TypeVar("T")


class StepScope(Protocol):
    """Who may take memory writes into a running step, and what they look like to its tasks."""

    def stage(self, drafts: Sequence[Draft]) -> bool:
        """Take `drafts` into the running task's step; False when no step of this memory is running."""

    def staged(self) -> Sequence[Draft]:
        """What the running task sees beyond what is committed, oldest first."""

    def has_landed(self, versions: Iterable[str]) -> bool:
        """Whether any of these staged versions has been committed since."""

    def is_running(self) -> bool:
        """Whether the caller is a task of a step of this memory."""


class MemoryStore:
    """Thread state, facts and vectors over one database.

    Args:
        storage: owned by this memory from now on: opened here, closed by `close`.
        vector_sync: ``"atomic"`` (a commit whose vectors cannot be stored does not happen) or ``"deferred"``
            (it happens, and its vectors follow).
    """

    def __init__(
        self,
        storage: Storage,
        *,
        index: Mapping[str, Any] | None = None,
        vector_sync: VectorSync = "atomic",
    ) -> None:
        if vector_sync not in ("atomic", "deferred"):
            raise IndexConfigError(f"vector_sync is 'atomic' or 'deferred', not {vector_sync!r}")
        if index is not None:
            check_index_config(index)
        self.storage = storage
        self.schemas = SchemaRegistry()
        self.store_id = storage.open()
        self._writer = Writer(storage)
        self._outbox = Outbox(storage, self._writer, vector_sync, self.store_id)
        self._scope: StepScope | None = None
        self._pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="memstate")
        self._lock = threading.RLock()
        self._closed = False
        self._index_config = dict(index) if index else None
        self._transaction: ContextVar[Transaction | None] = ContextVar("memstate_transaction", default=None)
        self._at_close: list[Callable[[], object]] = []
        self._pid = os.getpid()

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        index: Mapping[str, Any] | None = None,
        vectors: Any = None,
        vector_sync: VectorSync = "atomic",
    ) -> MemoryStore:
        """Open a memory by URL: a path, ``sqlite:///path`` or ``:memory:``.

        Args:
            index: LangGraph's `IndexConfig`: `dims`, `embed`, `fields` (default ``["$"]``, the whole value). An extra
                `model` names the embedding model where it has no name of its own.
            vectors: a hook, a chromadb client or collection, or a `langchain_chroma.Chroma`. Default with `index`:
                an embedded Chroma beside the SQLite file, and an exact search in SQL for ``:memory:``.

        Raises:
            DatabaseOpenError: the URL names nothing that can be opened.
            IndexConfigError: `index` is incomplete, or not what the database was indexed with.
        """
        if index is not None:
            check_index_config(index)
        storage = storage_at(url)
        memory = cls(storage, index=index, vector_sync=vector_sync)
        try:
            memory._attach_default(vectors)
        except BaseException:
            memory.close()
            raise
        return memory

    # -- wiring -------------------------------------------------------------------------------------

    def _attach_default(self, vectors: Any) -> None:
        if vectors is not None:
            if not isinstance(vectors, SyncHook):
                from langgraph_memstate.hooks.chroma import ChromaSyncHook

                vectors = ChromaSyncHook(vectors)
            self.add_hook(vectors)
        elif self._index_config is not None:
            if self.storage.location is None:
                self._attach(None)
            else:
                from langgraph_memstate.hooks.chroma import ChromaSyncHook

                path = Path(self.storage.location)
                self.add_hook(ChromaSyncHook(path=path.with_name(path.name + ".chroma")))

    def add_hook(self, hook: SyncHook) -> None:
        """Let a vector database follow the log. The first one added answers semantic search.

        Raises:
            IndexConfigError: neither the hook nor the memory says which model embeds.
        """
        self._check_open()
        self._attach(hook)

    def _attach(self, hook: SyncHook | None) -> None:
        config = self._index_config or {}
        if hook is not None and hook.embedding is not None:
            source, dims, model = hook.embedding, None, None
        elif config:
            source, dims, model = config["embed"], config["dims"], config.get("model")
        else:
            raise IndexConfigError(
                "nothing says how texts become vectors: give the hook embedding=…, or open the memory with index=…"
            )
        fields = (hook.fields if hook is not None else None) or config.get("fields") or ("$",)
        self._outbox.attach(VectorIndex(Embedder(source, dims=dims, model=model), fields, hook))

    def use_index(self, config: Mapping[str, Any]) -> None:
        """Give the memory an `IndexConfig` after it was opened; the same one again changes nothing."""
        self._check_open()
        check_index_config(config)
        with self._lock:
            if self._index_config is not None:
                if dict(config) != self._index_config:
                    raise IndexConfigError("this memory has an index with another configuration already")
                return
            self._index_config = dict(config)
            if not self._outbox.indexes:
                self._attach_default(None)

    def register_schema(self, pattern: Pattern, model: type[BaseModel]) -> None:
        """Validate every value of a fact type (a string) or of the namespaces a pattern matches.

        In a pattern of labels, ``*`` stands for any one label. The stored value is what the model dumps.
        """
        self._check_open()
        self.schemas.register(pattern, model)

    @functools.cached_property
    def checkpointer(self) -> MemStateCheckpointer:
        """The LangGraph checkpointer of this memory."""
        from langgraph_memstate.graph.checkpointer import MemStateCheckpointer

        return MemStateCheckpointer(self)

    @functools.cached_property
    def store(self) -> MemStateStore:
        """The LangGraph store of this memory."""
        from langgraph_memstate.graph.store import MemStateStore

        return MemStateStore(self)

    def join_steps(self, make_scope: Callable[[MemoryStore], StepScope]) -> StepScope:
        """The scope that takes memory writes into graph steps, made on first use."""
        with self._lock:
            if self._scope is None:
                self._scope = make_scope(self)
            return self._scope

    # -- writing ------------------------------------------------------------------------------------

    @overload
    def commit(
        self,
        fact: Fact,
        *,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> Fact: ...
    @overload
    def commit(
        self,
        fact: Sequence[Fact],
        *,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> list[Fact]: ...
    def commit(
        self,
        fact: Fact | Sequence[Fact],
        *,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> Fact | list[Fact]:
        """Write one fact, or several in one commit, with their vectors. Inside a graph node: with its step.

        Returns the facts with the `version` they have in the log.

        Raises:
            SchemaError, SerializationError, NamespaceError: nothing was written.
            VectorSyncError: the index failed and the commit was taken back.
        """
        facts = [fact] if isinstance(fact, Fact) else list(fact)
        drafts = []
        for one in facts:
            origin = Origin(thread_id=one.thread_id or thread_id, actor=one.actor or actor, reason=one.reason or reason)
            namespace, key = one.address
            drafts.append(self.draft_put(namespace, key, one.payload, type=one.type, origin=origin))
        self.write(drafts)
        written = [one.with_version(draft.version) for one, draft in zip(facts, drafts, strict=True)]
        return written[0] if isinstance(fact, Fact) else written

    def delete(
        self, namespace: str | Namespace, key: str, *, actor: str | None = None, reason: str | None = None
    ) -> None:
        """Delete an item; its history stays. Deleting what is not there is recorded and changes nothing."""
        self.write([self.draft_delete(check_namespace(namespace), key, origin=Origin(actor=actor, reason=reason))])

    def draft_put(
        self,
        namespace: Namespace,
        key: str,
        value: Mapping[str, Any],
        *,
        type: str | None = None,
        index: IndexPaths = None,
        ttl: float | None = None,
        origin: Origin | None = None,
    ) -> Draft:
        """A validated write, ready for `write`. `ttl` is in minutes."""
        namespace, key, type = check_namespace(namespace), check_key(key), check_text("type", type)
        value, schema = self.schemas.validate(namespace, type, value)
        return Draft(
            new_version(), namespace, key, "put", encode_value(value),
            type=type, index=index, ttl=check_ttl(ttl), schema=schema, origin=origin or Origin(),
        )  # fmt: skip

    def draft_delete(self, namespace: Namespace, key: str, *, origin: Origin | None = None) -> Draft:
        """A validated delete, ready for `write`."""
        namespace, key = check_namespace(namespace), check_key(key)
        return Draft(new_version(), namespace, key, "delete", None, origin=origin or Origin())

    def write(self, drafts: Sequence[Draft]) -> None:
        """Put drafts where they belong: the open transaction, the running step, or a commit of their own."""
        self._check_open()
        if not drafts:
            return
        transaction = self._transaction.get()
        if transaction is not None and transaction.take(drafts):
            return
        if self._scope is None or not self._scope.stage(drafts):
            self._prepared(lambda: self._outbox.commit(drafts))

    def transaction(self) -> Transaction:
        """Collect the writes of a ``with`` block and land them in one commit at its end, or none after an error.

        Reads inside see what is committed. A block inside another is part of its commit. ``async with`` works too.
        """
        self._check_open()
        return Transaction(self, self._transaction)

    def land(self, drafts: Sequence[Draft], before: Commit = (), after: Commit = ()) -> None:
        """Land one atomic commit of drafts and the operations around them; for the graph's checkpointer."""
        self._check_open()
        self._outbox.commit(drafts, before, after)

    # -- reading ------------------------------------------------------------------------------------

    def view(self, moment: Moment | None = None) -> View:
        """What the caller may see now: what is committed and, inside a step, what its task staged.

        With a moment, what was committed then.
        """
        self._check_open()
        with self._lock:
            if not self._outbox.indexes and self._index_config is not None:
                self._attach(None)  # an index and no vector database: SQL is scanned exactly
        index = self._outbox.indexes[0] if self._outbox.indexes else None
        return View(self.storage, index, self._scope, self._outbox.catch_up, moment)

    def get(self, namespace: str | Namespace, key: str) -> Fact | None:
        """The current version of a fact, or None. A string is a fact type."""
        record = self.view().get(check_namespace(namespace), check_key(key))
        return None if record is None else Fact.of(record)

    def query(
        self,
        namespace: str | Namespace = (),
        *,
        filter: Mapping[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
    ) -> list[Fact]:
        """Facts under a namespace prefix (a string: a fact type) that match a filter, last written first."""
        found = self.view().search(
            _prefix(namespace), matches=compile_filter(filter), query=None, limit=limit, offset=offset
        )
        return [Fact.of(record) for record, _ in found]

    def search(
        self,
        query: str,
        *,
        namespace: str | Namespace = (),
        filter: Mapping[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
    ) -> list[Fact]:
        """Facts nearest to a text in meaning; `score` is cosine similarity.

        Raises:
            IndexConfigError: the memory was opened without an index.
        """
        view = self.view()
        if not self._outbox.indexes:
            raise IndexConfigError("semantic search needs an index: open the memory with index=… or add a hook")
        found = view.search(_prefix(namespace), matches=compile_filter(filter), query=query, limit=limit, offset=offset)
        return [Fact.of(record, score) for record, score in found]

    def history(self, namespace: str | Namespace, key: str) -> list[LogEntry]:
        """Every version a fact ever had, oldest first."""
        self._check_open()
        with self.storage.snapshot() as reader:
            return list(reader.versions(check_namespace(namespace), check_key(key)))[::-1]

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
        """
        self._check_open()
        origin = {
            "thread_id": thread_id, "checkpoint_id": checkpoint_id, "node": node, "run_id": run_id, "actor": actor,
        }  # fmt: skip
        with self.storage.snapshot() as reader:
            entries = reader.log(
                prefix=_prefix(namespace),
                key=key,
                origin={name: wanted for name, wanted in origin.items() if wanted is not None},
                after=find_moment(reader, since).seq,
                until=None if until is None else find_moment(reader, until).seq,
                limit=limit,
                newest_first=limit is not None,
            )
            return list(entries) if limit is None else list(entries)[::-1]

    def as_of(self, when: When) -> PastStore:
        """The memory as it was at a moment: a store that can be read and not written.

        Args:
            when: a sequence of the log, an aware datetime, or a checkpoint: its id, its config, or a snapshot of it.

        Raises:
            UnknownMomentError: the memory has no such moment.
        """
        from langgraph_memstate.graph.past import PastStore

        self._check_open()
        with self.storage.snapshot() as reader:
            return PastStore(self, find_moment(reader, when))

    def diff(self, a: When, b: When | None = None, *, namespace: str | Namespace = ()) -> list[Change]:
        """What changed in memory from moment `a` to moment `b` (now), by namespace and key."""
        self._check_open()
        with self.storage.snapshot() as reader:
            until = Moment(reader.last_seq(), time.time()) if b is None else find_moment(reader, b)
            return diff_moments(reader, find_moment(reader, a), until, _prefix(namespace))

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
        rollback can be undone as well: ``rollback(to=report.undone)``. No run of the thread may be under way.

        Args:
            on_conflict: what becomes of a fact that others have changed since: ``"raise"``, ``"keep"`` theirs, or
                ``"overwrite"`` it with the version before ours.

        Raises:
            RollbackConflict, RollbackError, UnknownMomentError: nothing changed.
        """
        self._check_open()
        if self._transaction.get() is not None or (self._scope is not None and self._scope.is_running()):
            raise RollbackError(
                "a rollback is a commit of its own: call it outside of a transaction and of a graph's nodes; "
                "inside a graph, add a RollbackNode"
            )
        origin = Origin(thread_id=thread_id, actor=actor, reason=reason)
        request = RollbackRequest(steps, turns, to, thread_id, on_conflict, origin)
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
        is a namespace prefix, a key under it, what a thread wrote, or any of these together. No file of the database
        holds it afterwards: an embedded Chroma of our own is rebuilt from SQL for that, one to three seconds for 1,000
        vectors, none of which is embedded again. One that was given as a client keeps its files as it likes.

        Args:
            checkpoints: also delete the checkpoints of the threads that wrote what is erased.

        Raises:
            ForgetError: nobody is named.
            VectorSyncError: the content is erased, and an index did not take the removal of its vectors yet; they stay
                queued and invisible.
        """
        self._check_open()
        subject = subject_of(_prefix(namespace), None if key is None else check_key(key), thread_id)
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

    def _prepared(self, commit: Callable[[], T]) -> T:
        """Run a commit that is prepared from what the database holds, again where that changed meanwhile."""
        for _ in range(_RACES - 1):
            try:
                return commit()
            except CommitRaced as error:
                logger.debug("prepared anew: %s", error)
        return commit()

    # -- expiry -------------------------------------------------------------------------------------

    def touch(self, records: Iterable[Record]) -> None:
        """Start the time to live of these items again."""
        addresses = tuple(
            (record.namespace, record.key)
            for record in records
            if record.ttl is not None and record.seq  # a staged item has no row yet
        )
        if addresses:
            self._writer.submit((Touch(addresses, time.time()),)).result()

    def sweep(self) -> int:
        """Delete items whose time to live is over, as log entries with reason ``ttl``; returns how many."""
        self._check_open()
        with self.storage.snapshot() as reader:
            expired = reader.expired(time.time())
        if expired:
            drafts = tuple(
                self.draft_delete(record.namespace, record.key, origin=Origin(reason="ttl")) for record in expired
            )
            names = tuple(index.name for index in self._outbox.indexes if index.hook is not None)
            versions = frozenset(record.version for record in expired)
            self._writer.submit((Append(drafts, names, if_expired=versions),)).result()
        return len(expired)

    # -- upkeep -------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until no index work is left.

        Raises:
            VectorSyncError: an index refused; its work stays queued.
        """
        self._check_open()
        self._outbox.flush()

    def verify(self) -> VerifyReport:
        """Compare SQL and every index in both directions. Changes nothing."""
        self._check_open()
        return VerifyReport(tuple(verify_index(self.storage, index) for index in self._outbox.indexes))

    def repair(self) -> VerifyReport:
        """Make every index equal to SQL; returns what `verify` says afterwards.

        Raises:
            VectorSyncError: an index cannot be reached or refuses its work.
        """
        self._check_open()
        for index in self._outbox.indexes:
            repair_index(self.storage, self._outbox, index)
        self.flush()
        return self.verify()

    def stats(self) -> dict[str, int]:
        """Rows by table."""
        self._check_open()
        with self.storage.snapshot() as reader:
            return reader.counts()

    def close(self) -> None:
        """Apply what waits for the indexes, then release everything. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if os.getpid() != self._pid:
            return  # the threads and connections are the parent's
        try:
            for call in self._at_close:
                call()
            self._pool.shutdown(wait=True)
            self._outbox.drain()
        finally:
            self._writer.close()
            self.storage.close()

    def at_close(self, call: Callable[[], object]) -> None:
        """Have `close` call this first."""
        self._check_open()
        self._at_close.append(call)

    @property
    def closed(self) -> bool:
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise StorageClosedError("the memory is closed; open it again")
        if os.getpid() != self._pid:
            raise StorageClosedError(
                "this process was forked from the one that opened the memory; open it again in the child"
            )

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> MemoryStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # -- the async face: the same calls, awaited ----------------------------------------------------

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        self._check_open()
        return self._pool.submit(contextvars.copy_context().run, call)

    async def run(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking call of this memory in a thread, with the caller's context.

        Cancelling the await leaves the call running: its outcome is then unknown, but whole.
        """
        token = home_loop.set(asyncio.get_running_loop())
        try:
            future = self._submit(functools.partial(call, *args, **kwargs))
        finally:
            home_loop.reset(token)
        return await asyncio.wrap_future(future)

    @classmethod
    async def aopen(cls, url: str | Path, **options: Any) -> MemoryStore:
        return await asyncio.get_running_loop().run_in_executor(None, functools.partial(cls.open, url, **options))

    aadd_hook = awaited(add_hook)
    acommit = awaited(commit)
    adelete = awaited(delete)
    aget = awaited(get)
    aquery = awaited(query)
    asearch = awaited(search)
    ahistory = awaited(history)
    alog = awaited(log)
    aas_of = awaited(as_of)
    adiff = awaited(diff)
    arollback = awaited(rollback)
    aforget = awaited(forget)
    asweep = awaited(sweep)
    aflush = awaited(flush)
    averify = awaited(verify)
    arepair = awaited(repair)
    astats = awaited(stats)

    async def aclose(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)


def _prefix(namespace: str | Namespace) -> Namespace:
    return () if namespace == () else check_namespace(namespace)

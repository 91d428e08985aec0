"""A database, opened and wired: what every face of a memory writes, reads and waits through."""

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
from typing import Any, Protocol, Self, TypeVar

from pydantic import BaseModel

from langgraph_memstate.awaited import awaited, is_own, opened
from langgraph_memstate.commit import Landing, Writer
from langgraph_memstate.constraints import admitted, claims_of, guarded, needs_guard
from langgraph_memstate.embedding import Embedder, holding_up, home_loop
from langgraph_memstate.errors import CommitRaced, FactRaced, IndexConfigError, StorageClosedError
from langgraph_memstate.facts import (
    NOWHERE,
    Draft,
    IndexPaths,
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
from langgraph_memstate.hooks.base import SyncHook
from langgraph_memstate.hooks.given import hook_of
from langgraph_memstate.index import VectorIndex, check_index_config
from langgraph_memstate.migration import check_finished
from langgraph_memstate.moments import Moment
from langgraph_memstate.outbox import Outbox, VectorSync
from langgraph_memstate.reading import View
from langgraph_memstate.schemas import Constraint, SchemaRegistry, Upcaster
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Commit, Expect, Touch
from langgraph_memstate.storage.values import Claim
from langgraph_memstate.together import Together
from langgraph_memstate.transaction import Transaction
from langgraph_memstate.urls import storage_at

logger = logging.getLogger("langgraph_memstate")

_RACES = 8  # how often a commit is prepared anew when the database moved under it
_TURNS = 100  # how often when others wrote a fact that it builds on, which means that one of them got on

T = TypeVar("T")


class StepScope(Protocol):
    """Who may take memory writes into a running step, and what they look like to its tasks."""

    def stage(self, drafts: Sequence[Draft]) -> bool:
        """Take `drafts` into the running task's step; False when no step of this memory is running."""

    def staged(self) -> Sequence[Draft]:
        """What the running task sees beyond what is committed, oldest first."""

    def has_landed(self, versions: Iterable[str]) -> bool:
        """Whether any of these staged versions has been committed since."""

    def running(self) -> object | None:
        """What identifies the task of a step of this memory that the caller is; None if it is none."""


class OpenedMemory:
    """One storage with its writer, its indexes, its schemas and the step that may be running."""

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
        try:
            check_finished(storage)
        except BaseException:
            storage.close()
            raise
        self._writer = Writer(storage)
        self._outbox = Outbox(storage, self._writer, vector_sync, self.store_id)
        self._scope: StepScope | None = None
        self._pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="memstate")
        self._together = Together(self._submit)
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
    ) -> Self:
        """Open a memory by URL: a path, ``sqlite:///path``, ``:memory:``, ``postgresql://…`` or ``redis://…``.

        Args:
            index: LangGraph's `IndexConfig`: `dims`, `embed`, `fields` (default ``["$"]``, the whole value). An extra
                `model` names the embedding model where it has no name of its own.
            vectors: a hook, a chromadb client or collection, a `langchain_chroma.Chroma`, or a Qdrant client. Default
                with `index`: an embedded Chroma beside the SQLite file; pgvector in PostgreSQL, if the server has it;
                and an exact search in SQL elsewhere.

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
            self.add_hook(hook_of(vectors))
        elif self._index_config is not None:
            if self.storage.keeps_indexes:
                self._attach_kept()
            elif self.storage.location is None:
                self._attach(None)
            else:
                from langgraph_memstate.hooks.chroma import ChromaSyncHook

                path = Path(self.storage.location)
                self.add_hook(ChromaSyncHook(path=path.with_name(path.name + ".chroma")))

    def _attach_kept(self) -> None:
        """Let the database itself keep the vectors; where it cannot, they are compared in memory."""
        from langgraph_memstate.hooks.pgvector import PgvectorSyncHook

        hook = PgvectorSyncHook()
        try:
            hook.join(self.storage.index_table(hook.name))
        except IndexConfigError as error:
            logger.warning("search compares vectors in memory, because %s", error)
            self._attach(None)
        else:
            self._attach(hook)

    def add_hook(self, hook: SyncHook) -> None:
        """Let a vector database follow the log. The first one added answers semantic search.

        Raises:
            IndexConfigError: neither the hook nor the memory says which model embeds, or the hook's index is kept in
                the database itself, which this one cannot.
        """
        self._check_open()
        if hook.capabilities.transactional:
            hook.join(self.storage.index_table(hook.name))
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

    def register_schema(
        self,
        pattern: str | Sequence[str],
        model: type[BaseModel],
        constraint: Constraint | None = None,
        *,
        version: int = 1,
        upcast: Mapping[int, Upcaster] | None = None,
    ) -> None:
        """Validate every value of a fact type (a string) or of the namespaces a pattern matches.

        In a pattern of labels, ``*`` stands for any one label. The stored value is what the model dumps, which it
        has to take again: `update` and reading under a later version validate it.

        Args:
            constraint: what must hold between the facts; those that are there already are not checked.
            version: of the model, counted up when it changes. Facts keep the version they were written under.
            upcast: by version, what brings a value from it to the next (a dict to a dict); a version without one needs
                nothing but the model. 0 is for facts that were written without a schema. What cannot be brought to the
                present version is read as it was written, and is listed by `check_schemas`.

        Raises:
            SchemaError, NamespaceError: what is registered makes no sense.
        """
        self._check_open()
        self.schemas.register(pattern, model, constraint, version=version, upcast=upcast)

    def join_steps(self, make_scope: Callable[[Self], StepScope]) -> StepScope:
        """The scope that takes memory writes into graph steps, made on first use."""
        with self._lock:
            if self._scope is None:
                self._scope = make_scope(self)
            return self._scope

    # -- writing ------------------------------------------------------------------------------------

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
        if type is None and self.schemas.types:  # what is written over a typed fact is of that type
            current = self._sight().stored(namespace, key)
            type = None if current is None else current.type
        value, schema = self.schemas.validate(namespace, type, value)
        return Draft(
            new_version(), namespace, key, "put", encode_value(value), type=type, index=index, ttl=check_ttl(ttl),
            schema=None if schema is None else schema.name,
            schema_version=None if schema is None else schema.version,
            origin=origin or NOWHERE,
        )  # fmt: skip

    def draft_delete(self, namespace: Namespace, key: str, *, origin: Origin | None = None) -> Draft:
        """A validated delete, ready for `write`."""
        namespace, key = check_namespace(namespace), check_key(key)
        return Draft(new_version(), namespace, key, "delete", None, origin=origin or NOWHERE)

    def _running(self) -> object | None:
        return None if self._scope is None else self._scope.running()

    def _open_transaction(self) -> Transaction | None:
        """The transaction that the caller writes to."""
        transaction = self._transaction.get()
        return transaction if transaction is not None and transaction.is_open_here() else None

    def write(self, drafts: Sequence[Draft], before: Commit = ()) -> Sequence[Draft]:
        """Put drafts where they belong: the open transaction, the running step, or a commit of their own.

        Returns them as written. `before`: what a commit of their own begins with.
        """
        self._check_open()
        if not drafts:
            return drafts
        transaction = self._open_transaction()
        if transaction is not None and transaction.take(drafts):
            return drafts
        if self._scope is not None and self._running() is not None:
            if self.schemas.constrained:
                drafts = admitted(self.schemas, self.view(), drafts)
            if self._scope.stage(drafts):
                return drafts
        if before:
            return self._commit(drafts, before)  # the caller tries again
        return self._prepared(lambda: self._commit(drafts))

    def _commit(
        self, drafts: Sequence[Draft], before: Commit = (), after: Commit = (), *, in_step: bool = False
    ) -> Sequence[Draft]:
        """Commit drafts under the constraints of their schemas, built anew while others write what they build on."""
        if not needs_guard(self.schemas, drafts):
            self._outbox.commit(drafts, before, after)
            return drafts
        committed = View(self.storage, None, None, self._outbox.catch_up, self.schemas)
        tries = 1 if any(isinstance(op, Expect) for op in before) else _TURNS  # else the caller tries again
        while True:
            ready = guarded(self.storage, committed, self.schemas, drafts, in_step=in_step)
            try:
                self._outbox.commit(ready.drafts, (*before, *ready.before), (*ready.after, *after))
                return ready.drafts
            except FactRaced:
                tries -= 1
                if not tries:
                    raise

    def claims_of(self, draft: Draft) -> list[Claim]:
        """What a fact must have for itself, once an undo brings it back."""
        return claims_of(self.schemas, draft)

    def land(self, drafts: Sequence[Draft], before: Commit = (), after: Commit = ()) -> None:
        """Land one atomic commit of drafts and the operations around them; for the graph's checkpointer."""
        self._check_open()
        self._commit(drafts, before, after, in_step=True)

    def enqueue(self, commit: Commit) -> Landing:
        """Queue operations without drafts, to be waited for. They land after all that was queued before.

        For the graph's checkpointer, as is `submit`.
        """
        self._check_open()
        return self._writer.enqueue(commit)

    def submit(self, commit: Commit) -> Future[None]:
        """Queue operations without drafts, which a thread waits for. They land after all that was queued before."""
        self._check_open()
        return self._writer.submit(commit)

    @property
    def is_simple(self) -> bool:
        """Whether what the caller writes now is nothing but a commit, which `begin` can queue."""
        return (
            self._index_config is None
            and not self._outbox.indexes
            and not self.schemas.all()  # which run code of the application, for as long as that takes
            and self._open_transaction() is None
            and self._running() is None
            and is_own(self.write, _write)
        )

    def begin(self, drafts: Sequence[Draft]) -> Landing:
        """Queue drafts as a commit of their own, to be waited for.

        Raises:
            CommitRaced: a write takes more than that by now, and is to be left to `write`.
        """
        if not self.is_simple:
            raise CommitRaced("the memory has got an index or a schema meanwhile")
        return self.enqueue(self._outbox.plain(drafts))

    def _prepared(self, commit: Callable[[], T]) -> T:
        """Run a commit that is prepared from what the database holds, again where that changed meanwhile."""
        for _ in range(_RACES - 1):
            try:
                return commit()
            except CommitRaced as error:
                logger.debug("prepared anew: %s", error)
        return commit()

    def touch(self, records: Iterable[Record]) -> None:
        """Start the time to live of these items again."""
        addresses = tuple(
            (record.namespace, record.key)
            for record in records
            if record.ttl is not None and record.seq  # a staged item has no row yet
        )
        if addresses:
            self._writer.land((Touch(addresses, time.time()),))

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
        return View(self.storage, index, self._scope, self._outbox.catch_up, self.schemas, moment=moment)

    def _sight(self) -> View:
        """What a write builds on: the view, and what the open transaction has collected."""
        transaction = self._open_transaction()
        return self.view() if transaction is None else self.view().over(transaction.collected())

    # -- waiting and closing ------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until no index work is left.

        Raises:
            VectorSyncError: an index refused; its work stays queued.
        """
        self._check_open()
        self._outbox.flush()

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
            with holding_up():
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        self._check_open()
        try:
            return self._pool.submit(contextvars.copy_context().run, call)
        except RuntimeError:
            self._check_open()  # it may have been closed meanwhile
            raise

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

    async def land_together(self, begin: Callable[[], Landing | None]) -> None:
        """Run a call that queues a commit, and wait for it, in a thread that such calls of other tasks share.

        As with `run`, it has the caller's context, and cancelling the await leaves it running. It must not wait.
        """
        self._check_open()
        await self._together.land(begin)

    @classmethod
    async def aopen(cls, url: str | Path, **options: Any) -> Self:
        return await opened(functools.partial(cls.open, url, **options), cls.close)

    async def aclose(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    aadd_hook = awaited(add_hook)
    aflush = awaited(flush)


_write = OpenedMemory.write  # a memory that has another is asked to `write`

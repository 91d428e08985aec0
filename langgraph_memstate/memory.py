"""MemoryStore: facts, written and found. The graph's checkpointer and store are faces of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from pydantic import BaseModel

from langgraph_memstate import sessions
from langgraph_memstate.awaited import awaited
from langgraph_memstate.constraints import adopted
from langgraph_memstate.errors import IndexConfigError, SerializationError
from langgraph_memstate.facts import (
    Draft,
    Fact,
    Namespace,
    Origin,
    check_key,
    check_namespace,
    in_session,
    new_version,
    prefix_of,
)
from langgraph_memstate.filters import compile_filter
from langgraph_memstate.hindsight import Hindsight
from langgraph_memstate.moments import When, find_moment
from langgraph_memstate.patches import updated
from langgraph_memstate.reading import item_of
from langgraph_memstate.schemas import SchemaFault, dumped, type_name
from langgraph_memstate.stats import Stats
from langgraph_memstate.storage.operations import Append, Expect
from langgraph_memstate.transaction import Transaction
from langgraph_memstate.verify import VerifyReport, repair_index, verify_index

if TYPE_CHECKING:
    from langgraph_memstate.graph.checkpointer import MemStateCheckpointer
    from langgraph_memstate.graph.past import PastStore
    from langgraph_memstate.graph.store import MemStateStore


class MemoryStore(Hindsight):
    """Thread state, facts and vectors over one database.

    Args:
        storage: owned by this memory from now on: opened here, closed by `close`.
        vector_sync: ``"atomic"`` (a commit whose vectors cannot be stored does not happen) or ``"deferred"``
            (it happens, and its vectors follow).
    """

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

    # -- writing ------------------------------------------------------------------------------------

    @overload
    def commit(
        self,
        fact: Fact,
        *,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> Fact: ...
    @overload
    def commit(
        self,
        fact: Sequence[Fact],
        *,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> list[Fact]: ...
    def commit(
        self,
        fact: Fact | Sequence[Fact],
        *,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> Fact | list[Fact]:
        """Write one fact, or several in one commit, with their vectors. Inside a graph node: with its step.

        Returns the facts with the `version` they have in the log; a singleton with the `id` of the one it replaces.

        Raises:
            SchemaError, ConstraintError, SerializationError, NamespaceError: nothing was written.
            VectorSyncError: the index failed and the commit was taken back.
        """
        facts = list(fact) if isinstance(fact, Iterable) else [fact]
        for one in facts:
            if not isinstance(one, Fact):
                raise SerializationError(f"commit writes a Fact or several, not {one!r:.100}")
        facts = [replace(one, session_id=one.session_id or session_id) for one in facts]
        drafts: list[Draft] = []
        for one in facts:
            origin = Origin(thread_id=one.thread_id or thread_id, actor=one.actor or actor, reason=one.reason or reason)
            namespace, key = one.address
            draft = self.draft_put(namespace, key, one.payload, type=one.type, origin=origin)
            if self.schemas.constrained:
                draft = adopted(self.schemas, self._sight().over(drafts), draft)
            drafts.append(draft)
        self.write(drafts)
        written = [replace(one, id=d.key, version=d.version) for one, d in zip(facts, drafts, strict=True)]
        return written[0] if isinstance(fact, Fact) else written

    def commit_model(
        self,
        model: BaseModel,
        *,
        type: str | None = None,
        id: str | None = None,
        namespace: Namespace | None = None,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> Fact:
        """Write a Pydantic model as a fact. Its type is the one its class is registered for, or its name in snake_case.

        Raises:
            SchemaError: it is no model.
        """
        payload = dumped(model)
        kind = type or self.schemas.type_of(model.__class__) or type_name(model.__class__)
        fact = Fact(kind, payload, id=new_version() if id is None else id, namespace=namespace)
        return self.commit(fact, thread_id=thread_id, actor=actor, reason=reason, session_id=session_id)

    def update(
        self,
        namespace: str | Namespace,
        key: str,
        patch: Mapping[str, Any],
        *,
        thread_id: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> Fact:
        """Change fields of a fact: `patch` is a merge patch (RFC 7396), in which None removes a field.

        Two updates at once both count: the patch is applied to the fact as it is when it commits, with the step inside
        a graph node. Returns the fact as written, or as the node sees it.

        Raises:
            NotFoundError: there is no such fact.
            SchemaError, ConstraintError, SerializationError: nothing was written.
            VectorSyncError: the index failed and the commit was taken back.
        """
        origin = Origin(thread_id=thread_id, actor=actor, reason=reason)
        place = in_session(check_namespace(namespace), session_id)
        before, draft = updated(self._sight(), self.schemas, place, check_key(key), patch, origin)
        written = {one.version: one for one in self.write([draft])}[draft.version]
        item = item_of(written)
        assert item is not None
        return Fact.of(item._replace(created_at=before.created_at))

    def delete(
        self,
        namespace: str | Namespace,
        key: str,
        *,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> None:
        """Delete an item; its history stays. Deleting what is not there is recorded and changes nothing."""
        place = in_session(check_namespace(namespace), session_id)
        self.write([self.draft_delete(place, key, origin=Origin(actor=actor, reason=reason))])

    def promote_session(
        self,
        session_id: str,
        *,
        selector: Callable[[Fact], bool] | None = None,
        actor: str | None = None,
        reason: str | None = None,
    ) -> list[Fact]:
        """Make the facts of a session long-term ones, in one commit: a new version each, under the same key.

        `selector` says which are promoted; the others stay in the session. A new version has the actor and reason of
        the old one where none are given; which thread and step wrote that is in the session's history (`history` with
        `session_id`). Outside of a graph, a promotion belongs to no thread: ``rollback(1)`` undoes it.

        Raises:
            ConstraintError, VectorSyncError: nothing was written.
        """

        def promote() -> list[Draft]:
            puts, ends, read = sessions.promoted(self._sight(), session_id, selector, actor, reason)
            self.write([*puts, *ends], (Expect(tuple(read)),))
            return puts

        items = map(item_of, self._prepared(promote))
        return [Fact.of(self.schemas.present(item)) for item in items if item is not None]

    def discard_session(self, session_id: str, *, actor: str | None = None, reason: str | None = None) -> int:
        """Delete the facts of a session in one commit; returns how many. Their history stays."""
        drafts = sessions.discarded(self._sight(), session_id, actor, reason)
        self.write(drafts)
        return len(drafts)

    def transaction(self) -> Transaction:
        """Collect the writes of a ``with`` block and land them in one commit at its end, or none after an error.

        Reads inside see what is committed. A block inside another is part of its commit. ``async with`` works too.
        The nodes of a graph that is run inside write to their own steps.
        """
        self._check_open()
        return Transaction(self, self._transaction, self._running)

    # -- reading ------------------------------------------------------------------------------------

    def get(self, namespace: str | Namespace, key: str, *, session_id: str | None = None) -> Fact | None:
        """The current version of a fact, or None. A string is a fact type."""
        record = self.view().get(in_session(check_namespace(namespace), session_id), check_key(key))
        return None if record is None else Fact.of(record)

    def query(
        self,
        namespace: str | Namespace = (),
        *,
        filter: Mapping[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
        session_id: str | None = None,
    ) -> list[Fact]:
        """Facts under a namespace prefix (a string: a fact type) that match a filter, last written first.

        With `session_id` those of that session, without it those of none.
        """
        found = self.view().search(
            prefix_of(namespace, session_id), matches=compile_filter(filter), query=None, limit=limit, offset=offset,
            sessions=False,
        )  # fmt: skip
        return [Fact.of(record) for record, _ in found]

    def search(
        self,
        query: str,
        *,
        namespace: str | Namespace = (),
        filter: Mapping[str, Any] | None = None,
        limit: int = 10,
        offset: int = 0,
        session_id: str | None = None,
    ) -> list[Fact]:
        """Facts nearest to a text in meaning; `score` is cosine similarity. `session_id` is that of `query`.

        Raises:
            IndexConfigError: the memory was opened without an index.
        """
        view = self.view()
        if not self._outbox.indexes:
            raise IndexConfigError("semantic search needs an index: open the memory with index=… or add a hook")
        found = view.search(
            prefix_of(namespace, session_id), matches=compile_filter(filter), query=query, limit=limit, offset=offset,
            sessions=False,
        )  # fmt: skip
        return [Fact.of(record, score) for record, score in found]

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

    # -- upkeep -------------------------------------------------------------------------------------

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
            self._writer.land((Append(drafts, names, if_expired=versions),))
        return len(expired)

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

    def reindex(self) -> VerifyReport:
        """Build every index anew from the embeddings in SQL; no text is embedded again, and search goes on meanwhile.

        Returns what `verify` says afterwards.

        Raises:
            VectorSyncError: an index cannot be reached or refuses its work.
        """
        self._check_open()
        self._outbox.rebuild()
        self.flush()
        return self.verify()

    def prune(self, thread_ids: Sequence[str], *, strategy: Literal["keep_latest", "delete"] = "keep_latest") -> None:
        """Delete the checkpoints of threads, or all but the latest; see `MemStateCheckpointer.prune`. Facts stay."""
        self._check_open()
        self.checkpointer.prune(thread_ids, strategy=strategy)

    def check_schemas(self) -> list[SchemaFault]:
        """The current facts that the registered schemas do not accept, or cannot bring to their present version."""
        self._check_open()
        with self.storage.snapshot() as reader:
            return [fault for one in reader.items((), time.time()) if (fault := self.schemas.fault(one)) is not None]

    def vacuum(self) -> None:
        """Give back to the disk what deleting has freed. Writers wait, and the database is written anew.

        Raises:
            TransientError: another process keeps the database busy.
        """
        self._check_open()
        self._writer.alone(self.storage.vacuum)

    def stats(self) -> Stats:
        """Rows and bytes by table. It looks at every row."""
        self._check_open()
        with self.storage.snapshot() as reader:
            return Stats(reader.counts(), bytes=reader.sizes())

    # -- the async face: the same calls, awaited ----------------------------------------------------

    acommit = awaited(commit)
    acommit_model = awaited(commit_model)
    aupdate = awaited(update)
    adelete = awaited(delete)
    apromote_session = awaited(promote_session)
    adiscard_session = awaited(discard_session)
    aget = awaited(get)
    aquery = awaited(query)
    asearch = awaited(search)
    aas_of = awaited(as_of)
    asweep = awaited(sweep)
    averify = awaited(verify)
    arepair = awaited(repair)
    areindex = awaited(reindex)
    aprune = awaited(prune)
    acheck_schemas = awaited(check_schemas)
    avacuum = awaited(vacuum)
    astats = awaited(stats)

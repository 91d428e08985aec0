"""The LangGraph store: long-term memory whose writes land with the step that made them."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
)

from langgraph_memstate.awaited import is_own
from langgraph_memstate.embedding import check_paths
from langgraph_memstate.errors import CommitRaced, FilterError, NamespaceError, StorageClosedError
from langgraph_memstate.facts import Draft, IndexPaths, Namespace, Record, check_key, check_namespace, decode_value
from langgraph_memstate.filters import compile_filter
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.opening import Opening, ready
from langgraph_memstate.graph.staging import Staging
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.reading import View, check_page

logger = logging.getLogger("langgraph_memstate")

P = ParamSpec("P")
R = TypeVar("R")


class InvalidMemoryNamespace(NamespaceError, InvalidNamespaceError):
    """A namespace LangGraph refuses; an error of both trees."""


def _our_error(method: Callable[P, R]) -> Callable[P, R]:
    """LangGraph's refusal of a namespace as one of our tree that is still an error of theirs."""

    @functools.wraps(method)
    def refused(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except InvalidNamespaceError as error:
            raise InvalidMemoryNamespace(str(error)) from error

    return refused


def _our_async_error(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """The same for a coroutine function."""

    @functools.wraps(method)
    async def refused(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(*args, **kwargs)
        except InvalidNamespaceError as error:
            raise InvalidMemoryNamespace(str(error)) from error

    return refused


class MemStateStore(BaseStore):
    """Long-term memory in a `MemoryStore`. Sync and async, in one class.

    Inside a node of a graph that the same memory checkpoints, writes join the running step; elsewhere each batch is one
    commit. Reads inside a node see what the node itself and earlier steps of its run wrote.

    Args:
        index: LangGraph's `IndexConfig`, where the memory has none yet.
        ttl: LangGraph's `TTLConfig`: `default_ttl` (minutes), `refresh_on_read`, `sweep_interval_minutes`.
    """

    supports_ttl = True

    get = _our_error(BaseStore.get)
    search = _our_error(BaseStore.search)
    put = _our_error(BaseStore.put)
    delete = _our_error(BaseStore.delete)
    list_namespaces = _our_error(BaseStore.list_namespaces)
    aget = _our_async_error(BaseStore.aget)
    asearch = _our_async_error(BaseStore.asearch)
    aput = _our_async_error(BaseStore.aput)
    adelete = _our_async_error(BaseStore.adelete)
    alist_namespaces = _our_async_error(BaseStore.alist_namespaces)

    def __init__(
        self, memory: MemoryStore, *, index: Mapping[str, Any] | None = None, ttl: TTLConfig | None = None
    ) -> None:
        self.memory = memory
        self.ttl_config = ttl
        self._sweeper: threading.Thread | None = None
        self._stop = threading.Event()
        if index is not None:
            memory.use_index(index)
        memory.join_steps(Staging)

    def __bool__(self) -> bool:
        # LangGraph asks this of a store once as it enters a graph: see `pregel`.
        pregel.enter_graph()
        return True

    @classmethod
    def from_conn_string(
        cls,
        url: str,
        *,
        index: Mapping[str, Any] | None = None,
        ttl: TTLConfig | None = None,
        **options: Any,
    ) -> Opening[MemStateStore]:
        """A context manager, sync and async, over a store with a memory of its own.

        `options` are those of `MemoryStore.open`; the memory closes with the context.
        """
        return Opening(lambda: MemoryStore.open(url, index=index, **options), lambda memory: cls(memory, ttl=ttl))

    def setup(self) -> Any:
        """Nothing is left to do once the memory is open. May be called or awaited, as upstream's."""
        return ready()

    # -- the two methods everything goes through ----------------------------------------------------

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Run operations as one batch: reads see the state before it, writes are one commit, the last of a key wins.

        Raises:
            NamespaceError, KeyTypeError, SerializationError, SchemaError, FilterError: nothing was written.
            VectorSyncError: outside a step, the index failed and the commit was taken back.
        """
        operations = list(ops)
        drafts = self._drafts(operations)
        view = self._view()
        results = [self._read(view, op) for op in operations]
        self.memory.write(drafts)
        return results

    def _view(self) -> View:
        return self.memory.view()

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        operations = list(ops)
        if self._is_put(operations):
            with suppress(CommitRaced):  # else it is prepared anew, as any batch
                await self.memory.land_together(lambda: self.memory.begin(self._drafts(operations)))
                return [None] * len(operations)
        return await self.memory.run(self.batch, operations)

    def _is_put(self, ops: Sequence[Op]) -> bool:
        """Whether a batch is nothing but a commit."""
        only_puts = bool(ops) and all(isinstance(op, PutOp) for op in ops)
        return only_puts and self.memory.is_simple and is_own(self.batch, _batch)

    # -- writes -------------------------------------------------------------------------------------

    def _drafts(self, ops: Sequence[Op]) -> list[Draft]:
        last: dict[tuple[Namespace, str], Draft] = {}
        for op in ops:
            if isinstance(op, PutOp):
                draft = self._draft(op)
                last.pop(draft.address, None)
                last[draft.address] = draft
            elif not isinstance(op, GetOp | SearchOp | ListNamespacesOp):
                raise FilterError(f"{type(op).__name__} is no operation of a store")
        return list(last.values())

    def _draft(self, op: PutOp) -> Draft:
        if op.value is None:
            return self.memory.draft_delete(op.namespace, op.key)
        index: IndexPaths = op.index if op.index is None or op.index is False else check_paths(op.index)
        return self.memory.draft_put(op.namespace, op.key, op.value, index=index, ttl=op.ttl)

    # -- reads --------------------------------------------------------------------------------------

    def _read(self, view: View, op: Op) -> Result:
        if isinstance(op, GetOp):
            record = view.get(check_namespace(op.namespace), check_key(op.key))
            if record is not None and op.refresh_ttl:
                self._touch((record,))
            return None if record is None else _item(record)
        if isinstance(op, SearchOp):
            found = view.search(
                _labels(op.namespace_prefix),
                matches=compile_filter(op.filter),
                query=op.query or None,
                limit=op.limit,
                offset=op.offset,
            )
            if op.refresh_ttl:
                self._touch(record for record, _ in found)
            return [_search_item(record, score) for record, score in found]
        if isinstance(op, ListNamespacesOp):
            return _list_namespaces(view, op)
        return None

    # -- expiry -------------------------------------------------------------------------------------

    def _touch(self, records: Iterable[Record]) -> None:
        self.memory.touch(records)

    def sweep_ttl(self) -> int:
        """Delete items whose time to live is over; returns how many. They are invisible before, too."""
        return self.memory.sweep()

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> threading.Thread:
        """Sweep in the background until `stop_ttl_sweeper` or the memory closes. Default: every 5 minutes."""
        configured = (self.ttl_config or {}).get("sweep_interval_minutes")
        minutes = float(sweep_interval_minutes or configured or 5)
        if self._sweeper is None or not self._sweeper.is_alive():
            self.memory.at_close(self.stop_ttl_sweeper)
            self._stop.clear()
            self._sweeper = threading.Thread(target=self._sweep_on, args=(minutes,), name="memstate-ttl", daemon=True)
            self._sweeper.start()
        return self._sweeper

    def stop_ttl_sweeper(self, timeout: float | None = None) -> bool:
        """Stop the sweeper; whether it has stopped within `timeout` seconds."""
        self._stop.set()
        if self._sweeper is not None:
            self._sweeper.join(timeout)
        return self._sweeper is None or not self._sweeper.is_alive()

    def _sweep_on(self, minutes: float) -> None:
        while not self._stop.wait(minutes * 60):
            try:
                self.memory.sweep()
            except StorageClosedError:
                return
            except Exception as error:  # the next round may find the database well again
                logger.warning("sweeping expired items failed: %r", error)


_batch = MemStateStore.batch  # a store that has another is asked for it


def _times(record: Record) -> dict[str, datetime]:
    return {
        "created_at": datetime.fromtimestamp(record.created_at, UTC),
        "updated_at": datetime.fromtimestamp(record.updated_at, UTC),
    }


def _item(record: Record) -> Item:
    return Item(namespace=record.namespace, key=record.key, value=decode_value(record.value), **_times(record))


def _search_item(record: Record, score: float | None) -> SearchItem:
    return SearchItem(
        namespace=record.namespace, key=record.key, value=decode_value(record.value), score=score, **_times(record)
    )


def _list_namespaces(view: View, op: ListNamespacesOp) -> list[Namespace]:
    check_page(op.limit, op.offset)
    if op.max_depth is not None and (not isinstance(op.max_depth, int) or op.max_depth < 1):
        raise FilterError(f"max_depth={op.max_depth!r} is not a number of labels")
    conditions = [condition._replace(path=_labels(condition.path)) for condition in op.match_conditions or ()]
    prefix = _fixed_prefix(conditions)
    if op.max_depth is None and all(condition == MatchCondition("prefix", prefix) for condition in conditions):
        return view.namespaces(prefix, op.offset + op.limit)[op.offset :]
    found = [
        namespace
        for namespace in view.namespaces(prefix)
        if all(_satisfies(namespace, condition) for condition in conditions)
    ]
    if op.max_depth is not None:
        found = list(dict.fromkeys(namespace[: op.max_depth] for namespace in found))
    return found[op.offset : op.offset + op.limit]


def _labels(path: Sequence[str]) -> Namespace:
    return check_namespace(path) if path else ()


def _fixed_prefix(conditions: Sequence[MatchCondition]) -> Namespace:
    """The labels every wanted namespace starts with: up to the first wildcard of a prefix condition."""
    for condition in conditions:
        if condition.match_type == "prefix":
            path = condition.path
            return path[: path.index("*")] if "*" in path else path
    return ()


def _satisfies(namespace: Namespace, condition: MatchCondition) -> bool:
    path = condition.path
    if condition.match_type not in ("prefix", "suffix"):
        raise FilterError(f"a namespace matches by 'prefix' or 'suffix', not {condition.match_type!r}")
    if len(path) > len(namespace):
        return False
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[len(namespace) - len(path) :]
    return all(wanted in ("*", label) for wanted, label in zip(path, part, strict=True))

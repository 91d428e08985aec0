"""The store of a moment of the past: it can be read and not written."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from langgraph.store.base import Op, PutOp

from langgraph_memstate.errors import ReadOnlyError
from langgraph_memstate.facts import Draft, Record
from langgraph_memstate.graph.store import MemStateStore
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.moments import Moment
from langgraph_memstate.reading import View


class PastStore(MemStateStore):
    """LangGraph's store interface over a memory as it was at a moment: get, search (by filter and by meaning), list.

    `seq` is the moment's sequence in the log, `at` its time. What had expired then is not there; that reading an item
    had prolonged its life is not in the log, and not seen here.
    """

    def __init__(self, memory: MemoryStore, moment: Moment) -> None:
        super().__init__(memory)
        self._moment = moment

    @property
    def seq(self) -> int:
        return self._moment.seq

    @property
    def at(self) -> datetime:
        return datetime.fromtimestamp(self._moment.at, UTC)

    def _view(self) -> View:
        return self.memory.view(self._moment)

    def _touch(self, records: Iterable[Record]) -> None:
        return  # looking back prolongs nothing

    def sweep_ttl(self) -> int:
        raise ReadOnlyError("the past cannot be swept; sweep the memory's own store")

    def start_ttl_sweeper(self, sweep_interval_minutes: float | None = None) -> threading.Thread:
        raise ReadOnlyError("the past cannot be swept; sweep the memory's own store")

    def _drafts(self, ops: Sequence[Op]) -> list[Draft]:
        if any(isinstance(op, PutOp) for op in ops):
            raise ReadOnlyError("the past cannot be written; write to the memory's own store, or roll back to then")
        return super()._drafts(ops)

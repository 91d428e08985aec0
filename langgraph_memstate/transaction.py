"""A transaction: the memory writes of one context, landed in one commit at its end or dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

from langgraph_memstate.facts import Draft

if TYPE_CHECKING:
    from langgraph_memstate.memory import MemoryStore


class Transaction:
    """Collects drafts until it ends; a context manager, sync and async.

    One inside another hands its writes over when it ends, or drops them after an error, as a savepoint would.
    Code that outlives it (a thread or a task started inside) writes to the enclosing transaction, or commits at once.
    A graph that is run inside has steps of its own, and what its nodes write is part of those.

    Args:
        place: what identifies the node that is running.
    """

    def __init__(
        self, memory: MemoryStore, current: ContextVar[Transaction | None], place: Callable[[], object]
    ) -> None:
        self._memory = memory
        self._current = current
        self._place = place
        self._opened_in: object = None
        self._outer: Transaction | None = None
        self._token: Token[Transaction | None] | None = None
        self._drafts: list[Draft] = []
        self._over = False
        self._lock = threading.Lock()

    def is_open_here(self) -> bool:
        """Whether the caller is the node that opened it, or no node, as then."""
        return self._place() is self._opened_in

    def take(self, drafts: Sequence[Draft]) -> bool:
        """Collect drafts; False when this transaction and those around it have ended."""
        with self._lock:
            if not self._over:
                self._drafts.extend(drafts)
                return True
        return self._outer is not None and self._outer.is_open_here() and self._outer.take(drafts)

    def collected(self) -> list[Draft]:
        """What this transaction and those around it have collected, oldest first."""
        outer = self._outer.collected() if self._outer is not None and self._outer.is_open_here() else []
        with self._lock:
            return outer if self._over else [*outer, *self._drafts]

    def _end(self, error: BaseException | None) -> list[Draft]:
        """What is to be written, after leaving the context."""
        if self._token is not None:
            self._current.reset(self._token)
        with self._lock:
            self._over = True
            return self._drafts if error is None else []

    def __enter__(self) -> MemoryStore:
        self._opened_in = self._place()
        self._outer = self._current.get()
        self._token = self._current.set(self)
        return self._memory

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if drafts := self._end(error):
            self._memory.write(drafts)

    async def __aenter__(self) -> MemoryStore:
        return self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if drafts := self._end(error):
            await self._memory.run(self._memory.write, drafts)

"""Saved writes that a channel refuses.

LangGraph saves a task's writes before any channel sees them, and applies what is saved again whenever the thread is
read or resumed. So a write that its channel refuses must not stay: its task has not finished, and runs again. A channel
sees values only; which pending write a value is, the checkpointer's ledger knows, by the identity of the object that it
saved or loaded. The ledger that belongs to a graph's channels is the one of the checkpointer call that came before them
in the same context: LangGraph loads a checkpoint and makes the channels from it in one go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from langgraph_memstate.awaited import on_event_loop
from langgraph_memstate.commit import Landing
from langgraph_memstate.errors import SchemaError
from langgraph_memstate.storage.operations import Commit, DropWrites, Unstage
from langgraph_memstate.storage.values import StepKey

if TYPE_CHECKING:
    from langgraph_memstate.graph.reducer import TypedReducer

Remove = Callable[[Commit], "Future[None]"]


class Write(NamedTuple):
    """A pending write as it is saved, and the value as LangGraph knows it."""

    idx: int
    channel: str
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class _Saved:
    """Writes of one task that stand or fall together."""

    step: StepKey
    task_id: str
    writes: tuple[Write, ...]
    remove: Remove
    kept: frozenset[int] = frozenset()
    """indexes under which the task had saved something before, which stays"""
    is_loaded: bool = False

    def holds(self, channels: Iterable[str], value: object) -> bool:
        return any(write.value is value and write.channel in channels for write in self.writes)

    def drop(self) -> Future[None]:
        idxs = tuple(write.idx for write in self.writes if write.idx not in self.kept)
        drop = DropWrites(self.step, self.task_id, idxs)
        return self.remove((drop,) if self.kept else (drop, Unstage(self.step, self.task_id)))


class Ledger:
    """Which saved write each value of a run is, until its step ends, and which values were refused.

    A write may be saved in the background while its channel refuses it. Both go through the ledger's lock and the
    writer's queue, so that the removal comes after the write, or the write is never saved.

    Args:
        is_run: it is of a run of a graph, not of a call that reads or updates a thread's state.
    """

    def __init__(self, *, is_run: bool = False) -> None:
        self._is_run = is_run
        self._lock = threading.Lock()
        self._saved: dict[tuple[StepKey, str], list[_Saved]] = {}
        self._refused: list[tuple[frozenset[str], Any]] = []
        self._channels: dict[tuple[str, str], dict[str, TypedReducer]] = {}

    def save(
        self,
        step: StepKey,
        task_id: str,
        writes: Sequence[Write],
        enqueue: Callable[[], Landing],
        remove: Remove,
    ) -> Landing | None:
        """Queue a task's writes, to be waited for; None if one of them is refused already, and nothing is saved.

        What is saved under an index stays, and stands by itself: input that comes bit by bit is saved whole each time.
        """
        with self._lock:
            if any(value is one.value and one.channel in names for names, value in self._refused for one in writes):
                return None
            known = self._saved.setdefault((step, task_id), [])
            kept = frozenset(write.idx for saved in known for write in saved.writes if write.idx >= 0)
            known.append(_Saved(step, task_id, tuple(writes), remove, kept))
            return enqueue()

    def loaded(self, step: StepKey, task_id: str, writes: Sequence[Write], remove: Remove) -> None:
        """Note writes that were saved before."""
        with self._lock:
            saved = _Saved(step, task_id, tuple(writes), remove, is_loaded=True)
            self._saved.setdefault((step, task_id), []).append(saved)

    def refuse(self, channels: Iterable[str], value: object) -> None:
        """A channel refuses a value: the writes it was saved with are removed, whenever that is or was.

        Durably on return, but on an event loop, which must not wait: there the saver's next read waits.
        """
        names = frozenset(channels)
        with self._lock:
            self._refused.append((names, value))
            everything = [saved for task in self._saved.values() for saved in task]
            refused = [saved for saved in everything if saved.holds(names, value)]
            if refused and not self._is_run:  # `update_state` stands or falls as one
                refused += [saved for saved in everything if not saved.is_loaded and saved not in refused]
            for saved in refused:
                self._saved[saved.step, saved.task_id].remove(saved)
            removals = [saved.drop() for saved in refused]
        if not on_event_loop():
            wait(removals)

    def landed(self, step: StepKey) -> None:
        """A step has ended, and its writes with it."""
        with self._lock:
            self._saved = {key: saved for key, saved in self._saved.items() if key[0] != step}

    def add_channel(self, place: tuple[str, str], name: str, channel: TypedReducer) -> None:
        """Note a typed channel of the graph at a thread and namespace, as its run found it."""
        with self._lock:
            self._channels.setdefault(place, {})[name] = channel
            if self.half(place):
                _half.set(None)

    def leave_half(self, place: tuple[str, str], error: SchemaError) -> None:
        """The graph at a thread and namespace stops in the middle of applying a step.

        Noted in the context, which LangGraph copies as it hands a checkpoint to the background: one that was made
        before is whole.
        """
        _half.set((self, place, error))

    def half(self, place: tuple[str, str]) -> SchemaError | None:
        """Why the graph's channels held half a step when this call was made, if they did."""
        noted = _half.get()
        return noted[2] if noted is not None and noted[0] is self and noted[1] == place else None

    def channels(self, place: tuple[str, str]) -> dict[str, TypedReducer]:
        with self._lock:
            return dict(self._channels.get(place, {}))


class Scope(NamedTuple):
    """The checkpointer call that came last in this context: its ledger, thread and namespace."""

    ledger: Ledger
    place: tuple[str, str]


_half: ContextVar[tuple[Ledger, tuple[str, str], SchemaError] | None] = ContextVar("memstate_half", default=None)
_scope: ContextVar[Scope | None] = ContextVar("memstate_ledger", default=None)


def enter(scope: Scope) -> None:
    _scope.set(scope)


def current() -> Scope | None:
    return _scope.get()

"""One batch of memory writes of a running task: whether it still counts, and who may read it.

It leaves a marker in the write set of its task, of those that called it, and of every task that one runs inside of. It
counts only while all of those markers are there and none of the tasks has failed. So whatever LangGraph does to a task,
its memory writes share: a retry clears them, a failure drops them, the end of the step lands them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from langgraph_memstate.facts import Draft
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.parts import Part, Place, place_of
from langgraph_memstate.graph.pregel import Caller, RunningTask, WriteSet


class Marks:
    """The markers of write sets at one moment, each looked at once; a task that failed has none."""

    def __init__(self) -> None:
        self._known: dict[int, frozenset[str]] = {}
        self._left: dict[int, frozenset[str]] = {}

    def of(self, task: RunningTask) -> frozenset[str]:
        key = id(task.writes)
        if key not in self._known:
            writes = task.writes.copy()
            self._known[key] = frozenset() if pregel.failed(writes) else frozenset(pregel.tokens(writes))
        return self._known[key]

    def left_by_calls(self, caller: Caller) -> frozenset[str]:
        """A caller that failed has them too: what it called had finished."""
        key = id(caller.writes)
        if key not in self._left:
            self._left[key] = frozenset(pregel.tokens(caller.writes.copy()))
        return self._left[key]


@dataclass(slots=True, eq=False)
class Entry:
    """One batch of memory writes. `chain`: its task, then the tasks that one runs inside of."""

    token: str
    order: int
    chain: tuple[RunningTask, ...]
    drafts: tuple[Draft, ...]
    attempts: Mapping[str, int]
    """by the task ids of those that called its task: how often each had been retried"""
    saved_level: int | None = None
    """the level of the chain whose finished task was saved with these writes: only its graph lands them"""
    is_kept: bool = False
    """its caller failed for good, and would find the result of the call when it runs again"""

    def level(self, thread_id: str, graph_ns: str) -> int | None:
        """Where in the chain the graph of that namespace is."""
        for level, task in enumerate(self.chain):
            if task.graph_ns == graph_ns and task.thread_id == thread_id:
                return level
        return None

    def counts(self, marks: Marks, level: int | None = None) -> bool:
        """Whether no task of the chain (up to a level) was retried, timed out, cancelled or failed since."""
        chain = self.chain if level is None else self.chain[: level + 1]
        return all(self.token in marks.of(task) for task in chain)

    def stands(self, marks: Marks, level: int | None = None) -> bool:
        """Whether it counts, and no task that called one of the chain was retried since."""
        chain = self.chain if level is None else self.chain[: level + 1]
        callers = () if self.is_kept else (caller for task in chain for caller in task.callers)
        return self.counts(marks, level) and all(self.token in marks.left_by_calls(caller) for caller in callers)

    def part(self, level: int) -> Part:
        """As a part of a step of the graph at a level."""
        return Part(place_in(self.chain[: level + 1]), (self.order, ""), self.drafts)


def sees(task: RunningTask, entry: Entry) -> bool:
    """Whether a task may read what another staged: its own, of tasks around it or inside it, and of earlier steps."""
    if entry.saved_level is not None:
        owner = entry.chain[entry.saved_level].graph_ns
        if owner not in {one.graph_ns for one in task.chain}:
            return False  # it lands with a graph that has ended without landing it
    for mine, theirs in zip(reversed(task.chain), reversed(entry.chain), strict=False):
        if mine.writes is theirs.writes:
            continue
        if (mine.thread_id, mine.graph_ns) != (theirs.thread_id, theirs.graph_ns):
            return mine.inside is not None  # another subgraph that the same task ran
        if mine.checkpoint_id != theirs.checkpoint_id:
            return True  # an earlier step of this run
        # The same step: parallel tasks are isolated. A call knows what its callers wrote, and what they and it called
        # once that has returned.
        line = {path for path, _ in _line(mine)}
        between = [writes for path, writes in _line(theirs) if path not in line]
        return len(between) < len(_line(theirs)) and all(pregel.returned(writes.copy()) for writes in between)
    return True


def _line(task: RunningTask) -> list[tuple[str, WriteSet]]:
    """The paths and write sets of a task and those that called it."""
    return [*((caller.path, caller.writes) for caller in task.callers), (task.path, task.writes)]


def place_in(chain: Sequence[RunningTask]) -> Place:
    return place_of((task.checkpoint_id, task.path) for task in reversed(chain))

"""Memory writes of running steps: staged with the write set of their task, landed with its step.

One entry is one batch of writes. It leaves a marker in the write set of its task and of every task that one runs inside
of, and counts only while all of those markers are there and none of those tasks has failed. So whatever LangGraph does
to a task, its memory writes share: a retry clears them, a failure drops them, the end of the step lands them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.runnables import RunnableConfig

from langgraph_memstate.facts import Draft
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.pregel import RunningTask
from langgraph_memstate.storage.base import StagedDraft, StepKey

if TYPE_CHECKING:
    from langgraph_memstate.memory import MemoryStore


@dataclass(slots=True, eq=False)
class _Entry:
    """One batch of memory writes. `chain`: its task, then the tasks that one runs inside of."""

    token: str
    order: int
    chain: tuple[RunningTask, ...]
    drafts: tuple[Draft, ...]
    saved_level: int | None = None
    """the level of the chain whose finished task was saved with these writes: only its graph lands them"""

    def level(self, thread_id: str, graph_ns: str) -> int | None:
        """Where in the chain the graph of that namespace is."""
        for level, task in enumerate(self.chain):
            if task.graph_ns == graph_ns and task.thread_id == thread_id:
                return level
        return None

    def counts(self, level: int | None = None) -> bool:
        """Whether no task of the chain (up to a level) was retried, timed out, cancelled or failed since."""
        for task in self.chain if level is None else self.chain[: level + 1]:
            writes = task.writes.copy()
            if pregel.failed(writes) or self.token not in pregel.tokens(writes):
                return False
        return True

    def position(self, level: int) -> tuple[Any, ...]:
        """Its place among the writes of a step: task path order, as LangGraph applies channel writes."""
        outermost_first = reversed(self.chain[: level + 1])
        return (*((task.checkpoint_id, task.path) for task in outermost_first), ("", ""), self.order)


@dataclass(slots=True, eq=False)
class _Run:
    """What one run of a graph has staged and not landed."""

    control: object
    entries: dict[str, _Entry] = field(default_factory=dict)
    landed: set[str] = field(default_factory=set)
    resumed: dict[StepKey, list[StagedDraft]] = field(default_factory=dict)
    """finished calls that an earlier process saved, by step; read once"""
    anchored: bool = False


class Part(NamedTuple):
    """One memory write and its place: the checkpoint its step started from, and the path of its task."""

    checkpoint_id: str
    task_path: str
    draft: Draft


@dataclass(frozen=True, slots=True)
class Landing:
    """What a checkpoint makes visible, in order, and the ids of the tasks it came from."""

    parts: tuple[Part, ...] = ()
    tasks: frozenset[str] = frozenset()


class Staging:
    """The step scope of one memory: takes writes into running steps and hands them to the checkpointer."""

    def __init__(self, memory: MemoryStore) -> None:
        self._memory = memory
        self._runs: dict[int, _Run] = {}
        self._lock = threading.RLock()
        self._order = 0

    # -- from inside a node -------------------------------------------------------------------------

    def stage(self, drafts: Sequence[Draft]) -> bool:
        task = self._task()
        if task is None:
            return False
        token = pregel.new_token()
        with self._lock:
            self._order += 1
            origin = _origin(task)
            entry = _Entry(token, self._order, task.chain, tuple(_with_origin(draft, origin) for draft in drafts))
            self._run(task.run).entries[token] = entry
        for one in task.chain:
            one.mark(token)
        return True

    def staged(self) -> Sequence[Draft]:
        task = self._task()
        if task is None:
            return ()
        with self._lock:
            run = self._runs.get(id(task.run))
            entries = list(run.entries.values()) if run is not None else []
        seen = [draft for entry in entries if _sees(task, entry) and entry.counts() for draft in entry.drafts]
        return [*self._resumed_calls(task), *seen]

    def has_landed(self, versions: Iterable[str]) -> bool:
        task = pregel.running_task()
        with self._lock:
            run = None if task is None else self._runs.get(id(task.run))
            return run is not None and not run.landed.isdisjoint(versions)

    def _task(self) -> RunningTask | None:
        """The running task, if its graph saves to this memory."""
        task = pregel.running_task()
        if task is None or getattr(task.saver, "memory", None) is not self._memory:
            return None
        return task

    def _resumed_calls(self, task: RunningTask) -> list[Draft]:
        """What calls of the functional API wrote that finished in an earlier process and are not run again."""
        step = StepKey(task.thread_id, task.graph_ns, task.checkpoint_id)
        with self._lock:
            run = self._run(task.run)
            rows = run.resumed.get(step)
        if rows is None:
            with self._memory.storage.snapshot() as reader:
                rows = reader.staged(step)
            with self._lock:
                run.resumed[step] = rows
                here = {draft.version for entry in run.entries.values() for draft in entry.drafts}
                rows = run.resumed[step] = [row for row in rows if row.draft.version not in here]
        callers = [path for path in (task.path, task.caller) if path is not None]
        return [
            row.draft for row in rows if any(row.task_path.startswith(pregel.call_prefix(path)) for path in callers)
        ]

    # -- from inside the saver ----------------------------------------------------------------------

    def begin(self, config: RunnableConfig) -> None:
        """Tie what a run stages to the life of the run: one that is abandoned leaves nothing behind."""
        control, anchor = pregel.run_of(config), pregel.run_anchor(config)
        if control is None or anchor is None:
            return
        with self._lock:
            run = self._run(control)
            if not run.anchored:
                run.anchored = True
                weakref.finalize(anchor, self._runs.pop, id(control), None).atexit = False

    def finished(
        self, config: RunnableConfig, step: StepKey, task_id: str, writes: Sequence[tuple[str, Any]]
    ) -> tuple[Draft, ...]:
        """The memory writes to save with a task's pending writes; none for a task that has not finished."""
        control = pregel.run_of(config)
        with self._lock:
            run = self._runs.get(id(control))
            if run is None:
                return ()
            mine = [
                (entry, level)
                for entry in run.entries.values()
                if (level := entry.level(step.thread_id, step.checkpoint_ns)) is not None
                and entry.chain[level].task_id == task_id
                and entry.chain[level].checkpoint_id == step.checkpoint_id
            ]
            if pregel.unfinished(writes):
                for entry, _ in mine:
                    run.entries.pop(entry.token, None)
                return ()
            marked = set(pregel.tokens(writes))
            kept = [
                (entry, level)
                for entry, level in mine
                if entry.token in marked and entry.saved_level in (None, level) and entry.counts(level)
            ]
            for entry, level in kept:
                entry.saved_level = level
            kept.sort(key=lambda pair: pair[0].position(pair[1]))
            return tuple(draft for entry, _ in kept for draft in entry.drafts)

    def landing(self, config: RunnableConfig, checkpoint: StepKey, parent_id: str | None) -> Landing:
        """What the run staged in the steps that a checkpoint ends.

        Usually that is the step that started from its parent. A run that saves at exit ends several steps at once: all
        of its own but the one that starts from the new checkpoint, which has not finished.
        """
        with self._lock:
            found = [
                (entry, level)
                for entry, level in self._ended(config, checkpoint, parent_id)
                if entry.saved_level in (None, level) and entry.counts(level)
            ]
        found.sort(key=lambda pair: pair[0].position(pair[1]))
        return Landing(
            parts=tuple(
                Part(entry.chain[level].checkpoint_id, entry.chain[level].path, draft)
                for entry, level in found
                for draft in entry.drafts
            ),
            tasks=frozenset(entry.chain[level].task_id for entry, level in found),
        )

    def landed(self, config: RunnableConfig, checkpoint: StepKey, parent_id: str | None, landing: Landing) -> None:
        """Forget the steps that a checkpoint ended, now that it is committed."""
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            if run is None:
                return
            run.landed.update(part.draft.version for part in landing.parts)
            for entry, _ in self._ended(config, checkpoint, parent_id):
                run.entries.pop(entry.token, None)

    def _ended(self, config: RunnableConfig, checkpoint: StepKey, parent_id: str | None) -> list[tuple[_Entry, int]]:
        run = self._runs.get(id(pregel.run_of(config)))
        if run is None:
            return []
        at_exit = pregel.saves_at_exit(config)
        ended = []
        for entry in run.entries.values():
            level = entry.level(checkpoint.thread_id, checkpoint.checkpoint_ns)
            if level is None:
                continue
            started_from = entry.chain[level].checkpoint_id
            if (started_from != checkpoint.checkpoint_id) if at_exit else (started_from == parent_id):
                ended.append((entry, level))
        return ended

    def _run(self, control: object) -> _Run:
        return self._runs.setdefault(id(control), _Run(control))


def _origin(task: RunningTask) -> dict[str, Any]:
    return {
        "thread_id": task.thread_id,
        "checkpoint_ns": task.graph_ns,
        "task_id": task.task_id,
        "node": task.node,
        "run_id": task.run_id,
    }


def _with_origin(draft: Draft, origin: dict[str, Any]) -> Draft:
    return replace(draft, origin=replace(draft.origin, **origin))


def _sees(task: RunningTask, entry: _Entry) -> bool:
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
        # The same step: parallel tasks are isolated, a call that has returned is known to its caller.
        called_by_us = theirs.caller is not None and theirs.caller in (mine.path, mine.caller)
        return called_by_us and pregel.returned(theirs.writes.copy())
    return True

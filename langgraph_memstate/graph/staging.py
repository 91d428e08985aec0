"""Memory writes of running steps: staged as entries while their tasks run, landed when their step ends."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig

from langgraph_memstate.awaited import on_event_loop
from langgraph_memstate.facts import Draft
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.entries import Entry, Marks, place_in, sees
from langgraph_memstate.graph.order import Order
from langgraph_memstate.graph.parts import Part, in_log_order, saved_part
from langgraph_memstate.graph.pregel import Caller, RunningTask
from langgraph_memstate.graph.refusals import Ledger
from langgraph_memstate.storage.values import StagedDraft, StepKey

if TYPE_CHECKING:
    from langgraph_memstate.memory import MemoryStore


_PATIENCE = 1.0  # seconds


@dataclass(slots=True, eq=False)
class _Loaded:
    """The checkpoint a run started from, and what finished tasks of its step had saved before."""

    step: StepKey
    rows: Sequence[StagedDraft]
    around: Mapping[str, str]
    """for a subgraph: by namespace, the checkpoints that the steps around it start from"""
    head: Mapping[str, Any] | None = None
    """the checkpoint's channel versions and what its nodes have seen of them, where `rows` are"""
    runs_again: bool = False
    """the run does not go on with what finished tasks of that step had done, but does all of it again"""
    decided: threading.Event = field(default_factory=threading.Event)
    resumed: bool = False

    def decide(self, resumed: bool) -> None:
        """Whether the run goes on with that step, or had new input that drops it. The first account stays."""
        if not self.decided.is_set():
            self.resumed = resumed
            self.decided.set()

    def is_resumed(self, wait: bool) -> bool:
        """Whether the step goes on. LangGraph tells the saver in the background, which is worth waiting for."""
        if wait:
            self.decided.wait(_PATIENCE)
        return self.resumed


@dataclass(slots=True, eq=False)
class _Run:
    """What one run of a graph has staged and not landed."""

    control: object
    entries: dict[str, Entry] = field(default_factory=dict)
    landed: set[str] = field(default_factory=set)
    loaded: dict[tuple[str, str], _Loaded] = field(default_factory=dict)
    """by thread and namespace"""
    rewound: Sequence[Draft] = ()
    """what takes memory back to the checkpoint of the past that the run starts from, until that is committed"""
    ledger: Ledger = field(default_factory=lambda: Ledger(is_run=True))
    order: Order = field(default_factory=Order)
    attempts: dict[str, tuple[int, str]] = field(default_factory=dict)
    """by the id of a task: how often it was retried, and the marker that its calls left last"""
    at_exit: bool = False
    anchor: weakref.ref[Any] | None = None

    def attempt(self, caller: Caller, token: str) -> int:
        """How often a caller has been retried so far, which clears its write set of what its calls left there."""
        number, last = self.attempts.get(caller.task_id, (0, token))
        number += last != token and last not in pregel.tokens(caller.writes.copy())
        self.attempts[caller.task_id] = number, token
        return number

    def loaded_by(self, task: RunningTask) -> _Loaded | None:
        """The checkpoint the run loaded, if it is the one the task's step starts from."""
        loaded = self.loaded.get((task.thread_id, task.graph_ns))
        return loaded if loaded is not None and loaded.step.checkpoint_id == task.checkpoint_id else None

    def unsaved_before(self, thread_id: str, graph_ns: str, checkpoint_id: str) -> list[_Loaded]:
        """Resumed steps of subgraphs that ran in steps of a graph before the one that starts from a checkpoint.

        A run that saves at exit saves no subgraph that finishes.
        """
        return [
            loaded
            for loaded in (self.loaded.values() if self.at_exit else ())
            if loaded.resumed
            and loaded.step.thread_id == thread_id
            and loaded.around.get(graph_ns, checkpoint_id) != checkpoint_id
        ]

    def not_landed(self, rows: Iterable[StagedDraft]) -> list[StagedDraft]:
        return [row for row in rows if row.draft.version not in self.landed]


@dataclass(frozen=True, slots=True)
class Landing:
    """What a checkpoint makes visible, and the ids of the tasks it came from.

    `void`: versions that were saved by calls of a task that was retried then, and called anew.
    """

    parts: tuple[Part, ...] = ()
    tasks: frozenset[str] = frozenset()
    void: frozenset[str] = frozenset()


class Staging:
    """The step scope of one memory: takes writes into running steps and hands them to the checkpointer."""

    def __init__(self, memory: MemoryStore) -> None:
        self._memory = memory
        self._runs: dict[int, _Run] = {}
        self._lock = threading.RLock()
        self._order = 0
        self.removals: set[Future[None]] = set()
        """of writes that a channel refused, on their way"""

    # -- from inside a node -------------------------------------------------------------------------

    def stage(self, drafts: Sequence[Draft]) -> bool:
        task = self._task()
        if task is None:
            return False
        token = pregel.new_token()
        with self._lock:
            self._order += 1
            run = self._run(task.run)
            for one in task.chain:
                if loaded := run.loaded_by(one):
                    loaded.decide(True)
            origin = _origin(task)
            attempts = {caller.task_id: run.attempt(caller, token) for one in task.chain for caller in one.callers}
            staged = tuple(_with_origin(draft, origin) for draft in drafts)
            run.entries[token] = Entry(token, self._order, task.chain, staged, attempts)
            for one in task.chain:  # before another call of the same task looks for its marker
                one.mark(token)
        return True

    def staged(self) -> Sequence[Draft]:
        task = self._task()
        if task is None:
            return ()
        with self._lock:
            run = self._runs.get(id(task.run))
            entries = list(run.entries.values()) if run is not None else []
        marks = Marks()
        seen = [entry.part(len(entry.chain) - 1) for entry in entries if sees(task, entry) and entry.stands(marks)]
        past = () if run is None else run.rewound
        return [*past, *(draft for part in in_log_order([*_resumed(task, run), *seen]) for draft in part.drafts)]

    def take_back(self) -> None:
        """Forget what the running task staged, itself or in the graphs and tasks it ran, and that has not landed."""
        task = self._task()
        if task is None:
            return
        with self._lock:
            run = self._run(task.run)
            for entry in list(run.entries.values()):
                if any(one.writes is task.writes for one in entry.chain):
                    run.entries.pop(entry.token, None)

    def has_landed(self, versions: Iterable[str]) -> bool:
        task = self._task()
        with self._lock:
            run = None if task is None else self._runs.get(id(task.run))
            return run is not None and not run.landed.isdisjoint(versions)

    def running(self) -> object | None:
        task = self._task()
        return None if task is None else task.writes

    def _task(self) -> RunningTask | None:
        """The running task, if its graph saves to this memory."""
        saves_here = getattr(pregel.running_saver(), "memory", None) is self._memory
        return pregel.running_task() if saves_here else None

    # -- from inside the saver ----------------------------------------------------------------------

    def begin(
        self,
        config: RunnableConfig,
        step: StepKey | None,
        rows: Sequence[StagedDraft],
        head: Mapping[str, Any] | None = None,
        *,
        runs_again: bool = False,
        rewound: Sequence[Draft] = (),
    ) -> None:
        """Note the checkpoint a run loads first, and tie what it stages to its life: one abandoned leaves nothing.

        `rewound` takes memory back to that checkpoint, which is of the past.
        """
        control, anchor = pregel.run_of(config), pregel.run_anchor(config)
        if control is None or anchor is None:
            return
        with self._lock:
            run = self._run(control)
            if run.anchor is not None and run.anchor() is not anchor and pregel.is_root(config):
                del self._runs[id(control)]  # the application uses one RunControl for another run
                run = self._run(control)
            if run.anchor is None:
                run.anchor = weakref.ref(anchor)
                run.at_exit = pregel.saves_at_exit(config)
                weakref.finalize(anchor, self._forget, run).atexit = False
            place = None if step is None else (step.thread_id, step.checkpoint_ns)
            if step is not None and place is not None and place not in run.loaded:
                loaded = run.loaded[place] = _Loaded(
                    step, () if runs_again else rows, pregel.steps_around(config), head, runs_again
                )
                run.rewound = rewound if pregel.is_root(config) else run.rewound
                resumes = pregel.subgraph_resumes(config)
                if resumes is not None:
                    loaded.decide(resumes)

    def rewound(self, config: RunnableConfig) -> None:
        """The run has committed what it saw of the past."""
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            if run is not None:
                run.landed.update(draft.version for draft in run.rewound)
                run.rewound = ()

    def ledger(self, config: RunnableConfig) -> Ledger | None:
        """The ledger of the run that a config belongs to."""
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            return None if run is None else run.ledger

    def order(self, config: RunnableConfig) -> Order | None:
        """The order of saves in the run that a config belongs to; None where it is LangGraph's alone."""
        if pregel.saves_at_exit(config):
            return None
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            return None if run is None else run.order

    def decide(self, config: RunnableConfig, step: StepKey | None, *, resumed: bool) -> None:
        """Note what a call of the saver says about the step its run started from."""
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            if run is not None and step is not None:
                loaded = run.loaded.get((step.thread_id, step.checkpoint_ns))
                if loaded is not None and loaded.step == step:
                    loaded.decide(resumed)

    def runs_again(self, config: RunnableConfig, step: StepKey | None) -> bool:
        """Whether the run started from that step, and does again what its finished tasks had done."""
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            loaded = None if run is None or step is None else run.loaded.get((step.thread_id, step.checkpoint_ns))
            return loaded is not None and loaded.runs_again and loaded.step == step

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
                for entry, level in mine:
                    if level == 0:  # what a subgraph finished may be on its way, and is the subgraph's to land
                        run.entries.pop(entry.token, None)
                return ()
            marked, marks = set(pregel.tokens(writes)), Marks()
            kept = [
                (entry, level)
                for entry, level in mine
                if entry.token in marked and entry.saved_level in (None, level) and entry.counts(marks, level)
            ]
            for entry, level in kept:
                entry.saved_level = level
            parts = in_log_order(entry.part(level) for entry, level in kept)
            return tuple(draft for part in parts for draft in part.drafts if not draft.derived)

    def drop_calls(self, config: RunnableConfig, step: StepKey, task_id: str) -> Mapping[str, int]:
        """Drop what a task that failed for good had called when it was retried; by task id, how many writes each saved.

        When it runs again it counts its calls from the first one, and finds those of its first attempt.
        """
        dropped: dict[str, int] = {}
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            if run is None:
                return dropped
            called = [one for one in run.entries.values() if task_id in one.attempts]
            first = min((entry.attempts[task_id] for entry in called), default=0)
            for entry in called:
                level = entry.level(step.thread_id, step.checkpoint_ns)
                if entry.attempts[task_id] == first or level is None:
                    entry.is_kept = True
                else:
                    run.entries.pop(entry.token, None)
                    line: list[Caller | RunningTask] = [*entry.chain[level].callers, entry.chain[level]]
                    below = line[[one.task_id for one in line].index(task_id) + 1 :]
                    dropped |= {one.task_id: len(pregel.without_tokens(one.writes.copy())) for one in below}
        return dropped

    def landing(self, config: RunnableConfig, checkpoint: StepKey, parent_id: str | None) -> Landing:
        """What the run staged in the steps that a checkpoint ends.

        Usually that is the step that started from its parent. A run that saves at exit ends several steps at once: all
        of its own but the one that starts from the new checkpoint, which has not finished.
        """
        marks = Marks()
        with self._lock:
            ended = self._ended(config, checkpoint, parent_id)
            found = [
                (entry, level)
                for entry, level in ended
                if entry.saved_level in (None, level) and entry.stands(marks, level)
            ]
            void = [entry for entry, level in ended if entry.saved_level == level and not entry.stands(marks, level)]
        return Landing(
            parts=tuple(entry.part(level) for entry, level in found),
            void=frozenset(draft.version for entry in void for draft in entry.drafts),
            tasks=frozenset(entry.chain[level].task_id for entry, level in found),
        )

    def unsaved_subgraphs(
        self, config: RunnableConfig, checkpoint: StepKey
    ) -> list[tuple[StepKey, Sequence[StagedDraft]]]:
        """Steps of subgraphs that this checkpoint ends too, with what their finished tasks had saved before."""
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            if run is None:
                return []
            unsaved = run.unsaved_before(*checkpoint)
            return [(loaded.step, rows) for loaded in unsaved if (rows := run.not_landed(loaded.rows))]

    def landed(
        self, config: RunnableConfig, checkpoint: StepKey, parent_id: str | None, versions: frozenset[str]
    ) -> None:
        """Forget the steps that a checkpoint ended, now that it is committed."""
        with self._lock:
            run = self._runs.get(id(pregel.run_of(config)))
            if run is None:
                return
            run.landed |= versions
            if parent_id is not None:
                run.ledger.landed(checkpoint._replace(checkpoint_id=parent_id))
            for entry, _ in self._ended(config, checkpoint, parent_id):
                run.entries.pop(entry.token, None)

    def _ended(self, config: RunnableConfig, checkpoint: StepKey, parent_id: str | None) -> list[tuple[Entry, int]]:
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

    def _forget(self, run: _Run) -> None:
        with self._lock:
            if self._runs.get(id(run.control)) is run:
                del self._runs[id(run.control)]

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


def _resumed(task: RunningTask, run: _Run | None) -> list[Part]:
    """What tasks wrote that finished before this run resumed their step, and are not run again."""
    if run is None:
        return []
    found: list[Part] = []
    for level, one in enumerate(task.chain):
        around = place_in(task.chain[level + 1 :])
        for subgraph in run.unsaved_before(one.thread_id, one.graph_ns, one.checkpoint_id):
            place = (*around, (subgraph.around[one.graph_ns], ""))
            found += [Part(place, (-2, row.draft.version), [row.draft]) for row in run.not_landed(subgraph.rows)]
        loaded = run.loaded.get((one.thread_id, one.graph_ns))
        if loaded is None or not loaded.rows:
            continue
        rows = loaded.rows
        if loaded is run.loaded_by(one):
            loaded.decide(True)
            line = pregel.lineage(one.path)
            rows = [row for row in rows if any(pregel.calls(path, row.task_path) for path in line)]
        else:
            if loaded.head is not None and one.versions_seen is not None:
                loaded.decide(pregel.resumed_from(loaded.head, one.versions_seen))
            if not loaded.is_resumed(wait=not run.at_exit and not on_event_loop()):
                continue
        found += [saved_part(loaded.step, row, around) for row in run.not_landed(rows)]
    return found

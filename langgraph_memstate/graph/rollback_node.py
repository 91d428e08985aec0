"""A node that undoes the last steps of the graph it is in: state and memory, with its own step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from langgraph.channels.base import BaseChannel
from langgraph.types import Command, Overwrite

from langgraph_memstate.errors import RollbackError
from langgraph_memstate.facts import LogEntry, Origin
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.checkpointer import MemStateCheckpointer
from langgraph_memstate.graph.pregel import RunningTask
from langgraph_memstate.graph.rollback import begins_turn, step_before
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.storage.values import StoredHead
from langgraph_memstate.undo import OnConflict, plan_undo

_PATIENCE = 30.0  # seconds to wait for a checkpoint that is being saved in the background
_POLL = 0.002

Update = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]]


class RollbackNode:
    """For `add_node`: puts the state back as it was `steps` checkpoints before, and what those steps remembered.

    The values go through the channels' reducers, as `langgraph.types.Overwrite` where they have one. A channel that had
    no value then cannot be unset: it becomes empty, or None. Both land with this node's own step, or not at all. What
    was to run next is not restored; `goto` or the node's edges say how the graph goes on. In a subgraph, the subgraph's
    own steps are undone.

    Args:
        goto: where to go on: a node, several, or `Send`s, as in `Command`.
        keep: channels that keep their current value.
        update: further changes, applied to the state that was put back: a dict, or a function of that state.
        max_rollbacks: how often in one turn (invocation) this node goes back.
        otherwise: where to go when that is used up; without it, the node raises `RollbackError`.
        on_conflict: see `MemoryStore.rollback`. What others change while the node's step is under way counts too: with
            ``"raise"`` the step then fails as it ends, with `RollbackConflict`.

    Raises:
        RollbackError: the graph's checkpointer is none of ours, ``durability="exit"`` saves no steps to go back to, the
            thread has not so many, or a channel cannot be put back.
    """

    def __init__(
        self,
        steps: int = 1,
        *,
        goto: Any = (),
        keep: Sequence[str] = (),
        update: Update | None = None,
        max_rollbacks: int = 3,
        otherwise: Any = None,
        on_conflict: OnConflict = "raise",
    ) -> None:
        if steps < 1 or max_rollbacks < 1:
            raise RollbackError(f"steps={steps!r} and max_rollbacks={max_rollbacks!r} are both 1 or more")
        if isinstance(keep, str):
            raise RollbackError(f"keep is a sequence of channels, such as ({keep!r},)")
        self._steps = steps
        self._goto = goto
        self._keep = frozenset(keep)
        self._update = update
        self._max_rollbacks = max_rollbacks
        self._otherwise = otherwise
        self._on_conflict = on_conflict

    def __call__(self, state: Any) -> Command[Any]:
        task, saver = _running()
        memory = saver.memory
        head = _saved(memory, task)
        with memory.storage.snapshot() as reader:
            done = _rollbacks(saver, task.node, reader.ancestors(*head.step))
            if done >= self._max_rollbacks:
                return self._give_up(task, done)
            target, _ = step_before(reader.ancestors(*head.step), self._steps)
            if target is None:
                raise RollbackError(f"{task.node}: there are no {self._steps} steps before this one to undo")
        update = self._values(saver, head, target)
        self._undo_memory(memory, task, head, target)
        return Command(update=update, goto=self._goto)

    def _give_up(self, task: RunningTask, done: int) -> Command[Any]:
        if self._otherwise is None:
            raise RollbackError(
                f"{task.node} has gone back {done} times in this turn, which is its max_rollbacks; "
                "otherwise=… names a node to go to instead"
            )
        return Command(goto=self._otherwise)

    def _undo_memory(self, memory: MemoryStore, task: RunningTask, head: StoredHead, target: StoredHead) -> None:
        def is_undone(entry: LogEntry) -> bool:
            return (
                target.seq < entry.seq <= head.seq
                and entry.thread_id == task.thread_id
                and pregel.is_within(entry.checkpoint_ns or "", task.graph_ns)
            )

        with memory.storage.snapshot() as reader:
            entries = reader.log(origin={"thread_id": task.thread_id}, after=target.seq, until=head.seq)
            undo = plan_undo(
                reader, filter(is_undone, entries), is_undone,
                claims=memory.claims_of, thread_id=task.thread_id, on_conflict=self._on_conflict,
                origin=Origin(thread_id=task.thread_id, reason="rollback"),
            )  # fmt: skip
        drafts = undo.drafts
        if self._on_conflict != "overwrite":  # others may go on until the step lands
            over = {(namespace, key): version for namespace, key, version in undo.current}
            drafts = [replace(one, over=over[one.address], on_conflict=self._on_conflict) for one in drafts]
        memory.write(drafts)

    # -- the state ----------------------------------------------------------------------------------

    def _values(self, saver: MemStateCheckpointer, head: StoredHead, target: StoredHead) -> dict[str, Any]:
        """The update that puts back every channel that has changed since the target."""
        now = saver.head_of(head)["channel_versions"]
        then, channels = pregel.channels_at(saver, pregel.config_of(target.step))
        changed = {
            name: channel
            for name, channel in channels.items()
            if name not in self._keep and now.get(name) != then.get(name)
        }
        update = dict(self._further(channels))
        values: dict[str, Any] = {name: value for name, value in update.items() if name not in changed}
        for name, channel in changed.items():
            if name in update:
                channel.update([update[name]])
            values[name] = _reset(name, channel)
        return values

    def _further(self, channels: Mapping[str, BaseChannel[Any, Any, Any]]) -> Mapping[str, Any]:
        if not callable(self._update):
            return self._update or {}
        current = pregel.current_channels()
        state = {
            name: held.get()
            for name, channel in channels.items()
            if (held := current[name] if name in self._keep else channel).is_available()
        }
        return self._update(state)


def _reset(name: str, channel: BaseChannel[Any, Any, Any]) -> Any:
    """What a node writes to give a channel the value that this one holds: asked of the kind of channel it is."""
    empty = pregel.emptied(channel)
    value = channel.get() if channel.is_available() else (empty.get() if empty.is_available() else None)
    for write in (Overwrite(value), value):
        probe = pregel.current_channels()[name].copy()
        try:
            probe.update([write])
        except Exception as error:
            raise RollbackError(f"channel {name!r} does not take back {value!r:.200}: {error}") from error
        held = probe.get() if probe.is_available() else None
        if held is value or (not isinstance(held, Overwrite) and _equal(held, value)):
            return write
    raise RollbackError(
        f"channel {name!r} ({type(channel).__name__}) cannot be set to a value, only added to; "
        f"leave it as it is with keep=({name!r},)"
    )


def _equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception:  # such as of arrays, which have no one truth value
        return False


# -- where we are -----------------------------------------------------------------------------------


def _running() -> tuple[RunningTask, MemStateCheckpointer]:
    task = pregel.running_task()
    if task is None:
        raise RollbackError("a RollbackNode is a node: add it to a graph; outside of one, call memory.rollback")
    if not isinstance(task.saver, MemStateCheckpointer):
        raise RollbackError(
            f"{task.node} goes back along the checkpoints of a memory: compile the graph with "
            "checkpointer=memory.checkpointer"
        )
    if not pregel.task_is_saved():
        raise RollbackError(
            f"{task.node}: its subgraph has no checkpoints to go back to; compile it without checkpointer=False"
        )
    if pregel.task_saves_at_exit():
        raise RollbackError(f'{task.node}: durability="exit" saves no steps to go back to; use "sync" or "async"')
    return task, task.saver


def _saved(memory: MemoryStore, task: RunningTask) -> StoredHead:
    """The checkpoint that the running step starts from, once it is saved."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with memory.storage.snapshot() as reader:
            head = next(reader.ancestors(task.thread_id, task.graph_ns, task.checkpoint_id), None)
        if head is not None:
            return head
        if time.monotonic() > deadline:
            raise RollbackError(
                f"{task.node}: checkpoint {task.checkpoint_id} was not saved within {_PATIENCE:.0f} seconds"
            )
        time.sleep(_POLL)


def _rollbacks(saver: MemStateCheckpointer, node: str, chain: Iterator[StoredHead]) -> int:
    """How often a node has run in this turn, by what it had seen at each checkpoint, and what was sent to it."""
    count = 0
    checkpoint = next(chain, None)
    while checkpoint is not None:
        parent = next(chain, None)
        if begins_turn(checkpoint, parent):
            break
        if parent is not None:
            before = saver.head_of(parent)["versions_seen"].get(node, {})
            seen = saver.head_of(checkpoint)["versions_seen"].get(node, {})
            count += seen != before or (pregel.SENDS in parent.manifest and pregel.is_sent_to(saver, parent.step, node))
        checkpoint = parent
    return count

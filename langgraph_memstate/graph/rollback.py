"""Rollback of a thread: an earlier checkpoint becomes its head again, as a new one, and memory goes back with it.

The new checkpoint is a twin of the target: the same values and the same parent. So what comes before it counts as
history, what was undone stays on record beside it, and one more rollback goes further back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from langgraph.checkpoint.base import empty_checkpoint

from langgraph_memstate.errors import RollbackError
from langgraph_memstate.facts import LogEntry
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.moments import find_checkpoint
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.operations import PutCheckpoint
from langgraph_memstate.storage.values import Blob, StepKey, StoredHead
from langgraph_memstate.timeline import metadata_of, rollback_of
from langgraph_memstate.undo import RollbackPlan, RollbackRequest, plan_undo

_ROOT = ""


def plan_thread(reader: Reader, request: RollbackRequest) -> RollbackPlan | None:
    """The commit that rolls a thread back; None where the request is not about a thread's checkpoints.

    Raises:
        RollbackConflict, RollbackError, UnknownMomentError: it cannot be done.
    """
    thread_id = request.thread_id
    if thread_id is None:
        if request.to is None or isinstance(request.to, int):
            return None
        thread_id = find_checkpoint(reader, request.to).step.thread_id
    head = next(reader.ancestors(thread_id, _ROOT, None), None)
    if head is None:
        if request.turns is None and (request.to is None or isinstance(request.to, int)):
            return None
        raise RollbackError(f"thread {thread_id!r} has no checkpoints")
    if isinstance(request.to, int):
        raise RollbackError(f"thread {thread_id!r} goes back to one of its checkpoints, not to a sequence of the log")
    target, steps = _target(reader, head, request)
    to = _before_first(reader, head) if target is None else target.seq

    def is_undone(entry: LogEntry) -> bool:
        return entry.seq > to and entry.thread_id == thread_id

    puts, latest = _subgraphs(reader, thread_id, target)
    new = StepKey(thread_id, _ROOT, pregel.new_checkpoint_id(after=head.step.checkpoint_id))
    puts.append(_twin(new, target, undone=head))
    origin = replace(request.origin, thread_id=thread_id, checkpoint_ns=_ROOT, checkpoint_id=new.checkpoint_id)
    undo = plan_undo(
        reader, reader.log(origin={"thread_id": thread_id}, after=to), is_undone,
        claims=request.claims, thread_id=thread_id, on_conflict=request.on_conflict, origin=origin,
    )  # fmt: skip
    return undo.plan(
        steps, request.claims, head=new, undone=head.step.checkpoint_id, latest=(head.step, *latest), after=tuple(puts)
    )  # fmt: skip


# -- where to ---------------------------------------------------------------------------------------


def _target(reader: Reader, head: StoredHead, request: RollbackRequest) -> tuple[StoredHead | None, int]:
    """The checkpoint to go back to (None: before the first) and how many steps that undoes."""
    chain = reader.ancestors(*head.step)
    if request.to is not None:
        return _named(reader, chain, head, request.to)
    if request.turns is not None:
        return _before_turns(chain, request.turns)
    return step_before(chain, request.steps or 1)


def step_before(chain: Iterator[StoredHead], steps: int) -> tuple[StoredHead | None, int]:
    """The checkpoint `steps` before the first of a chain; None for the one before its last.

    Raises:
        RollbackError: the chain is shorter.
    """
    found = list(islice(chain, steps + 1))
    if len(found) > steps:
        return found[steps], steps
    undoable = len(found) - is_before_first(found[-1]) if found else 0
    if undoable < steps:
        raise RollbackError(f"there are {undoable} steps to undo, not {steps}")
    _check_first(found[-1])
    return None, steps


def is_before_first(checkpoint: StoredHead) -> bool:
    """Whether a checkpoint is the empty state that a rollback of all steps left."""
    rollback = rollback_of(metadata_of(checkpoint))
    return rollback is not None and rollback["source"] is None  # also of a twin of that


def _check_first(checkpoint: StoredHead) -> None:
    if checkpoint.parent_id is not None:
        raise _pruned(checkpoint)


def _pruned(checkpoint: StoredHead) -> RollbackError:
    return RollbackError(f"what came before {checkpoint.step.checkpoint_id} was pruned; there is no going back to it")


def _before_turns(chain: Iterator[StoredHead], turns: int) -> tuple[StoredHead | None, int]:
    undone, steps = 0, 0
    checkpoint = next(chain, None)
    while checkpoint is not None:
        parent = next(chain, None)
        steps += 1
        if begins_turn(checkpoint, parent):
            undone += 1
            if undone == turns:
                if parent is None:
                    _check_first(checkpoint)
                return parent, steps
        checkpoint = parent
    raise RollbackError(f"there are {undone} turns to undo, not {turns}")


def begins_turn(checkpoint: StoredHead, parent: StoredHead | None) -> bool:
    """Whether a checkpoint is a new input, or the end of a run that saved at exit alone, steps after its parent."""
    metadata = metadata_of(checkpoint)
    source = (rollback_of(metadata) or metadata).get("source")
    if source == "loop":
        step = metadata.get("step", 0)
        return parent is None or step > metadata_of(parent).get("step", step) + 1
    return bool(source == "input")


def _named(reader: Reader, chain: Iterator[StoredHead], head: StoredHead, to: Any) -> tuple[StoredHead, int]:
    target = find_checkpoint(reader, to, head.step.thread_id)
    if target.step.checkpoint_ns != _ROOT:
        raise RollbackError(f"{target.step.checkpoint_id} is a checkpoint of a subgraph; name one of the graph itself")
    if target.step == head.step:
        raise RollbackError(f"{target.step.checkpoint_id} is the thread's head already")
    kept = {checkpoint.step for checkpoint in reader.ancestors(*target.step)}
    steps = 0
    for checkpoint in chain:
        if checkpoint.step in kept:
            break
        steps += 1
    return target, steps


def _before_first(reader: Reader, head: StoredHead) -> int:
    """The log's sequence before a thread's first checkpoint.

    Raises:
        RollbackError: that was pruned, and only the twin is left that a rollback made of it.
    """
    *_, first = reader.ancestors(*head.step)
    while (rollback := rollback_of(metadata_of(first))) is not None:
        original = next(reader.ancestors(*first.step[:2], rollback["to"]), None)
        if original is None:
            raise _pruned(first)
        first = original
    thread_id, _, checkpoint_id = first.step
    earlier = reader.checkpoints(  # of subgraphs, in the very run that saved its first checkpoint at exit
        thread_id=thread_id, checkpoint_ns=None, checkpoint_id=None, before=checkpoint_id, limit=-1
    )
    landed = (
        reader.log(origin={"thread_id": thread_id, "checkpoint_id": one.step.checkpoint_id}, limit=1)
        for one in (first, *earlier)
    )
    return min((entry.seq - 1 for entries in landed for entry in entries), default=first.seq)


# -- the state --------------------------------------------------------------------------------------


def _twin(step: StepKey, target: StoredHead | None, *, undone: StoredHead) -> PutCheckpoint:
    """The target's state as a checkpoint of its own, above the one that is undone."""
    original: dict[str, Any] = {"step": -2, "parents": {}} if target is None else metadata_of(target)
    rollback = {
        "from": undone.step.checkpoint_id,
        "to": None if target is None else target.step.checkpoint_id,
        "source": (rollback_of(original) or original).get("source"),
    }
    return PutCheckpoint(
        step=step,
        parent_id=None if target is None else target.parent_id,
        ts=datetime.now(UTC).isoformat(),
        head=_empty_head() if target is None else target.head,
        metadata=json.dumps({**original, "source": "fork", "rollback": rollback}),
        run_id=None,
        manifest={} if target is None else target.manifest,
        values={},
    )


def _subgraphs(reader: Reader, thread_id: str, target: StoredHead | None) -> tuple[list[PutCheckpoint], list[StepKey]]:
    """Twins for subgraphs that keep state from one call to the next, and the checkpoints they go above.

    Others need none: their namespace holds the id of a task, and the tasks after a rollback are new ones.
    """
    puts, latest = [], []
    for ns in filter(pregel.outlives_its_task, reader.checkpoint_namespaces(thread_id)):
        head = next(reader.ancestors(thread_id, ns, None))
        before = None
        if target is not None:
            page = reader.checkpoints(
                thread_id=thread_id, checkpoint_ns=ns, checkpoint_id=None, before=target.step.checkpoint_id, limit=1
            )
            before = page[0] if page else None
        if before is None or before.step != head.step:
            step = StepKey(thread_id, ns, pregel.new_checkpoint_id(after=head.step.checkpoint_id))
            puts.append(_twin(step, before, undone=head))
            latest.append(head.step)
    return puts, latest


def _empty_head() -> Blob:
    head = {name: part for name, part in empty_checkpoint().items() if name not in ("id", "ts", "channel_values")}
    return Blob(*MemStateSerializer().dumps_typed(head))

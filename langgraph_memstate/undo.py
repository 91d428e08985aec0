"""Undo: what memory has to become so that some entries of the log might never have been written.

Nothing is taken out of the log. An undo is a commit of its own, which gives every fact that the undone entries touched
the version it had before them. It notes the sequence it went back to, so that the next one passes over what is undone
already, and it can be undone itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from langgraph_memstate.errors import Conflict, RollbackConflict, RollbackError
from langgraph_memstate.facts import Draft, LogEntry, Namespace, Origin, encode_value, new_version
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.operations import Commit, Expect
from langgraph_memstate.storage.values import StepKey

OnConflict = Literal["raise", "keep", "overwrite"]
Address = tuple[Namespace, str]
_SHOWN = 5  # conflicts that an error's text lists


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What a rollback did.

    `steps` counts undone checkpoints, or commits outside of graphs. Facts are (namespace, key): `restored` have an
    earlier version again, `removed` did not exist before, `kept` were changed by others since and left alone.
    `head` is the thread's new checkpoint and `undone` the one that was its head: ``rollback(to=report.undone)`` takes
    the rollback back. Outside of threads `head` is None and `undone` the log's sequence before it.
    """

    steps: int
    restored: tuple[Address, ...] = ()
    removed: tuple[Address, ...] = ()
    kept: tuple[Address, ...] = ()
    head: str | None = None
    undone: str | int | None = None


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """What is to be undone: `steps`, `turns`, or everything since `to`; see `MemoryStore.rollback`.

    Raises:
        RollbackError: it contradicts itself.
    """

    steps: int | None
    turns: int | None
    to: Any
    thread_id: str | None
    on_conflict: OnConflict
    origin: Origin

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.steps, self.turns, self.to)) > 1:
            raise RollbackError("give one of steps, turns and to")
        for name in ("steps", "turns"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise RollbackError(f"{name}={count!r} is not a number of {name} to undo; 1 is the least")
        if self.on_conflict not in ("raise", "keep", "overwrite"):
            raise RollbackError(f"on_conflict is 'raise', 'keep' or 'overwrite', not {self.on_conflict!r}")


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """One commit that undoes, and what it does."""

    drafts: tuple[Draft, ...]
    before: Commit
    after: Commit
    report: RollbackReport


@dataclass(slots=True)
class Undo:
    """The drafts that undo, what they were prepared from, and what becomes of each fact."""

    drafts: list[Draft] = field(default_factory=list)
    restored: list[Address] = field(default_factory=list)
    removed: list[Address] = field(default_factory=list)
    kept: list[Address] = field(default_factory=list)
    current: list[tuple[Namespace, str, str | None]] = field(default_factory=list)

    @property
    def expected(self) -> Commit:
        """What the drafts were prepared from."""
        return (Expect(tuple(self.current)),) if self.current else ()

    def plan(
        self,
        steps: int,
        *,
        head: StepKey | None = None,
        undone: str | int | None = None,
        latest: tuple[StepKey, ...] = (),
        after: Commit = (),
    ) -> RollbackPlan:
        """The commit, if nothing of what it was prepared from changes."""
        report = RollbackReport(
            steps,
            tuple(self.restored),
            tuple(self.removed),
            tuple(self.kept),
            None if head is None else head.checkpoint_id,
            undone,
        )
        return RollbackPlan(tuple(self.drafts), (Expect(tuple(self.current), latest),), after, report)


def plan_undo(
    reader: Reader,
    entries: Iterable[LogEntry],
    is_undone: Callable[[LogEntry], bool],
    *,
    to: int,
    thread_id: str | None,
    on_conflict: OnConflict,
    origin: Origin,
) -> Undo:
    """What undoes `entries`, of which `is_undone` knows any. `to` is the sequence they go back to.

    Raises:
        RollbackConflict: with ``on_conflict="raise"``, another thread has since changed what would be undone.
    """
    first: dict[Address, int] = {}
    for entry in entries:
        first[entry.address] = min(entry.seq, first.get(entry.address, entry.seq))
    undo, conflicts = Undo(), []
    goals: list[tuple[Address, LogEntry | None]] = []
    for address, seq in first.items():
        theirs, before = _versions(reader, address, seq, is_undone)
        if theirs is not None:
            if theirs.thread_id == thread_id or on_conflict == "keep":
                undo.kept.append(address)
                continue
            ours = next(filter(is_undone, reader.versions(*address)))
            conflicts.append(Conflict(*address, ours.version, theirs.version))
        goals.append((address, before))
    if conflicts and on_conflict == "raise":
        shown = "; ".join(
            f"{'/'.join(namespace)} {key!r} (ours {ours}, theirs {theirs})"
            for namespace, key, ours, theirs in conflicts[:_SHOWN]
        )
        raise RollbackConflict(
            f"{len(conflicts)} of the facts were changed by others since: {shown}. Nothing was undone; "
            "on_conflict='keep' leaves theirs, 'overwrite' takes them back too",
            conflicts,
        )
    for address, before in sorted(goals, key=_age):  # what was written later before is listed as later again
        _add(undo, reader, address, before, to, origin)
    return undo


def _age(goal: tuple[Address, LogEntry | None]) -> int:
    return 0 if goal[1] is None else goal[1].seq


def _versions(
    reader: Reader, address: Address, first: int, is_undone: Callable[[LogEntry], bool]
) -> tuple[LogEntry | None, LogEntry | None]:
    """The entry by which others have replaced what is undone, if any, and the one a fact goes back to."""
    theirs: LogEntry | None = None
    covered = False  # by an undone entry: what others wrote before that is nobody's loss
    for entry in reader.versions(*address):
        if is_undone(entry):
            covered = True
        elif entry.seq < first or (covered and theirs is None):
            return theirs, entry
        elif not covered and theirs is None and not is_expiry(entry):
            theirs = entry
    return theirs, None


def is_expiry(entry: LogEntry) -> bool:
    """Whether a fact was deleted because its time to live was over."""
    return entry.op == "delete" and entry.reason == "ttl" and entry.thread_id is None


def _add(undo: Undo, reader: Reader, address: Address, before: LogEntry | None, to: int, origin: Origin) -> None:
    namespace, key = address
    current = reader.item(namespace, key, now=0.0)
    undo.current.append((namespace, key, None if current is None else current.version))
    now = time.time()
    if before is None or before.value is None:
        if current is not None:
            undo.removed.append(address)
        undo.drafts.append(Draft(new_version(), namespace, key, "delete", None, ts=now, origin=origin, undoes=to))
        return
    undo.restored.append(address)
    undo.drafts.append(
        Draft(
            new_version(), namespace, key, "put", encode_value(before.value),
            type=before.type, index=before.index, ttl=before.ttl, schema=before.schema,
            schema_version=before.schema_version, ts=now, origin=origin, undoes=to,
            created_at=None if before.created_at is None else before.created_at.timestamp(),
        )
    )  # fmt: skip


# -- commits outside of graphs ----------------------------------------------------------------------


def plan_commits(reader: Reader, request: RollbackRequest) -> RollbackPlan:
    """What undoes the last commits that no graph made, or all of them after a sequence.

    Raises:
        RollbackConflict, RollbackError: there are not so many, or others changed what they wrote.
    """
    if request.turns is not None:
        raise RollbackError("turns are of a thread that a graph has run on; give its thread_id, or steps")

    def is_ours(entry: LogEntry) -> bool:
        ours = request.thread_id is None or entry.thread_id == request.thread_id
        return ours and entry.checkpoint_id is None and not is_expiry(entry)

    last, to, steps = reader.last_seq(), request.to, request.steps or 1
    if to is None:
        to = _before_commits(filter(is_ours, reader.log(newest_first=True)), steps)
    elif not isinstance(to, int) or isinstance(to, bool) or not 0 <= to <= last:
        raise RollbackError(f"the log goes from 0 to {last}; {to!r} is not in it")

    def is_undone(entry: LogEntry) -> bool:
        return entry.seq > to and is_ours(entry)

    undone = [entry for entry in reader.log(after=to) if is_undone(entry)]
    undo = plan_undo(
        reader, undone, is_undone,
        to=to, thread_id=request.thread_id, on_conflict=request.on_conflict, origin=request.origin,
    )  # fmt: skip
    if request.to is not None:
        steps = len({entry.commit_id for entry in undone})
    return undo.plan(steps, undone=last)


def _before_commits(newest_first: Iterable[LogEntry], steps: int) -> int:
    """The sequence before the last `steps` commits, passing over those that are undone already."""
    position: int | None = None
    counted = 0
    for entry in newest_first:
        if position is not None and entry.seq > position:
            continue
        if entry.undoes is not None:
            position = entry.undoes
            continue
        counted += 1
        position = entry.commit_id - 1
        if counted == steps:
            return position
    raise RollbackError(f"there are {counted} commits to undo, not {steps}")

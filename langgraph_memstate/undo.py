"""Undo: what memory has to become so that some entries of the log might never have been written.

Nothing is taken out of the log. An undo is a commit of its own, which gives every fact that the undone entries touched
the version it had before them. It notes for each fact the sequence it went back to, so that the next one passes over
what is undone already, and it can be undone itself. A fact's value is the last one that somebody wrote who is not
undone: `FactHistory` finds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from math import inf
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
    is_ours: Callable[[LogEntry], bool],
    *,
    thread_id: str | None,
    on_conflict: OnConflict,
    origin: Origin,
) -> Undo:
    """What undoes `entries`, and with each whatever is ours (`is_ours`) and later in its fact.

    Raises:
        RollbackConflict: with ``on_conflict="raise"``, another thread has since changed what would be undone.
    """
    first: dict[Address, int] = {}
    for entry in entries:
        first[entry.address] = min(entry.seq, first.get(entry.address, entry.seq))
    undo, conflicts = Undo(), []
    goals: list[tuple[Address, LogEntry | None]] = []
    for address, seq in first.items():
        history = FactHistory(reader.versions(*address)).read(seq)
        is_undone = _since(seq, is_ours)
        theirs = history.theirs(is_undone, seq)
        if theirs is not None:
            if _is_kept(theirs, thread_id, on_conflict):
                undo.kept.append(address)
                continue
            ours = next(filter(is_undone, history.versions))
            conflicts.append(Conflict(*address, ours.version, theirs.version))
            is_undone = _since(seq, lambda _: True)
        goals.append((address, history.before(is_undone)))
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
        _add(undo, reader, address, before, first[address] - 1, origin)
    return undo


def _since(seq: int, is_ours: Callable[[LogEntry], bool]) -> Callable[[LogEntry], bool]:
    return lambda entry: entry.seq >= seq and is_ours(entry)


def _is_kept(theirs: LogEntry, thread_id: str | None, on_conflict: OnConflict) -> bool:
    return theirs.thread_id == thread_id or on_conflict == "keep"


def _age(goal: tuple[Address, LogEntry | None]) -> int:
    return 0 if goal[1] is None else goal[1].seq


class FactHistory:
    """The versions of one fact, and which of them stand: those that nobody has undone."""

    def __init__(self, newest_first: Iterable[LogEntry]) -> None:
        self.versions: list[LogEntry] = []
        self._newest_first = iter(newest_first)
        self._entries: list[LogEntry] = []  # the versions, and where they expired
        self._floor: float = inf  # no undo that was read reaches further back
        self._overwriting: set[int] = set()
        self._stands: frozenset[int] = frozenset()

    def read(self, first: int) -> FactHistory:
        """Read back to what the fact was before `first`, and at least twice as far as before."""
        if self._floor < first:
            return self
        enough, known, lowest = 2 * len(self._entries), len(self.versions), self._floor
        self._floor = -inf
        for entry in self._newest_first:
            self._entries.append(entry)
            if is_expiry(entry):
                continue
            self.versions.append(entry)
            if entry.undoes is not None:
                lowest = min(lowest, entry.undoes)
            elif entry.seq < first and entry.seq <= lowest and len(self._entries) >= enough:
                self._floor = entry.seq
                break
        for place in reversed(range(known, len(self.versions))):
            undo = self.versions[place]
            if undo.undoes is not None and self.theirs(partial(_covers, undo), undo.undoes, place + 1) is not None:
                self._overwriting.add(undo.seq)
        self._stands = frozenset(entry.seq for entry in self.standing())
        return self

    def has(self, entry: LogEntry) -> bool:
        """Whether an entry stands."""
        return entry.seq in self.read(entry.seq)._stands

    def standing(self, is_undone: Callable[[LogEntry], bool] = lambda _: False, start: int = 0) -> Iterator[LogEntry]:
        """What stands of the versions from `start` on, newest first, if those `is_undone` had never been written."""
        undos: list[LogEntry] = []
        for entry in islice(self.versions, start, None):
            if is_undone(entry) or any(self._takes_back(undo, entry) for undo in undos):
                continue
            if entry.undoes is None:
                yield entry
            else:
                undos.append(entry)

    def theirs(self, is_ours: Callable[[LogEntry], bool], first: int, start: int = 0) -> LogEntry | None:
        """The version by which others have replaced what is ours since `first`, as of the version at `start`."""
        if start == len(self.versions) or is_ours(self.versions[start]):
            return None
        latest = next(self.standing(start=start), None)  # where others have undone their own, that may be ours again
        return None if latest is None or latest.seq <= first or is_ours(latest) else latest

    def before(self, is_undone: Callable[[LogEntry], bool]) -> LogEntry | None:
        """The version that a fact goes back to; None where that had expired before it was replaced."""
        goal = next(self.standing(is_undone), None)
        if goal is None or goal.ttl is None:
            return goal
        latest = next(entry for entry in self.versions if not is_undone(entry))
        held = latest if latest.value == goal.value else goal  # an undo that brought it back gave it a life of its own
        after = next((entry for entry in self._entries if entry.supersedes == held.version), None)
        return None if after is not None and _begins_anew(after, held) else goal

    def _takes_back(self, undo: LogEntry, entry: LogEntry) -> bool:
        return _covers(undo, entry) or (_reaches(undo, entry) and undo.seq in self._overwriting)


def _reaches(undo: LogEntry, entry: LogEntry) -> bool:
    return undo.undoes is not None and undo.undoes < entry.seq < undo.commit_id


def _covers(undo: LogEntry, entry: LogEntry) -> bool:
    """Whether an undo was to take back an entry of the same fact, whoever has written it over since.

    One that came with a checkpoint undoes what its thread wrote, any other what no graph wrote: of its thread, if it
    names one.
    """
    if not _reaches(undo, entry):
        return False
    if undo.checkpoint_id is None and (entry.checkpoint_id is not None or undo.thread_id is None):
        return entry.checkpoint_id is None
    return undo.thread_id == entry.thread_id


def _begins_anew(entry: LogEntry, held: LogEntry) -> bool:
    """Whether what was held had expired when the next version came. Its age cannot say: reads prolong a life."""
    return is_expiry(entry) or (entry.op == "put" and entry.undoes is None and entry.created_at != held.created_at)


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

    last, to = reader.last_seq(), request.to
    if to is None:
        undone = _last_commits(reader, request, is_ours)
        steps = request.steps or 1
    elif isinstance(to, int) and not isinstance(to, bool) and 0 <= to <= last:
        undone = list(filter(is_ours, reader.log(after=to)))
        steps = len({entry.commit_id for entry in undone})
    else:
        raise RollbackError(f"the log goes from 0 to {last}; {to!r} is not in it")
    undo = plan_undo(
        reader, undone, is_ours,
        thread_id=request.thread_id, on_conflict=request.on_conflict, origin=request.origin,
    )  # fmt: skip
    return undo.plan(steps, undone=last)


def _last_commits(reader: Reader, request: RollbackRequest, is_ours: Callable[[LogEntry], bool]) -> list[LogEntry]:
    """What stands of the last commits: as many as asked for, those not counted of which nothing would be undone."""
    steps = request.steps or 1
    histories: dict[Address, FactHistory] = {}
    found: list[LogEntry] = []
    counted = 0
    newest_first = filter(is_ours, reader.log(newest_first=True))
    for _, commit in groupby(newest_first, key=lambda entry: entry.commit_id):
        goes_back = False
        for entry in commit:
            if entry.undoes is not None:
                continue
            if entry.address not in histories:
                histories[entry.address] = FactHistory(reader.versions(*entry.address))
            history = histories[entry.address]
            if not history.has(entry):
                continue
            found.append(entry)
            theirs = history.theirs(is_ours, entry.seq)
            goes_back |= theirs is None or not _is_kept(theirs, request.thread_id, request.on_conflict)
        counted += goes_back
        if counted == steps:
            return found
    kept = len({entry.commit_id for entry in found}) - counted
    others = f"; of {kept} more, others have since changed every fact" if kept else ""
    raise RollbackError(f"there are {counted} commits to undo, not {steps}{others}")

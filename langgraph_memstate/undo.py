"""Undo: what memory has to become so that some entries of the log might never have been written.

Nothing is taken out of the log. An undo is a commit of its own, which gives every fact that the undone entries touched
the version it had before them. It notes for each fact the sequence it went back to, so that the next one passes over
what is undone already, and it can be undone itself. A fact's value is the last one that somebody wrote who is not
undone: `FactHistory` finds it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NoReturn

from langgraph_memstate.errors import Conflict, RollbackConflict, RollbackError
from langgraph_memstate.facts import NOWHERE, Draft, LogEntry, Namespace, Origin, encode_value, new_version
from langgraph_memstate.standing import FactHistory, is_expiry
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.checks import is_same
from langgraph_memstate.storage.operations import CheckUnique, Commit, Expect
from langgraph_memstate.storage.values import Claim, StepKey

OnConflict = Literal["raise", "keep", "overwrite"]
Address = tuple[Namespace, str]
ClaimsOf = Callable[[Draft], Iterable[Claim]]
"""What a fact must have for itself, once a draft brings it back."""

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
    claims: ClaimsOf

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
        claims: ClaimsOf,
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
        checks = unrivalled(self.drafts, claims)
        return RollbackPlan(tuple(self.drafts), (Expect(tuple(self.current), latest),), (*checks, *after), report)


def plan_undo(
    reader: Reader,
    entries: Iterable[LogEntry],
    is_ours: Callable[[LogEntry], bool],
    *,
    claims: ClaimsOf,
    thread_id: str | None,
    on_conflict: OnConflict,
    origin: Origin,
) -> Undo:
    """What undoes `entries`, and with each whatever is ours (`is_ours`) and later in its fact.

    Raises:
        RollbackConflict: with ``on_conflict="raise"``, others have since changed what would be undone, or another
            fact holds a value that is to be one fact's alone.
    """
    first: dict[Address, int] = {}
    for entry in entries:
        first[entry.address] = min(entry.seq, first.get(entry.address, entry.seq))
    undo, conflicts = Undo(), []
    goals: dict[Address, LogEntry | None] = {}
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
        goals[address] = history.before(is_undone)
    taken = _give_way(reader, undo, goals, first, claims, on_conflict)
    if on_conflict == "raise" and (conflicts or taken):
        _refuse(conflicts, taken)
    for address, before in sorted(goals.items(), key=_age):  # what was written later before is listed as later again
        _add(undo, reader, address, before, first[address] - 1, origin)
    return undo


def unrivalled(drafts: Iterable[Draft], claims: ClaimsOf) -> list[CheckUnique]:
    """The checks after an undo: a rival that it did not know of has it planned anew."""
    return [CheckUnique(draft, claim, replaces=True) for draft in drafts for claim in claims(draft)]


def _refuse(changed: list[Conflict], taken: list[Conflict]) -> NoReturn:
    conflicts = changed + taken
    shown = "; ".join(
        f"{'/'.join(namespace)} {key!r} (ours {ours}, theirs {theirs})"
        for namespace, key, ours, theirs in conflicts[:_SHOWN]
    )
    or_taken = ", or another fact has taken their value" if taken else ""
    raise RollbackConflict(
        f"{len(conflicts)} of the facts were changed by others since{or_taken}: {shown}. Nothing was undone; "
        "on_conflict='keep' leaves theirs, 'overwrite' takes them back too",
        conflicts,
    )


def _give_way(
    reader: Reader,
    undo: Undo,
    goals: dict[Address, LogEntry | None],
    first: dict[Address, int],
    claims: ClaimsOf,
    on_conflict: OnConflict,
) -> list[Conflict]:
    """Change what facts go back to until no two of them claim the same: conflicts, where that is not to be decided."""
    while rivals := _rivals(reader, goals, claims):
        if on_conflict == "raise":
            return [
                Conflict(*address, *(next(reader.versions(*one)).version for one in (address, rival)))
                for address, rival in rivals
            ]
        known = frozenset(goals)
        for address, rival in rivals:
            if goals.get(address) is None:
                continue  # it has given way to another rival
            if on_conflict == "keep":
                del goals[address]
                undo.kept.append(address)
            elif rival in known:
                goals[rival] = None
            elif rival not in goals:
                history = FactHistory(reader.versions(*rival)).read(0)
                first[rival] = next(history.standing(), history.versions[0]).seq
                goals[rival] = history.before(_since(first[rival], lambda _: True))
    return []


def _rivals(
    reader: Reader, goals: Mapping[Address, LogEntry | None], claims: ClaimsOf
) -> list[tuple[Address, Address]]:
    """The facts whose goals claim what another fact will hold, each with that one."""
    claimed: defaultdict[Claim, list[Draft]] = defaultdict(list)
    for goal in sorted(goals.items(), key=_age, reverse=True):
        draft = _draft(*goal)
        for claim in claims(draft):
            claimed[claim].append(draft)
    now = time.time()
    found: dict[tuple[Address, Address], None] = {}
    for claim, claimants in claimed.items():
        others = [(record.namespace, record.key) for record in reader.holders(claim, now)]
        holders = [one for one in others if one not in goals] + [draft.address for draft in claimants]
        for draft in claimants:
            found |= dict.fromkeys((draft.address, holder) for holder in holders if not is_same(*holder, draft))
    return list(found)


def _since(seq: int, is_ours: Callable[[LogEntry], bool]) -> Callable[[LogEntry], bool]:
    return lambda entry: entry.seq >= seq and is_ours(entry)


def _is_kept(theirs: LogEntry, thread_id: str | None, on_conflict: OnConflict) -> bool:
    return theirs.thread_id == thread_id or on_conflict == "keep"


def _age(goal: tuple[Address, LogEntry | None]) -> int:
    return 0 if goal[1] is None else goal[1].seq


def _add(undo: Undo, reader: Reader, address: Address, before: LogEntry | None, to: int, origin: Origin) -> None:
    current = reader.item(*address, now=0.0)
    undo.current.append((*address, None if current is None else current.version))
    draft = _draft(address, before, to, origin)
    if draft.value is not None:
        undo.restored.append(address)
    elif current is not None:
        undo.removed.append(address)
    undo.drafts.append(draft)


def _draft(address: Address, before: LogEntry | None, to: int = 0, origin: Origin = NOWHERE) -> Draft:
    """The write that brings a version back, or none."""
    if before is None or before.value is None:
        return Draft(new_version(), *address, "delete", None, origin=origin, undoes=to)
    return Draft(
        new_version(), *address, "put", encode_value(before.value),
        type=before.type, index=before.index, ttl=before.ttl, schema=before.schema,
        schema_version=before.schema_version, origin=origin, undoes=to,
        created_at=None if before.created_at is None else before.created_at.timestamp(),
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
        reader, undone, is_ours, claims=request.claims,
        thread_id=request.thread_id, on_conflict=request.on_conflict, origin=request.origin,
    )  # fmt: skip
    return undo.plan(steps, request.claims, undone=last)


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

"""What stands of a fact's versions: its value is the last one that somebody wrote who is not undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from math import inf

from langgraph_memstate.facts import LogEntry


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

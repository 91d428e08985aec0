"""Timing contenders side by side: in turns, in one process, on one disk, so that a busy machine slows all of them."""

from __future__ import annotations

import asyncio
import operator
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Sample = Callable[[int], float]
"""Runs an operation so many times; seconds each."""


@dataclass(frozen=True)
class Contender:
    name: str
    journal: str
    sample: Sample


@dataclass(frozen=True)
class Row:
    """What one contender showed. Times are seconds an operation; `low` and `high` are their quartiles."""

    case: str
    what: str
    contender: str
    journal: str = ""
    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    """ours ÷ this contender's, round by round, median: below 1 we are faster"""
    notes: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """One run of the benchmarks: where its files are, and how much patience it has."""

    folder: Path
    quick: bool = False
    large: bool = False
    most_rounds: int | None = None

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def rounds(self, wanted: int) -> int:
        return wanted if self.most_rounds is None else min(wanted, self.most_rounds)

    def room(self, name: str) -> Path:
        """An empty folder for one case."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder

    def tell(self, text: str) -> None:
        """Show what is being measured, where somebody is watching."""
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def race(
    session: Session, case: str, what: str, ours: Contender, peers: Sequence[Contender], *, rounds: int, calls: int
) -> list[Row]:
    """Sample all contenders in turns: a row each."""
    contenders = [ours, *peers]
    return rows_of(case, what, contenders, in_turns(session, f"{case}: {what}", contenders, rounds=rounds, calls=calls))


def in_turns(
    session: Session, telling: str, contenders: Sequence[Contender], *, rounds: int, calls: int
) -> list[list[float]]:
    """Samples by contender, round by round, in the opposite order every other round. The first does not count."""
    seconds: list[list[float]] = [[] for _ in contenders]
    rounds = session.rounds(rounds)
    for turn in range(rounds + 1):
        session.tell(f"{telling} {turn}/{rounds}")
        order = range(len(contenders)) if turn % 2 else reversed(range(len(contenders)))
        for place in order:
            took = contenders[place].sample(calls)
            if turn:
                seconds[place].append(took)
    session.tell("")
    return seconds


def rows_of(case: str, what: str, contenders: Sequence[Contender], seconds: Sequence[Sequence[float]]) -> list[Row]:
    """Rows of samples taken in turns, beside the first contender."""
    rows = []
    for place, (contender, taken) in enumerate(zip(contenders, seconds, strict=True)):
        low, median, high = quartiles(taken)
        ratio = statistics.median(map(operator.truediv, seconds[0], taken)) if place else None
        rows.append(Row(case, what, contender.name, contender.journal, median, low, high, ratio))
    return rows


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    values = list(values)
    low, median, high = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")
    return low, median, high


def timed(call: Callable[[], object]) -> Sample:
    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return sample


def timed_async(runner: asyncio.Runner, call: Callable[[], Awaitable[object]]) -> Sample:
    """The same for an awaited call; entering the event loop is not part of the time."""

    async def loop(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            await call()
        return (time.perf_counter() - start) / calls

    return lambda calls: runner.run(loop(calls))

"""Eight threads, eight tasks and eight processes on one file: cycles of put, put_writes and get_tuple."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.benchmarks.bare import bare
from tests.benchmarks.crowding import Tally, acycles, cycles, latencies
from tests.benchmarks.measure import Row, Session, quartiles
from tests.benchmarks.peers import Peer, ours, upstream, upstream_async

CASE = "crowd"
CALLERS = 8
ROOT = Path(__file__).parents[2]
PROCESSES = {"ours": "a MemStateCheckpointer each", "upstream": "a SqliteSaver each"}

Child = subprocess.Popen[str]

Sitting = Callable[[Sequence[str], int], tuple[float, Tally]]
"""All callers at once, on a LangGraph thread each, so many cycles each: seconds from start to end, and how it went"""


@dataclass
class Crowd:
    """One contender, and what it showed."""

    name: str
    sit: Sitting
    cycle: list[float] = field(default_factory=list)
    """seconds from start to end ÷ cycles that succeeded, by round"""
    tallies: list[Tally] = field(default_factory=list)

    def sample(self, threads: Sequence[str], count: int) -> None:
        took, tally = self.sit(threads, count)
        self.cycle.append(took / max(len(tally.seconds), 1))
        self.tallies.append(tally)


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds = session.pick(7, 2)
    rows = []
    with asyncio.Runner() as runner, ExitStack() as stack:
        plain = [stack.enter_context(peer) for peer in (ours(folder / "ours"), upstream(folder / "upstream"))]
        awaited = [
            stack.enter_context(peer)
            for peer in (ours(folder / "ours-async"), upstream_async(folder / "upstream-async", runner))
        ]
        least = stack.enter_context(bare(folder / "bare.db"))
        for shared in (False, True):
            whose = "on one thread_id" if shared else "a thread_id each"
            crowds = [Crowd(f"one {peer.saver_name}", in_threads(peer.saver)) for peer in plain]
            crowds.append(Crowd("one BareSaver", in_threads(least)))
            rows += race_crowds(session, f"{CALLERS} threads, {whose}", crowds, shared, rounds, session.pick(60, 15))
            crowds = [Crowd(f"one {peer.saver_name}", _in_tasks(peer, runner)) for peer in awaited]
            rows += race_crowds(session, f"{CALLERS} tasks, {whose}", crowds, shared, rounds, session.pick(60, 15))
    with ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in range(CALLERS)]
        for child in processes:
            _heard(child)
        rows += _openings(session, folder, processes)
        sittings = {name: _in_processes(folder, whose, processes) for whose, name in PROCESSES.items()}
        for shared in (False, True):
            whose = "on one thread_id" if shared else "a thread_id each"
            crowds = [Crowd(name, sit) for name, sit in sittings.items()]
            rows += race_crowds(session, f"{CALLERS} processes, {whose}", crowds, shared, rounds, session.pick(60, 15))
    return rows


def race_crowds(
    session: Session,
    what: str,
    crowds: list[Crowd],
    shared: bool,
    rounds: int,
    count: int,
    *,
    case: str = CASE,
    journal: str = "WAL",
    callers: int = CALLERS,
) -> list[Row]:
    """In turns, in the opposite order every other round."""
    rounds = session.rounds(rounds)
    for turn in range(rounds):
        session.tell(f"{case}: {what} {turn}/{rounds}")
        for crowd in reversed(crowds) if turn % 2 else crowds:
            threads = [uuid4().hex] * callers if shared else [uuid4().hex for _ in range(callers)]
            crowd.sample(threads, count)
    session.tell("")
    return [replace(_row(what, crowds[0], crowd), case=case, journal=journal) for crowd in crowds]


def _row(what: str, first: Crowd, crowd: Crowd) -> Row:
    tally = Tally.of(crowd.tallies)
    low, median, high = quartiles(crowd.cycle)
    paired = [mine / theirs for mine, theirs in zip(first.cycle, crowd.cycle, strict=True)]
    notes: dict[str, float | str] = {"cycles/s": 1 / median}
    if tally.seconds:
        notes |= latencies(tally.seconds)
    notes["errors"] = tally.shown_errors
    ratio = None if crowd is first else statistics.median(paired)
    return Row(CASE, what, crowd.name, "WAL", median, low, high, ratio, notes)


def in_threads(saver: Any) -> Sitting:
    def sit(threads: Sequence[str], count: int) -> tuple[float, Tally]:
        start = time.perf_counter()
        with ThreadPoolExecutor(CALLERS) as pool:
            tallies = list(pool.map(lambda thread: cycles(saver, thread, count), threads))
        return time.perf_counter() - start, Tally.of(tallies)

    return sit


def _in_tasks(peer: Peer, runner: asyncio.Runner) -> Sitting:
    async def gather(threads: Sequence[str], count: int) -> list[Tally]:
        return await asyncio.gather(*(acycles(peer.saver, thread, count) for thread in threads))

    def sit(threads: Sequence[str], count: int) -> tuple[float, Tally]:
        start = time.perf_counter()
        tallies = runner.run(gather(threads, count))
        return time.perf_counter() - start, Tally.of(tallies)

    return sit


# -- processes --------------------------------------------------------------------------------------


@contextmanager
def _process() -> Iterator[Child]:
    command = [sys.executable, "-m", "tests.benchmarks.crowded"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield child  # whose end of input is its end


def _heard(child: Child) -> str:
    assert child.stdout is not None
    said = child.stdout.readline()
    assert said, "a process of the crowd has died"
    return said


def _ask(children: Iterable[Child], questions: Iterable[Sequence[object]]) -> Tally:
    """All at once; returns when all have answered."""
    asked = []
    for child, question in zip(children, questions, strict=True):
        assert child.stdin is not None
        child.stdin.write(json.dumps(question) + "\n")
        child.stdin.flush()
        asked.append(child)
    return Tally.of(Tally(**json.loads(_heard(child))) for child in asked)


def _in_processes(folder: Path, whose: str, processes: Sequence[Child]) -> Sitting:
    path = str(folder / f"{whose}-processes.db")
    for child in processes:  # one after the other
        opened = _ask([child], [("open", whose, path)])
        assert opened.seconds, opened.shown_errors

    def sit(threads: Sequence[str], count: int) -> tuple[float, Tally]:
        start = time.perf_counter()
        tally = _ask(processes, [("cycles", whose, thread, count) for thread in threads])
        return time.perf_counter() - start, tally

    return sit


def _openings(session: Session, folder: Path, processes: Sequence[Child]) -> Iterator[Row]:
    """All processes at once open a file that is not there yet."""
    what = f"{CALLERS} processes open a new file"
    tallies: dict[str, list[Tally]] = {whose: [] for whose in PROCESSES}
    for turn in range(session.rounds(session.pick(12, 3))):
        session.tell(f"{CASE}: {what} {turn}")
        for whose in reversed(PROCESSES) if turn % 2 else PROCESSES:
            path = str(folder / f"{whose}-{turn}.db")
            tallies[whose].append(_ask(processes, [("open", whose, path)] * CALLERS))
    session.tell("")
    first = Tally.of(tallies["ours"]).seconds
    for whose, name in PROCESSES.items():
        tally = Tally.of(tallies[whose])
        low, median, high = quartiles(tally.seconds)
        ratio = None if whose == "ours" else statistics.median(first) / median
        notes = {**latencies(tally.seconds), "errors": tally.shown_errors}
        yield Row(CASE, what, name, "WAL", median, low, high, ratio, notes)

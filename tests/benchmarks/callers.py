"""One caller and sixteen on one file: commits a second, and how many transactions a commit takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from uuid import uuid4

from tests.benchmarks.counting import Ledger
from tests.benchmarks.measure import Contender, Row, Sample, Session, race
from tests.benchmarks.peers import Peer, ours, upstream, upstream_async
from tests.benchmarks.work import checkpoint_chain

CASE = "callers"
MANY = 16
COUNTED = 160  # commits, of which the transactions are counted


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds = session.pick(30, 10)
    rows = []
    with asyncio.Runner() as runner:
        per_commit = _transactions_per_commit(folder / "counted", runner)
        with _both_faces(folder / "timed", runner) as faces:
            for callers in (1, MANY):
                calls = session.pick(320, 96) if callers == MANY else session.pick(40, 20)
                for face, peers in enumerate(faces):
                    first, *others = [
                        Contender(peer.saver_name, peer.saver_journal, _puts(peer, face, callers, runner))
                        for peer in peers
                    ]
                    what = f"{'aput' if face else 'put'}, {callers} {'task' if face else 'thread'}{'s' * (callers > 1)}"
                    raced = race(session, CASE, what, first, others, rounds=rounds, calls=calls)
                    shares = per_commit[face, callers]
                    rows += [_with_rate(row, share) for row, share in zip(raced, shares, strict=True)]
    return rows


def _with_rate(row: Row, transactions: float) -> Row:
    assert row.median is not None
    return replace(row, notes={"commits/s": 1 / row.median, "transactions per commit": transactions})


@contextmanager
def _both_faces(folder: Path, runner: asyncio.Runner) -> Iterator[tuple[list[Peer], list[Peer]]]:
    """The sync contenders and the async ones."""
    folder.mkdir()
    with ExitStack() as stack:
        plain = [ours(folder / "ours"), upstream(folder / "upstream")]
        awaited = [ours(folder / "ours-async"), upstream_async(folder / "upstream-async", runner)]
        yield [stack.enter_context(peer) for peer in plain], [stack.enter_context(peer) for peer in awaited]


def _transactions_per_commit(folder: Path, runner: asyncio.Runner) -> dict[tuple[int, int], list[float]]:
    """By face and number of callers, for each contender. On files of their own, since tracing takes time."""
    found: dict[tuple[int, int], list[float]] = {}
    with Ledger() as ledger, _both_faces(folder, runner) as faces:
        for callers in (1, MANY):
            for face, peers in enumerate(faces):
                shares = found[face, callers] = []
                for peer in peers:
                    before = ledger.writes
                    _puts(peer, face, callers, runner)(COUNTED)
                    shares.append((ledger.writes - before) / COUNTED)
    return found


def _puts(peer: Peer, face: int, callers: int, runner: asyncio.Runner) -> Sample:
    """Put so many checkpoints, shared out among callers that have a LangGraph thread each."""
    chains = [checkpoint_chain(uuid4().hex) for _ in range(callers)]

    def thread(chain: Iterator[tuple[object, ...]], count: int) -> None:
        for arguments in islice(chain, count):
            peer.saver.put(*arguments)

    async def task(chain: Iterator[tuple[object, ...]], count: int) -> None:
        for arguments in islice(chain, count):
            await peer.saver.aput(*arguments)

    async def tasks(count: int) -> None:
        await asyncio.gather(*(task(chain, count) for chain in chains))

    def sample(commits: int) -> float:
        start = time.perf_counter()
        if face:
            runner.run(tasks(commits // callers))
        else:
            with ThreadPoolExecutor(callers) as pool:
                list(pool.map(thread, chains, [commits // callers] * callers))
        return (time.perf_counter() - start) / commits

    return sample

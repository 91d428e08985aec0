"""One caller and sixteen on one file: commits a second, and how many transactions a commit takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.benchmarks.counting import Ledger
from tests.benchmarks.measure import Contender, Row, Sample, Session, race
from tests.benchmarks.peers import Peer, ours, upstream, upstream_async
from tests.benchmarks.work import SENTENCE, checkpoint_chain

CASE = "callers"
MANY = 16
COUNTED = 160  # commits, of which the transactions are counted

Arguments = Iterable[tuple[Any, ...]]
Work = Callable[[Peer, int, int, asyncio.Runner], Contender]


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds = session.pick(30, 10)
    rows = []
    with asyncio.Runner() as runner:
        per_commit = _transactions_per_commit(folder / "counted", runner)
        with _both_faces(folder / "timed", runner) as faces:
            for work, callers in MEASURED:
                calls = session.pick(320, 96) if callers == MANY else session.pick(40, 20)
                for face, peers in enumerate(faces):
                    first, *others = [work(peer, face, callers, runner) for peer in peers]
                    put = f"{'store ' * (work is _store_puts)}{'aput' if face else 'put'}"
                    what = f"{put}, {callers} {'task' if face else 'thread'}{'s' * (callers > 1)}"
                    raced = race(session, CASE, what, first, others, rounds=rounds, calls=calls)
                    shares = per_commit[work, callers, face]
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


def _transactions_per_commit(folder: Path, runner: asyncio.Runner) -> dict[tuple[Work, int, int], list[float]]:
    """By work, number of callers and face, for each contender. On files of their own, since tracing takes time."""
    found: dict[tuple[Work, int, int], list[float]] = {}
    with Ledger() as ledger, _both_faces(folder, runner) as faces:
        for work, callers in MEASURED:
            for face, peers in enumerate(faces):
                shares = found[work, callers, face] = []
                for peer in peers:
                    before = ledger.writes
                    work(peer, face, callers, runner).sample(COUNTED)
                    shares.append((ledger.writes - before) / COUNTED)
    return found


def _puts(peer: Peer, face: int, callers: int, runner: asyncio.Runner) -> Contender:
    """Puts of checkpoints by callers that have a LangGraph thread each."""
    chains = [checkpoint_chain(uuid4().hex) for _ in range(callers)]

    def shares(count: int) -> list[Arguments]:
        return [islice(chain, count) for chain in chains]

    put = peer.saver.aput if face else peer.saver.put
    return Contender(peer.saver_name, peer.saver_journal, _shared_out(put, shares, face, callers, runner))


def _store_puts(peer: Peer, face: int, callers: int, runner: asyncio.Runner) -> Contender:
    """Puts of items by callers that share a namespace."""

    def shares(count: int) -> list[Arguments]:
        """Made ahead: uuid4 gives up the interpreter's lock, and a caller would wait to have it back."""
        return [[(("written", "one"), uuid4().hex, {"text": SENTENCE}) for _ in range(count)] for _ in range(callers)]

    put = peer.store.aput if face else peer.store.put
    return Contender(peer.store_name, peer.store_journal, _shared_out(put, shares, face, callers, runner))


def _shared_out(
    put: Callable[..., Any], shares: Callable[[int], list[Arguments]], face: int, callers: int, runner: asyncio.Runner
) -> Sample:
    """So many puts, shared out among threads or, awaited, among tasks."""

    def thread(share: Arguments) -> None:
        for arguments in share:
            put(*arguments)

    async def task(share: Arguments) -> None:
        for arguments in share:
            await put(*arguments)

    async def tasks(shared: list[Arguments]) -> None:
        await asyncio.gather(*map(task, shared))

    def sample(commits: int) -> float:
        shared = shares(commits // callers)
        start = time.perf_counter()
        if face:
            runner.run(tasks(shared))
        else:
            with ThreadPoolExecutor(callers) as pool:
                list(pool.map(thread, shared))
        return (time.perf_counter() - start) / commits

    return sample


MEASURED: tuple[tuple[Work, int], ...] = ((_puts, 1), (_puts, MANY), (_store_puts, MANY))

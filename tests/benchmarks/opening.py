"""Opening a database that holds facts and a long thread, until the first item and the latest checkpoint are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

from langgraph.store.base import PutOp

from tests.benchmarks.measure import Contender, Row, Session, race
from tests.benchmarks.peers import Peer, ours, upstream
from tests.benchmarks.work import checkpoint_chain, items

CASE = "opening"
THREAD = "long"
_BATCH = 1_000

Opener = Callable[[Path], AbstractContextManager[Peer]]

OPENERS: dict[str, Opener] = {"ours": ours, "upstream": upstream}


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds, steps = session.pick(40, 10), session.pick(1_000, 200)
    rows = []
    for facts in (1_000, 10_000) if session.quick else (10_000, 100_000):
        contenders = []
        for name, opener in OPENERS.items():
            session.tell(f"{CASE}: {facts:,} for {name}")
            place = folder / f"{name}-{facts}"
            with opener(place) as peer:
                fill(peer, facts, steps)
                contenders.append(Contender(peer.name, peer.journal, _opened(opener, place)))
        first, *others = contenders
        what = f"{facts:,} facts, a thread of {steps:,} steps"
        rows += race(session, CASE, what, first, others, rounds=rounds, calls=1)
    return rows


def fill(peer: Peer, facts: int, steps: int) -> None:
    written = [PutOp(*item) for item in items(facts, users=facts // 20)]
    for start in range(0, facts, _BATCH):
        peer.store.batch(written[start : start + _BATCH])
    for arguments in islice(checkpoint_chain(THREAD), steps):
        peer.saver.put(*arguments)


def _opened(opener: Opener, place: Path) -> Callable[[int], float]:
    """Closing is not part of the time."""

    def sample(calls: int) -> float:
        took = 0.0
        for _ in range(calls):
            start = time.perf_counter()
            with opener(place) as peer:
                found = peer.saver.get_tuple({"configurable": {"thread_id": THREAD, "checkpoint_ns": ""}})
                item = peer.store.get(("users", "u7"), "item-7")
                took += time.perf_counter() - start
            assert found is not None
            assert item is not None
        return took / calls

    return sample

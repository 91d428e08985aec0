"""A whole run of a three-node graph whose nodes write one memory each."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

from tests.benchmarks.measure import Contender, Row, Sample, Session, race, timed, timed_async
from tests.benchmarks.peers import Peer, ours, upstream, upstream_async
from tests.benchmarks.work import new_run, three_nodes

CASE = "steps"


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds, calls = session.pick(40, 12), session.pick(4, 2)
    rows = []
    with asyncio.Runner() as runner, ExitStack() as stack:
        plain = [
            stack.enter_context(peer)
            for peer in (ours(folder / "ours"), upstream(folder / "delete"), upstream(folder / "wal", wal=True))
        ]
        awaited = [
            stack.enter_context(peer)
            for peer in (
                ours(folder / "ours-async"),
                upstream_async(folder / "delete-async", runner),
                upstream_async(folder / "wal-async", runner, wal=True),
            )
        ]
        for durability in ("sync", "async", "exit"):
            first, *others = [_invoked(peer, durability) for peer in plain]
            rows += race(session, CASE, f"invoke, {durability}", first, others, rounds=rounds, calls=calls)
            first, *others = [_awaited(peer, durability, runner) for peer in awaited]
            rows += race(session, CASE, f"ainvoke, {durability}", first, others, rounds=rounds, calls=calls)
    return rows


def _invoked(peer: Peer, durability: Any) -> Contender:
    graph = three_nodes(peer.saver, peer.store, awaited=False)
    return _contender(peer, timed(lambda: graph.invoke(*new_run(), durability=durability)))


def _awaited(peer: Peer, durability: Any, runner: asyncio.Runner) -> Contender:
    graph = three_nodes(peer.saver, peer.store, awaited=True)
    return _contender(peer, timed_async(runner, lambda: graph.ainvoke(*new_run(), durability=durability)))


def _contender(peer: Peer, sample: Sample) -> Contender:
    return Contender(peer.name, peer.journal, sample)

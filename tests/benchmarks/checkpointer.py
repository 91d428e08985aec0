"""The checkpointer without a graph: `put`, `put_writes` and `get_tuple` of small checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

from tests.benchmarks.measure import Contender, Row, Session, race, timed, timed_async
from tests.benchmarks.peers import Peer, ours, upstream, upstream_async
from tests.benchmarks.work import checkpoint_chain, pending_writes

CASE = "checkpointer"
HISTORY = 20  # checkpoints of the thread that is read


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds, calls = session.pick(60, 20), session.pick(50, 25)
    rows = []
    with asyncio.Runner() as runner, ExitStack() as stack:
        plain = [stack.enter_context(peer) for peer in (ours(folder / "ours"), upstream(folder / "upstream"))]
        awaited = [
            stack.enter_context(peer)
            for peer in (ours(folder / "ours-async"), upstream_async(folder / "upstream-async", runner))
        ]
        for name, work in {"put": _put, "put_writes": _put_writes, "get_tuple": _get_tuple}.items():
            first, *others = [_contender(peer, timed(work(peer.saver, runner, ""))) for peer in plain]
            rows += race(session, CASE, name, first, others, rounds=rounds, calls=calls)
            first, *others = [_contender(peer, timed_async(runner, work(peer.saver, runner, "a"))) for peer in awaited]
            rows += race(session, CASE, f"a{name}", first, others, rounds=rounds, calls=calls)
    return rows


def _contender(peer: Peer, sample: Any) -> Contender:
    return Contender(peer.saver_name, peer.saver_journal, sample)


def _put(saver: Any, runner: asyncio.Runner, face: str) -> Callable[[], Any]:
    chain = checkpoint_chain(uuid4().hex)
    put = getattr(saver, f"{face}put")
    return lambda: put(*next(chain))


def _put_writes(saver: Any, runner: asyncio.Runner, face: str) -> Callable[[], Any]:
    writes = pending_writes(_thread(saver, runner, face, 1))
    put_writes = getattr(saver, f"{face}put_writes")
    return lambda: put_writes(*next(writes))


def _get_tuple(saver: Any, runner: asyncio.Runner, face: str) -> Callable[[], Any]:
    """The latest checkpoint of a thread, with the writes of one task."""
    config = _thread(saver, runner, face, HISTORY)
    written = getattr(saver, f"{face}put_writes")(*next(pending_writes(config)))
    if face:
        runner.run(written)
    latest = {"configurable": {"thread_id": config["configurable"]["thread_id"], "checkpoint_ns": ""}}
    get_tuple = getattr(saver, f"{face}get_tuple")
    return lambda: get_tuple(latest)


def _thread(saver: Any, runner: asyncio.Runner, face: str, length: int) -> Any:
    """A thread of so many checkpoints; returns the config of the last."""
    chain = checkpoint_chain(uuid4().hex)
    config = None
    for _ in range(length):
        put = getattr(saver, f"{face}put")(*next(chain))
        config = runner.run(put) if face else put
    return config

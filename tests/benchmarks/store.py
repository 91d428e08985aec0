"""The store without a graph, holding a thousand items of fifty users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

from langgraph.store.base import PutOp

from tests.benchmarks.measure import Contender, Row, Session, race, timed, timed_async
from tests.benchmarks.peers import Peer, ours, upstream, upstream_async
from tests.benchmarks.work import SENTENCE, items

CASE = "store"
ITEMS, USERS, BATCH = 1_000, 50, 100

Operation = Callable[[Any, str], Callable[[], Any]]


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds = session.pick(40, 12)
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
        for peer in plain:
            peer.store.batch(_puts(items(ITEMS, USERS)))
        for peer in awaited:
            runner.run(peer.store.abatch(_puts(items(ITEMS, USERS))))
        for what, (operation, calls) in OPERATIONS.items():
            calls = session.pick(calls, max(calls // 2, 1))
            first, *others = [_contender(peer, timed(operation(peer.store, ""))) for peer in plain]
            rows += race(session, CASE, what, first, others, rounds=rounds, calls=calls)
            first, *others = [_contender(peer, timed_async(runner, operation(peer.store, "a"))) for peer in awaited]
            rows += race(session, CASE, f"{what} (async)", first, others, rounds=rounds, calls=calls)
    return rows


def _contender(peer: Peer, sample: Any) -> Contender:
    return Contender(peer.store_name, peer.store_journal, sample)


def _puts(rows: list[tuple[tuple[str, str], str, dict[str, Any]]]) -> list[PutOp]:
    return [PutOp(namespace, key, value) for namespace, key, value in rows]


def _put(store: Any, face: str) -> Callable[[], Any]:
    put = getattr(store, f"{face}put")
    return lambda: put(("written", "one"), uuid4().hex, {"text": SENTENCE})


def _batch(store: Any, face: str) -> Callable[[], Any]:
    batch = getattr(store, f"{face}batch")
    return lambda: batch([PutOp(("written", "many"), uuid4().hex, {"text": SENTENCE}) for _ in range(BATCH)])


def _get(store: Any, face: str) -> Callable[[], Any]:
    get = getattr(store, f"{face}get")
    return lambda: get(("users", "u7"), "item-7")


def _search(filter: dict[str, Any]) -> Operation:
    def operation(store: Any, face: str) -> Callable[[], Any]:
        search = getattr(store, f"{face}search")
        return lambda: search(("users",), filter=filter, limit=10)

    return operation


def _search_user(store: Any, face: str) -> Callable[[], Any]:
    search = getattr(store, f"{face}search")
    return lambda: search(("users", "u0"), filter={"role": "preference"}, limit=10)


def _list_namespaces(store: Any, face: str) -> Callable[[], Any]:
    namespaces = getattr(store, f"{face}list_namespaces")
    return lambda: namespaces(prefix=("users",), limit=100)


OPERATIONS: dict[str, tuple[Operation, int]] = {
    "put": (_put, 25),
    f"batch of {BATCH} puts": (_batch, 4),
    "get": (_get, 200),
    "search, 20 items, all match": (_search_user, 100),
    "search, 1,000 items, 1 in 10 matches": (_search({"role": "preference"}), 40),
    "search, 1,000 items, 1 matches": (_search({"number": {"$eq": 3}}), 20),
    "list_namespaces, 50 of them": (_list_namespaces, 100),
}

"""Cost against size: each call on ever larger databases and ever longer threads, a row each with how it grows."""

from __future__ import annotations

import itertools
import math
import operator
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from langgraph.store.base import PutOp

from langgraph_memstate import Fact, MemoryStore
from tests.benchmarks.measure import Contender, Row, Session, in_turns, quartiles, timed
from tests.benchmarks.opening import THREAD, fill
from tests.benchmarks.peers import Peer, ours, upstream
from tests.benchmarks.work import SENTENCE, checkpoint_chain

CASE = "scale"
IN_NAMESPACE = 20  # items of a user, however many there are
_FIRST, _LAST = 0, -1


@dataclass(frozen=True)
class Work:
    """A call, made from a contender that is filled to a size; None where it has no such call."""

    make: Callable[[Peer, int], Callable[[int], float] | None]
    calls: int


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    facts = [1_000, 10_000] if session.quick else [1_000, 10_000, 100_000]
    steps = [100, 1_000] if session.quick else [100, 1_000, 10_000]
    if session.large:
        facts.append(1_000_000)
    found = _measured(session, folder / "facts", facts, 0, FACTS)
    return found + _measured(session, folder / "steps", steps, 1, STEPS)


def _measured(session: Session, folder: Path, sizes: list[int], kind: int, works: dict[str, Work]) -> list[Row]:
    """`kind` is 0 where the sizes are of facts, 1 where they are of steps."""
    folder.mkdir()
    rounds = session.pick(15, 5)
    names, unit = ["", ""], ("facts", "steps")[kind]
    taken: dict[str, list[list[list[float]]]] = {what: [] for what in works}
    for size in sizes:
        with ExitStack() as stack:
            peers = []
            for place, opener in enumerate((ours, upstream)):
                session.tell(f"{CASE}: {size:,} {unit}")
                peers.append(stack.enter_context(opener(folder / f"{place}-{size}")))
                fill(peers[place], *((size, 0), (0, size))[kind])
                names[place] = (peers[place].store_name, peers[place].saver_name)[kind]
            for what, work in works.items():
                calls = [sample for peer in peers if (sample := work.make(peer, size)) is not None]
                contenders = [Contender("", "", sample) for sample in calls]
                telling = f"{CASE}: {what} of {size:,} {unit}"
                taken[what].append(in_turns(session, telling, contenders, rounds=rounds, calls=work.calls))
    rows = []
    for what, by_size in taken.items():
        for name, *samples in zip(names, *by_size, strict=False):
            first = None if name == names[0] else [by[0] for by in by_size]
            rows.append(_row(f"{unit}: {what}", name, sizes, samples, first))
    return rows


def _row(what: str, name: str, sizes: list[int], samples: list[list[float]], ours: list[list[float]] | None) -> Row:
    """At the largest size, with the medians at the others."""
    medians = [quartiles(of_size)[1] for of_size in samples]
    low, median, high = quartiles(samples[_LAST])
    notes: dict[str, float | str] = {
        f"ms at {size:,}": round(at * 1e3, 4) for size, at in zip(sizes, medians, strict=True)
    }
    growth = medians[_LAST] / medians[_FIRST]
    notes |= {"growth": growth, "grows as N^": math.log(growth) / math.log(sizes[_LAST] / sizes[_FIRST])}
    ratio = None if ours is None else statistics.median(map(operator.truediv, ours[_LAST], samples[_LAST]))
    return Row(CASE, what, name, "", median, low, high, ratio, notes)


# -- of facts ---------------------------------------------------------------------------------------


def _put(peer: Peer, size: int) -> Callable[[int], float]:
    return timed(lambda: peer.store.put(("written",), uuid4().hex, {"text": SENTENCE}))


def _batch(peer: Peer, size: int) -> Callable[[int], float]:
    return timed(lambda: peer.store.batch([PutOp(("written",), uuid4().hex, {"text": SENTENCE}) for _ in range(100)]))


def _get(peer: Peer, size: int) -> Callable[[int], float]:
    numbers = itertools.cycle(range(0, size, max(size // 100, 1) + 1))
    users = size // IN_NAMESPACE

    def get() -> None:
        number = next(numbers)
        assert peer.store.get(("users", f"u{number % users}"), f"item-{number}") is not None

    return timed(get)


def _search(namespace: tuple[str, ...], filter: dict[str, Any] | None = None) -> Any:
    def make(peer: Peer, size: int) -> Callable[[int], float]:
        return timed(lambda: peer.store.search(namespace, filter=filter, limit=10))

    return make


def _list_namespaces(peer: Peer, size: int) -> Callable[[int], float]:
    return timed(lambda: peer.store.list_namespaces(prefix=("users",), limit=100))


def _rollback(peer: Peer, size: int) -> Callable[[int], float] | None:
    """The commit before is not part of the time."""
    memory = getattr(peer.store, "memory", None)
    if not isinstance(memory, MemoryStore):
        return None

    def sample(calls: int) -> float:
        took = 0.0
        for _ in range(calls):
            memory.commit(Fact("note", {"text": SENTENCE}, id="one"))
            start = time.perf_counter()
            memory.rollback(1)
            took += time.perf_counter() - start
        return took / calls

    return sample


FACTS = {
    "get": Work(_get, 50),
    "search in a namespace of 20": Work(_search(("users", "u7")), 20),
    "search, the latest 10 of all": Work(_search(("users",)), 3),
    "search, 1 of all matches": Work(_search(("users",), {"number": 3}), 1),
    "list_namespaces, 100 of them": Work(_list_namespaces, 3),
    "put": Work(_put, 10),
    "batch of 100": Work(_batch, 2),
    "search, the latest 10 after those": Work(_search(("users",)), 3),
    "rollback(1)": Work(_rollback, 5),
}
"""In this order: what is put and batched lies in another namespace than what is searched"""


# -- of steps ---------------------------------------------------------------------------------------


def _latest() -> Any:
    return {"configurable": {"thread_id": THREAD, "checkpoint_ns": ""}}


def _put_step(peer: Peer, size: int) -> Callable[[int], float]:
    """One more on the long thread."""
    chain = checkpoint_chain(THREAD)
    at = [peer.saver.get_tuple(_latest()).config]

    def put() -> None:
        _, *arguments = next(chain)
        at[0] = peer.saver.put(at[0], *arguments)

    return timed(put)


def _get_tuple(peer: Peer, size: int) -> Callable[[int], float]:
    return timed(lambda: peer.saver.get_tuple(_latest()))


def _list(peer: Peer, size: int) -> Callable[[int], float]:
    return timed(lambda: list(peer.saver.list(_latest(), limit=10)))


def _prune(peer: Peer, size: int) -> Callable[[int], float] | None:
    """All but the latest of a copy; copying is not part of the time."""
    if not isinstance(getattr(peer.store, "memory", None), MemoryStore):
        return None

    def sample(calls: int) -> float:
        took = 0.0
        for _ in range(calls):
            copy = uuid4().hex
            peer.saver.copy_thread(THREAD, copy)
            start = time.perf_counter()
            peer.saver.prune([copy], strategy="keep_latest")
            took += time.perf_counter() - start
        return took / calls

    return sample


STEPS = {
    "put": Work(_put_step, 10),
    "get_tuple": Work(_get_tuple, 20),
    "list, the latest 10": Work(_list, 5),
    "prune to the latest": Work(_prune, 1),
}

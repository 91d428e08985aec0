"""Undo of a hundred commits of ten facts each, beside a thousand puts; with an embedded Chroma, and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from langgraph_memstate import Fact, MemoryStore
from tests.benchmarks.measure import Row, Session, quartiles
from tests.benchmarks.work import SENTENCE

CASE = "undo"
FACTS = 10  # of a step
DIMS = 384


class Model:
    """Embeds in no time, and counts the texts."""

    model = "counted"

    def __init__(self) -> None:
        self.texts = 0

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        self.texts += len(texts)
        return [[float(1 + hash((text, place)) % 1000) for place in range(DIMS)] for text in texts]


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rows: list[Row] = []
    for vectors in (False, True):
        samples: dict[str, list[float]] = {}
        embedded: dict[str, int] = {}
        for turn in range(session.rounds(session.pick(3, 1))):
            session.tell(f"{CASE}: {turn}")
            _round(folder / f"{vectors}-{turn}.db", session.pick(100, 10), vectors, samples, embedded)
        session.tell("")
        name = "SQLite + Chroma" if vectors else "SQLite"
        for what, seconds in samples.items():
            low, median, high = quartiles(seconds)
            rows.append(Row(CASE, what, name, "WAL", median, low, high, notes={"texts embedded": str(embedded[what])}))
    return rows


def _round(path: Path, steps: int, vectors: bool, samples: dict[str, list[float]], embedded: dict[str, int]) -> None:
    facts = steps * FACTS
    model = Model()
    with MemoryStore.open(path, index={"dims": DIMS, "embed": model} if vectors else None) as memory:

        def timed(what: str, call: Callable[[], object]) -> None:
            before, start = model.texts, time.perf_counter()
            call()
            samples.setdefault(what, []).append(time.perf_counter() - start)
            embedded[what] = model.texts - before

        def write(text: str) -> None:
            for step in range(steps):
                numbers = range(step * FACTS, step * FACTS + FACTS)
                memory.commit([Fact("note", {"text": f"{SENTENCE} {text} {n}"}, id=str(n)) for n in numbers])

        write("first")
        timed(f"{facts:,} puts", lambda: [memory.store.put(("put",), str(n), {"text": f"{n}"}) for n in range(facts)])
        timed(f"{steps} commits of {FACTS} facts", lambda: write("second"))
        timed(f"undo of these {steps}", lambda: memory.rollback(steps))
        memory.flush()

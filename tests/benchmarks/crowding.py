"""One caller among many on a database: cycles of `put`, `put_writes` and `get_tuple`, and how they went."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.measure import quartiles
from tests.benchmarks.work import checkpoint_chain, pending_writes


@dataclass
class Tally:
    """Seconds of the cycles that succeeded, and the errors of the others by name."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        whole = cls()
        for part in parts:
            whole.seconds += part.seconds
            whole.errors.update(part.errors)
        return whole

    def failed(self, error: BaseException) -> None:
        self.errors[f"{type(error).__name__}: {error}"[:60]] += 1

    def dumped(self) -> str:
        """As JSON, of which `Tally` makes it again."""
        return json.dumps({"seconds": self.seconds, "errors": self.errors})

    @property
    def shown_errors(self) -> str:
        return ", ".join(f"{count} x {name}" for name, count in self.errors.most_common()) or "none"


def cycles(saver: Any, thread_id: str, count: int) -> Tally:
    """So many cycles on a LangGraph thread, each checkpoint the parent of the next."""
    tally = Tally()
    chain = checkpoint_chain(thread_id)
    latest: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    for _ in range(count):
        start = time.perf_counter()
        try:
            config = saver.put(*next(chain))
            saver.put_writes(*next(pending_writes(config)))
            found = saver.get_tuple(latest)
        except Exception as error:
            tally.failed(error)
        else:
            assert found is not None
            tally.seconds.append(time.perf_counter() - start)
    return tally


async def acycles(saver: Any, thread_id: str, count: int) -> Tally:
    """The same, awaited."""
    tally = Tally()
    chain = checkpoint_chain(thread_id)
    latest: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    for _ in range(count):
        start = time.perf_counter()
        try:
            config = await saver.aput(*next(chain))
            await saver.aput_writes(*next(pending_writes(config)))
            found = await saver.aget_tuple(latest)
        except Exception as error:
            tally.failed(error)
        else:
            assert found is not None
            tally.seconds.append(time.perf_counter() - start)
    return tally


def latencies(seconds: Sequence[float]) -> dict[str, float | str]:
    """In milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50 ms": quartiles(ordered)[1] * 1e3,
        "p99 ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1e3,
        "max ms": ordered[-1] * 1e3,
    }

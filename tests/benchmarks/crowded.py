"""A process of `crowd`: ``python -m tests.benchmarks.crowded``. A line of JSON asks, a line of JSON says how it went.

``["open", WHOSE, PATH]`` opens a saver and closes the one before; ``["cycles", WHOSE, THREAD_ID, COUNT]`` uses it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from langgraph.checkpoint.sqlite import SqliteSaver

from langgraph_memstate import MemoryStore
from tests.benchmarks.crowding import Tally, cycles


@contextmanager
def our_saver(path: str) -> Iterator[Any]:
    with MemoryStore.open(path) as memory:
        yield memory.checkpointer


@contextmanager
def upstream_saver(path: str) -> Iterator[Any]:
    with SqliteSaver.from_conn_string(path) as saver:
        saver.setup()
        yield saver


OPENERS = {"ours": our_saver, "upstream": upstream_saver}


class Opened:
    """The savers of this process, by whose they are."""

    def __init__(self) -> None:
        self._savers: dict[str, tuple[ExitStack, Any]] = {}

    def open(self, whose: str, path: str) -> Tally:
        self.close(whose)
        tally, stack = Tally(), ExitStack()
        start = time.perf_counter()
        try:
            saver = stack.enter_context(OPENERS[whose](path))
        except Exception as error:
            tally.failed(error)
        else:
            tally.seconds.append(time.perf_counter() - start)
            self._savers[whose] = stack, saver
        return tally

    def cycles(self, whose: str, thread_id: str, count: int) -> Tally:
        return cycles(self._savers[whose][1], thread_id, count)

    def close(self, whose: str) -> None:
        if whose in self._savers:
            self._savers.pop(whose)[0].close()


def main() -> None:
    opened = Opened()
    print("ready", flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        tally = opened.open(*arguments) if command == "open" else opened.cycles(*arguments)
        print(tally.dumped(), flush=True)
    for whose in OPENERS:
        opened.close(whose)


if __name__ == "__main__":
    main()

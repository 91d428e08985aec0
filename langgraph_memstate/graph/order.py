"""When a subgraph saves: after the graphs around it.

LangGraph may save in the background, and each graph waits for its own saves alone. So what a subgraph remembers could
land before the step around it that came first, and memory as of that step's checkpoint would know of it. Here a save
waits until the checkpoints that the steps around it start from have landed.

It does not wait where they cannot come: one that failed is raised, and one that nobody begins is given up. Runs that
save at exit save a subgraph before the graph around it; that order is LangGraph's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from langgraph_memstate.storage.values import StepKey

_PATIENCE = 1.0  # seconds, while a graph saves nothing

Place = tuple[str, str]
"""a thread and a namespace"""


def _pending() -> Future[None]:
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()  # so that no waiter can cancel it for the others
    return future


@dataclass(slots=True, eq=False)
class _Graph:
    """The saves of one graph of a run."""

    loop: asyncio.AbstractEventLoop | None = None
    """which they need"""
    blocks: asyncio.AbstractEventLoop | None = None
    """which stands still while the graph runs"""
    landed: set[str] = field(default_factory=set)
    under_way: int = 0
    failure: Exception | None = None
    change: Future[None] = field(default_factory=_pending)
    """resolved, and replaced, when a save begins or ends"""

    def changed(self) -> None:
        change, self.change = self.change, _pending()
        change.set_result(None)


class Order:
    """The saves of one run: those of a subgraph come after those around it."""

    def __init__(self) -> None:
        self._graphs: dict[Place, _Graph] = {}
        self._lock = threading.Lock()

    def enter(self, place: Place, checkpoint_id: str | None, *, is_async: bool) -> None:
        """A graph starts from a checkpoint that is saved, or from none. To be called where the graph runs."""
        loop = _running_loop()
        with self._lock:
            graph = self._graphs.get(place)
            if graph is None:
                graph = self._graphs[place] = _Graph(loop=loop) if is_async else _Graph(blocks=loop)
            graph.failure = None
            if checkpoint_id is not None:
                graph.landed.add(checkpoint_id)

    @contextmanager
    def saving(self, step: StepKey) -> Iterator[None]:
        """Inside, a checkpoint is saved."""
        with self._lock:
            graph = self._graphs.setdefault(step[:2], _Graph())
            graph.under_way += 1
            graph.changed()
        try:
            yield
            graph.landed.add(step.checkpoint_id)
            graph.failure = None
        except Exception as error:
            graph.failure = error
            raise
        finally:
            with self._lock:
                graph.under_way -= 1
                graph.changed()

    def await_around(self, place: Place, around: Mapping[str, str]) -> None:
        """Wait for the checkpoints, by namespace, that the steps around a graph start from.

        Raises why one of them was not saved.
        """
        for change, patience in self._changes(place, around):
            wait((change,), patience)

    async def aawait_around(self, place: Place, around: Mapping[str, str]) -> None:
        """The same without holding a thread."""
        for change, patience in self._changes(place, around):
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(change), patience)

    def _changes(self, place: Place, around: Mapping[str, str]) -> Iterator[tuple[Future[None], float | None]]:
        """What to wait for, and for how many seconds, until there is nothing left to wait for."""
        for graph, checkpoint_id in self._awaited(place, around):
            while checkpoint_id not in graph.landed:
                with self._lock:
                    change, is_idle = graph.change, not graph.under_way
                    if checkpoint_id in graph.landed:
                        break
                    if graph.failure is not None:
                        raise graph.failure
                yield change, _PATIENCE if is_idle else None
                if not change.done():
                    graph.landed.add(checkpoint_id)  # nobody saves it: not to be waited for again

    def _awaited(self, place: Place, around: Mapping[str, str]) -> list[tuple[_Graph, str]]:
        """The graphs around one that save to this memory, and can while it runs."""
        with self._lock:
            graphs = {ns: self._graphs.get((place[0], ns)) for ns in (*around, place[1])}
            blocked = {graph.blocks for graph in graphs.values() if graph is not None} - {None}
            return [
                (graph, checkpoint_id)
                for ns, checkpoint_id in around.items()
                if ns != place[1] and (graph := graphs[ns]) is not None and graph.loop not in blocked
            ]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

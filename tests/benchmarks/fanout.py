"""A superstep of fifty parallel tasks: what saving it adds to what it takes with a saver that does nothing."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any, TypedDict
from uuid import uuid4

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Send

from tests.benchmarks.bare import bare
from tests.benchmarks.measure import Contender, Row, Session, in_turns, rows_of, timed, timed_async
from tests.benchmarks.peers import ours, upstream, upstream_async
from tests.benchmarks.work import SENTENCE

CASE = "fanout"
TASKS = 50


class State(TypedDict):
    found: Annotated[list[str], operator.add]


class NullSaver(InMemorySaver):
    """Takes what it is given and keeps nothing."""

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return None

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return None

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        place = config["configurable"]
        names = {"thread_id": place["thread_id"], "checkpoint_ns": place.get("checkpoint_ns", "")}
        return {"configurable": {**names, "checkpoint_id": checkpoint["id"]}}

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return self.put(config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Nothing is kept."""

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Nothing is kept."""


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    rounds = session.pick(40, 8)
    rows = []
    with asyncio.Runner() as runner, ExitStack() as stack:
        plain = [stack.enter_context(peer) for peer in (ours(folder / "ours"), upstream(folder / "upstream"))]
        awaited = [
            stack.enter_context(peer)
            for peer in (ours(folder / "ours-async"), upstream_async(folder / "upstream-async", runner))
        ]
        least = stack.enter_context(bare(folder / "bare.db"))
        for durability in ("sync", "async"):
            savers = [*((peer.saver, peer.saver_journal) for peer in plain), (least, "WAL")]
            contenders = [_contender(saver, journal, _invoked(saver, durability)) for saver, journal in _with(savers)]
            rows += _above(session, f"{TASKS} tasks, invoke, {durability}", contenders, rounds)
            savers = [(peer.saver, peer.saver_journal) for peer in awaited]
            contenders = [
                _contender(saver, journal, _awaited(saver, durability, runner)) for saver, journal in _with(savers)
            ]
            rows += _above(session, f"{TASKS} tasks, ainvoke, {durability}", contenders, rounds)
    return rows


def _with(savers: list[tuple[Any, str]]) -> Iterator[tuple[Any, str]]:
    yield from savers
    yield InMemorySaver(), ""
    yield NullSaver(), ""


def _contender(saver: BaseCheckpointSaver[Any], journal: str, sample: Callable[[int], float]) -> Contender:
    return Contender(type(saver).__name__, journal, sample)


def _above(session: Session, what: str, contenders: list[Contender], rounds: int) -> list[Row]:
    """A row each of what is above the null saver, which comes last, in the same round."""
    *savers, null = contenders
    *seconds, floor = in_turns(session, f"{CASE}: {what}", contenders, rounds=rounds, calls=2)
    above = [list(map(operator.sub, taken, floor)) for taken in seconds]
    rows = rows_of(CASE, what, savers, above)
    first = rows[0].median
    assert first is not None
    # What is above may be nothing in a round: the ratio is that of the medians.
    rows = [
        replace(row, ratio=first / row.median if place and row.median and row.median > 0 else None)
        for place, row in enumerate(rows)
    ]
    (whole,) = rows_of(CASE, what, [null], [floor])
    return [*rows, replace(whole, contender="NullSaver, the whole run")]


def _fan_out(saver: BaseCheckpointSaver[Any], *, awaited: bool) -> CompiledStateGraph[Any]:
    def spread(state: State) -> list[Send]:
        return [Send("look", {"number": number}) for number in range(TASKS)]

    def look(task: dict[str, int]) -> dict[str, list[str]]:
        return {"found": [f"{SENTENCE} {task['number']}"]}

    async def alook(task: dict[str, int]) -> dict[str, list[str]]:
        return look(task)

    graph = StateGraph(State)
    node: Any = alook if awaited else look
    graph.add_node("look", node)
    graph.add_conditional_edges(START, spread, ["look"])
    return graph.compile(checkpointer=saver)


def _new_thread() -> RunnableConfig:
    return {"configurable": {"thread_id": uuid4().hex}}


def _invoked(saver: Any, durability: Any) -> Callable[[int], float]:
    graph = _fan_out(saver, awaited=False)
    return timed(lambda: graph.invoke({"found": []}, _new_thread(), durability=durability))


def _awaited(saver: Any, durability: Any, runner: asyncio.Runner) -> Callable[[int], float]:
    graph = _fan_out(saver, awaited=True)
    return timed_async(runner, lambda: graph.ainvoke({"found": []}, _new_thread(), durability=durability))

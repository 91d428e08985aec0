"""One process of a story: open a side, let the user talk until the process is killed or the story ends, count."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command

from langgraph_memstate.demo.agent import build_agent
from langgraph_memstate.demo.census import Census, take_census
from langgraph_memstate.demo.faults import Faults, Outage
from langgraph_memstate.demo.sides import SideName, open_side
from langgraph_memstate.demo.story import Turn
from langgraph_memstate.errors import MemStateError, VectorSyncError

logger = logging.getLogger(__name__)

# One background thread keeps the saver's calls in order, so that every run of the demo is killed at the same places.
_CONFIG: RunnableConfig = {"configurable": {"thread_id": "ada"}, "max_concurrency": 1}

Graph = CompiledStateGraph[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a story. `faults` counts what went wrong in this process: traps sprung and interrupts."""

    faults: int
    remembered: int
    facts: Census
    vectors: Census


def play(name: SideName, directory: Path, turns: Sequence[Turn], first: int, result: Connection) -> None:
    """Play `turns` from number `first`; the one before it killed the last process. Sends an `Outcome` at the end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["LANGSMITH_TRACING"] = os.environ["LANGCHAIN_TRACING_V2"] = "false"  # the demo stays on this machine
    logging.basicConfig(filename=directory / "demo.log", level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with open_side(name, directory) as side:
        graph = build_agent(side)
        faults = Faults(side)
        happened = 0
        if first:
            _go_on(graph, turns[first - 1])
        for turn in turns[first:]:
            faults.set(turn.trap)
            ended = _run(graph, {"messages": [HumanMessage(turn.text)]})
            if not faults.sprung:
                raise MemStateError(f"the fault of the turn {turn.text!r} did not happen, so nothing can be compared")
            happened += turn.trap is not None or not ended
            if not ended:
                _go_on(graph, turn)
        remembered = graph.get_state(_CONFIG).values["remembered"]
        result.send(
            Outcome(
                faults=happened,
                remembered=len(remembered),
                facts=take_census(remembered, side.facts()),
                vectors=take_census(remembered, side.vectors()),
            )
        )


def _run(graph: Graph, what: Any) -> bool:
    """One run, in the most careful durability there is; whether it ended."""
    try:
        graph.invoke(what, _CONFIG, durability="sync")
    except (Outage, VectorSyncError) as error:
        logger.info("the run failed: %r", error)
        return False
    return not graph.get_state(_CONFIG).interrupts


def _go_on(graph: Graph, turn: Turn) -> None:
    """What the application does about a run that did not end."""
    if turn.then == "resume":
        interrupted = graph.get_state(_CONFIG).interrupts
        _run(graph, Command(resume=True) if interrupted else None)

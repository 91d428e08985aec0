"""Plays every story on both sides, in processes that can be killed."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from langgraph_memstate.demo.play import Outcome, play
from langgraph_memstate.demo.sides import SIDES, SideName
from langgraph_memstate.demo.story import STORIES, Story
from langgraph_memstate.errors import MemStateError

if TYPE_CHECKING:  # not every platform has both
    from multiprocessing.context import ForkServerContext, SpawnContext

Progress = Callable[[SideName, Story], None]
_KILLED = -9 if sys.platform != "win32" else 15  # how a killed process ends
_turn = threading.Lock()
"""Held while a process is started or awaited. Starting one asks after every other; of two threads that ask after the
same one at a time `multiprocessing` tells only one how it ended, and the other 255.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One story, and how it ended on each side."""

    story: Story
    outcomes: dict[SideName, Outcome]

    @property
    def times(self) -> int:
        """How often the fault happened, on either side."""
        return self.outcomes["without"].faults


def count_processes(stories: Sequence[Story] = STORIES) -> int:
    """How many processes a run takes: one more than kills, for each story and side."""
    return len(SIDES) * sum(1 + sum(turn.kills for turn in story.turns) for story in stories)


def compare(directory: Path, on_progress: Progress, stories: Sequence[Story] = STORIES) -> list[Comparison]:
    """Play `stories` on both sides at once, each in a directory of its own under `directory`.

    `on_progress` is called after each process, from either side's thread.

    Raises:
        MemStateError: the comparison itself failed; the process concerned has said why.
    """
    context = _context()

    def run_side(name: SideName) -> list[Outcome]:
        return [_play(context, name, story, directory / name / story.name, on_progress) for story in stories]

    with ThreadPoolExecutor(len(SIDES)) as pool:
        by_side = dict(zip(SIDES, pool.map(run_side, SIDES), strict=True))
    comparisons = [Comparison(story, {name: by_side[name][n] for name in SIDES}) for n, story in enumerate(stories)]
    for comparison in comparisons:
        if len({outcome.faults for outcome in comparison.outcomes.values()}) > 1:
            raise MemStateError(f"{comparison.story.title}: the two sides did not have the same faults")
    return comparisons


def _context() -> ForkServerContext | SpawnContext:
    """Processes forked from one that has imported everything and started nothing; new ones where there is no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    package = __package__ or ""
    context.set_forkserver_preload([f"{package}.play", f"{package}.without", f"{package}.beside"])
    return context


def _play(
    context: ForkServerContext | SpawnContext, name: SideName, story: Story, directory: Path, on_progress: Progress
) -> Outcome:
    directory.mkdir(parents=True)
    first = kills = 0
    while True:
        outcome = _process(context, name, story, directory, first)
        on_progress(name, story)
        if outcome is not None:
            return replace(outcome, faults=outcome.faults + kills)
        kills += 1
        first = next(n for n, turn in enumerate(story.turns) if n >= first and turn.kills) + 1


def _process(
    context: ForkServerContext | SpawnContext, name: SideName, story: Story, directory: Path, first: int
) -> Outcome | None:
    """Play on in a new process; None if it was killed as the story wants."""
    receiver, sender = context.Pipe(duplex=False)
    with receiver:
        process = context.Process(target=play, args=(name, directory, story.turns, first, sender))
        with _turn:
            process.start()
        sender.close()
        try:
            outcome: Outcome | None = receiver.recv()
        except EOFError:
            outcome = None
        with _turn:
            process.join()
    killed = process.exitcode == _KILLED
    to_be_killed = any(turn.kills for turn in story.turns[first:])
    if killed != to_be_killed or (outcome is None) != killed:
        raise MemStateError(f"{name}, {story.title}: a process ended unexpectedly, with status {process.exitcode}")
    return outcome

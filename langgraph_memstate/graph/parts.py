"""Memory writes of tasks, and the order in which they land.

Tasks of one step land by path, as LangGraph applies their channel writes. What one task does, itself and in the graphs
and functions that it calls, lands in the order in time: a task that writes, calls and writes again has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from langgraph_memstate.facts import Draft
from langgraph_memstate.graph import pregel
from langgraph_memstate.storage.values import StagedDraft, StepKey

Place = tuple[tuple[str, str], ...]
"""the step and the path of a task, those of the tasks that it runs inside of before it"""


Order = tuple[int, str]
"""in time, and by version where an earlier run saved it: that comes first, and is negative"""


class Part(NamedTuple):
    """Memory writes of one task."""

    place: Place
    order: Order
    drafts: Sequence[Draft]


def place_of(tasks: Iterable[tuple[str, str]]) -> Place:
    """Of tasks inside of each other, by checkpoint and path, the outermost first.

    What a function calls (functional API) starts from the same checkpoint, and is inside of it too: a step of its own.
    """
    place: list[tuple[str, str]] = []
    for checkpoint_id, path in tasks:
        outermost, *calls = pregel.lineage(path)
        place += [(checkpoint_id, outermost), *((call, "") for call in calls)]
    return tuple(place)


def saved_part(step: StepKey, row: StagedDraft, around: Place = ()) -> Part:
    """What a finished task of a step saved. `around`: the place of the task that the step's graph runs inside of."""
    return Part((*around, *place_of([(step.checkpoint_id, row.task_path)])), (-1, row.draft.version), [row.draft])


def in_log_order(parts: Iterable[Part]) -> list[Part]:
    """Parts as they land. Those that were saved before come first in their task."""
    parts = list(parts)
    begun: dict[tuple[object, ...], Order] = {}
    for part in parts:
        for step in _steps(part.place):
            begun[step] = min(begun.get(step, part.order), part.order)

    def key(part: Part) -> list[tuple[Order, str]]:
        paths = (path for _, path in part.place)
        return [*((begun[step], path) for step, path in zip(_steps(part.place), paths, strict=True)), (part.order, "")]

    return sorted(parts, key=key)


def _steps(place: Place) -> list[tuple[object, ...]]:
    return [(*place[:depth], step) for depth, (step, _) in enumerate(place)]

"""What the user sees of a run: a progress bar, a table, and the same as JSON."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from langgraph_memstate.demo.census import Census
from langgraph_memstate.demo.run import Comparison
from langgraph_memstate.demo.sides import SIDES, SideName

PLACES = ("facts", "vectors")
LABELS: dict[SideName, str] = {"without": "without", "with": "with memstate"}
_ABOUT: dict[SideName, str] = {
    "without": "LangGraph's SqliteSaver and SqliteStore, and Chroma updated by the node that remembers",
    "with": "one MemoryStore, which is checkpointer, store and index",
}
_MEANINGS = {
    "ghosts": "memories of work that never landed",
    "losses": "memories the conversation has and the database lacks",
    "duplicates": "the same memory a second time",
}
KINDS = tuple(_MEANINGS)
_WIDTH = len("  ".join(KINDS))  # of the three columns of a side
_PACKAGES = ("langgraph-memstate", "langgraph", "langgraph-checkpoint-sqlite", "chromadb")

Counts = dict[str, int]


def counts(census: Census) -> Counts:
    return {kind: len(getattr(census, kind)) for kind in KINDS}


def totals(comparisons: Sequence[Comparison], side: SideName, place: str) -> Counts:
    """Ghosts, losses and duplicates of one side in one place, over all stories."""
    found = [counts(getattr(comparison.outcomes[side], place)) for comparison in comparisons]
    return {kind: sum(one[kind] for one in found) for kind in KINDS}


def is_clean(comparisons: Sequence[Comparison], side: SideName) -> bool:
    return not any(sum(totals(comparisons, side, place).values()) for place in PLACES)


def as_json(comparisons: Sequence[Comparison], seconds: float) -> dict[str, Any]:
    """Counts and the texts behind them, story by story."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "seconds": round(seconds, 2),
        "faults": [
            {
                "name": comparison.story.name,
                "title": comparison.story.title,
                "times": comparison.times,
                **{side: asdict(comparison.outcomes[side]) for side in SIDES},
            }
            for comparison in comparisons
        ],
        "totals": {side: {place: totals(comparisons, side, place) for place in PLACES} for side in SIDES},
    }


def table(comparisons: Sequence[Comparison]) -> str:
    """Rows: each fault, for facts and for vectors. Columns: ghosts, losses and duplicates of each side."""
    width = max(len(comparison.story.title) for comparison in comparisons)
    blank = " " * (width + 16)
    lines = [
        (blank + "".join(f"  {LABELS[side]:^{_WIDTH}}" for side in SIDES)).rstrip(),
        f"{'fault':{width}}  times         " + "".join("  " + "  ".join(KINDS) for _ in SIDES),
    ]
    rule = "-" * len(lines[1])
    lines.append(rule)
    for comparison in comparisons:
        found = {place: [counts(getattr(comparison.outcomes[side], place)) for side in SIDES] for place in PLACES}
        lines += _rows(f"{comparison.story.title:{width}}  {comparison.times:5}", found)
    lines.append(rule)
    found = {place: [totals(comparisons, side, place) for side in SIDES] for place in PLACES}
    return "\n".join([*lines, *_rows(f"{'total':{width}}  {sum(one.times for one in comparisons):5}", found)])


def _rows(label: str, found: Mapping[str, Sequence[Counts]]) -> Iterator[str]:
    for place, by_side in found.items():
        cells = ("  " + "  ".join(f"{one[kind]:{len(kind)}}" for kind in KINDS) for one in by_side)
        yield f"{label}  {place:7}" + "".join(cells)
        label = " " * len(label)


def meanings(comparisons: Sequence[Comparison]) -> list[str]:
    """What each column counts, with the first memory found of each side where there is one."""
    lines = []
    for kind, meaning in _MEANINGS.items():
        lines.append(f"{kind:10}  {meaning}")
        lines += [f"{'':12}{LABELS[side]}: {text!r}" for side in SIDES for text in _found(comparisons, side, kind)[:1]]
    return lines


def _found(comparisons: Sequence[Comparison], side: SideName, kind: str) -> list[str]:
    censuses = [getattr(comparison.outcomes[side], place) for comparison in comparisons for place in PLACES]
    return [text for census in censuses for text in getattr(census, kind)]


def text(comparisons: Sequence[Comparison], seconds: float) -> str:
    """Everything the demo prints."""
    about = [f"  {LABELS[side]:13}  {_ABOUT[side]}" for side in SIDES]
    return "\n".join(
        [
            "One small agent, twice through the same faults:",
            "",
            *about,
            "",
            table(comparisons),
            "",
            *meanings(comparisons),
            "",
            f"Measured in this run, in {seconds:.1f} seconds.",
        ]
    )

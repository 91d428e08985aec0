"""A thread's timeline: its checkpoints, the branches and rollbacks between them, and what each remembered."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from langgraph_memstate.errors import CorruptRowError
from langgraph_memstate.facts import LogEntry
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.values import StoredHead

_ROOT = ""
_ACROSS, _DOWN, _MARGIN = 64, 66, 34  # pixels between steps, between branches, around all
_RADIUS, _SQUARE, _IN_A_ROW = 9, 7, 5


@dataclass(frozen=True, slots=True)
class TimelineStep:
    """One checkpoint: where it came from, and the log's entries that landed with it (its subgraphs' too).

    `lane` numbers branches. `rolled_back` is the checkpoint that a rollback left behind when it made this one.
    """

    checkpoint_id: str
    parent_id: str | None
    step: int
    source: str
    ts: str
    lane: int
    current: bool
    """whether it is the thread's head, or on the way to it"""
    facts: tuple[LogEntry, ...]
    rolled_back: str | None


@dataclass(frozen=True, slots=True, repr=False)
class Timeline:
    """The steps of one thread, oldest first. A notebook shows it as a picture."""

    thread_id: str
    steps: tuple[TimelineStep, ...]

    def __str__(self) -> str:
        lines = [f"thread {self.thread_id}"]
        for one in self.steps:
            mark = "*" if one.current else " "
            undone = f" undoes back from {one.rolled_back}" if one.rolled_back else ""
            facts = ", ".join(map(_in_words, one.facts))
            lines.append(
                f"{mark} {'| ' * one.lane}{one.source} {one.step} {one.checkpoint_id}{undone}  {facts}".rstrip()
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        places = {
            one.checkpoint_id: (_MARGIN + _ACROSS * x, _MARGIN + _DOWN * one.lane) for x, one in enumerate(self.steps)
        }
        width = 2 * _MARGIN + _ACROSS * max(len(self.steps) - 1, 0)
        height = 2 * _MARGIN + _DOWN * max((one.lane for one in self.steps), default=0) + 16
        drawn = [*self._edges(places), *(_drawn(one, *places[one.checkpoint_id]) for one in self.steps)]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            f'font-size="10" role="img" aria-label="timeline of thread {escape(self.thread_id)}">{"".join(drawn)}</svg>'
        )

    def _edges(self, places: dict[str, tuple[int, int]]) -> list[str]:
        edges = []
        for one in self.steps:
            ways = ((one.parent_id, 'stroke="#888"'), (one.rolled_back, 'stroke="#c33" stroke-dasharray="4"'))
            for origin, style in ways:
                if origin in places:
                    (x1, y1), (x2, y2) = places[origin], places[one.checkpoint_id]
                    bend = (x1 + x2) // 2
                    edges.append(f'<path d="M{x1} {y1} C{bend} {y1} {bend} {y2} {x2} {y2}" fill="none" {style}/>')
        return edges


def _drawn(one: TimelineStep, x: int, y: int) -> str:
    fill = "#2a7" if one.current else "#ccc"
    parts = [
        f'<circle cx="{x}" cy="{y}" r="{_RADIUS}" fill="{fill}">'
        f"<title>{escape(one.checkpoint_id)} {escape(one.ts)}</title></circle>"
        f'<text x="{x}" y="{y + 3}" text-anchor="middle" fill="white">{one.step}</text>'
        f'<text x="{x}" y="{y - _RADIUS - 4}" text-anchor="middle">{escape(one.source)}</text>'
    ]
    for number, entry in enumerate(one.facts):
        left = x - _RADIUS + (number % _IN_A_ROW) * (_SQUARE + 1)
        top = y + _RADIUS + 4 + (number // _IN_A_ROW) * (_SQUARE + 1)
        colour = "#c33" if entry.undoes is not None else "#36c" if entry.op == "put" else "#555"
        parts.append(
            f'<rect x="{left}" y="{top}" width="{_SQUARE}" height="{_SQUARE}" fill="{colour}">'
            f"<title>{escape(_in_words(entry))}</title></rect>"
        )
    return "".join(parts)


def _in_words(entry: LogEntry) -> str:
    verb = {"put": "+", "delete": "-"}[entry.op] if entry.undoes is None else "undo "
    return f"{verb}{'/'.join(entry.namespace)}:{entry.key}"


def read_timeline(reader: Reader, thread_id: str) -> Timeline:
    """The timeline of a thread; empty where it has no checkpoints."""
    heads = sorted(reader.heads(thread_id, _ROOT), key=lambda head: head.step.checkpoint_id)
    landed: dict[str, list[LogEntry]] = defaultdict(list)
    for entry in reader.log(origin={"thread_id": thread_id}):
        if entry.checkpoint_id is not None:
            landed[_owner(heads, entry)].append(entry)
    current = {head.step.checkpoint_id for head in reader.ancestors(thread_id, _ROOT, None)}
    lanes = _lanes(heads)
    return Timeline(thread_id, tuple(_step(head, lanes, current, landed[head.step.checkpoint_id]) for head in heads))


def _owner(heads: Sequence[StoredHead], entry: LogEntry) -> str:
    """The checkpoint an entry is drawn at: its own, or for a subgraph's the next one of the graph around it."""
    if entry.checkpoint_ns:
        for head in heads:
            if head.step.checkpoint_id > str(entry.checkpoint_id):
                return head.step.checkpoint_id
    return str(entry.checkpoint_id)


def _lanes(heads: Sequence[StoredHead]) -> dict[str, int]:
    """A branch for each checkpoint: its parent's, unless an earlier child goes on there."""
    lanes: dict[str, int] = {}
    continued: set[str | None] = set()
    for head in heads:
        if head.parent_id in lanes and head.parent_id not in continued:
            lanes[head.step.checkpoint_id] = lanes[head.parent_id]
        else:
            lanes[head.step.checkpoint_id] = max(lanes.values(), default=-1) + 1
        continued.add(head.parent_id)
    return lanes


def _step(head: StoredHead, lanes: dict[str, int], current: set[str], facts: Sequence[LogEntry]) -> TimelineStep:
    metadata = metadata_of(head)
    rollback = rollback_of(metadata)
    id_ = head.step.checkpoint_id
    return TimelineStep(
        checkpoint_id=id_,
        parent_id=head.parent_id,
        step=metadata.get("step", 0),
        source=str(metadata.get("source")) if rollback is None else "rollback",
        ts=head.ts,
        lane=lanes[id_],
        current=id_ in current,
        facts=tuple(facts),
        rolled_back=None if rollback is None else rollback["from"],
    )


def rollback_of(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint says of the rollback that made it; a config's own metadata may have the same name."""
    found = metadata.get("rollback")
    ours = metadata.get("source") == "fork" and isinstance(found, dict) and found.keys() == {"from", "to", "source"}
    return found if ours else None


def metadata_of(stored: StoredHead) -> dict[str, Any]:
    """A checkpoint's metadata.

    Raises:
        CorruptRowError: it is not what a checkpointer wrote.
    """
    try:
        metadata = json.loads(stored.metadata)
    except ValueError as error:
        raise CorruptRowError(f"checkpoint {stored.step.checkpoint_id}: its metadata is not JSON") from error
    if not isinstance(metadata, dict):
        raise CorruptRowError(f"checkpoint {stored.step.checkpoint_id}: its metadata is not an object")
    return metadata

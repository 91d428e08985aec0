"""Copies and imports that are killed, and what is found afterwards."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from forks import KILLED, KillSwitch, in_child

sys.path.insert(0, str(Path(__file__).parents[1]))
from moved import fill, graph_on, rows_of, say

from langgraph_memstate import MemoryStore, migration
from langgraph_memstate.errors import UnfinishedCopyError
from langgraph_memstate.graph import importing
from langgraph_memstate.graph.importing import import_langgraph
from langgraph_memstate.migration import migrate
from langgraph_memstate.storage.tables import MOVED


def make_memory(path: str) -> None:
    fill(path, more=30)


def make_langgraph(path: str) -> None:
    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.store.sqlite import SqliteStore

    with SqliteSaver.from_conn_string(path) as saver, SqliteStore.from_conn_string(path) as store:
        store.setup()
        say(graph_on(saver, store), "one", "hello", "green tea")
        for number in range(30):
            store.put(("more",), str(number), {"text": str(number)})


def move(kind: str, source: str, destination: str, at: int) -> int:
    """Move in small commits, and die at point number `at`: a SQL statement, or a commit of another database.

    Returns how many points there were.
    """
    migration._ROWS = importing._ITEMS = importing._CHECKPOINTS = 10
    switch = KillSwitch(at)
    if at >= 0:
        switch.watch_sqlite()
    switch.armed = True
    if kind == "migrate":
        migrate(source, destination, on_progress=switch.point)
    else:
        import_langgraph([source], destination, on_progress=switch.point)
    return switch.passed


def state_of(destination: str, expected: dict[str, Any]) -> str:
    """What a user who opens the destination finds."""
    try:
        MemoryStore.open(destination).close()
    except UnfinishedCopyError:
        return "unfinished"
    found = rows_of(destination)
    return "empty" if not any(found.values()) else "whole" if _same(found, expected) else "part"


def _same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(len(found[table]) == len(expected[table]) for table in MOVED)


def kill_all_over(kind: str, source: str, destination: str, points: int) -> list[str]:
    """Kill at points all over a move, each time in a new destination; what was wrong."""
    total = in_child(move, kind, source, f"{destination}-count", 0)
    expected = in_child(rows_of, f"{destination}-count")
    steps = sorted({1 + number * (total - 1) // (points - 1) for number in range(points)})
    wrong, states = [], set()
    for at in steps:
        folder = Path(destination).with_name(f"{at}")
        folder.mkdir()
        place = str(folder / "copy.db")
        if in_child(move, kind, source, place, at) is not KILLED:
            wrong.append(f"at {at} of {total} nobody was killed")
        states.add(state := in_child(state_of, place, expected))
        if state == "part":
            wrong.append(f"killed at {at} of {total}: a part is taken for a whole")
        if state != "whole":
            in_child(move, kind, source, place, -1)
        if not _agrees(kind, in_child(rows_of, place), expected) or in_child(state_of, place, expected) != "whole":
            wrong.append(f"killed at {at} of {total}: the copy is not the source")
        shutil.rmtree(folder)
    if "unfinished" not in states:
        wrong.append(f"no death was in the middle: {states}")
    return wrong


def _agrees(kind: str, found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """An import makes versions and times of its own; the rest is the same, as all of a copy is."""
    if kind == "import":
        return _same(found, expected) and found["checkpoints"] == expected["checkpoints"]
    return found == expected


def kill_on_a_server(source: str, url: str, ats: list[int]) -> list[str]:
    """Kill one copy again and again, each time after some more commits."""
    expected = in_child(rows_of, source)
    wrong = []
    for at in ats:
        if in_child(move, "migrate", source, url, at) is not KILLED:
            wrong.append(f"at {at} nobody was killed")
        if (state := in_child(state_of, url, expected)) != "unfinished":
            wrong.append(f"killed at {at}: it is {state}")
    in_child(move, "migrate", source, url, -1)
    if in_child(rows_of, url) != expected:
        wrong.append("the copy is not the source")
    return wrong

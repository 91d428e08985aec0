"""Every scenario of a step, in every durability, sync and async: ours against what must be, upstream beside it."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import scenarios

# What the scenarios import. They themselves cannot be found yet where this is imported ahead.
PRELOAD = [
    "langgraph_memstate",
    "langgraph_memstate.graph.checkpointer",
    "langgraph_memstate.graph.store",
    "langgraph.func",
    "langgraph.graph",
    "langgraph.prebuilt",
    "langgraph.checkpoint.sqlite.aio",
    "langgraph.store.sqlite.aio",
]
DURABILITIES = ("sync", "async", "exit")
Cell = tuple[str, bool, str]  # scenario, sync, durability


@pytest.fixture(scope="module")
def fresh_process() -> Any:
    """Runs a function in a process of its own, forked from one that has done nothing but import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def run(function: Any, *args: Any) -> Any:
        pool: Pool
        with context.Pool(1) as pool:
            return pool.apply_async(function, args).get(timeout=120)

    return run


def cells(name: str) -> list[Cell]:
    scenario = scenarios.SCENARIOS[name]
    return [
        (name, sync, durability)
        for sync in (True, False)
        for durability in DURABILITIES
        if not scenario.skip(sync, durability)
    ]


def deviations(fresh_process: Any, side: str, name: str, path: Path) -> dict[Cell, list[str]]:
    """Play a scenario in all its cells, each phase in a new process; what differs from the expectation, by cell."""
    found: dict[Cell, list[str]] = {cell: [] for cell in cells(name)}
    for phase, expected in enumerate(scenarios.SCENARIOS[name].expect):
        work = [(str(path / f"{sync}-{durability}"), name, sync, durability, phase) for _, sync, durability in found]
        for cell, outcome in zip(found, fresh_process(scenarios.play_all, side, work), strict=True):
            if outcome != expected:
                found[cell].append(f"phase {phase}: {outcome}, not {expected}")
    return found


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_a_step_and_its_memory_land_together(name: str, fresh_process: Any, tmp_path: Path) -> None:
    wrong = {cell: faults for cell, faults in deviations(fresh_process, "memstate", name, tmp_path).items() if faults}
    assert not wrong


QUICK = ("a_node_is_retried", "a_sibling_fails", "an_interrupt_is_resumed", "a_subgraph_fails_in_its_second_step")


def quick_first(names: Iterable[str]) -> list[Any]:
    return [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in names if name not in QUICK)]


@pytest.mark.parametrize("name", quick_first(scenarios.SCENARIOS))
def test_they_land_together_on_postgres(name: str, fresh_process: Any, tmp_path: Path, postgres: Any) -> None:
    wrong = {cell: faults for cell, faults in deviations(fresh_process, postgres.uri, name, tmp_path).items() if faults}
    assert not wrong


@pytest.mark.parametrize("name", quick_first([*scenarios.SCENARIOS][::4]))
def test_they_land_together_on_redis(name: str, fresh_process: Any, tmp_path: Path, redis_server: Any) -> None:
    url = redis_server.url
    wrong = {cell: faults for cell, faults in deviations(fresh_process, url, name, tmp_path).items() if faults}
    assert not wrong


def test_the_upstream_saver_and_store_leave_ghosts(fresh_process: Any, tmp_path: Path) -> None:
    """The same scenarios on LangGraph's SQLite saver and store: the harness sees what they leave behind."""
    kept = {
        name: [not faults for faults in deviations(fresh_process, "upstream", name, tmp_path / name).values()]
        for name in scenarios.SCENARIOS
    }
    for name, good in kept.items():
        print(f"{name:52} {sum(good)} of {len(good)} right")
    everything = [good for outcome in kept.values() for good in outcome]
    print(f"{'all cells':52} {sum(everything)} of {len(everything)} right")
    assert sum(everything) < len(everything) / 2
    for name in ("plain_steps", "a_subgraph_finishes", "a_fan_out_by_send"):
        assert all(kept[name]), name  # where nothing goes wrong, the harness finds nothing

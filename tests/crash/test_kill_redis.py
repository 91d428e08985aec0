"""Kill -9 around every round trip to Redis of a graph run with memory writes; then resume and count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from census import Cell
from forks import Hosts
from test_kill_census import assert_clean, cells, census

Cells = Callable[[str, str], list[Cell]]


@pytest.fixture
def on_server(redis_server: Any) -> Cells:
    """Cells of a side and a graph, on a running server."""
    return lambda side, graph: [replace(cell, server=redis_server.url) for cell in cells(side, graph)]


def test_a_run_killed_around_its_round_trips(hosts: Hosts, quick_path: Path, on_server: Cells) -> None:
    assert_clean(census(hosts, quick_path, on_server("redis", "line"), stride=4))


@pytest.mark.slow
def test_a_run_killed_at_every_round_trip(hosts: Hosts, quick_path: Path, on_server: Cells) -> None:
    assert_clean(census(hosts, quick_path, [on_server("redis", "line")[0], on_server("redis", "fan out")[3]]))


@pytest.mark.slow
def test_a_run_killed_at_many_statements(hosts: Hosts, quick_path: Path, on_server: Cells) -> None:
    assert_clean(census(hosts, quick_path, on_server("redis sql", "line"), stride=29))

"""Kill -9 at random times: what was acknowledged is there, and nothing that nobody wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Hosts
from writers import Setup, kill_at_random

ATOMIC = Setup()
DEFERRED = Setup(vector_sync="deferred")
GRAPHS = Setup(writers=("graph-a", "graph-b", "graph-c"))
CHROMA = Setup(writers=("one", "two", "graph"), chroma=True)


def test_what_was_acknowledged_survives(hosts: Hosts, quick_path: Path) -> None:
    calls = [(str(quick_path), seed, 15, setup) for seed, setup in enumerate((ATOMIC, DEFERRED, GRAPHS, ATOMIC))]
    assert not [violation for found in hosts.map(kill_at_random, calls) for violation in found]


@pytest.mark.slow
def test_what_was_acknowledged_survives_many_deaths(hosts: Hosts, quick_path: Path) -> None:
    setups = (ATOMIC, DEFERRED, GRAPHS, CHROMA) * 2
    calls = [(str(quick_path), 100 + seed, 25, setup) for seed, setup in enumerate(setups)]
    assert not [violation for found in hosts.map(kill_at_random, calls) for violation in found]

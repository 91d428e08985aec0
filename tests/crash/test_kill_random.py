"""Kill -9 at random times: what was acknowledged is there, and nothing that nobody wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forks import Hosts
from journal_hook import JournalHook
from writers import Setup, kill_at_random

from langgraph_memstate.hooks.base import IndexSpec, IndexState, VectorRecord

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


def test_a_line_that_a_kill_tore_was_not_written(quick_path: Path) -> None:
    path, spec = quick_path / "index.journal", IndexSpec("store", 1, 2, "words")
    hook = JournalHook(path)
    hook.reset(spec)
    header = path.read_bytes()
    hook.apply([VectorRecord("a", np.ones(2, dtype=np.float32), ("notes",))], [])
    one = path.read_bytes()
    hook.apply([VectorRecord("b", np.ones(2, dtype=np.float32), ("notes",))], [])
    hook.close()
    path.write_bytes(path.read_bytes()[:-5])
    assert hook.open(spec) is IndexState.OK
    assert list(hook.ids()) == ["a"]
    assert path.read_bytes() == one
    hook.close()
    path.write_bytes(header[:-5])
    assert hook.open(spec) is IndexState.EMPTY

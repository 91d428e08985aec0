"""Kill -9 at every SQL statement of a rollback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forks import Hosts
from rollbacks import kill_everywhere
from writers import Setup

SCRIPTS = pytest.mark.parametrize("script", ["rollback", "node"])


def kill(hosts: Hosts, path: Path, script: str, first: int, stride: int) -> int:
    """Assert that each death left the old or the new; returns how many there were."""
    calls = [(str(path), Setup((), mode), script, first, stride) for mode in ("atomic", "deferred")]
    total = 0
    for deaths, violations in hosts.map(kill_everywhere, calls):
        assert not violations
        total += deaths
    print(f"\n{script}: {total} deaths")
    return total


@SCRIPTS
def test_a_killed_rollback_is_whole_or_absent(hosts: Hosts, quick_path: Path, script: str) -> None:
    assert kill(hosts, quick_path, script, 1, 20) > 20


@pytest.mark.slow
@SCRIPTS
def test_a_rollback_killed_at_more_statements(hosts: Hosts, quick_path: Path, script: str) -> None:
    """At all of them with ``EVERY_STATEMENT=1``, which takes minutes."""
    first, stride = (1, 1) if os.environ.get("EVERY_STATEMENT") else (5, 10)
    assert kill(hosts, quick_path, script, first, stride) > 300 // stride

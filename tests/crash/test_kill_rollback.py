"""Kill -9 at every SQL statement of a rollback."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Hosts
from rollbacks import kill_everywhere
from writers import Setup


@pytest.mark.parametrize("script", ["rollback", "node"])
def test_a_killed_rollback_is_whole_or_absent(hosts: Hosts, quick_path: Path, script: str) -> None:
    calls = [(str(quick_path), Setup((), mode), script, first, 6) for first, mode in ((1, "atomic"), (4, "deferred"))]
    total = 0
    for deaths, violations in hosts.map(kill_everywhere, calls):
        assert not violations
        total += deaths
    print(f"\n{script}: {total} deaths")
    assert total > 20


@pytest.mark.slow
@pytest.mark.parametrize("script", ["rollback", "node"])
def test_a_rollback_killed_at_every_statement(hosts: Hosts, quick_path: Path, script: str) -> None:
    halves = [
        (str(quick_path), Setup((), mode), script, first, 2) for first in (1, 2) for mode in ("atomic", "deferred")
    ]
    total = 0
    for deaths, violations in hosts.map(kill_everywhere, halves):
        assert not violations
        total += deaths
    print(f"\n{script}: {total} deaths")
    assert total > 200

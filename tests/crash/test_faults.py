"""A fault before and after every operation of the seams, and in every SQL statement, once and for ever."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from forks import Hosts
from seams import KINDS, STATEMENTS, Kind, fail_everywhere, fail_while_recovering

MODES = ("atomic", "deferred")


def run(hosts: Hosts, path: Path, scripts: Sequence[str], kinds: Sequence[Kind], stride: int = 1) -> None:
    calls = [
        (fail_everywhere, str(path), script, kind, mode, stride)
        for script in scripts
        for kind in kinds
        for mode in MODES
    ]
    outcomes = hosts.check(calls)
    for call, (struck, violations) in zip(calls, outcomes, strict=True):
        print(f"{call[2]:8} {call[3].name:22} {call[4]:8} {struck:4} faults, {len(violations)} violations")
    assert not [violation for _, violations in outcomes for violation in violations]
    assert all(struck > 5 for struck, _ in outcomes)


def test_faults_of_calls(hosts: Hosts, quick_path: Path) -> None:
    run(hosts, quick_path, ["facts", "upkeep", "line"], KINDS)


def test_faults_of_statements(hosts: Hosts, quick_path: Path) -> None:
    run(hosts, quick_path, ["facts", "upkeep", "line"], STATEMENTS, stride=5)


def test_faults_during_recovery(hosts: Hosts, quick_path: Path) -> None:
    calls = [
        (fail_while_recovering, str(quick_path), kind, mode, left_at)
        for kind in KINDS[1:3]
        for mode in MODES
        for left_at in ((30, 45), (60, 75))
    ]
    outcomes = hosts.check(calls)
    assert not [violation for _, violations in outcomes for violation in violations]
    assert sum(struck for struck, _ in outcomes) > 50


@pytest.mark.slow
def test_faults_of_every_statement(hosts: Hosts, quick_path: Path) -> None:
    run(hosts, quick_path, ["facts", "upkeep", "line", "fan out"], STATEMENTS)


@pytest.mark.slow
def test_faults_of_calls_in_a_fan_out(hosts: Hosts, quick_path: Path) -> None:
    run(hosts, quick_path, ["fan out"], KINDS)

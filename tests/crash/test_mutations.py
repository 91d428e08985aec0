"""The tests of this folder can fail: each seeded bug is found by a check, and without it the check finds nothing."""

from __future__ import annotations

from pathlib import Path

from forks import Hosts
from mutations import CHECKS, MUTATIONS, find


def test_every_seeded_bug_is_found(hosts: Hosts, quick_path: Path) -> None:
    found = hosts.check([(find, str(quick_path), number) for number in range(len(MUTATIONS))])
    for mutation, violations in zip(MUTATIONS, found, strict=True):
        print(f"{mutation.name:60} {mutation.check.__name__:22} {len(violations):4}", str(violations[:1])[:150])
    assert not [mutation.name for mutation, violations in zip(MUTATIONS, found, strict=True) if not violations]


def test_without_a_bug_nothing_is_found(hosts: Hosts, quick_path: Path) -> None:
    found = hosts.check([(check, str(quick_path)) for check in CHECKS])
    assert not [violation for violations in found for violation in violations]

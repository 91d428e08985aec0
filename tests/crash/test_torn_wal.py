"""A torn or garbled write-ahead log, as power loss leaves it."""

from __future__ import annotations

from pathlib import Path

from forks import Hosts
from torn import cut, garble


def test_a_log_that_was_cut(hosts: Hosts, quick_path: Path) -> None:
    outcomes = hosts.check([(cut, str(quick_path), first, 2) for first in range(2)])
    assert not [violation for _, violations in outcomes for violation in violations]
    assert sum(images for images, _ in outcomes) > 300


def test_a_log_that_was_garbled(hosts: Hosts, quick_path: Path) -> None:
    outcomes = hosts.check([(garble, str(quick_path), seed, 200) for seed in range(2)])
    assert not [violation for _, violations in outcomes for violation in violations]

"""Kill -9 at every SQL statement, ours beside LangGraph's SQLite saver and store; then resume and count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from census import DURABILITIES, Cell, Count, take_census
from forks import Hosts
from writers import KINDS, Setup, kill_during_upkeep, kill_everywhere


def cells(side: str, graph: str, vector_sync: str = "atomic") -> list[Cell]:
    return [Cell(side, graph, sync, durability, vector_sync) for sync in (True, False) for durability in DURABILITIES]


def census(
    hosts: Hosts, path: Path, cells: Sequence[Cell], phase: int = 0, stride: int = 1
) -> list[tuple[Cell, Count]]:
    """Take a census of every cell and print it. With a stride, each cell starts at another point."""
    calls = [(cell, str(path), phase, 1 + n % stride, stride) for n, cell in enumerate(cells)]
    counts = list(zip(cells, hosts.map(take_census, calls), strict=True))
    print(f"\n{'':53} deaths   bad  ghosts  losses  duplicates  index and SQL")
    for cell, count in counts:
        print(
            f"{cell!s:53} {count.deaths:6} {count.bad_deaths:5} {count.ghosts:7} {count.losses:7} "
            f"{count.duplicates:11} {len(count.violations):14}"
        )
    return counts


def assert_clean(counts: Iterable[tuple[Cell, Count]]) -> None:
    wrong = [(str(cell), count) for cell, count in counts if not count.clean]
    assert not wrong
    assert all(count.deaths > 5 for _, count in counts)


def test_a_killed_run_leaves_state_memory_and_index_in_agreement(hosts: Hosts, quick_path: Path) -> None:
    assert_clean(census(hosts, quick_path, cells("memstate", "line"), stride=5))


@pytest.mark.slow
def test_a_run_killed_at_every_statement(hosts: Hosts, quick_path: Path) -> None:
    assert_clean(census(hosts, quick_path, cells("memstate", "line")[:3]))


def test_the_upstream_saver_and_store_do_not_agree_after_a_kill(hosts: Hosts, quick_path: Path) -> None:
    """The census sees what there is to see."""
    counts = [count for _, count in census(hosts, quick_path, cells("upstream", "line"))]
    assert all(count.bad_deaths and count.ghosts for count in counts)
    assert sum(count.losses for count in counts)
    assert sum(count.duplicates for count in counts)


@pytest.mark.parametrize("phase", [0, 1], ids=["first run", "resume"])
def test_a_killed_fan_out_keeps_what_finished_beside_a_failure(hosts: Hosts, quick_path: Path, phase: int) -> None:
    assert_clean(census(hosts, quick_path, cells("memstate", "fan out"), phase, stride=6))


def test_a_killed_run_with_chroma(hosts: Hosts, quick_path: Path) -> None:
    assert_clean(census(hosts, quick_path, cells("chroma", "line")[:2], stride=15))


def test_a_memory_killed_between_its_first_open_and_its_close(hosts: Hosts, quick_path: Path) -> None:
    calls = [(str(quick_path), Setup(("one",), mode), KINDS, 2) for mode in ("atomic", "deferred")]
    for deaths, violations in hosts.map(kill_everywhere, calls):
        assert not violations
        assert deaths > 50


def test_pruning_and_deleting_a_thread_is_whole_or_absent(hosts: Hosts, quick_path: Path) -> None:
    deaths, violations = hosts.run(kill_during_upkeep, str(quick_path))
    assert not violations
    assert deaths > 10


@pytest.mark.slow
@pytest.mark.parametrize("phase", [0, 1], ids=["first run", "resume"])
def test_a_killed_fan_out_at_many_statements(hosts: Hosts, quick_path: Path, phase: int) -> None:
    assert_clean(census(hosts, quick_path, cells("memstate", "fan out"), phase, stride=3 + phase))
    upstream = [count for _, count in census(hosts, quick_path, cells("upstream", "fan out")[:3], phase)]
    assert all(count.bad_deaths for count in upstream)


@pytest.mark.slow
def test_a_killed_run_whose_index_follows_later(hosts: Hosts, quick_path: Path) -> None:
    assert_clean(census(hosts, quick_path, cells("memstate", "line", "deferred"), stride=4))


@pytest.mark.slow
def test_a_killed_run_with_chroma_in_every_durability(hosts: Hosts, quick_path: Path) -> None:
    both = [*cells("chroma", "line"), *cells("chroma", "line", "deferred")]
    assert_clean(census(hosts, quick_path, both, stride=13))

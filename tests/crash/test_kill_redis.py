"""Kill -9 around every round trip to Redis of a graph run with memory writes; then resume and count."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from census import SERVER
from forks import Hosts
from test_kill_census import assert_clean, cells, census


@pytest.fixture(scope="module")
def redis_hosts(redis_server: Any) -> Iterator[Hosts]:
    """Processes that know the server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, SERVER, redis_server.url)
        with Hosts(2) as running:
            yield running


def test_a_run_killed_around_its_round_trips(redis_hosts: Hosts, quick_path: Path) -> None:
    assert_clean(census(redis_hosts, quick_path, cells("redis", "line"), stride=4))


@pytest.mark.slow
def test_a_run_killed_at_every_round_trip(redis_hosts: Hosts, quick_path: Path) -> None:
    assert_clean(census(redis_hosts, quick_path, [cells("redis", "line")[0], cells("redis", "fan out")[3]]))


@pytest.mark.slow
def test_a_run_killed_at_many_statements(redis_hosts: Hosts, quick_path: Path) -> None:
    assert_clean(census(redis_hosts, quick_path, cells("redis sql", "line"), stride=41))

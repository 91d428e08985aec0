"""Kill -9 while a memory moves: what is left is not taken for the memory, and the next try brings all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forks import Hosts
from moving import kill_all_over, kill_on_a_server, make_langgraph, make_memory

MAKERS = {"migrate": make_memory, "import": make_langgraph}


def _kill(hosts: Hosts, path: Path, kind: str, points: int) -> list[str]:
    source = str(path / "source.db")
    hosts.check([(MAKERS[kind], source)])
    (wrong,) = hosts.map(kill_all_over, [(kind, source, str(path / "copy"), points)])
    return list(wrong)


@pytest.mark.parametrize("kind", MAKERS)
def test_killed_at_some_points(hosts: Hosts, quick_path: Path, kind: str) -> None:
    assert _kill(hosts, quick_path, kind, 8) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_killed_at_many_points(hosts: Hosts, quick_path: Path, kind: str) -> None:
    assert _kill(hosts, quick_path, kind, 60) == []


def test_killed_again_and_again_on_a_server(hosts: Hosts, quick_path: Path, postgres: Any) -> None:
    source = str(quick_path / "source.db")
    hosts.check([(make_memory, source)])
    with postgres.database() as url:
        (wrong,) = hosts.map(kill_on_a_server, [(source, url, [25, 35, 50])])
    assert wrong == []

"""Fixtures that any test may use: a memory on a SQLite file and one in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langgraph_memstate import MemoryStore

pytest.register_assert_rewrite("langgraph_memstate.testing")  # the contracts say what differs


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A path for a database of the test's own; no file is there yet."""
    return tmp_path / "memory.db"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server, started once; see `postgres_server.Server`."""
    pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")
    sys.path.insert(0, str(Path(__file__).parent))
    from postgres_server import running

    with running() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Any]:
    """A Redis server, started once; see `redis_server.Server`."""
    pytest.importorskip("redis", reason="the extra [redis] is not installed")
    sys.path.insert(0, str(Path(__file__).parent))
    from redis_server import running

    with running() as server:
        yield server


SERVERS = {"postgres": "postgres", "redis": "redis_server"}


@pytest.fixture(params=["file", "in-memory", *(pytest.param(name, marks=pytest.mark.slow) for name in SERVERS)])
def url(request: pytest.FixtureRequest, database: Path) -> Iterator[str]:
    """What `MemoryStore.open` takes: a SQLite file, then ``:memory:``, and a PostgreSQL and a Redis server."""
    if request.param in SERVERS:
        with request.getfixturevalue(SERVERS[request.param]).default() as fresh:
            yield fresh
    else:
        yield str(database) if request.param == "file" else ":memory:"


@pytest.fixture
def memory(url: str) -> Iterator[MemoryStore]:
    """A memory without an index, on a SQLite file and on ``:memory:``."""
    with MemoryStore.open(url) as opened:
        yield opened


@pytest.fixture
def file_memory(database: Path) -> Iterator[MemoryStore]:
    """A memory without an index on a SQLite file, for tests that need the file."""
    with MemoryStore.open(database) as opened:
        yield opened

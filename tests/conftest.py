"""Fixtures that any test may use: a memory on a SQLite file and one in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from langgraph_memstate import MemoryStore


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A path for a database of the test's own; no file is there yet."""
    return tmp_path / "memory.db"


@pytest.fixture(params=["file", "in-memory"])
def url(request: pytest.FixtureRequest, database: Path) -> str:
    """What `MemoryStore.open` takes: a SQLite file, and then ``:memory:``."""
    return str(database) if request.param == "file" else ":memory:"


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

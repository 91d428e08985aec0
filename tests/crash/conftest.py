"""Processes to kill, and a file system on which a sync costs nothing: kill -9 cannot tell the difference."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forks import Hosts


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Two processes that have imported everything, run no thread, and fork the processes that are killed."""
    with Hosts(2) as running:
        yield running


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """A directory in memory where there is one, else on disk."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="memstate-", dir=shared if shared.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)

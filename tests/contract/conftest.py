"""Folders on a file system where a sync costs nothing: the contracts kill processes, not machines."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one, else on disk."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="memstate-", dir=shared if shared.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)

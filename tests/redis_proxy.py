"""A line to Redis that breaks at an entry of the log, or at what else a test names."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from line import Line

APPEND = b"*11\r\n$7\r\nEVALSHA"  # with an entry and its id; to look takes nine words
CHUNK = b"*3\r\n$5\r\nRPUSH"  # of an image
IMAGE = b"*16\r\n$7\r\nEVALSHA"


class RedisLine(Line):
    """A line to a server's port. It breaks at a call that `starts` so."""

    def __init__(self, port: int) -> None:
        self.starts = APPEND
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        super().__init__(listener, lambda: socket.create_connection(("127.0.0.1", port)))

    def is_awaited(self, request: bytes) -> bool:
        return request.startswith(self.starts)


@contextmanager
def line_to(port: int) -> Iterator[RedisLine]:
    line = RedisLine(port)
    try:
        yield line
    finally:
        line.close()

"""A line to a server that breaks at the worst moment: as a request goes out, or before the answer comes back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

When = Literal["before", "after"]


class Line:
    """Forwards the connections of a listener.

    `breaks`: the next request that `is_awaited` is lost, or its answer is. `is_down`: nobody gets through any more.
    `trips`: how often something was sent after an answer, or first of all.
    """

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self.breaks: When | None = None
        self.is_down = False
        self.broken = 0
        self.trips = 0
        self._listener = listener
        self._connect = connect
        self._sockets: list[socket.socket] = [listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def is_awaited(self, request: bytes) -> bool:
        """Whether what is sent is the request that the line waits for to break."""
        raise NotImplementedError

    def is_request(self, sent: bytes) -> bool:
        """Whether what is sent has an answer."""
        return True

    def answer(self, sent: bytes) -> bytes:
        """What the client gets of what the server has sent."""
        return sent

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
            try:
                server = None if self.is_down else self._connect()
            except OSError:
                server = None
            if server is None:
                client.close()
                continue
            self._sockets += [client, server]
            answered, cut = threading.Event(), threading.Event()
            answered.set()
            for forward in (self._forward_requests, self._forward_answers):
                threading.Thread(target=forward, args=(client, server, answered, cut), daemon=True).start()

    def _forward_requests(
        self, client: socket.socket, server: socket.socket, answered: threading.Event, cut: threading.Event
    ) -> None:
        with suppress(OSError):
            while sent := client.recv(1 << 20):
                if answered.is_set() and self.is_request(sent):
                    answered.clear()
                    self.trips += 1
                if self.breaks is not None and self.is_awaited(sent):
                    when, self.breaks = self.breaks, None
                    self.broken += 1
                    cut.set()  # first: the server may answer before the client is cut off
                    if when == "after":
                        server.sendall(sent)
                    client.shutdown(socket.SHUT_RDWR)
                    break  # the server may go on with what it got
                server.sendall(sent)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _forward_answers(
        self, client: socket.socket, server: socket.socket, answered: threading.Event, cut: threading.Event
    ) -> None:
        with suppress(OSError):
            while (sent := server.recv(1 << 20)) and not cut.is_set():
                answered.set()
                client.sendall(self.answer(sent))
        with suppress(OSError):
            client.shutdown(socket.SHUT_WR)

"""Runs functions in processes that may be killed, forked from one that has imported everything and runs no thread."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import select
import signal
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NoReturn

PRELOAD = (
    "langgraph_memstate",
    "langgraph_memstate.hooks.chroma",
    "langgraph_memstate.storage.redis",
    "chromadb",
    "langgraph.graph",
    "langgraph.checkpoint.sqlite.aio",
    "langgraph.store.sqlite.aio",
)


class Killed:
    """What a call in a child comes to when the child is killed."""

    def __repr__(self) -> str:
        return "killed"


KILLED = Killed()


def in_child(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> Any:
    """The result of a call in a forked process, or `KILLED`. The caller must run a single thread."""
    child, receiver = fork(function, *args)
    sent = read_all(receiver, time.monotonic() + timeout)
    if sent is None:
        os.kill(child, signal.SIGKILL)
    outcome = wait_for(child)
    if sent is None:
        raise TimeoutError(f"{function.__name__}{args} did not end within {timeout} s")
    if outcome == -signal.SIGKILL:
        return KILLED
    if outcome or not sent:
        raise RuntimeError(f"{function.__name__}{args} died with status {outcome}")
    ok, result = pickle.loads(sent)
    if not ok:
        raise RuntimeError(f"{function.__name__}{args} failed:\n{result}")
    return result


def fork(function: Callable[..., Any], *args: Any, send: bool = False) -> tuple[int, int]:
    """Start a call in a forked process; returns its pid and the end of a pipe that its result comes through.

    With `send`, the call gets the other end as its first argument and nothing but what it writes comes through.
    """
    if threading.active_count() > 1:
        raise RuntimeError("a process with threads must not fork")
    receiver, sender = os.pipe()
    child = os.fork()
    if child:
        os.close(sender)
        return child, receiver
    os.close(receiver)
    try:
        if send:
            function(sender, *args)
        else:
            write_all(sender, pickle.dumps((True, function(*args))))
    except BaseException:
        if send:
            traceback.print_exc()
            os._exit(1)
        write_all(sender, pickle.dumps((False, traceback.format_exc())))
    os._exit(0)


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_all(receiver: int, deadline: float) -> bytes | None:
    """Everything until the pipe is closed; None if that is not before the deadline."""
    parts: list[bytes] = []
    try:
        while True:
            ready, _, _ = select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            part = os.read(receiver, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(receiver)


def write_all(sender: int, content: bytes) -> None:
    while content:
        content = content[os.write(sender, content) :]


class KillSwitch:
    """Kills this process at its point number `at`; until it is armed, nothing is counted."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._lock = threading.Lock()
        self.passed = 0
        self.armed = False

    def point(self, *_: object) -> None:
        if not self.armed:
            return
        with self._lock:
            self.passed += 1
            if self.passed == self._at:
                kill_this_process()

    def watch_sqlite(self) -> None:
        """Make every SQL statement of connections opened from now on a point, just before it runs."""
        connect = sqlite3.connect

        def watched(*args: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*args, **options)
            connection.set_trace_callback(self.point)
            return connection

        sqlite3.connect = watched  # type: ignore[assignment]

    def watch_redis(self) -> None:
        """Make a point of the moment before each round trip to Redis, and of that after."""
        from langgraph_memstate.storage.redis_link import Link

        inner = Link._with_connection

        def watched(link: Link, call: Callable[[Any], Any]) -> Any:
            self.point()
            answer = inner(link, call)
            self.point()
            return answer

        Link._with_connection = watched  # type: ignore[method-assign]


def kill_this_process() -> NoReturn:
    """End at once: no `finally`, no `atexit`, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(1)


class Hosts:
    """Processes that run functions one at a time and may fork."""

    def __init__(self, count: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self._count = count
        self._free: SimpleQueue[tuple[Any, Connection]] = SimpleQueue()
        self._all: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Hosts:
        for _ in range(self._count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._all.append((process, ours))
            self._free.put((process, ours))
        return self

    def __exit__(self, *exc: object) -> None:
        for process, connection in self._all:
            connection.close()
            process.join()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in a host that is free."""
        host = self._free.get()
        try:
            host[1].send((function, args))
            ok, result = host[1].recv()
        finally:
            self._free.put(host)
        if not ok:
            raise AssertionError(result)
        return result

    def check(self, calls: Sequence[tuple[Any, ...]]) -> list[tuple[int, list[str]]]:
        """Call checks, each with its arguments, in processes of their own, which may start threads."""
        return self.map(_in_patience, calls)

    def map(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Spread calls over the hosts; results in the order of the calls."""
        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(lambda args: self.run(function, *args), calls))


def _in_patience(function: Callable[..., Any], *args: Any) -> Any:
    return in_child(function, *args, timeout=600.0)


def _serve(connection: Connection) -> None:
    gc.freeze()  # forks then copy fewer pages
    logging.disable(logging.CRITICAL)  # what the killed leave behind is told by results
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)

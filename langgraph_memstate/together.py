"""Calls that tasks of one event loop make at the same moment share a thread.

To hand a call to a thread and back takes longer than most commits, and the threads of many calls wait for each other
besides. So the calls that come until a thread has started are made by that one: first each queues its commit, then the
thread waits for all of them, which land in one transaction. None waits for a thread that is under way already: what
LangGraph saves in the background keeps its order.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable
from contextlib import suppress

from langgraph_memstate.commit import Landing

_MOST = 256  # calls at a time: their transaction keeps other writers waiting


class _Call:
    """One call, and what became of it once `done`."""

    __slots__ = ("_begin", "_context", "_landing", "done", "error")

    def __init__(self, begin: Callable[[], Landing | None], done: Future[None]) -> None:
        self.done = done
        self.error: BaseException | None = None
        self._begin = begin
        self._context = contextvars.copy_context()
        self._landing: Landing | None = None

    def begin(self) -> None:
        try:
            self._landing = self._context.run(self._begin)
        except BaseException as error:  # raised where the call was made
            self.error = error

    def wait(self) -> None:
        try:
            if self._landing is not None:
                self._landing.wait()
        except BaseException as error:
            self.error = error


class Together:
    """Collects the calls of each event loop until the thread that makes them has started.

    Args:
        submit: runs a function in a thread, or raises why it does not.
    """

    def __init__(self, submit: Callable[[Callable[[], None]], object]) -> None:
        self._submit = submit
        self._collected: dict[AbstractEventLoop, list[_Call]] = {}
        self._lock = threading.Lock()

    async def land(self, begin: Callable[[], Landing | None]) -> None:
        """Return once the commit that `begin` queues is durable. It runs in the caller's context, and must not wait.

        Cancelling the await does not take the call back: its outcome is then unknown, but whole.
        """
        loop = asyncio.get_running_loop()
        call = _Call(begin, loop.create_future())
        with self._lock:
            is_first = loop not in self._collected
            self._collected.setdefault(loop, []).append(call)
        if is_first:
            try:
                self._submit(functools.partial(self._run, loop))
            except BaseException:
                self._take(loop)  # nobody else has called yet
                raise
        await call.done
        if call.error is not None:
            raise call.error

    def _take(self, loop: AbstractEventLoop) -> list[_Call]:
        with self._lock:
            return self._collected.pop(loop)

    def _run(self, loop: AbstractEventLoop) -> None:
        calls = self._take(loop)
        for first in range(0, len(calls), _MOST):
            _land(calls[first : first + _MOST], loop)


def _land(calls: list[_Call], loop: AbstractEventLoop) -> None:
    for call in calls:
        call.begin()
    for call in reversed(calls):  # the last to be queued is the last to land: to wait for it is to wait for all
        call.wait()
    with suppress(RuntimeError):  # the loop is closed: nobody awaits them any more
        loop.call_soon_threadsafe(_wake, calls)


def _wake(calls: list[_Call]) -> None:
    for call in calls:
        if not call.done.done():  # else its caller was cancelled
            call.done.set_result(None)

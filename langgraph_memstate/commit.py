"""The writer: one commit or group of commits at a time, many waiting callers that share a transaction.

A caller that finds nothing waiting lands its commit itself: handing it to another thread and back takes as long as the
sync. What comes meanwhile waits in a queue, and a thread lands all that is waiting in one transaction, each whole or
not at all, so that concurrent callers share one fsync (group commit, DeWitt et al. 1984). A call returns, and a future
resolves, only after the transaction is durable. LangGraph saves the writes of a task in the background and, soon after
that of the last one, the step: such writes wait for each other and for their step, where that has paid off.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from langgraph_memstate.errors import StorageClosedError
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Commit, PutWrites, Stage, Unstage

_MAX_GROUP = 256  # bounds how long the first caller of a group waits for the last
_PATIENCE = 0.002  # seconds that a task's writes wait for company
_DISCOURAGED = 8  # groups that do not wait after one that waited in vain

_Queued = tuple[Commit, "Future[None]"]


class Writer:
    """Lands commits of a storage in the order they were submitted."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._closed = False
        self._discouraged = 0
        self._unsettled = 0  # commits that have not landed or failed yet
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # to write
        self._thread = threading.Thread(target=self._run, name="memstate-writer", daemon=True)
        self._thread.start()

    def submit(self, commit: Commit) -> Future[None]:
        """Queue a commit. The future's error is of our tree, and says that nothing of the commit landed.

        Cancelling the future does not take the commit back: its outcome is then unknown, but whole.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._check_open()
            self._unsettled += 1
            self._queue.put((commit, future))
        return future

    def land(self, commit: Commit) -> None:
        """Land a commit, after all that were submitted before. Raises what `submit`'s future would."""
        with self._lock:
            self._check_open()
            alone = self._unsettled == 0 and not _is_of_a_task(commit)
            self._unsettled += alone
        if not alone:
            self.submit(commit).result()
            return
        try:
            with self._turn:
                (outcome,) = self._storage.apply((commit,))
        finally:
            with self._lock:
                self._unsettled -= 1
        if outcome is not None:
            raise outcome

    def alone(self, call: Callable[[], None]) -> None:
        """Run something while nothing is written."""
        with self._lock:
            self._check_open()
        with self._turn:
            call()

    def _check_open(self) -> None:
        if self._closed:
            raise StorageClosedError("the memory is closed; open it again")

    def close(self) -> None:
        """Land what is queued, then stop. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._turn.acquire()  # a caller may still be landing its own commit
            self._turn.release()

    def _run(self) -> None:
        while True:
            entry = self._queue.get()
            if entry is None:
                return
            with self._turn:
                group, last = self._take_waiting(entry)
                self._land(group)
            if last:
                return

    def _take_waiting(self, first: _Queued) -> tuple[list[_Queued], bool]:
        """What is to land with a commit, and whether the writer is to stop then."""
        group = [first]
        patience = 0.0 if self._discouraged else _PATIENCE
        self._discouraged = max(0, self._discouraged - 1)
        deadline = time.monotonic() + patience
        waits = True
        while len(group) < _MAX_GROUP:
            waits = waits and _is_of_a_task(group[-1][0])
            try:
                entry = self._queue.get(timeout=max(0.0, deadline - time.monotonic()) if waits else 0.0)
            except queue.Empty:
                if len(group) == 1 and waits and patience:
                    self._discouraged = _DISCOURAGED
                break
            if entry is None:
                return group, True
            group.append(entry)
        return group, False

    def _land(self, group: Sequence[_Queued]) -> None:
        try:
            outcomes = self._storage.apply([commit for commit, _ in group])
        except BaseException as error:  # whatever it is, the callers must learn of it
            outcomes = [error] * len(group)
        with self._lock:
            self._unsettled -= len(group)
        for (_, future), outcome in zip(group, outcomes, strict=True):
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)


def _is_of_a_task(commit: Commit) -> bool:
    return all(isinstance(op, (PutWrites, Stage, Unstage)) for op in commit)

"""The writer: one commit or group of commits at a time, many waiting callers that share a transaction.

Callers land what they bring themselves: handing it to another thread and back takes as long as the sync. One that finds
nobody writing lands its commit at once. Those that come meanwhile queue, and the first of them then lands all that is
waiting in one transaction, each commit whole or not at all, so that concurrent callers share one fsync (group commit,
DeWitt et al. 1984). A call returns, and a future resolves, only after the transaction is durable.

LangGraph saves the writes of a task in the background and, soon after that of the last one, the step: such writes wait
for each other and for their step, no longer than landing them alone takes, and where that has paid off.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from langgraph_memstate.errors import StorageClosedError, StorageError
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Commit, PutWrites, Stage, Unstage

_PATIENCE = 0.002  # seconds that a task's writes wait for company, at most
_DISCOURAGED = 8  # of a task's writes do not wait, after some that waited in vain


class Landing:
    """A commit on its way. Whoever queued it waits for it, or others may have to land it for them."""

    __slots__ = ("_called", "_writer", "commit", "is_settled", "outcome", "waits")

    def __init__(self, writer: Writer, commit: Commit) -> None:
        self.commit = commit
        self.is_settled = False
        self.outcome: BaseException | None = None
        self.waits = False
        """whether its caller can be called to land what is queued"""
        self._writer = writer
        self._called = threading.Lock()
        self._called.acquire()

    def wait(self) -> None:
        """Return once the commit is durable, or raise why nothing of it landed."""
        if not self.is_settled:
            self._writer.see_through(self)
        if self.outcome is not None:
            raise self.outcome

    def settle(self, outcome: BaseException | None) -> None:
        self.outcome = outcome
        self.is_settled = True
        self.call()

    def call(self) -> None:
        """Wake the caller: its commit has settled, or it is its turn to write."""
        with suppress(RuntimeError):  # it has been called already, and is not asleep
            self._called.release()

    def sleep(self, timeout: float = -1) -> None:
        """Until it is called."""
        self._called.acquire(timeout=timeout)


class Writer:
    """Lands commits of a storage in the order they were queued."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._queue: deque[Landing] = deque()
        self._leader: Landing | None = None  # whose caller writes, or is called to
        self._closed = False
        self._discouraged = 0
        self._took = _PATIENCE  # seconds that the last group needed
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # to write
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="memstate-writer")

    def enqueue(self, commit: Commit) -> Landing:
        """Queue a commit, which whoever queued it must then wait for."""
        with self._lock:
            return self._add(commit)

    def _add(self, commit: Commit) -> Landing:
        self._check_open()
        landing = Landing(self, commit)
        self._queue.append(landing)
        return landing

    def land(self, commit: Commit) -> None:
        """Land a commit, after all that were queued before.

        Raises why nothing of it landed: an error of our tree.
        """
        self.enqueue(commit).wait()

    def submit(self, commit: Commit) -> Future[None]:
        """The same in the background.

        Cancelling the future does not take the commit back: its outcome is then unknown, but whole.
        """
        with self._lock:
            return self._background.submit(self._add(commit).wait)

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
            self._closed = True
        self._background.shutdown()
        self._land_waiting()

    # -- whose turn it is ---------------------------------------------------------------------------

    def see_through(self, landing: Landing) -> None:
        """Wait until a queued commit has settled, and land it with all that waits if nobody else does."""
        patience = self._patience(landing)
        try:
            if patience:
                landing.sleep(patience)
            if not landing.is_settled and not self._leads(landing):
                landing.sleep()
            if not landing.is_settled:
                landed = self._land_waiting()
                if patience and landed == 1:
                    self._discouraged = _DISCOURAGED
        finally:
            with self._lock:
                landing.waits = False
                if self._leader is landing:
                    self._leader = next((one for one in self._queue if one.waits), None)
                    if self._leader is not None:
                        self._leader.call()

    def _patience(self, landing: Landing) -> float:
        """How long to wait for company, in seconds."""
        if self._leader is not None or not _is_of_a_task(landing.commit):
            return 0.0
        if self._discouraged:
            self._discouraged -= 1
            return 0.0
        return min(_PATIENCE, self._took)

    def _leads(self, landing: Landing) -> bool:
        with self._lock:
            landing.waits = True
            if self._leader is None:
                self._leader = landing
            return self._leader is landing

    def _land_waiting(self) -> int:
        """Land all that is queued by now; returns how many commits that were."""
        group: list[Landing] = []
        outcomes: Sequence[BaseException | None] | None = None
        with self._turn:
            try:
                with self._lock:
                    group += self._queue
                    self._queue.clear()
                if group:
                    outcomes = self._land(group)
            except Exception as error:  # whatever it is, the callers must learn of it
                outcomes = [error] * len(group)
            finally:
                if outcomes is None:  # by Ctrl-C, which goes on in the caller that writes
                    outcomes = [_interrupted()] * len(group)
                for landing, outcome in zip(group, outcomes, strict=True):
                    landing.settle(outcome)
            return len(group)

    def _land(self, group: Sequence[Landing]) -> Sequence[BaseException | None]:
        start = time.monotonic()
        try:
            return self._storage.apply([landing.commit for landing in group])
        finally:
            self._took = time.monotonic() - start


def _is_of_a_task(commit: Commit) -> bool:
    return all(isinstance(op, (PutWrites, Stage, Unstage)) for op in commit)


def _interrupted() -> StorageError:
    return StorageError("the thread that was writing was interrupted: whether this commit landed is unknown")

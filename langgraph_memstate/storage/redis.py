"""Redis: a log of commits that every process follows into a database of its own.

Redis holds the truth as a list of commits, and each process what they come to: a SQLite database, on which every reader
works. A commit is run on that, appended to the list if nobody was faster (else the process catches up and runs it
again), and then kept; all processes run the same commits in the same order, so they hold the same rows. That is
state machine replication (Schneider 1990) over a shared log, as in Tango (Balakrishnan et al., SOSP 2013). Before every
snapshot a process asks for what it has missed, so a read sees each commit that was confirmed before it began.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

try:
    import redis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "RedisStorage needs redis, which is not installed: pip install 'langgraph-memstate[redis]'"
    ) from error

from langgraph_memstate.errors import (
    CorruptRowError,
    DatabaseOpenError,
    LostCommitsError,
    MemStateError,
    StorageClosedError,
    StorageError,
    TransientError,
)
from langgraph_memstate.storage.base import Reader, Storage
from langgraph_memstate.storage.op_codec import dump_commit
from langgraph_memstate.storage.operations import Commit
from langgraph_memstate.storage.redis_link import Link
from langgraph_memstate.storage.redis_log import (
    LARGEST,
    Answer,
    Head,
    ImageReplaced,
    Position,
    RedisLog,
    dump_entry,
    load_entry,
    position_in,
)
from langgraph_memstate.storage.redis_server import check_server, rewrite_append_only_file
from langgraph_memstate.storage.redis_view import MARKS, View, deflated, forgets, inflate, new_folder, scratch
from langgraph_memstate.storage.sqlite import storage_error

logger = logging.getLogger("langgraph_memstate")

IMAGE_AFTER = 2_000_000  # bytes of log that are read again sooner than an image
ENTRY_COST = 1_000  # bytes that take as long to read as it takes to run an entry
_BETWEEN = 100  # entries, at least, from one attempt at an image to the next

T = TypeVar("T")
_Outcomes = list[BaseException | None]


class RedisStorage(Storage):
    """A memory in Redis, shared by any number of threads, processes and machines.

    Every process holds a copy of the whole database, in a private temporary file or in `replica`: for memories of many
    gigabytes PostgreSQL is the better place. A step touches threads and memory in one commit, which Redis grants only
    within one slot, so the keys of a memory carry one hash tag: on a Cluster a memory is on one node, whichever the URL
    names, and several memories spread.

    What was confirmed survives the death of any client. Whether it survives the server's is the server's promise: with
    ``appendonly yes`` and ``appendfsync always`` it does, as with a file. With ``everysec`` a failing machine may lose
    a second, without an append-only file a restart loses everything since the last snapshot, and a failover what the
    replica had not got, unless `wait_replicas` asks for its word. A process that has seen what the server lost says so
    (`LostCommitsError`) and does not go on. Opening warns where something may be lost.

    Args:
        url: as redis-py reads it: ``redis://user:password@host:6379/0``, ``rediss://…`` or ``unix:///path``.
        name: of the memory; one server holds any number of them.
        replica: a file for the copy, which the next opening takes up; processes of one machine may share it.
        wait_replicas: how many of the server's replicas have to confirm a commit. Where they do not within half
            of `timeout`, it stays in the log, and its caller gets `TransientError`.
        timeout: seconds in which a server that is away may come back, before `TransientError`.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "memstate",
        replica: str | os.PathLike[str] | None = None,
        wait_replicas: int = 0,
        timeout: float = 10.0,
    ) -> None:
        if timeout <= 0 or wait_replicas < 0:
            raise DatabaseOpenError(f"timeout={timeout!r} is no time, or wait_replicas={wait_replicas!r} no number")
        self._timeout = timeout
        self._wait_replicas = wait_replicas
        self._link = Link(url, timeout)
        self._log = RedisLog(self._link, name, (wait_replicas, int(timeout * 500)) if wait_replicas else None)
        self._replica = None if replica is None else Path(replica)
        self._folder: Path | None = None
        self._opened: View | None = None
        self._lost: LostCommitsError | None = None
        self._imaging: threading.Thread | None = None
        self._imaged = -_BETWEEN  # how long the log was when an image was last thought of
        self._erased = 0  # entries up to the last that erases
        self._turn = threading.RLock()  # to write the copy
        self._pid = 0

    # -- opening ------------------------------------------------------------------------------------

    def exists(self) -> bool:
        check_server(self._link, self._log.key)
        return self._log.exists()

    def open(self) -> str:
        if self._opened is not None:
            raise StorageError("this storage is open already; one memory owns one storage")
        self._pid = os.getpid()
        self._lost = None
        self._imaged, self._erased = -_BETWEEN, 0
        self._link.open()
        try:
            check_server(self._link, self._log.key)
            head = self._log.open(uuid4().hex).head
            self._folder = new_folder()
            path = self._replica or self._folder / "view.db"
            self._opened = View(path, self._log.store_id, is_kept=self._replica is not None)
            if self._opened.open() != self._log.store_id:
                raise DatabaseOpenError(f"{path} is not a copy of this memory; choose another file, or delete it")
            self._refresh()
        except BaseException:
            self.close()
            raise
        self._image_if_due(head)
        return self._log.store_id

    @property
    def _view(self) -> View:
        if self._opened is None:
            raise StorageClosedError("the storage is closed; open the memory again")
        if os.getpid() != self._pid:
            raise StorageClosedError(
                "this process was forked from the one that opened the database; open the memory again in the child"
            )
        if self._lost is not None:
            raise LostCommitsError(str(self._lost)) from self._lost
        return self._opened

    # -- writing ------------------------------------------------------------------------------------

    def apply(self, commits: Sequence[Commit]) -> _Outcomes:
        view = self._view
        try:
            with self._turn:
                try:
                    return self._land(view, commits)
                finally:
                    view.rollback()
        except sqlite3.Error as error:
            failure, is_of_all = storage_error(error, "committing"), False
        except StorageError as error:
            failure, is_of_all = error, type(error) is not StorageError
        if is_of_all or len(commits) == 1:
            return [failure] * len(commits)
        # The shared entry is gone. One commit may be to blame, so each gets its own.
        return [outcome for commit in commits for outcome in self.apply((commit,))]

    def _land(self, view: View, commits: Sequence[Commit]) -> _Outcomes:
        """Run commits on the copy, append what succeeds, and keep it; all over again where another was faster."""
        deadline = time.monotonic() + self._timeout
        while True:
            at = view.begin()
            before, now = view.changes(), time.time()
            outcomes: _Outcomes = []
            landed: list[bytes] = []
            for commit in commits:
                outcomes.append(_run(view, commit, now, landed))
            if not landed or view.changes() == before:
                answer = self._asked(self._log.look, at)  # to be refused, or change nothing, it must see the latest
                if answer.status == "same":
                    return outcomes
            else:
                id = os.urandom(16)
                entry = dump_entry(at.last, id, now, view.mark(), landed)
                if len(entry) > LARGEST:
                    raise StorageError(f"a commit takes {len(entry):,} bytes; Redis holds {LARGEST:,} in one")
                answer = self._asked(self._log.append, at, id, entry)
                if answer.status == "appended":
                    self._keep(view, Position(at.number + 1, id, at.size + len(entry)))
                    self._image_if_due(answer.head)
                    return self._confirmed(outcomes, answer)
            view.rollback()
            self._catch_up(at, answer)
            if time.monotonic() > deadline:
                raise TransientError("committing: others kept being faster; try again")

    def _asked(self, ask: Callable[..., T], *arguments: Any) -> T:
        try:
            return ask(*arguments)
        except LostCommitsError as error:
            self._lost = error
            raise

    def _keep(self, view: View, at: Position) -> None:
        try:
            view.commit(at)
        except sqlite3.Error as error:  # it has landed; the copy follows later
            logger.warning("the copy of the memory could not be written: %s", error)

    def _confirmed(self, outcomes: _Outcomes, answer: Answer) -> _Outcomes:
        if answer.acknowledged is None or answer.acknowledged >= self._wait_replicas:
            return outcomes
        late = TransientError(
            f"the commit is in the log, but {answer.acknowledged} of {self._wait_replicas} replicas confirmed it "
            f"within {self._timeout / 2} s; it is lost if the server fails over to another"
        )
        return [late if outcome is None else outcome for outcome in outcomes]

    # -- reading ------------------------------------------------------------------------------------

    @contextmanager
    def snapshot(self) -> Iterator[Reader]:
        wanted: int | None = None
        while True:
            with self._view.snapshot() as reader:
                at = position_in(reader.meta("log"))
                answer = None
                if wanted is None or at.number < wanted:
                    answer = self._asked(self._log.look, at)
                if answer is None or answer.status == "same":
                    yield reader
                    return
            self._catch_up(at, answer)
            wanted = answer.head.length

    def _catch_up(self, at: Position | None, answer: Answer) -> None:
        """Bring the copy to where the log was when it gave an answer to one who was at a position."""
        view = self._view
        until = answer.head.length
        try:
            while True:
                with self._turn:
                    try:
                        here = view.begin()
                        if here.number >= until:
                            return
                        if here != at:
                            answer = self._asked(self._log.look, here)
                        self._replay(view, here, answer)
                    finally:
                        view.rollback()
                    if answer.status == "trimmed":
                        self._take_image(view, answer.head)
                at = None
        except sqlite3.Error as error:
            raise storage_error(error, "following the log") from error

    def _replay(self, view: View, at: Position, answer: Answer) -> None:
        erased = 0
        for stored in answer.entries:
            entry = load_entry(stored, MARKS)
            if entry.before != at.last:
                raise CorruptRowError(f"entry {at.number + 1} of the log does not follow the one before it")
            view.replay(entry)
            at = Position(at.number + 1, entry.id, at.size + len(stored))
            if forgets(entry.commits):
                erased = at.number
        if answer.entries:
            if at.number == answer.head.length and at.last != answer.head.last:
                raise CorruptRowError("the head of the log does not name its last entry")
            view.commit(at)
        if erased:
            self._erased = erased
            view.scrub()

    # -- images -------------------------------------------------------------------------------------

    def _take_image(self, view: View, head: Head) -> None:
        with scratch(self._folder) as folder:
            path = folder / "image.db"
            try:
                inflate(self._log.image(head), path)
            except ImageReplaced:
                self._asked(self._log.check_replaced, head)
                return  # the next answer names the new one
            view.restore(path)
        view.scrub()

    def _image_if_due(self, head: Head) -> None:
        """Begin to store an image where reading the log would take longer than reading one.

        Or where the log still holds what was erased: who erased it has died since, or is about to store one.
        """
        log = head.size - head.trimmed_size + ENTRY_COST * (head.length - head.trimmed)
        is_due = log > max(IMAGE_AFTER, head.image_size) or head.trimmed < self._erased
        is_free = self._imaging is None or not self._imaging.is_alive()
        if is_due and is_free and head.length >= self._imaged + _BETWEEN:
            self._imaged = head.length
            self._imaging = threading.Thread(target=self._store_image_in_turn, name="memstate-image", daemon=True)
            self._imaging.start()

    def _store_image_in_turn(self) -> None:
        try:
            if self._log.claims_image():
                self._store_image()
        except (MemStateError, sqlite3.Error, OSError) as error:
            logger.warning("no image of the memory could be stored, and its log grows: %s", error)

    def _store_image(self) -> None:
        view = self._view
        with scratch(self._folder) as folder:
            path = folder / "image.db"
            at = view.copy_to(path)
            head = self._asked(self._log.look, at).head
            self._log.put_image(at, head, deflated(path))

    def scrub(self) -> None:
        """Put an image without what was erased in place of the log.

        The server is asked to rewrite its append-only file; its snapshots and backups are its owner's, and copies of
        other processes follow when these next read or write.
        """
        self._refresh()
        view = self._view
        with view.snapshot() as reader:
            wanted = position_in(reader.meta("log"))
        view.scrub()
        while self._asked(self._log.look, wanted).head.trimmed < wanted.number:
            self._store_image()
        rewrite_append_only_file(self._link, self._timeout)

    def vacuum(self) -> None:
        with self._turn:
            self._view.vacuum()
        self.scrub()

    def _refresh(self) -> None:
        """Bring the copy to where the log is now."""
        with self.snapshot():
            return

    def close(self) -> None:
        if self._pid not in (0, os.getpid()):
            return  # in a fork: connections and copy are the parent's
        imaging, self._imaging = self._imaging, None
        if imaging is not None:
            imaging.join()
        with self._turn:
            view, self._opened = self._opened, None
            if view is not None:
                view.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        self._link.close()


def _run(view: View, commit: Commit, now: float, landed: list[bytes]) -> BaseException | None:
    """Run one commit, and note it where it succeeds; else why not."""
    try:
        dumped = dump_commit(commit)
    except Exception as error:
        failure = StorageError(f"a value does not fit the database: {error!r}")
        failure.__cause__ = error
        return failure
    outcome = view.run(commit, now)
    if outcome is None:
        landed.append(dumped)
    return outcome

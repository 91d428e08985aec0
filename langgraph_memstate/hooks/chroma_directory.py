"""One directory of embedded Chroma: who may use it, and what a crash has done to it.

Measured on Chroma 1.5.9: two processes on one directory corrupt it, its vector files are not crash-safe, a damaged one
can end every process that loads it, and its client hangs after a fork. So one process owns a directory, every write is
marked while it runs, and a marker found later condemns the collection without loading it.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, ClassVar

logger = logging.getLogger(__name__)

_FULL_TEXT = "embedding_fulltext_search"
_SEGMENT_HEADER = "????????-????-????-????-????????????/header.bin"  # a segment's directory is named by a UUID

FORKED = (
    "this process was forked after Chroma was opened, and Chroma's client hangs after a fork: open the memory in "
    "each process by itself, after the fork"
)


def owned_elsewhere(path: str) -> str:
    return (
        f"another process owns the Chroma directory {path}, which only one may use at a time; this process searches "
        f"SQL instead. For several processes start a server (chroma run --path {path}) and give the memory a "
        "chromadb.HttpClient"
    )


class ChromaDirectory:
    """This process's ownership of one Chroma directory, shared by all its hooks.

    Two files a collection lie beside Chroma's own. ``INFLIGHT-<id>`` is there while a write runs, and stays when the
    write did not end well. ``BOOT-<id>`` names the boot of this machine since which writes may not have reached the
    disk: it is removed by an orderly release, after syncing, and condemns the collection if the machine went down.
    """

    _held: ClassVar[dict[str, ChromaDirectory]] = {}
    _mutex: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: str, lock: IO[str]) -> None:
        self._path = Path(path)
        self._lock = lock  # closing it gives the directory up
        self._pid = os.getpid()
        self._users = 1
        self._client: Any = None
        self._boot = _boot_id()
        self._writers: Counter[str] = Counter()
        self._unsynced: set[str] = set()
        self._damaged: set[str] = set()

    @classmethod
    def acquire(cls, path: str) -> ChromaDirectory | None:
        """Own `path`, or None where another process does; `release` as often as this succeeds."""
        with cls._mutex:
            held = cls._held.get(path)
            if held is not None:
                if held._pid != os.getpid():  # inherited by a fork: the parent's, and so is its client
                    return None
                held._users += 1
                return held
            os.makedirs(path, exist_ok=True)
            lock = open(os.path.join(path, "memstate.lock"), "a")  # noqa: SIM115  held until release
            if not _try_lock(lock):
                lock.close()
                return None
            cls._held[path] = held = cls(path, lock)
            return held

    @classmethod
    def after_fork(cls) -> None:
        """In a forked child: leave the locks to the parent, which would otherwise outlive it here."""
        cls._mutex = threading.RLock()
        for held in cls._held.values():
            held._lock.close()

    def release(self) -> None:
        with self._mutex:
            if self._pid != os.getpid():
                return
            self._users -= 1
            if self._users:
                return
            del self._held[str(self._path)]
            try:
                if self._client is not None:
                    self._client.close()
                self._sync()
            finally:
                self._lock.close()

    def client(self) -> Any:
        """The client of this directory, one for all hooks that brought none."""
        import chromadb

        with self._mutex:
            if self._client is None:
                self._inspect()
                # Default settings, or Chroma would refuse the user a client of their own on this path.
                self._client = chromadb.PersistentClient(self._path)
            return self._client

    def renew(self) -> Any:
        """A fresh client where nobody shares the old one: Chroma keeps dropped vectors in memory and on disk."""
        with self._mutex:
            if self._client is not None and self._users == 1:
                self._client.close()
                self._client = None
                self._vacuum()
            return self.client()

    def _vacuum(self) -> None:
        """Rewrite Chroma's SQL without what was deleted from it. Like `_inspect`, never beside a client of ours."""
        try:
            with closing(sqlite3.connect(self._path / "chroma.sqlite3", isolation_level=None)) as connection:
                connection.execute(f"INSERT INTO {_FULL_TEXT} ({_FULL_TEXT}) VALUES ('rebuild')")
                connection.execute("VACUUM")
        except sqlite3.Error as error:
            logger.warning("%s: what was deleted from it could not be wiped: %s", self._path, error)

    # -- markers --------------------------------------------------------------------------------------

    def _marker(self, kind: str, collection_id: str) -> Path:
        return self._path / f"{kind}-{collection_id}"

    def is_suspect(self, collection_id: str) -> bool:
        """Whether the last writer of a collection did not finish, or what it wrote may not have reached the disk."""
        with self._mutex:
            if collection_id in self._damaged:
                return True
            if not self._writers[collection_id] and self._marker("INFLIGHT", collection_id).exists():
                return True
            boot = self._marker("BOOT", collection_id)
            if collection_id in self._unsynced or not boot.exists():
                return False
            if self._boot and boot.read_text() == self._boot:
                self._unsynced.add(collection_id)  # a process died, the machine did not: ours to sync now
                return False
            return True

    @contextmanager
    def writing(self, collection_id: str) -> Iterator[None]:
        """Mark a collection as being written. The marker stays if the body fails halfway."""
        marker = self._marker("INFLIGHT", collection_id)
        with self._mutex:
            self._note_boot(collection_id)
            marker.touch()
            self._writers[collection_id] += 1
        intact = False
        try:
            yield
            intact = True
        except Exception as error:
            intact = is_refusal(error)
            raise
        finally:
            with self._mutex:
                self._writers[collection_id] -= 1
                if not intact:
                    self._damaged.add(collection_id)
                if not self._writers[collection_id] and collection_id not in self._damaged:
                    marker.unlink(missing_ok=True)

    def _note_boot(self, collection_id: str) -> None:
        if collection_id not in self._unsynced:
            with open(self._marker("BOOT", collection_id), "w") as file:
                file.write(self._boot)
                file.flush()
                os.fsync(file.fileno())
            self._unsynced.add(collection_id)

    def forget(self, collection_id: str) -> None:
        """A collection is gone, so what its markers say no longer matters."""
        with self._mutex:
            self._damaged.discard(collection_id)
            self._unsynced.discard(collection_id)
            for kind in ("INFLIGHT", "BOOT"):
                self._marker(kind, collection_id).unlink(missing_ok=True)

    def _sync(self) -> None:
        """Bring the vector files to the disk, then say so. Chroma itself never does, only for its SQL."""
        if not self._unsynced:
            return
        try:
            for header in self._path.glob(_SEGMENT_HEADER):
                for file in header.parent.iterdir():
                    with open(file, "r+b") as handle:
                        os.fsync(handle.fileno())
        except OSError as error:
            logger.warning("%s was not synced: %s", self._path, error)
            return
        for collection_id in self._unsynced:
            self._marker("BOOT", collection_id).unlink(missing_ok=True)

    def _inspect(self) -> None:
        """Find collections whose vector files are gone, and remove the files of dropped ones, which Chroma leaves.

        Only ever without a client of ours: a second SQLite in the process would drop the first one's file locks.
        """
        database = self._path / "chroma.sqlite3"
        if not database.exists():
            return
        try:
            with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
                segments = connection.execute(
                    "SELECT s.id, s.collection, m.seq_id FROM segments s "
                    "LEFT JOIN max_seq_id m ON m.segment_id = s.id WHERE s.scope = 'VECTOR'"
                ).fetchall()
        except sqlite3.Error as error:
            logger.debug("%s was not inspected: %s", database, error)
            return
        for segment, collection_id, persisted in segments:
            if persisted and not (self._path / segment / "index_metadata.pickle").is_file():
                self._damaged.add(collection_id)
        live = {segment for segment, _, _ in segments}
        for header in self._path.glob(_SEGMENT_HEADER):
            if header.parent.name not in live:
                shutil.rmtree(header.parent, ignore_errors=True)


def is_refusal(error: Exception) -> bool:
    """Whether Chroma declined a call before doing anything, so that nothing is half done."""
    from chromadb.errors import ChromaError

    return isinstance(error, ValueError | TypeError) or (isinstance(error, ChromaError) and error.code() < 500)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ChromaDirectory.after_fork)


def _try_lock(file: IO[str]) -> bool:
    """Lock a file for this process alone, until it is closed. The lock of a process that was killed is free."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not lockf: copying the directory would unlock it
    except (BlockingIOError, PermissionError):
        return False
    return True


def _boot_id() -> str:
    """What tells one run of this machine's kernel from the next; "" where that is unknown."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError, subprocess.SubprocessError):
        macos = ["sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(macos, capture_output=True, text=True, timeout=5).stdout.strip()
    return ""

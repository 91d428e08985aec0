"""One directory on this machine that holds vectors: who may use it, and what a crash has done to what is in it.

One process owns a directory. Every write is marked while it runs, and a marker found later condemns the collection
without loading it: an index can be built again from SQL, a damaged one cannot be told from a good one.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, ClassVar, Self

logger = logging.getLogger(__name__)


class OwnedDirectory:
    """This process's ownership of one directory, shared by all its hooks. A subclass knows what lies in it.

    Two files a collection lie beside the database's own. ``INFLIGHT-<id>`` is there while a write runs, and stays when
    the write did not end well. ``BOOT-<id>`` names the boot of this machine since which writes may not have reached
    the disk: it is removed by an orderly release, after syncing, and condemns the collection if the machine went down.
    """

    LOCK: ClassVar[str] = "memstate.lock"
    """The file that a process locks to own the directory."""

    _held: ClassVar[dict[tuple[type[OwnedDirectory], str], OwnedDirectory]] = {}
    _mutex: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: str, lock: IO[str]) -> None:
        self._path = Path(path)
        self._lock = lock  # closing it gives the directory up
        self._pid = os.getpid()
        self._users = 1
        self._boot = _boot_id()
        self._writers: Counter[str] = Counter()
        self._unsynced: set[str] = set()
        self._damaged: set[str] = set()

    @classmethod
    def acquire(cls, path: str, *, shared: bool = True) -> Self | None:
        """Own `path`, or None where another process does; `release` as often as this succeeds.

        Hooks of one process share it, unless it is to be not `shared`: then another hook counts as another process.
        """
        with cls._mutex:
            held = cls._held.get((cls, path))
            if held is not None:
                assert isinstance(held, cls)
                if held._pid != os.getpid() or not shared:  # inherited by a fork, it is the parent's, as its client is
                    return None
                held._users += 1
                return held
            os.makedirs(path, exist_ok=True)
            lock = open(os.path.join(path, cls.LOCK), "a")  # noqa: SIM115  held until release
            if not _try_lock(lock):
                lock.close()
                return None
            made = cls(path, lock)
            cls._held[cls, path] = made
            return made

    @classmethod
    def after_fork(cls) -> None:
        """In a forked child: leave the locks to the parent, which would otherwise outlive it here."""
        OwnedDirectory._mutex = threading.RLock()
        for held in cls._held.values():
            held._lock.close()

    def release(self) -> None:
        with self._mutex:
            if self._pid != os.getpid():
                return
            self._users -= 1
            if self._users:
                return
            del self._held[type(self), str(self._path)]
            try:
                self._close()
                self._sync()
            finally:
                self._lock.close()

    # -- what a subclass says ---------------------------------------------------------------------------

    def _close(self) -> None:
        """Give up what the hooks of this directory share."""

    def _files(self) -> Iterable[Path]:
        """Files that the database itself never brings to the disk."""
        return ()

    def _is_refusal(self, error: Exception) -> bool:
        """Whether a call was declined before anything was done, so that nothing is half done."""
        return False

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
            intact = self._is_refusal(error)
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
        """Bring the files to the disk, then say so."""
        if not self._unsynced:
            return
        try:
            for file in self._files():
                with open(file, "r+b") as handle:
                    os.fsync(handle.fileno())
        except OSError as error:
            logger.warning("%s was not synced: %s", self._path, error)
            return
        for collection_id in self._unsynced:
            self._marker("BOOT", collection_id).unlink(missing_ok=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OwnedDirectory.after_fork)


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

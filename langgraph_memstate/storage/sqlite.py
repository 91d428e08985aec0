"""SQLite: write-ahead log, `synchronous=FULL`, one connection that writes, a pool of connections that read."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import resources
from pathlib import Path
from uuid import uuid4

from langgraph_memstate.errors import (
    CorruptRowError,
    DatabaseOpenError,
    DiskFullError,
    MemStateError,
    NewerSchemaError,
    ReadOnlyError,
    StorageClosedError,
    StorageError,
    TransientError,
)
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Commit
from langgraph_memstate.storage.sqlite_read import SQLiteReader
from langgraph_memstate.storage.sqlite_write import run_ops

logger = logging.getLogger("langgraph_memstate")

APPLICATION_ID = 0x4D656D53  # "MemS", in the file's header
MIGRATIONS = ("sqlite_0001.sql",)
_NAP = 0.0002, 0.0018  # seconds between two tries to get the write lock
OLDEST_SQLITE = (3, 37, 0)  # STRICT tables
_OF_ONE_COMMIT = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError)  # the transaction goes on


def storage_error(error: sqlite3.Error, doing: str) -> StorageError:
    """The error of our tree that an error of the driver means."""
    name = getattr(error, "sqlite_errorname", "") or ""
    kinds: dict[str, tuple[type[StorageError], str]] = {
        "SQLITE_BUSY": (TransientError, "another process kept the database busy; try again"),
        "SQLITE_LOCKED": (TransientError, "the database is locked; try again"),
        "SQLITE_FULL": (DiskFullError, "the disk is full; free space and try again"),
        "SQLITE_IOERR_WRITE": (DiskFullError, "the file cannot grow: a full disk, a quota or a size limit"),
        "SQLITE_IOERR_SHMSIZE": (DiskFullError, "the file cannot grow: a full disk, a quota or a size limit"),
        "SQLITE_READONLY": (ReadOnlyError, "the database is read-only; check the file's permissions"),
        "SQLITE_PERM": (ReadOnlyError, "access was denied; check the file's permissions"),
        "SQLITE_NOTADB": (DatabaseOpenError, "the file is not a SQLite database"),
        "SQLITE_CANTOPEN": (DatabaseOpenError, "the file cannot be opened; check path and permissions"),
        "SQLITE_CORRUPT": (CorruptRowError, "the file is damaged; restore it from a backup"),
        "SQLITE_TOOBIG": (StorageError, "a value is larger than SQLite's limit"),
    }
    for prefix, (kind, advice) in kinds.items():
        if name.startswith(prefix):
            return kind(f"{doing}: {advice} ({error})")
    return StorageError(f"{doing}: {error}")


class SQLiteStorage(Storage):
    """One SQLite file, shared by any number of threads and processes.

    Args:
        path: the file; it is created with its parent folders.
        busy_timeout: seconds to wait for other processes before `TransientError`.
    """

    def __init__(self, path: str | os.PathLike[str], *, busy_timeout: float = 30.0) -> None:
        self._path = Path(path)
        self._busy_timeout = busy_timeout
        self._writer: sqlite3.Connection | None = None
        self._readers: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._pid = 0

    @property
    def location(self) -> Path | None:
        return self._path

    # -- opening ------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return os.path.isfile(self._path) and os.path.getsize(self._path) > 0

    def open(self) -> str:
        if self._writer is not None:
            raise StorageError(f"{self._path} is open already; one memory owns one storage")
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise DatabaseOpenError(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 or later is needed")
        self._pid = os.getpid()
        try:
            self._make_parent()
            writer = self._connect()
            try:
                store_id = self._migrate(writer)
                writer.execute("PRAGMA busy_timeout=0")  # see _begin
            except BaseException:
                writer.close()
                raise
        except sqlite3.Error as error:
            raise storage_error(error, f"opening {self._path}") from error
        self._writer = writer
        return store_id

    def _make_parent(self) -> None:
        if "\0" in str(self._path):
            raise DatabaseOpenError(f"{str(self._path)!r} names no file")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseOpenError(f"the folder of {self._path} cannot be made: {error}") from error
        if os.path.isdir(self._path):  # Path.is_dir raises where it may not look; SQLite says so in its own words
            raise DatabaseOpenError(f"{self._path} is a folder; name a file in it")

    def _connect(self) -> sqlite3.Connection:
        conn = sqlite3.connect(self._path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False)
        try:
            conn.execute("PRAGMA foreign_keys=ON")
            conn.execute("PRAGMA synchronous=FULL")
            conn.execute("PRAGMA secure_delete=ON")  # else what is superseded now could not be forgotten later
        except sqlite3.Error:
            conn.close()
            raise
        return conn

    def _migrate(self, conn: sqlite3.Connection) -> str:
        conn.execute("BEGIN")  # one snapshot: another process may be making the database at this moment
        try:
            self._schema_version(conn)  # before the journal mode is changed: the file may be somebody else's
        finally:
            self._rollback(conn)
        self._use_wal(conn)
        conn.execute("BEGIN IMMEDIATE")
        try:
            version = self._schema_version(conn)
            for name in MIGRATIONS[version:]:
                script = resources.files("langgraph_memstate.storage.sql").joinpath(name).read_text()
                for statement in _statements(script):
                    conn.execute(statement)
            if version < len(MIGRATIONS):
                conn.execute(f"PRAGMA application_id={APPLICATION_ID}")
                conn.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
            conn.execute("INSERT OR IGNORE INTO meta VALUES ('store_id', ?)", (self._new_id(),))
            (store_id,) = conn.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()
            conn.execute("COMMIT")
        except BaseException:
            if conn.in_transaction:
                conn.execute("ROLLBACK")
            raise
        return str(store_id)

    def _new_id(self) -> str:
        return uuid4().hex

    def _schema_version(self, conn: sqlite3.Connection) -> int:
        """How many migrations the database has seen: 0 for a new file.

        Raises:
            DatabaseOpenError: it belongs to another program, or to a newer release.
        """
        (application_id,) = conn.execute("PRAGMA application_id").fetchone()
        (version,) = conn.execute("PRAGMA user_version").fetchone()
        (tables,) = conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application_id != APPLICATION_ID and (tables or application_id):
            raise DatabaseOpenError(f"{self._path} is a SQLite database of another program; choose a file of its own")
        if version > len(MIGRATIONS):
            raise NewerSchemaError(
                f"{self._path} has schema {version}; this release knows {len(MIGRATIONS)}. "
                "Upgrade langgraph-memstate to open it"
            )
        return int(version)

    def _use_wal(self, conn: sqlite3.Connection) -> None:
        # Changing the mode does not wait on the busy timeout, so many processes opening a new file would collide.
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                (mode,) = conn.execute("PRAGMA journal_mode=WAL").fetchone()
            except sqlite3.OperationalError as error:
                if getattr(error, "sqlite_errorname", "") not in ("SQLITE_BUSY", "SQLITE_BUSY_RECOVERY"):
                    raise
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
                continue
            if mode != "wal" and self._path.name:
                raise DatabaseOpenError(
                    f"{self._path}: no write-ahead log here (journal mode {mode}); use a local file system"
                )
            return

    # -- writing ------------------------------------------------------------------------------------

    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        conn = self._open_writer()
        try:
            together = tuple(op for commit in commits for op in commit)
            (failure,) = self._apply_in_order(conn, (together,), apart=False)
            if failure is None or len(commits) == 1:
                return [failure] * len(commits)
            return self._apply_in_order(conn, commits, apart=True)  # one is to blame, and the others are to land
        except sqlite3.Error as error:
            self._rollback(conn)
            if len(commits) == 1:
                return [storage_error(error, "committing")]
        # The shared transaction is gone. One commit may be to blame, so each gets its own.
        return [outcome for commit in commits for outcome in self.apply((commit,))]

    def _apply_in_order(
        self, conn: sqlite3.Connection, commits: Sequence[Commit], *, apart: bool
    ) -> list[BaseException | None]:
        """Run commits in one transaction: each `apart` from the others, or nothing lands once one fails."""
        outcomes: list[BaseException | None] = []
        try:
            self._begin(conn)
            for commit in commits:
                outcomes.append(self._apply_one(conn, commit, time.time(), apart=apart))
                if not conn.in_transaction:
                    return outcomes
            conn.execute("COMMIT")
        except BaseException:
            self._rollback(conn)
            raise
        return outcomes

    def _begin(self, conn: sqlite3.Connection) -> None:
        """Take the write lock.

        SQLite's own waiting sleeps longer each time, up to 0.1 s, so that whoever has waited longest is least likely to
        be next. Here all ask as often.
        """
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                conn.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(*_NAP))
            else:
                return

    def _apply_one(self, conn: sqlite3.Connection, commit: Commit, now: float, *, apart: bool) -> BaseException | None:
        """Run one commit. If it fails, it alone is taken back, or else the transaction; what breaks that is raised."""
        if apart:
            conn.execute("SAVEPOINT one")
        try:
            run_ops(conn, commit, now)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and not isinstance(error, _OF_ONE_COMMIT):
                raise
            if apart:
                conn.execute("ROLLBACK TO one")
                conn.execute("RELEASE one")
            else:
                self._rollback(conn)
            if isinstance(error, MemStateError):
                return error
            failure = StorageError(f"a value does not fit the database: {error!r}")
            failure.__cause__ = error
            return failure
        if apart:
            conn.execute("RELEASE one")
        return None

    @staticmethod
    def _rollback(conn: sqlite3.Connection) -> None:
        if conn.in_transaction:
            conn.execute("ROLLBACK")

    def _open_writer(self) -> sqlite3.Connection:
        self._check_open()
        assert self._writer is not None
        return self._writer

    def _check_open(self) -> None:
        if self._writer is None:
            raise StorageClosedError(f"{self._path} is closed; open the memory again")
        if os.getpid() != self._pid:
            raise StorageClosedError(
                "this process was forked from the one that opened the database; open the memory again in the child"
            )

    # -- reading ------------------------------------------------------------------------------------

    @contextmanager
    def snapshot(self) -> Iterator[SQLiteReader]:
        conn = self._take_reader()
        healthy = False
        try:
            conn.execute("BEGIN")
            yield SQLiteReader(conn)
            healthy = True
        except sqlite3.Error as error:
            raise storage_error(error, "reading") from error
        except MemStateError:
            healthy = True
            raise
        finally:
            self._give_back(conn, healthy)

    def _take_reader(self) -> sqlite3.Connection:
        with self._lock:
            self._check_open()
            if self._readers:
                return self._readers.pop()
        try:
            conn = self._connect()
            conn.execute("PRAGMA query_only=ON")
        except sqlite3.Error as error:
            raise storage_error(error, f"opening {self._path}") from error
        return conn

    def _give_back(self, conn: sqlite3.Connection, healthy: bool) -> None:
        if healthy:
            conn.execute("ROLLBACK")
            with self._lock:
                if self._writer is not None:
                    self._readers.append(conn)
                    return
        conn.close()

    def scrub(self) -> None:
        self._check_open()
        try:
            with closing(self._connect()) as conn:
                (busy, *_) = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise storage_error(error, "emptying the write-ahead log") from error
        if busy:
            logger.warning("%s: others are reading; the write-ahead log is emptied once they are done", self._path)

    def vacuum(self) -> None:
        self._check_open()
        try:
            with closing(self._connect()) as conn:
                conn.execute("VACUUM")
        except sqlite3.Error as error:
            raise storage_error(error, "vacuuming") from error
        self.scrub()

    def close(self) -> None:
        with self._lock:
            readers, self._readers = self._readers, []
            writer, self._writer = self._writer, None
        if os.getpid() != self._pid:
            return  # the parent's connections: closing them here would drop its locks
        for conn in readers:
            conn.close()
        if writer is not None:
            writer.close()


def _statements(script: str) -> Iterator[str]:
    """The statements of a migration, one by one: `executescript` would commit the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""

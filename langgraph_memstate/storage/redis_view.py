"""A process's copy of the memory that a log describes: a SQLite database that says how far it has followed."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from langgraph_memstate.errors import CorruptRowError, DatabaseOpenError, StorageError
from langgraph_memstate.storage.operations import Commit, Forget
from langgraph_memstate.storage.redis_log import Entry, Mark, Position, position_in
from langgraph_memstate.storage.sqlite import SQLiteStorage, storage_error

logger = logging.getLogger("langgraph_memstate")

MARKS = 5
_CHUNK = 4_000_000  # bytes of an image in one value
_PREFIX = "memstate-view-"
_YOUNG = 60.0  # seconds in which a process may not have opened its copy yet
# What the next rows will be numbered from: where two copies agree on it, the same operations name the same rows.
_MARK = (
    "SELECT coalesce((SELECT max(seq) FROM facts), 0), coalesce((SELECT max(id) FROM lists), 0), "
    "coalesce((SELECT max(id) FROM elements), 0), coalesce((SELECT max(id) FROM vectors), 0), "
    "coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0)"
)


class View(SQLiteStorage):
    """Any number of processes may share the file: how far it has followed is in it, and moves with what it holds.

    Args:
        store_id: of the memory; a new file takes it.
        is_kept: whether the file outlives this process, and so must bear a power failure.
    """

    def __init__(self, path: Path, store_id: str, *, is_kept: bool) -> None:
        super().__init__(path)
        self._store_id = store_id
        self._is_kept = is_kept

    def _new_id(self) -> str:
        return self._store_id

    def _connect(self) -> sqlite3.Connection:
        conn = super()._connect()
        # What a power failure takes from the end is read again; the order of what stays is kept.
        conn.execute(f"PRAGMA synchronous={'NORMAL' if self._is_kept else 'OFF'}")
        return conn

    # -- following the log --------------------------------------------------------------------------

    def begin(self) -> Position:
        """Start a transaction; how far the copy has followed."""
        conn = self._open_writer()
        self._begin(conn)
        return position_of(conn)

    def run(self, commit: Commit, now: float) -> BaseException | None:
        """Run one commit under a savepoint, or none of it, and say why."""
        return self._apply_one(self._open_writer(), commit, now, apart=True)

    def changes(self) -> int:
        """Grows with every row that changes."""
        return self._open_writer().total_changes

    def mark(self) -> Mark:
        (*numbers,) = self._open_writer().execute(_MARK).fetchone()
        return tuple(numbers)

    def replay(self, entry: Entry) -> None:
        """Run what has landed elsewhere.

        Raises:
            CorruptRowError: it does not do here what it did there.
        """
        for commit in entry.commits:
            if (error := self.run(commit, entry.now)) is not None:
                raise CorruptRowError(f"a commit of the log cannot be run again: {error}") from error
        if self.mark() != entry.mark:
            raise CorruptRowError(
                "a commit of the log has another result here than where it was made; all processes need the same "
                "release of langgraph-memstate"
            )

    def commit(self, at: Position) -> None:
        """End the transaction: the copy has followed so far."""
        conn = self._open_writer()
        text = f"{at.number} {at.last.hex()} {at.size}"
        conn.execute("INSERT INTO meta VALUES ('log', ?1) ON CONFLICT (key) DO UPDATE SET value = ?1", (text,))
        conn.execute("COMMIT")

    def rollback(self) -> None:
        """End the transaction, if one is open: nothing has changed."""
        if self._writer is not None:
            self._rollback(self._writer)

    # -- images -------------------------------------------------------------------------------------

    def copy_to(self, path: Path) -> Position:
        """Write a compact copy, without a trace of what was erased; how far it has followed."""
        try:
            with closing(self._connect()) as conn:
                conn.execute("VACUUM INTO ?", (str(path),))
            with closing(sqlite3.connect(path)) as copy:
                return position_of(copy)
        except sqlite3.Error as error:
            raise storage_error(error, "making an image") from error

    def restore(self, path: Path) -> None:
        """Become what an image holds. Readers keep what they see.

        Raises:
            NewerSchemaError: a newer release made the image.
            CorruptRowError: it is no image of this memory.
        """
        try:
            with closing(sqlite3.connect(path)) as image:
                self._schema_version(image)
                row = image.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()
                if row is None or row[0] != self._store_id:
                    raise CorruptRowError("the image in Redis is not one of this memory")
                image.backup(self._open_writer(), sleep=0.01)
            self._migrate(self._open_writer())
        except sqlite3.Error as error:
            raise storage_error(error, "reading an image") from error


def position_of(conn: sqlite3.Connection) -> Position:
    """How far a copy has followed."""
    row = conn.execute("SELECT value FROM meta WHERE key = 'log'").fetchone()
    return position_in(row[0] if row else None)


def forgets(commits: Iterable[Commit]) -> bool:
    """Whether content is erased for good."""
    return any(isinstance(op, Forget) for commit in commits for op in commit)


# -- files ------------------------------------------------------------------------------------------


def deflated(path: Path) -> Iterator[bytes]:
    """A file, compressed, in chunks."""
    deflate = zlib.compressobj(level=3)
    chunk = b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            chunk += deflate.compress(block)
            if len(chunk) >= _CHUNK:
                yield chunk
                chunk = b""
    yield chunk + deflate.flush()


def inflate(chunks: Iterable[bytes], path: Path) -> None:
    """Write what `deflated` made of a file.

    Raises:
        CorruptRowError: something is missing, or not of our making.
    """
    inflater = zlib.decompressobj()
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(inflater.decompress(chunk))
            file.write(inflater.flush())
    except zlib.error as error:
        raise CorruptRowError(f"the image in Redis is damaged: {error}") from error
    except OSError as error:
        raise StorageError(f"the image cannot be written to {path}: {error}") from error
    if not inflater.eof:
        raise CorruptRowError("the image in Redis is cut off")


def new_folder() -> Path:
    """A folder for a copy that goes with this process; what processes that were killed have left is removed.

    Raises:
        DatabaseOpenError: there is no place for temporary files.
    """
    try:
        parent = Path(tempfile.gettempdir())
        for left in parent.glob(_PREFIX + "*"):
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise DatabaseOpenError(f"no temporary folder can be made; set TMPDIR to a place for one: {error}") from error


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A folder for an image, removed at the end. Raises: StorageError: it cannot be made."""
    try:
        made = tempfile.TemporaryDirectory(prefix="memstate-image-", dir=folder)
    except OSError as error:
        raise StorageError(f"no folder for an image can be made: {error}") from error
    with made as name:
        yield Path(name)


def _is_abandoned(folder: Path) -> bool:
    """Whether nobody has a copy open."""
    database = folder / "view.db"
    try:
        if not os.access(folder, os.W_OK) or time.time() - folder.stat().st_mtime < _YOUNG:
            return False
        if not database.exists():
            return True
        with closing(sqlite3.connect(database, timeout=0.0, isolation_level=None)) as conn:
            conn.execute("PRAGMA locking_mode=EXCLUSIVE")  # a write-ahead log gives it to the only connection
            conn.execute("BEGIN EXCLUSIVE")
            conn.execute("ROLLBACK")
    except (OSError, sqlite3.OperationalError):
        return False
    except sqlite3.DatabaseError:
        return True  # cut off as its process died
    return True

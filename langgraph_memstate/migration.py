"""Moves a memory from one storage to another: everything, unchanged, and verified before anyone can open it.

The rows are copied from one snapshot of the source, table after table, each in the order of its keys and in commits of
many rows. Before the first of them the destination is marked, and the mark goes when all rows are known to be there. So
a copy that was broken off is recognised; it goes on where its rows are those of the source, and is begun again where
they are not any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from langgraph_memstate.errors import MemStateError, MigrationError, UnfinishedCopyError
from langgraph_memstate.storage.base import Reader, Storage
from langgraph_memstate.storage.operations import Clear, Commit, Load
from langgraph_memstate.storage.tables import META, MOVED, UNFINISHED, Row
from langgraph_memstate.urls import storage_at

Progress = Callable[[str, int, int], object]
"""Called with what is moved, how much of that is done, and of how much.

A migration tells of tables and their rows, each of which counts when it is copied and when it is verified.
"""

_ROWS, _BYTES = 2_000, 4_000_000  # of one commit, at most


def migrate(
    source: str | Path | Storage, destination: str | Path | Storage, *, on_progress: Progress | None = None
) -> dict[str, int]:
    """Copy a whole memory into a new database; returns the rows of each table.

    Sequences, versions, times, provenance, checkpoints and embeddings stay what they are. Who writes to the source
    meanwhile is not held up (though the write-ahead log of a SQLite source grows), and what is written after the
    beginning is not in the copy. An index beside SQL is not copied: a hook that is added to the copy builds it from the
    vectors in SQL. What is called again after it was broken off goes on.

    Raises:
        MigrationError: the source has no memory, or the destination has something of its own.
        UnfinishedCopyError: the source itself is a copy that was never finished.
    """
    report = on_progress or silent
    with opened(source, existing=True) as (origin, origin_id), opened(destination) as (copy, copy_id):
        if origin_id == copy_id:
            raise MigrationError("source and destination are the same database; name another destination")
        check_finished(origin)
        claim(copy, f"a copy of memory {origin_id}")
        with origin.snapshot() as reader:
            counted = reader.counts()
            steps = _Steps(report, 2 * sum(counted.get(table, 0) for table in MOVED))
            try:
                seals = {table: _copy(table, reader, copy, steps) for table in MOVED}
            except _Differs:  # the source was written since the copy was broken off
                steps.restart()
                _commit(copy, (Clear(),))
                seals = {table: _copy(table, reader, copy, steps) for table in MOVED}
        _verify(copy, seals, steps)
        release(copy)
    return {table: seal.rows for table, seal in seals.items()}


def silent(what: str, done: int, total: int) -> None:
    return


# -- the two databases ------------------------------------------------------------------------------


@contextmanager
def opened(place: str | Path | Storage, *, existing: bool = False) -> Iterator[tuple[Storage, str]]:
    """A storage while it is open, and the id of its database.

    Raises:
        MigrationError: with `existing`, there is no database.
    """
    storage = place if isinstance(place, Storage) else storage_at(place)
    if existing and not storage.exists():
        raise MigrationError("there is no memory at the source; check its name")
    store_id = storage.open()
    try:
        yield storage, store_id
    finally:
        storage.close()


def is_memory(place: str | Path) -> bool:
    """Whether there is a memory at a path or URL, and it can be opened."""
    try:
        with opened(place, existing=True):
            return True
    except MemStateError:
        return False


def check_finished(storage: Storage) -> None:
    """Raise `UnfinishedCopyError` where a memory was moved to and did not arrive."""
    if (what := _unfinished(storage)) is not None:
        raise UnfinishedCopyError(
            f"the database is to be {what}, which is not finished: run the same command again, or choose another one"
        )


def _unfinished(storage: Storage) -> str | None:
    """What a marked database is to become."""
    with storage.snapshot() as reader:
        return dict(_notes(reader)).get(UNFINISHED) or None


def _notes(reader: Reader) -> Iterator[tuple[str, str]]:
    return ((str(key), str(value)) for key, value in reader.dump(META))


def claim(storage: Storage, what: str) -> bool:
    """Mark a database as one that is to become something; whether it was marked so already.

    Raises:
        MigrationError: it has something of its own, or is to become something else.
    """
    marked = _unfinished(storage)
    if marked == what:
        return True
    if marked is not None:
        raise MigrationError(f"the destination is to be {marked}, which is not finished; choose another one")
    with storage.snapshot() as reader:
        full = [table for table in MOVED if next(reader.dump(table), None) is not None]
    if full:
        raise MigrationError(f"the destination is a memory of its own (with {', '.join(full)}); choose a new one")
    _commit(storage, (Load(META, ((UNFINISHED, what),)),))
    return False


def release(storage: Storage) -> None:
    """Take the mark away: everything is there."""
    _commit(storage, (Load(META, ((UNFINISHED, ""),)),))


def _commit(storage: Storage, commit: Commit) -> None:
    (outcome,) = storage.apply((commit,))
    if outcome is not None:
        raise outcome


# -- the rows ---------------------------------------------------------------------------------------


class _Differs(Exception):
    """What was copied earlier is not what the source holds now."""


class _Steps:
    """What is told of the progress."""

    def __init__(self, report: Progress, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def advance(self, table: str, rows: int) -> None:
        self._done += rows
        self._total = max(self._total, self._done)
        self._report(table, self._done, self._total)

    def restart(self) -> None:
        self._done = 0


class Seal:
    """The checksum of a table: of what its rows say, in their order."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = blake2b(digest_size=16)

    def add(self, row: Row) -> int:
        """Take a row into account; returns about how many bytes it has."""
        self.rows += 1
        parts = [value for value in row if isinstance(value, bytes)]
        if parts:
            row = tuple((len(value),) if isinstance(value, bytes) else value for value in row)  # type: ignore[misc]
        text = repr(row).encode()
        self._hash.update(text)
        for part in parts:
            self._hash.update(part)
        return len(text) + sum(map(len, parts))

    def __str__(self) -> str:
        return self._hash.hexdigest()


def _copy(table: str, source: Reader, copy: Storage, steps: _Steps) -> Seal:
    """Bring a table's rows over, but for those that are there."""
    seal = Seal()
    rows = source.dump(table)
    with copy.snapshot() as there:
        for held in there.dump(table):
            if next(rows, None) != held:
                raise _Differs
            seal.add(held)
    steps.advance(table, seal.rows)
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += seal.add(row)
        if len(batch) >= _ROWS or size >= _BYTES:
            _commit(copy, (Load(table, tuple(batch)),))
            steps.advance(table, len(batch))
            batch, size = [], 0
    if batch:
        _commit(copy, (Load(table, tuple(batch)),))
        steps.advance(table, len(batch))
    return seal


def _verify(copy: Storage, seals: Mapping[str, Seal], steps: _Steps) -> None:
    with copy.snapshot() as reader:
        for table, expected in seals.items():
            found = Seal()
            told = 0
            for row in reader.dump(table):
                found.add(row)
                if found.rows - told >= _ROWS:
                    steps.advance(table, found.rows - told)
                    told = found.rows
            steps.advance(table, found.rows - told)
            if (found.rows, str(found)) != (expected.rows, str(expected)):
                raise MigrationError(
                    f"the copy of {table} is not what was read: {found.rows} rows with checksum {found}, "
                    f"and {expected.rows} with {expected} in the source. Did somebody write to the destination? "
                    "Run it again: it begins anew"
                )

"""PostgreSQL: one connection that writes, a pool of connections that read, any number of processes and machines.

A commit is sent whole and waits once: what has to be looked up or checked between its statements, functions of the
database do (see sql/postgres_0002.sql). No connection keeps state between two transactions but the statements it has
prepared, and those only where no pooler such as PgBouncer stands in between: settings and locks end with the
transaction. A transaction notes its number in a row of its storage: after a connection that was lost during COMMIT,
that row says whether the commit arrived.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import LiteralString
from uuid import uuid4

try:
    import psycopg
except ImportError as error:
    raise ImportError(
        "PostgresStorage needs psycopg, which is not installed: pip install 'langgraph-memstate[postgres]'"
    ) from error
from psycopg import sql

from langgraph_memstate.errors import (
    DatabaseOpenError,
    MemStateError,
    StorageClosedError,
    StorageError,
    TransientError,
)
from langgraph_memstate.storage.base import IndexTable, Reader, Storage
from langgraph_memstate.storage.operations import Commit, Load
from langgraph_memstate.storage.postgres_calls import Call, only_calls
from langgraph_memstate.storage.postgres_claims import claim, release
from langgraph_memstate.storage.postgres_link import (
    Connection,
    Cursor,
    Pool,
    bigint_array,
    connect,
    interruption,
    is_lost,
    is_open,
    run,
    storage_error,
)
from langgraph_memstate.storage.postgres_read import PostgresReader
from langgraph_memstate.storage.postgres_schema import checked, migrate
from langgraph_memstate.storage.postgres_tables import PostgresIndexTable
from langgraph_memstate.storage.postgres_values import GROWING
from langgraph_memstate.storage.postgres_vectors import Places, VectorTables, schema_of_extension
from langgraph_memstate.storage.postgres_write import Sweep, lock_key, locks, run_op
from langgraph_memstate.storage.values import OutboxRow

_RESOLVE = 15.0  # seconds in which a lost server may come back and say whether a commit arrived
_FORGOTTEN = "seen_at < now() - interval '30 days'"

logger = logging.getLogger("langgraph_memstate")


class _Unknown(TransientError):
    """Whether commits landed could not be found out."""


class _Lost(Exception):
    """The connection was lost, and nothing landed."""

    def __init__(self, cause: psycopg.Error) -> None:
        super().__init__(cause)
        self.cause = cause


class PostgresStorage(Storage):
    """One schema of a PostgreSQL database, shared by any number of threads, processes and machines.

    Args:
        conninfo: ``postgresql://user@host/database`` or libpq's ``host=… dbname=…``. UTF-8 databases only.
        schema: where the tables are; it is made when it is not there.
        pool_size: how many connections may read at once; one more writes.
        timeout: seconds to wait for a connection of the pool, or for others' commits, before `TransientError`.
    """

    def __init__(self, conninfo: str, *, schema: str = "memstate", pool_size: int = 10, timeout: float = 30.0) -> None:
        if not schema or "\0" in schema:
            raise DatabaseOpenError(f"{schema!r} is no name of a schema")
        if pool_size < 1:
            raise DatabaseOpenError(f"pool_size={pool_size!r}: readers need at least one connection")
        self._conninfo = conninfo
        self._schema = schema
        self._pool_size = pool_size
        self._timeout = timeout
        self._pool: Pool | None = None
        self._writer: Connection | None = None
        self._tables = VectorTables()
        self._id = uuid4().hex
        self._committed = 0
        self._has_claimed = False
        self._lock = threading.Lock()
        self._pid = 0
        name = sql.Identifier(schema).as_bytes()
        self._here = b"SET LOCAL search_path TO " + name
        self._snapshot = (b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", self._here)
        # A writer that waits too long gives up; one whose machine is gone must not keep the others waiting.
        self._path, self._patience = name.decode(), str(int(max(timeout, 0.001) * 1_000))
        self._durability: str | None = None
        self._functions = self._path.replace("%", "%%")  # where they are, in a statement that has parameters
        turn = "take_turn(%s, %s, %s::text, %s::bigint, %s::bigint[], %s, %s::bigint)"
        self._take_turn = f"{self._functions}.{turn}"

    # -- opening ------------------------------------------------------------------------------------

    def exists(self) -> bool:
        query = "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = 'meta'"
        try:
            with connect(self._conninfo) as conn:
                return run(conn, query, self._schema).fetchone() is not None
        except psycopg.Error as error:
            raise _unreachable(error) from error

    def open(self) -> str:
        if self._pool is not None:
            raise StorageError("this storage is open already; one memory owns one storage")
        self._pid = os.getpid()
        try:
            conn = connect(self._conninfo)
        except psycopg.Error as error:
            raise _unreachable(error) from error
        try:
            if checked(conn) == "off":
                self._durability = "on"
            store_id = migrate(conn, self._schema)
        except psycopg.Error as error:
            raise storage_error(error, f"opening schema {self._schema}") from error
        finally:
            conn.close()
        self._pool = Pool(self._conninfo, self._pool_size, self._timeout)
        return store_id

    # -- writing ------------------------------------------------------------------------------------

    def apply(self, commits: Sequence[Commit]) -> list[BaseException | None]:
        self._check_open()
        try:
            try:
                stale = self._apply_together(commits)
            except _Lost:
                stale = self._apply_together(commits)  # nothing has landed; perhaps another connection works
        except _Lost as error:
            return [storage_error(error.cause, "committing")] * len(commits)
        except psycopg.errors.LockNotAvailable as error:  # nor would another of the group have had its turn
            return [storage_error(error, "committing")] * len(commits)
        except _Unknown as error:
            return [error] * len(commits)
        except Exception as error:
            if len(commits) == 1:
                return [_outcome(error)]
        else:
            for thread_id in stale:
                self._sweep(thread_id)
            return [None] * len(commits)
        # Nothing of the group has landed. One commit may be to blame: it is found by halving.
        half = len(commits) // 2
        return [*self.apply(commits[:half]), *self.apply(commits[half:])]

    def _apply_together(self, commits: Sequence[Commit | tuple[Sweep]]) -> set[str]:
        """Land commits in one transaction, and return the threads that have to be swept.

        All is sent at once, the COMMIT too: unless an operation has to know an answer, one round trip is all it takes.
        A commit that only saves the state of a thread is one statement, and needs none.

        Raises:
            MemStateError: a commit may not land as it is; none of them did.
            psycopg.Error: the server refused something; nothing landed.
            _Lost: nor did anything, for want of a connection.
            _Unknown: the connection was lost, and the server stays away.
        """
        try:
            conn = self._open_writer()
        except psycopg.OperationalError as error:
            raise _Lost(error) from error
        calls = only_calls(commits[0]) if len(commits) == 1 else None
        if calls and not is_open(conn):  # else it would have to find out whether the statement arrived
            self._drop_writer()
            raise _Lost(psycopg.OperationalError("the server has closed the connection"))
        stale: list[Cursor] = []
        self._committed = number = self._committed + 1  # never used twice, whatever becomes of this commit
        is_decided = False
        try:
            if calls:
                is_decided = True
                stale.append(self._run_calls(conn, calls, *locks(self._schema, commits), number))
                return _threads_in(stale)
            copies = any(isinstance(op, Load) for commit in commits for op in commit)
            with nullcontext() if copies else conn.pipeline():
                conn.execute(b"BEGIN")
                self._wait_turn(conn, *locks(self._schema, commits), number)
                places = Places(conn)
                for commit in commits:
                    for op in commit:
                        stale += run_op(conn, op, places)
                is_decided = True
                conn.execute(b"COMMIT")
        except BaseException as error:
            if (interrupt := interruption(error)) is not None:
                self._drop_writer()
                raise interrupt  # noqa: B904  what the driver says of it is no refusal of the server
            if not is_lost(conn):
                conn.rollback()
            if not is_lost(conn):
                raise
            self._drop_writer()
            if not isinstance(error, psycopg.Error):
                raise
            if not is_decided or not self._has_landed(number):
                raise _Lost(error) from error
            stale.clear()  # what it said was lost with it
        return _threads_in(stale)

    def _run_calls(
        self, conn: Connection, calls: Sequence[Call], everybody: int, threads: list[int] | None, number: int
    ) -> Cursor:
        """One statement: what is selected from is there first, so that the calls begin when it is their turn."""
        functions = ", ".join(f"{self._functions}.{function}" for function, _ in calls)
        parameters = (parameter for _, bound in calls for parameter in bound)
        query = f"SELECT {functions} FROM {self._take_turn}"
        return run(conn, query, *parameters, *self._turn(everybody, threads, number))

    def _wait_turn(
        self, conn: Connection, everybody: int, threads: list[int] | None = None, number: int | None = None
    ) -> None:
        run(conn, f"SELECT {self._take_turn}", *self._turn(everybody, threads, number))

    def _turn(self, everybody: int, threads: list[int] | None, number: int | None) -> tuple[object, ...]:
        keys = None if threads is None else bigint_array(threads)
        writer = None if number is None else self._id
        return self._path, self._patience, self._durability, everybody, keys, writer, number

    def _sweep(self, thread_id: str) -> None:
        try:
            self._apply_together(((Sweep(thread_id),),))
        except (psycopg.Error, _Lost, MemStateError) as error:
            logger.debug("values of a checkpoint that was put again stay until the next sweep: %s", error)

    def _open_writer(self) -> Connection:
        self._check_open()
        if self._writer is not None and not is_lost(self._writer):
            return self._writer
        self._drop_writer()
        conn = connect(self._conninfo)
        try:
            with conn.transaction():
                conn.execute(self._here)
                run(conn, f"DELETE FROM writers WHERE {_FORGOTTEN}")
                run(conn, "INSERT INTO writers VALUES (%s, 0, now()) ON CONFLICT DO NOTHING", self._id)
        except BaseException:
            conn.close()
            raise
        self._writer = conn
        return conn

    def _drop_writer(self) -> None:
        conn, self._writer = self._writer, None
        if conn is not None:
            conn.close()

    def _has_landed(self, number: int) -> bool:
        """Whether the transaction with this number committed, as the server says once it is back.

        Raises:
            _Unknown: the server stays away.
        """
        deadline = time.monotonic() + _RESOLVE
        while True:
            try:
                conn = self._open_writer()
                with conn.transaction():
                    conn.execute(self._here)
                    conn.execute(b"SET LOCAL lock_timeout TO '5s'")
                    # The lock of the row waits for a transaction that is still about to end.
                    row = run(conn, "SELECT committed FROM writers WHERE id = %s FOR UPDATE", self._id).fetchone()
                return row is not None and row[0] == number
            except psycopg.Error as error:
                self._drop_writer()
                if time.monotonic() > deadline:
                    raise _Unknown(
                        "committing: the connection was lost, and the server did not come back to say whether the "
                        f"commit landed; it did whole or not at all ({error})"
                    ) from error
                time.sleep(0.1)

    def _check_open(self) -> None:
        if self._pool is None:
            raise StorageClosedError("the storage is closed; open the memory again")
        if os.getpid() != self._pid:
            raise StorageClosedError(
                "this process was forked from the one that opened the database; open the memory again in the child"
            )

    # -- reading ------------------------------------------------------------------------------------

    @contextmanager
    def snapshot(self) -> Iterator[Reader]:
        with self._begun() as conn:
            yield PostgresReader(conn, self._tables, self._id)

    def scrub(self) -> None:
        """Let the server reuse the space of what was erased. Its write-ahead log, and backups, are its owner's."""
        self._vacuum("VACUUM {}.{}", "freeing erased rows")

    def vacuum(self) -> None:
        """Give free space back to the disk. Each table is locked while it is written anew."""
        self._vacuum("VACUUM (FULL, ANALYZE) {}.{}", "vacuuming")

    def _vacuum(self, command: LiteralString, doing: str) -> None:
        self._check_open()
        schema = sql.Identifier(self._schema)
        try:
            with connect(self._conninfo) as conn:
                kept = conn.execute(sql.SQL("SELECT number FROM {}.vector_tables").format(schema)).fetchall()
                for table in GROWING:
                    conn.execute(sql.SQL(command).format(schema, sql.Identifier(table)))
                for (number,) in kept:
                    with suppress(psycopg.errors.UndefinedTable):  # another was built in its place meanwhile
                        conn.execute(sql.SQL(command).format(schema, sql.Identifier(f"vectors_{number:d}")))
        except psycopg.Error as error:
            raise storage_error(error, doing) from error

    # -- work that processes share ------------------------------------------------------------------

    def claim(self, index: str, *, due: float, limit: int, lease: float) -> list[OutboxRow]:
        self._has_claimed = True
        with self._writing("claims\0") as conn:
            return claim(conn, self._id, index, due=due, limit=limit, lease=lease)

    def _release(self) -> None:
        try:
            with self._writing("claims\0") as conn:
                release(conn, self._id)
        except MemStateError as error:
            logger.debug("what is claimed stays so until its lease ends: %s", error)

    # -- indexes kept here --------------------------------------------------------------------------

    def index_table(self, name: str) -> IndexTable:
        self._check_open()
        assert self._pool is not None
        if self._tables.extension is None:
            try:
                with self._pool.connection() as conn:
                    self._tables.extension = schema_of_extension(conn)
            except psycopg.Error as error:
                raise storage_error(error, "looking for pgvector") from error
        return PostgresIndexTable(name, self._tables, self._begun, self._writing)

    @property
    def keeps_indexes(self) -> bool:
        return True

    @contextmanager
    def _begun(self) -> Iterator[Connection]:
        """A snapshot, as the driver has it."""
        self._check_open()
        assert self._pool is not None
        try:
            with self._pool.transaction(self._snapshot) as conn:
                yield conn
        except psycopg.Error as error:
            raise storage_error(error, "reading") from error

    @contextmanager
    def _writing(self, turn: str = "") -> Iterator[Connection]:
        """A transaction beside those of the writer, in turn with them, or in a turn of another name."""
        self._check_open()
        assert self._pool is not None
        try:
            with self._pool.connection() as conn:
                with conn.pipeline():
                    conn.execute(b"BEGIN")
                    self._wait_turn(conn, lock_key(turn + self._schema))
                yield conn
                conn.commit()
        except psycopg.Error as error:
            raise storage_error(error, "writing an index") from error

    def close(self) -> None:
        if self._has_claimed and self._pool is not None and os.getpid() == self._pid:
            self._release()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is None or os.getpid() != self._pid:
            return  # in a fork: the connections are the parent's
        pool.close()
        self._drop_writer()


def _threads_in(answers: Sequence[Cursor]) -> set[str]:
    """The threads to be swept, as the calls of a commit say."""
    return {thread_id for answer in answers for row in answer for thread_id in row if thread_id is not None}


def _outcome(error: Exception) -> MemStateError:
    """What a commit's caller is told."""
    match error:
        case MemStateError():
            return error
        case psycopg.Error() if error.sqlstate is not None:
            outcome = storage_error(error, "committing")
        case psycopg.DataError():  # it was never sent
            outcome = StorageError(f"a value does not fit the database: {error}")
        case psycopg.Error():
            outcome = storage_error(error, "committing")
        case _:
            outcome = StorageError(f"a value does not fit the database: {error!r}")
    outcome.__cause__ = error
    return outcome


def _unreachable(error: psycopg.Error) -> DatabaseOpenError:
    text = str(error).strip().partition("\n")[0]
    return DatabaseOpenError(f"PostgreSQL cannot be reached, or refuses: {text}")

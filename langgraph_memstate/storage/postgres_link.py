"""Connections to PostgreSQL: what is bound and read, what an error means, and the pool that readers share.

PostgreSQL's texts hold no NUL character, and keys, labels and ids may. Every text that is bound is therefore escaped
so that its order stays (NUL becomes 1 1, and 1 becomes 1 2), and every text that is read is turned back. JSON text has
neither character in it and stays as it is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from struct import Struct
from typing import Any, ClassVar

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Dumper, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Format, PipelineStatus
from psycopg.types.string import StrDumper

from langgraph_memstate.errors import (
    CommitRaced,
    CorruptRowError,
    DatabaseOpenError,
    DiskFullError,
    MemStateError,
    ReadOnlyError,
    SerializationError,
    StorageError,
    TransientError,
)
from langgraph_memstate.storage.rows import escaped, unescaped

Connection = psycopg.Connection[tuple[Any, ...]]
Cursor = psycopg.Cursor[tuple[Any, ...]]

_PREPARED_AFTER, _PREPARED_MAX = 3, 300  # uses of a statement, and statements of a connection
_CONNECT_TIMEOUT = 10  # seconds, where the connection string does not say
_ARRAY, _DIMENSION = Struct("!3i"), Struct("!2i")  # the beginning of an array as PostgreSQL sends and takes it
_NAMED = re.compile(r"(?<![:\w]):([a-z_]\w*)")  # and no cast
_RACED = "MS001"  # what our own functions raise
_CLASSES: dict[str, tuple[type[MemStateError], str]] = {
    "08": (TransientError, "the connection was lost; try again"),
    "25006": (ReadOnlyError, "the server takes no writes; connect to the primary"),
    "28": (DatabaseOpenError, "the server refuses this user; check name and password"),
    "3D": (DatabaseOpenError, "there is no such database; create it"),
    "40": (TransientError, "another transaction was in the way; try again"),
    "42501": (ReadOnlyError, "this role may not do that; grant it the schema and its tables"),
    "53100": (DiskFullError, "the server's disk is full; free space and try again"),
    "53": (TransientError, "the server has no resources left; try again, or allow it more connections"),
    "54": (SerializationError, "a name is longer than an index of PostgreSQL holds, about 2,700 bytes"),
    "55P03": (TransientError, "a lock was not to be had; try again"),
    "57P": (TransientError, "the server shut down or is starting; try again"),
    "57014": (TransientError, "the statement was cancelled or timed out; try again"),
    "XX001": (CorruptRowError, "the database is damaged; restore it from a backup"),
    "XX002": (CorruptRowError, "an index is damaged; REINDEX it"),
}  # fmt: skip


def storage_error(error: psycopg.Error, doing: str) -> MemStateError:
    """The error of our tree that an error of the driver means."""
    text = str(error).strip().partition("\n")[0]
    if error.sqlstate == _RACED:
        return CommitRaced(text)
    state = error.sqlstate or ("" if not isinstance(error, psycopg.OperationalError) else "08")
    for length in (5, 3, 2):
        if (known := _CLASSES.get(state[:length])) is not None:
            kind, advice = known
            return kind(f"{doing}: {advice} ({text})")
    return StorageError(f"{doing}: {text}")


def is_lost(conn: Connection) -> bool:
    """Whether a connection can only be thrown away."""
    return conn.closed or conn.info.status is not psycopg.pq.ConnStatus.OK


def is_open(conn: Connection) -> bool:
    """Whether an idle connection still is, as far as one can know without asking the server."""
    try:
        for _ in range(2):  # a server that ends a connection says why, and then closes it
            conn.pgconn.consume_input()
    except psycopg.Error:
        return False
    return not is_lost(conn)


def interruption(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt, or the like, that an error is or has come of.

    It may have come in the middle of an answer, so that nobody knows what the connection waits for.
    """
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        cause = cause.__context__
    return cause


# -- texts ------------------------------------------------------------------------------------------


class _TextDumper(StrDumper):
    def dump(self, obj: str) -> Buffer:
        return escaped(obj).encode()


class _BinaryTextDumper(_TextDumper):
    format: ClassVar[Format] = Format.BINARY  # type: ignore[misc]


class Encoded(bytes):
    """A parameter in the binary form of whatever type its place in the statement has."""


class _EncodedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Encoded) -> Buffer:
        return bytes(obj)


def text_array(texts: Sequence[str]) -> Encoded:
    """What to bind as `text[]`: the driver would look at each text to find out."""
    return _array(25, [escaped(text).encode() for text in texts])


def bytea_array(contents: Sequence[bytes]) -> Encoded:
    """What to bind as `bytea[]`."""
    return _array(17, contents)


def integer_array(numbers: Sequence[int]) -> Encoded:
    """What to bind as `integer[]`."""
    return _array(23, [number.to_bytes(4, "big", signed=True) for number in numbers])


def bigint_array(numbers: Sequence[int]) -> Encoded:
    """What to bind as `bigint[]`."""
    return _array(20, [number.to_bytes(8, "big", signed=True) for number in numbers])


def _array(element_type: int, items: Sequence[bytes]) -> Encoded:
    """One dimension; no element is NULL; the type is its number in `pg_type`; how many, and the number of the first."""
    if not items:
        return Encoded(_ARRAY.pack(0, 0, element_type))
    parts = [_ARRAY.pack(1, 0, element_type), _DIMENSION.pack(len(items), 1)]
    for item in items:
        parts += (len(item).to_bytes(4, "big"), item)
    return Encoded(b"".join(parts))


class _TextLoader(Loader):
    def load(self, data: Buffer) -> str:
        return unescaped(bytes(data).decode())


class _BinaryTextLoader(_TextLoader):
    format = Format.BINARY


def connect(conninfo: str) -> Connection:
    """A connection outside of any transaction. It prepares statements unless a pooler stands in between.

    A pooler hands one server process to many clients, and a name that one of them has prepared may be another's. It
    shows by the number of the process, which it cannot tell at connecting, as it has not chosen one yet.
    """
    given = conninfo_to_dict(conninfo)
    options: dict[str, Any] = {"client_encoding": "utf8"}
    if "connect_timeout" not in given:
        options["connect_timeout"] = _CONNECT_TIMEOUT
    if "application_name" not in given:
        options["application_name"] = "langgraph-memstate"
    conn = psycopg.connect(conninfo, autocommit=True, prepare_threshold=None, **options)
    dumpers: tuple[type[Dumper], ...] = (_BinaryTextDumper, _TextDumper)
    for dumper in dumpers:
        conn.adapters.register_dumper(str, dumper)
    conn.adapters.register_dumper(Encoded, _EncodedDumper)
    for loader in (_TextLoader, _BinaryTextLoader):
        conn.adapters.register_loader("text", loader)
    if conn.execute(b"SELECT pg_backend_pid()").fetchone() == (conn.info.backend_pid,):
        conn.prepare_threshold, conn.prepared_max = _PREPARED_AFTER, _PREPARED_MAX
    return conn


# -- statements -------------------------------------------------------------------------------------


def run(conn: Connection, query: str, *parameters: Any, **named: Any) -> Cursor:
    """Send one statement; its parameters are bound. Inside a pipeline, only what is fetched is waited for."""
    return conn.execute(query.encode(), named or parameters, binary=True)


@lru_cache(maxsize=512)
def marked(query: str) -> str:
    """A query that names its parameters as `:name`, with the marks of the driver."""
    return _NAMED.sub(r"%(\1)s", query)


def run_rows(conn: Connection, query: str, types: str, rows: Sequence[Sequence[Any]], **named: Any) -> Cursor | None:
    """Send one statement about many rows, which it names as `{rows}`: a table of columns of these types, in order."""
    if not rows:
        return None
    names = types.split()
    if len(rows) == 1:  # arrays take longer to bind
        table = ", ".join(f"%(column{number})s::{type_}" for number, type_ in enumerate(names))
        named |= {f"column{number}": value for number, value in enumerate(rows[0])}
        return run(conn, query.replace("{rows}", f"(VALUES ({table}))"), **named)
    columns = zip(*rows, strict=True)
    for number, (type_, values) in enumerate(zip(names, columns, strict=True)):
        as_floats = type_ == "float8"  # an array has numbers of one kind
        named[f"column{number}"] = [float(one) if as_floats and one is not None else one for one in values]
    table = ", ".join(f"%(column{number})s::{type_}[]" for number, type_ in enumerate(names))
    return run(conn, query.replace("{rows}", f"ROWS FROM (unnest({table}))"), **named)


# -- the pool ---------------------------------------------------------------------------------------


class Pool:
    """Connections for readers: as many as are needed, up to a limit.

    A thread that holds one already gets its next beyond the limit: waiting for itself would never end.
    """

    def __init__(self, conninfo: str, size: int, timeout: float) -> None:
        self._conninfo = conninfo
        self._timeout = timeout
        self._size = size
        self._free = threading.BoundedSemaphore(size)
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._held = threading.local()
        self._closed = False

    @contextmanager
    def transaction(self, begin: Sequence[bytes]) -> Iterator[Connection]:
        """A pipeline that begins with these statements; they wait for nothing. It only reads.

        Raises:
            TransientError: all are in use, and none came free in time.
            psycopg.Error: the server cannot be reached.
        """
        with self.connection() as conn:
            is_answered = False
            try:
                with conn.pipeline():
                    for statement in begin:
                        conn.execute(statement)
                    yield conn
                    is_answered = True
                    if conn.pgconn.pipeline_status != PipelineStatus.ABORTED:
                        conn.execute(b"END")  # no ROLLBACK: the driver would forget what it has prepared
            except psycopg.Error:
                if not (is_answered and is_lost(conn)):  # else everything was read, and the end of a read is nothing
                    raise

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection outside of any transaction; one that is left open is rolled back.

        Raises:
            TransientError: all are in use, and none came free in time.
            psycopg.Error: the server cannot be reached.
        """
        depth = getattr(self._held, "depth", 0)
        if not depth and not self._free.acquire(timeout=self._timeout):
            raise TransientError(f"all {self._size} connections were in use for {self._timeout} seconds; try again")
        self._held.depth = depth + 1
        try:
            conn = self._take() or connect(self._conninfo)
            try:
                yield conn
            except BaseException as error:
                if (interrupt := interruption(error)) is None:
                    self._give_back(conn)
                    raise
                conn.close()
                raise interrupt  # noqa: B904
            else:
                self._give_back(conn)
        finally:
            self._held.depth = depth
            if not depth:
                self._free.release()

    def _take(self) -> Connection | None:
        """An idle connection that the server has not ended."""
        while True:
            with self._lock:
                conn = self._idle.pop() if self._idle else None
            if conn is None or is_open(conn):
                return conn
            conn.close()

    def _give_back(self, conn: Connection) -> None:
        try:
            if not is_lost(conn):
                conn.rollback()
        except psycopg.Error:
            conn.close()
        with self._lock:
            if not self._closed and not is_lost(conn) and len(self._idle) < self._size:
                self._idle.append(conn)
                return
        conn.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for conn in idle:
            conn.close()

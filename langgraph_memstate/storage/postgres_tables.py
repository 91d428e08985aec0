"""One index of PostgreSQL's own, as a hook opens it, fills it and compares it with the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from langgraph_memstate.errors import StorageError
from langgraph_memstate.facts import Namespace
from langgraph_memstate.storage import postgres_vectors as vectors
from langgraph_memstate.storage.base import IndexTable
from langgraph_memstate.storage.postgres_link import Connection, run
from langgraph_memstate.storage.postgres_vectors import Place, VectorTables
from langgraph_memstate.storage.values import BuiltFrom

Transaction = Callable[[], AbstractContextManager[Connection]]


class PostgresIndexTable(IndexTable):
    """`reading` and `writing` begin a transaction in the storage's schema."""

    def __init__(self, name: str, tables: VectorTables, reading: Transaction, writing: Transaction) -> None:
        self._name = name
        self._tables = tables
        self._reading = reading
        self._writing = writing

    def find(self) -> tuple[str, int, int, str] | None:
        with self._reading() as conn:
            found = vectors.find(conn, self._name)
        if found is None:
            self._tables.places.pop(self._name, None)
            return None
        self._tables.places[self._name], built = found
        return built

    def make(self, built: BuiltFrom) -> None:
        assert self._tables.extension is not None
        with self._writing() as conn, conn.pipeline():
            place = vectors.make(conn, self._name, built, self._tables.extension)
        self._tables.places[self._name] = place

    def put(self, built: BuiltFrom, rows: Sequence[tuple[str, Namespace, bytes]], deletes: Sequence[str]) -> None:
        with self._writing() as conn:
            place = self._place(conn, built)
            with conn.pipeline():
                vectors.put(conn, place, rows, deletes)

    def nearest(self, built: BuiltFrom, vector: bytes, count: int, prefix: Sequence[str]) -> list[str]:
        assert self._tables.extension is not None
        with self._reading() as conn:
            place = self._place(conn, built)
            for exact in (False, True):
                found = vectors.ids_near(conn, place, self._tables.extension, vector, count, prefix, exact=exact)
                if len(found) == count:
                    break
        return found

    def ids(self, built: BuiltFrom) -> list[str]:
        with self._reading() as conn:
            rows = run(conn, f"SELECT vector_id FROM {self._place(conn, built).table}").fetchall()
        return [id_ for (id_,) in rows]

    def count(self, built: BuiltFrom) -> int:
        with self._reading() as conn:
            rows = run(conn, f"SELECT count(*) FROM {self._place(conn, built).table}").fetchall()
        return int(rows[0][0])

    def _place(self, conn: Connection, built: BuiltFrom) -> Place:
        """Where the index is.

        Raises:
            StorageError: it was built anew, from something else.
        """
        found = vectors.find(conn, self._name)
        if found is None or found[1] != (built.store_id, built.generation, built.dims, built.model):
            raise StorageError(f"index {self._name} is gone, or was built anew by another process")
        return found[0]

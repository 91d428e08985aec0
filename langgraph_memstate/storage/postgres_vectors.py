"""Indexes in PostgreSQL itself, with pgvector: each a table of the vectors of what is current.

A commit writes the tables of the vectors that it makes current, or not current any more, whichever process it is of: at
every moment a table holds what the log says, and there is nothing to replay. A table is named by a number; a statement
names nothing else, and the extension's schema, which the search path leaves out.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import psycopg
from psycopg import sql

from langgraph_memstate.errors import IndexConfigError
from langgraph_memstate.facts import encode_namespace, namespace_range
from langgraph_memstate.storage.operations import PutIndexed
from langgraph_memstate.storage.postgres_checks import narrowed
from langgraph_memstate.storage.postgres_link import Connection, Cursor, Encoded, marked, run
from langgraph_memstate.storage.rows import COLUMNS, ITEM, scored_of
from langgraph_memstate.storage.values import BuiltFrom, IndexedRow, Nearest, Neighbours

OLDEST = (0, 8)  # of pgvector: the first that goes on looking while a filter takes away what it finds
MOST_DIMS = 16_000  # of a vector
_GRAPH_DIMS = {"vector": 2_000, "halfvec": 4_000}  # what an HNSW index takes
_PLAIN_DIMS = 4_000 * 2  # bytes in a row's own page; a scan is several times slower where vectors lie elsewhere
_EF_SEARCH = 200  # candidates that a search of the graph keeps
_MOST_EF_SEARCH = 1_000
_FEW = 5_000  # vectors that are compared about as fast as the graph is walked
_FEW_THAT_MATCH = 10_000  # the same under a filter, by which the walk is longer
_CHUNK = 1_000  # vectors
_EXTENSION = (
    "SELECT nspname::text, extversion FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace "
    "WHERE extname = 'vector'"
)
_ADVICE = (
    "CREATE EXTENSION vector, which a superuser or the owner of the database may, after installing pgvector on the "
    "server where that has not been done"
)

_CANNOT = (
    psycopg.errors.FeatureNotSupported,
    psycopg.errors.UndefinedFile,
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.ReadOnlySqlTransaction,
)

logger = logging.getLogger("langgraph_memstate")


class Place(NamedTuple):
    """The table of an index, and what its vectors are made of."""

    number: int
    element: str

    @property
    def table(self) -> str:
        return f"vectors_{self.number:d}"


class VectorTables:
    """What an open storage knows of its tables; others may have made them anew since."""

    def __init__(self) -> None:
        self.extension: str | None = None
        """the schema of pgvector, as SQL names it"""
        self.places: dict[str, Place] = {}


class Places:
    """The indexes that this database keeps, as of a transaction. Who asks early waits for no answer of its own."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._asked: Cursor | None = None
        self._by_name: dict[str, Place] | None = None

    def ask(self) -> Cursor:
        if self._asked is None:
            query = "SELECT index_name, number, element FROM vector_tables ORDER BY index_name"
            self._asked = run(self._conn, query)
        return self._asked

    @property
    def by_name(self) -> Mapping[str, Place]:
        # No cached_property: up to Python 3.11 all objects share its lock, so who waits for the server here would keep
        # those waiting on whom the server waits.
        if self._by_name is None:
            rows = self.ask().fetchall()
            self._by_name = {name: Place(number, element) for name, number, element in rows}
        return self._by_name


# -- inside a commit --------------------------------------------------------------------------------


def put_indexed(conn: Connection, op: PutIndexed, places: Places) -> None:
    if (place := places.by_name.get(op.index)) is not None:
        _insert(conn, place, op.rows)


def _insert(conn: Connection, place: Place, rows: Iterable[IndexedRow]) -> None:
    for row in rows:
        run(
            conn,
            f"INSERT INTO {place.table} (vector_id, ns, version, embedding) SELECT %s, ns, version, %s FROM items "
            "WHERE version = %s ON CONFLICT DO NOTHING",
            row.vector_id, _encoded(row.vector, place), row.version,
        )  # fmt: skip


def retire(conn: Connection, versions: Sequence[str], places: Places) -> None:
    """Remove the vectors of versions that are current no more."""
    for name, place in places.by_name.items():
        run(
            conn,
            f"DELETE FROM {place.table} WHERE vector_id IN (SELECT vector_id FROM vectors "
            "WHERE version = ANY(%s::text[]) AND index_name = %s)",
            list(versions), name,
        )  # fmt: skip


def remove(conn: Connection, place: Place, ids: Sequence[str]) -> None:
    run(conn, f"DELETE FROM {place.table} WHERE vector_id = ANY(%s::text[])", list(ids))


def fill(conn: Connection, name: str, place: Place, ids: Sequence[str] | None = None) -> None:
    """Put in what is current, of these vectors or of all."""
    last = 0
    while True:
        rows = run(
            conn,
            "SELECT vectors.id, vector_id, version, embeddings.vector FROM vectors JOIN items USING (version) "
            "JOIN vector_tables USING (index_name) "
            "JOIN embeddings ON embeddings.model = vector_tables.model AND embeddings.text_hash = vectors.text_hash "
            "WHERE index_name = %s AND vectors.id > %s AND (%s::text[] IS NULL OR vector_id = ANY(%s::text[])) "
            "ORDER BY vectors.id LIMIT %s",
            name, last, ids, ids, _CHUNK,
        ).fetchall()  # fmt: skip
        _insert(conn, place, [IndexedRow(*row) for _, *row in rows])
        if len(rows) < _CHUNK:
            return
        last = rows[-1][0]


# -- the tables -------------------------------------------------------------------------------------


def make(conn: Connection, name: str, built: BuiltFrom, schema: str) -> Place:
    """A table of what is current, in place of the one that the index has."""
    if built.dims > MOST_DIMS:
        raise IndexConfigError(f"index {name!r}: pgvector takes up to {MOST_DIMS:,} dimensions, not {built.dims:,}")
    old = run(conn, "DELETE FROM vector_tables WHERE index_name = %s RETURNING number", name)
    element = "halfvec" if _GRAPH_DIMS["vector"] < built.dims <= _GRAPH_DIMS["halfvec"] else "vector"
    row = run(
        conn,
        "INSERT INTO vector_tables (index_name, element, store_id, generation, dims, model) "
        "VALUES (%s, %s, %s, %s, %s, %s) RETURNING number",
        name, element, built.store_id, built.generation, built.dims, built.model,
    ).fetchone()  # fmt: skip
    assert row is not None
    place = Place(row[0], element)
    run(
        conn,
        f'CREATE TABLE {place.table} (vector_id text COLLATE "C" PRIMARY KEY, ns text COLLATE "C" NOT NULL, '
        f'version text COLLATE "C", embedding {schema}.{element}({built.dims:d}) NOT NULL)',
    )
    if built.dims * (2 if element == "halfvec" else 4) <= _PLAIN_DIMS:
        run(conn, f"ALTER TABLE {place.table} ALTER embedding SET STORAGE PLAIN")
    fill(conn, name, place)
    run(conn, f"CREATE INDEX ON {place.table} (ns)")
    if built.dims <= _GRAPH_DIMS[element]:  # several times faster after the vectors than before
        # They have length 1, for which the inner product ranks as cosine does, and is less to compute.
        ops = f"{schema}.{element}_ip_ops"
        run(conn, f"CREATE INDEX {place.table}_graph ON {place.table} USING hnsw (embedding {ops})")
    run(conn, f"ANALYZE {place.table}")
    for (number,) in old.fetchall():  # at the end: from here on, who searches waits
        run(conn, f"DROP TABLE IF EXISTS vectors_{number:d}")
    return place


def find(conn: Connection, name: str) -> tuple[Place, tuple[str, int, int, str]] | None:
    """The table of an index, and what it was built from."""
    row = run(
        conn,
        "SELECT number, element, store_id, generation, dims, model FROM vector_tables WHERE index_name = %s "
        "AND to_regclass('vectors_' || number) IS NOT NULL",
        name,
    ).fetchone()
    return None if row is None else (Place(*row[:2]), (row[2], row[3], row[4], row[5]))


def put(
    conn: Connection, place: Place, rows: Iterable[tuple[str, tuple[str, ...], bytes]], deletes: Sequence[str]
) -> None:
    for id_, namespace, vector in rows:
        run(
            conn,
            f"INSERT INTO {place.table} (vector_id, ns, version, embedding) VALUES (%s, %s, %s, %s) "
            "ON CONFLICT DO NOTHING",
            id_, encode_namespace(namespace), id_, _encoded(vector, place),
        )  # fmt: skip
    remove(conn, place, deletes)


def schema_of_extension(conn: Connection) -> str:
    """Where pgvector is, made where it is not and the role may.

    Raises:
        IndexConfigError: it is not, or too old; with what to do.
    """
    row = run(conn, _EXTENSION).fetchone()
    if row is None:
        try:
            conn.execute(b"CREATE EXTENSION IF NOT EXISTS vector")
        except psycopg.errors.UniqueViolation as error:
            logger.debug("another process made the extension: %s", error)
        except _CANNOT as error:
            text = str(error).strip().partition("\n")[0]
            raise IndexConfigError(f"the database has no pgvector ({text}); it needs {_ADVICE}") from error
        row = run(conn, _EXTENSION).fetchone()
    if row is None:
        raise IndexConfigError(f"the database has no pgvector; it needs {_ADVICE}")
    schema, version = row
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise IndexConfigError(f"pgvector {version} is too old, 0.8 or later is needed: ALTER EXTENSION vector UPDATE")
    return sql.Identifier(schema).as_string(None).replace("%", "%%")  # which would be the place of a parameter


# -- asking -----------------------------------------------------------------------------------------


def ids_near(
    conn: Connection, place: Place, extension: str, vector: bytes, count: int, prefix: Sequence[str], *, exact: bool
) -> list[str]:
    """Ids of up to `count` vectors, nearest first."""
    _set_search(conn, count, exact=exact)
    low, high = namespace_range(prefix)
    distance = _distance(place, extension, exact=False)
    rows = run(
        conn,
        f"WITH near AS MATERIALIZED (SELECT vector_id, {distance} AS distance FROM {place.table} AS near "
        f"WHERE ns >= %(low)s AND ns < %(high)s ORDER BY {_distance(place, extension, exact=exact)} LIMIT %(count)s) "
        "SELECT vector_id FROM near ORDER BY distance + 0",
        vector=_encoded(vector, place), low=low, high=high, count=count,
    )  # fmt: skip
    return [id_ for (id_,) in rows.fetchall()]


def neighbours(conn: Connection, tables: VectorTables, question: Nearest) -> Neighbours | None:
    """Everything in one round trip: which table is that of the index, what is near in it, and the items.

    A table is right whoever has made it. None where there is none, or it was replaced while this transaction reads.
    """
    if tables.extension is None:
        return None
    known = tables.places.get(question.index)
    while True:
        try:
            _set_search(conn, question.count, exact=question.exact)
            query = "SELECT number, element FROM vector_tables WHERE index_name = %s"
            current = run(conn, query, question.index)
            found = None if known is None else _near(conn, known, tables.extension, question)
            row = current.fetchone()
            rows = [] if found is None else found.fetchall()
        except psycopg.errors.UndefinedTable:
            tables.places.pop(question.index, None)
            return None
        if row is None:
            return None
        if found is not None and known == row:
            ids = frozenset(row[COLUMNS] for row in rows if row[-2])
            return Neighbours(
                ids, [scored_of(row[:-2]) for row in rows], question.exact or any(row[-1] for row in rows)
            )
        known = tables.places[question.index] = Place(*row)


def _near(conn: Connection, place: Place, extension: str, question: Nearest) -> Cursor:
    """What is near, and the items. Where few are in question all are compared: no graph is sure to find them."""
    also, bound = narrowed(question.conditions)
    fits = (
        "items.ns >= %(low)s AND items.ns < %(high)s AND (items.expires_at IS NULL OR items.expires_at > %(now)s) "
        + marked(also)
    )

    walked = compared = f"{place.table} AS near JOIN items ON items.version = near.version"
    most = _FEW
    if question.conditions:  # from the items that match there is a way to their vectors that has indexes
        compared = (
            "items JOIN vectors ON vectors.version = items.version AND vectors.index_name = %(index)s "
            f"JOIN {place.table} AS near ON near.vector_id = vectors.vector_id"
        )
        most = _FEW_THAT_MATCH
    few = f"count(*) <= {most} FROM (SELECT FROM items WHERE {fits} LIMIT {most + 1}) AS fitting"

    def nearest(joined: str, when: str, *, exact: bool) -> str:
        return (
            f"SELECT near.vector_id, near.version FROM {joined} "
            f"WHERE {when} AND near.ns >= %(low)s AND near.ns < %(high)s AND {fits} "
            f"ORDER BY {_distance(place, extension, exact=exact)} LIMIT %(count)s"
        )

    low, high = namespace_range(question.prefix)
    return run(
        conn,
        f"WITH few (are) AS MATERIALIZED (SELECT {'true' if question.exact else few}), near AS MATERIALIZED "
        f"(({nearest(compared, '(SELECT are FROM few)', exact=True)}) "
        f"UNION ALL ({nearest(walked, 'NOT (SELECT are FROM few)', exact=False)})) "
        f"SELECT {ITEM}, vectors.vector_id, vectors.ord, embeddings.vector, "
        "vectors.vector_id IN (SELECT vector_id FROM near), (SELECT are FROM few) FROM items "
        "JOIN vectors ON vectors.version = items.version AND vectors.index_name = %(index)s "
        "JOIN embeddings ON embeddings.model = %(model)s AND embeddings.text_hash = vectors.text_hash "
        "WHERE items.version IN (SELECT version FROM near)",
        vector=_encoded(question.vector, place), low=low, high=high, now=question.now, count=question.count,
        index=question.index, model=question.model, **bound,
    )  # fmt: skip


def _set_search(conn: Connection, count: int, *, exact: bool) -> None:
    """How this transaction searches.

    A plan for any namespace would take few vectors to be in it, and compare them all. Helpers are there before it shows
    that there is nothing to compare.
    """
    run(
        conn,
        "SELECT set_config('hnsw.iterative_scan', 'relaxed_order', true), set_config('hnsw.ef_search', %s, true), "
        "set_config('plan_cache_mode', 'force_custom_plan', true)"
        + ("" if exact else ", set_config('max_parallel_workers_per_gather', '0', true)"),
        str(min(max(_EF_SEARCH, 2 * count), _MOST_EF_SEARCH)),
    )


def _distance(place: Place, extension: str, *, exact: bool) -> str:
    """What to sort by; a sum is nothing that the graph can order."""
    distance = f"near.embedding OPERATOR({extension}.<#>) %(vector)s::{extension}.{place.element}"
    return f"({distance}) + 0" if exact else distance


def _encoded(vector: bytes, place: Place) -> Encoded:
    """The binary form of pgvector's types: how many, a word that is not used, and numbers in network order."""
    import numpy as np

    numbers = np.frombuffer(vector, dtype="<f4")
    return Encoded(
        struct.pack(">HH", len(numbers), 0) + numbers.astype(">f2" if place.element == "halfvec" else ">f4").tobytes()
    )

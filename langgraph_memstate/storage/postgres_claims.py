"""Work of the outbox that processes share: who applies which entries, and for how long.

An entry is claimed for a while, by the server's clock. Who dies loses it then. While it is claimed nobody else is given
an entry of the same vector: what was superseded meanwhile must not be removed before the store that it follows.
"""

from __future__ import annotations

from langgraph_memstate.storage.postgres_link import Connection, run
from langgraph_memstate.storage.values import OutboxRow

_NOW = "extract(epoch FROM clock_timestamp())"
CLAIMED = f"coalesce(claimed_until > {_NOW}, false)"
RELEASE = "UPDATE outbox SET claimed_by = NULL, claimed_until = NULL WHERE "
HELD = f"({CLAIMED} AND claimed_by <> %(me)s)"
"""whether somebody else applies an entry"""

_CLAIM = (
    "WITH chosen AS MATERIALIZED (SELECT id FROM outbox AS due "
    "WHERE index_name = %(index)s AND op <> 'embed' AND retry_at <= %(due)s "
    "AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.vector_id = due.vector_id "
    f"AND outbox.index_name = due.index_name AND {HELD}) "
    "AND NOT EXISTS (SELECT 1 FROM prepared WHERE index_name = %(index)s AND due.vector_id = ANY(vector_ids)) "
    "ORDER BY id LIMIT %(limit)s FOR UPDATE OF due SKIP LOCKED) "
    f"UPDATE outbox SET claimed_by = %(me)s, claimed_until = {_NOW} + %(lease)s FROM chosen "
    "WHERE outbox.id = chosen.id RETURNING outbox.id, index_name, op, vector_id, version, attempts"
)


def claim(conn: Connection, me: str, index: str, *, due: float, limit: int, lease: float) -> list[OutboxRow]:
    """Claim due entries. One process claims at a time: two may not be given different entries of one vector."""
    rows = run(conn, _CLAIM, me=me, index=index, due=due, limit=limit, lease=lease).fetchall()
    return sorted(OutboxRow(*row) for row in rows)


def release(conn: Connection, me: str) -> None:
    """Leave what this process has claimed to others."""
    run(conn, RELEASE + "claimed_by = %s", me)

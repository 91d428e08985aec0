"""Channel values in PostgreSQL: whole values once each, lists as versions that share their elements.

The same rows as in SQLite (see sqlite_values.py). What one statement has to know of another's result, the database
finds out itself (see postgres_0002.sql), so that a checkpoint waits for no answer before it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph_memstate.errors import CorruptRowError
from langgraph_memstate.storage.operations import PutCheckpoint
from langgraph_memstate.storage.packing import packed, unpacked
from langgraph_memstate.storage.postgres_link import Connection, run, run_rows
from langgraph_memstate.storage.rows import dump_ids, flattened, list_chain, load_ids
from langgraph_memstate.storage.values import AncestorWrite, Blob, StepKey, StoredList, StoredWrite

# A base is older than what is based on it; a row that says otherwise is damaged, and must not make the walk endless.
_CHAIN = (
    "WITH RECURSIVE chain (id, value_id, kind, depth, base, keep, elements) AS ("
    "SELECT id, value_id, kind, depth, base, keep, elements FROM lists WHERE thread_id = %(thread)s AND {} "
    "UNION ALL SELECT lists.id, lists.value_id, lists.kind, lists.depth, lists.base, lists.keep, lists.elements "
    "FROM chain JOIN lists ON lists.id = chain.base AND lists.id < chain.id AND lists.thread_id = %(thread)s) "
    "SELECT value_id, kind, depth, base, keep, elements FROM chain ORDER BY id DESC"
)
# Each channel is followed on its own; a row of the checkpoint itself starts the walk and is not part of the answer.
_ANCESTORS = (
    "WITH RECURSIVE path (channel, distance, checkpoint_id, parent_id, value_id) AS ("
    'SELECT wanted COLLATE "C", 0, checkpoint_id, parent_id, NULL::text COLLATE "C" '
    "FROM checkpoints, unnest(%(channels)s::text[]) AS wanted "
    "WHERE thread_id = %(thread)s AND checkpoint_ns = %(ns)s AND checkpoint_id = %(id)s "
    "UNION ALL SELECT channel, distance + 1, above.checkpoint_id, above.parent_id, "
    "above.value_ids[array_position(above.channels, path.channel)] "
    "FROM path JOIN checkpoints AS above "
    "ON above.thread_id = %(thread)s AND above.checkpoint_ns = %(ns)s AND above.checkpoint_id = path.parent_id "
    "WHERE path.value_id IS NULL) "
    "SELECT path.channel, path.value_id, task_id, task_path, type, data, idx FROM path "
    "LEFT JOIN writes ON writes.thread_id = %(thread)s AND writes.checkpoint_ns = %(ns)s "
    "AND writes.checkpoint_id = path.checkpoint_id AND writes.channel = path.channel "
    "WHERE distance > 0 ORDER BY distance DESC, task_path, task_id, idx"
)


# -- writing ----------------------------------------------------------------------------------------


def put_values(conn: Connection, op: PutCheckpoint) -> None:
    """Store what is new. `put_list` and `put_checkpoint` make sure that the rest is there."""
    thread = op.step.thread_id
    run_rows(
        conn,
        "INSERT INTO channel_values SELECT %(thread)s, * FROM {rows} AS fresh ON CONFLICT DO NOTHING",
        "text text bytea",
        [(value_id, blob.type, packed(blob.data)) for value_id, blob in op.values.items()],
        thread=thread,
    )
    listed = {digest for version in op.lists.values() for digest in version.tail}
    run_rows(
        conn,
        "INSERT INTO elements (thread_id, digest, type, data) SELECT %(thread)s, * FROM {rows} AS fresh "
        "ON CONFLICT DO NOTHING",
        "bytea text bytea",
        [(digest, blob.type, packed(blob.data)) for digest, blob in op.elements.items() if digest in listed],
        thread=thread,
    )
    for value_id, version in op.lists.items():
        run(
            conn,
            "SELECT put_list(%s, %s, %s, %s::integer, %s, %s::integer, %s::bytea[])",
            thread, value_id, version.kind, version.depth, version.base, version.keep, list(version.tail),
        )  # fmt: skip


# -- reading ----------------------------------------------------------------------------------------


def read_values(conn: Connection, thread_id: str, value_ids: Sequence[str]) -> dict[str, Blob]:
    rows = run(
        conn,
        "SELECT value_id, type, data FROM channel_values WHERE thread_id = %s AND value_id = ANY(%s::text[])",
        thread_id, list(value_ids),
    )  # fmt: skip
    return {value_id: Blob(type_, unpacked(data)) for value_id, type_, data in rows}


def read_list_chain(conn: Connection, thread_id: str, value_id: str) -> list[StoredList]:
    return list_chain(_chain(conn, "value_id = %(wanted)s", thread_id, value_id))


def _chain(conn: Connection, which: str, thread_id: str, wanted: str | int) -> list[Any]:
    return run(conn, _CHAIN.format(which), thread=thread_id, wanted=wanted).fetchall()


def read_digests(conn: Connection, thread_id: str, ids: Sequence[int]) -> dict[int, bytes]:
    query = "SELECT id, digest FROM elements WHERE id = ANY(%s::bigint[]) AND thread_id = %s"
    return dict(run(conn, query, list(ids), thread_id).fetchall())


def read_elements(conn: Connection, thread_id: str, ids: Sequence[int]) -> dict[int, Blob]:
    query = "SELECT id, type, data FROM elements WHERE id = ANY(%s::bigint[]) AND thread_id = %s"
    return {id_: Blob(type_, unpacked(data)) for id_, type_, data in run(conn, query, list(ids), thread_id)}


def read_ancestor_writes(conn: Connection, step: StepKey, channels: Sequence[str]) -> list[AncestorWrite]:
    found = []
    rows = run(
        conn, _ANCESTORS,
        thread=step.thread_id, ns=step.checkpoint_ns, id=step.checkpoint_id, channels=list(channels),
    )  # fmt: skip
    for channel, value_id, task_id, task_path, type_, data, idx in rows:
        write = None
        if task_id is not None:
            write = StoredWrite(task_id, task_path, channel, Blob(type_, unpacked(data)), idx)
        found.append(AncestorWrite(channel, value_id, write))
    return found


# -- freeing and copying ----------------------------------------------------------------------------

_USED = "SELECT unnest(value_ids) FROM checkpoints WHERE thread_id = %(thread)s"


def sweep(conn: Connection, thread_id: str) -> None:
    """Free the values, lists and elements of a thread that no checkpoint refers to."""
    run(
        conn,
        f"DELETE FROM channel_values WHERE thread_id = %(thread)s AND value_id NOT IN ({_USED})",
        thread=thread_id,
    )
    bases: dict[int, int | None] = {}
    keeps: dict[int, int] = {}
    live: set[int] = set()
    for id_, base, keep, is_used in run(
        conn,
        f"SELECT id, base, keep, value_id IN ({_USED}) FROM lists WHERE thread_id = %(thread)s",
        thread=thread_id,
    ).fetchall():
        bases[id_], keeps[id_] = base, keep
        if is_used:
            live.add(id_)
    dead = bases.keys() - live
    if not dead:
        return
    for id_ in sorted(live):  # a base is older than what is based on it
        base, keep = bases[id_], keeps[id_]
        if base in dead:
            while base is not None and base in dead:
                keep, above = min(keep, keeps[base]), bases[base]
                if above is not None and above >= base:
                    raise CorruptRowError("a list is based on a newer version")
                base = above
            _base_on(conn, thread_id, id_, base, keep)
    run(conn, "DELETE FROM lists WHERE id = ANY(%s::bigint[])", sorted(dead))
    _sweep_elements(conn, thread_id)


def _base_on(conn: Connection, thread_id: str, id_: int, base: int | None, keep: int) -> None:
    keep = 0 if base is None else keep
    chain = list_chain(_chain(conn, "id = %(wanted)s", thread_id, id_))
    elements = dump_ids(flattened(chain)[keep:])
    run(conn, "UPDATE lists SET base = %s, keep = %s, elements = %s WHERE id = %s", base, keep, elements, id_)


def _sweep_elements(conn: Connection, thread_id: str) -> None:
    lists = run(conn, "SELECT elements FROM lists WHERE thread_id = %s", thread_id)
    held = run(conn, "SELECT id FROM elements WHERE thread_id = %s", thread_id)
    used = {id_ for (elements,) in lists.fetchall() for id_ in load_ids(elements)}
    run(
        conn,
        "DELETE FROM elements WHERE id = ANY(%s::bigint[])",
        [id_ for (id_,) in held.fetchall() if id_ not in used],
    )


def copy_values(conn: Connection, source: str, target: str) -> None:
    run(
        conn,
        "INSERT INTO channel_values SELECT %s, value_id, type, data FROM channel_values WHERE thread_id = %s "
        "ON CONFLICT DO NOTHING",
        target, source,
    )  # fmt: skip
    run(
        conn,
        "INSERT INTO elements (thread_id, digest, type, data) "
        "SELECT %s, digest, type, data FROM elements WHERE thread_id = %s ORDER BY id ON CONFLICT DO NOTHING",
        target, source,
    )  # fmt: skip
    pairs = run(
        conn,
        "SELECT ours.id, theirs.id FROM elements AS ours JOIN elements AS theirs "
        "ON theirs.thread_id = %s AND theirs.digest = ours.digest WHERE ours.thread_id = %s",
        target, source,
    )  # fmt: skip
    held = run(conn, "SELECT value_id, id FROM lists WHERE thread_id = %s", target)
    rows = run(
        conn,
        "SELECT id, value_id, kind, depth, base, keep, elements FROM lists WHERE thread_id = %s ORDER BY id",
        source,
    )
    copies: dict[int, int] = dict(pairs.fetchall())
    there: dict[str, int] = dict(held.fetchall())
    lists: dict[int, int] = {}
    for id_, value_id, kind, depth, base, keep, elements in rows.fetchall():
        if value_id not in there:
            inserted = run(
                conn,
                "INSERT INTO lists (thread_id, value_id, kind, depth, base, keep, elements) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING id",
                target, value_id, kind, depth, None if base is None else lists[base], keep,
                dump_ids([copies[element] for element in load_ids(elements)]),
            ).fetchone()  # fmt: skip
            assert inserted is not None
            there[value_id] = inserted[0]
        lists[id_] = there[value_id]

"""Channel values in PostgreSQL: whole values once each, lists as versions that share their elements with writes.

What one statement has to know of another's result, the database finds out itself (see postgres_0002.sql), so that a
checkpoint waits for no answer before it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langgraph_memstate.errors import CorruptRowError
from langgraph_memstate.storage.base import COUNTED
from langgraph_memstate.storage.postgres_link import Connection, run
from langgraph_memstate.storage.postgres_packing import value_of
from langgraph_memstate.storage.rows import dump_ids, flattened, list_chain, load_ids
from langgraph_memstate.storage.values import AncestorWrite, Blob, StepKey, StoredList, StoredWrite

GROWING = (*COUNTED, "threads")
"""The tables whose bytes `stats` adds up and `vacuum` writes anew."""
THREAD = "(SELECT threads.thread_id FROM threads WHERE threads.id = thread)"  # of a row
NUMBER = "(SELECT threads.id FROM threads WHERE threads.thread_id = %(thread)s)"
# The value of a row of `writes`. Where its element is not there, what is here is empty, and no value.
VALUE = (
    "CASE WHEN writes.digest = '' THEN writes.value ELSE coalesce((SELECT elements.value FROM elements "
    "WHERE elements.thread = writes.thread AND elements.digest = writes.digest), '') END"
)
WRITTEN = f'id_text(task_id) COLLATE "C" AS task_id, task_path, channel, idx, {VALUE}'
# A base is older than what is based on it; a row that says otherwise is damaged, and must not make the walk endless.
_CHAIN = (
    "WITH RECURSIVE chain (id, value_id, kind, depth, base, keep, elements) AS ("
    f"SELECT id, value_id, kind, depth, base, keep, elements FROM lists WHERE thread = {NUMBER} AND {{}} "
    "UNION ALL SELECT lists.id, lists.value_id, lists.kind, lists.depth, lists.base, lists.keep, lists.elements "
    f"FROM chain JOIN lists ON lists.id = chain.base AND lists.id < chain.id AND lists.thread = {NUMBER}) "
    "SELECT id_text(value_id), kind, depth, base, keep, elements FROM chain ORDER BY id DESC"
)
# Each channel is followed on its own; a row of the checkpoint itself starts the walk and is not part of the answer.
_ANCESTORS = (
    "WITH RECURSIVE path (channel, distance, checkpoint_id, parent_id, value_id) AS ("
    'SELECT wanted COLLATE "C", 0, checkpoint_id, parent_id, NULL::text COLLATE "C" '
    "FROM checkpoints, unnest(%(channels)s::text[]) AS wanted "
    f"WHERE thread = {NUMBER} AND checkpoint_ns = %(ns)s AND checkpoint_id = %(id)s "
    "UNION ALL SELECT channel, distance + 1, above.checkpoint_id, above.parent_id, "
    "above.manifest::json ->> path.channel "
    "FROM path JOIN checkpoints AS above "
    f"ON above.thread = {NUMBER} AND above.checkpoint_ns = %(ns)s AND above.checkpoint_id = id_text(path.parent_id) "
    "WHERE path.value_id IS NULL) "
    'SELECT path.channel, path.value_id, id_text(writes.task_id) COLLATE "C" AS task_id, task_path, '
    f"{VALUE}, idx FROM path "
    f"LEFT JOIN writes ON writes.thread = {NUMBER} AND writes.checkpoint_ns = %(ns)s "
    "AND writes.checkpoint_id = id_key(path.checkpoint_id) AND writes.channel = path.channel "
    "WHERE distance > 0 ORDER BY distance DESC, task_path, task_id, idx"
)


# -- reading ----------------------------------------------------------------------------------------


def read_values(conn: Connection, thread_id: str, value_ids: Sequence[str]) -> dict[str, Blob]:
    rows = run(
        conn,
        f"SELECT id_text(value_id), value FROM channel_values WHERE thread = {NUMBER} "
        "AND value_id = ANY(ARRAY(SELECT id_key(wanted) FROM unnest(%(ids)s::text[]) AS wanted))",
        thread=thread_id, ids=list(value_ids),
    )  # fmt: skip
    return {value_id: value_of(value) for value_id, value in rows}


def read_list_chain(conn: Connection, thread_id: str, value_id: str) -> list[StoredList]:
    return list_chain(_chain(conn, "value_id = id_key(%(wanted)s)", thread_id, value_id))


def _chain(conn: Connection, which: str, thread_id: str, wanted: str | int) -> list[Any]:
    return run(conn, _CHAIN.format(which), thread=thread_id, wanted=wanted).fetchall()


def read_digests(conn: Connection, thread_id: str, ids: Sequence[int]) -> dict[int, bytes]:
    query = f"SELECT id, digest FROM elements WHERE id = ANY(%(ids)s::bigint[]) AND thread = {NUMBER}"
    return dict(run(conn, query, ids=list(ids), thread=thread_id).fetchall())


def read_elements(conn: Connection, thread_id: str, ids: Sequence[int]) -> dict[int, Blob]:
    query = f"SELECT id, value FROM elements WHERE id = ANY(%(ids)s::bigint[]) AND thread = {NUMBER}"
    return {id_: value_of(value) for id_, value in run(conn, query, ids=list(ids), thread=thread_id)}


def read_ancestor_writes(conn: Connection, step: StepKey, channels: Sequence[str]) -> list[AncestorWrite]:
    found = []
    rows = run(
        conn, _ANCESTORS,
        thread=step.thread_id, ns=step.checkpoint_ns, id=step.checkpoint_id, channels=list(channels),
    )  # fmt: skip
    for channel, value_id, task_id, task_path, value, idx in rows:
        write = None
        if task_id is not None:
            write = StoredWrite(task_id, task_path, channel, value_of(value), idx)
        found.append(AncestorWrite(channel, value_id, write))
    return found


# -- freeing and copying ----------------------------------------------------------------------------

_USED = "SELECT id_key(used.value) FROM checkpoints, json_each_text(manifest::json) AS used WHERE thread = %(number)s"


def number_of(conn: Connection, thread_id: str) -> int | None:
    """A thread's number; None where it has no rows."""
    row = run(conn, "SELECT id FROM threads WHERE thread_id = %s", thread_id).fetchone()
    return None if row is None else int(row[0])


def sweep(conn: Connection, thread_id: str) -> None:
    """Free the values and lists of a thread that no checkpoint refers to, and the elements of no list and no write."""
    number = number_of(conn, thread_id)
    if number is None:
        return
    run(
        conn,
        f"DELETE FROM channel_values WHERE thread = %(number)s AND value_id NOT IN ({_USED})",
        number=number,
    )
    bases: dict[int, int | None] = {}
    keeps: dict[int, int] = {}
    live: set[int] = set()
    for id_, base, keep, is_used in run(
        conn,
        f"SELECT id, base, keep, value_id IN ({_USED}) FROM lists WHERE thread = %(number)s",
        number=number,
    ).fetchall():
        bases[id_], keeps[id_] = base, keep
        if is_used:
            live.add(id_)
    dead = bases.keys() - live
    for id_ in sorted(live) if dead else ():  # a base is older than what is based on it
        base, keep = bases[id_], keeps[id_]
        if base in dead:
            while base is not None and base in dead:
                keep, above = min(keep, keeps[base]), bases[base]
                if above is not None and above >= base:
                    raise CorruptRowError("a list is based on a newer version")
                base = above
            _base_on(conn, thread_id, id_, base, keep)
    run(conn, "DELETE FROM lists WHERE id = ANY(%s::bigint[])", sorted(dead))
    _sweep_elements(conn, number)
    run(
        conn,
        "DELETE FROM threads WHERE id = %(number)s "
        "AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE thread = %(number)s) "
        "AND NOT EXISTS (SELECT 1 FROM writes WHERE thread = %(number)s)",
        number=number,
    )


def _base_on(conn: Connection, thread_id: str, id_: int, base: int | None, keep: int) -> None:
    keep = 0 if base is None else keep
    chain = list_chain(_chain(conn, "id = %(wanted)s", thread_id, id_))
    elements = dump_ids(flattened(chain)[keep:])
    run(conn, "UPDATE lists SET base = %s, keep = %s, elements = %s WHERE id = %s", base, keep, elements, id_)


def _sweep_elements(conn: Connection, number: int) -> None:
    unwritten = run(
        conn,
        "SELECT id FROM elements WHERE thread = %(number)s "
        "AND digest NOT IN (SELECT digest FROM writes WHERE thread = %(number)s)",
        number=number,
    )
    lists = run(conn, "SELECT elements FROM lists WHERE thread = %s", number)
    listed = {id_ for (elements,) in lists.fetchall() for id_ in load_ids(elements)}
    run(
        conn,
        "DELETE FROM elements WHERE id = ANY(%s::bigint[])",
        [id_ for (id_,) in unwritten.fetchall() if id_ not in listed],
    )


_COPIED = {  # the key, after the thread, and the other columns
    "checkpoints": (
        ("checkpoint_ns", "checkpoint_id"),
        ("seq", "parent_id", "run_id", "manifest", "head"),
    ),
    "writes": (
        ("checkpoint_ns", "checkpoint_id", "task_id", "idx"),
        ("task_path", "channel", "digest", "value"),
    ),
    "staged": (
        ("checkpoint_ns", "checkpoint_id", "task_id", "ord"),
        ("task_path", "version", "ns", "key", "draft"),
    ),
}


def copy_rows(conn: Connection, source_id: str, target_id: str) -> None:
    """Copy what a thread has to another, whose rows of the same key are replaced."""
    _copy(conn, "staged", "thread_id", source_id, target_id)
    source = number_of(conn, source_id)
    if source is None:
        return
    ((target,),) = run(conn, "SELECT number_of(%s)", target_id).fetchall()
    for table in ("checkpoints", "writes"):
        _copy(conn, table, "thread", source, target)
    _copy_values(conn, source, target)


def _copy(conn: Connection, table: str, thread: str, source: str | int, target: str | int) -> None:
    key, rest = _COPIED[table]
    copied = ", ".join((*key, *rest))
    fresh = ", ".join(f"{column} = EXCLUDED.{column}" for column in rest)
    run(
        conn,
        f"INSERT INTO {table} ({thread}, {copied}) SELECT %s, {copied} FROM {table} WHERE {thread} = %s "
        f"ON CONFLICT ({thread}, {', '.join(key)}) DO UPDATE SET {fresh}",
        target, source,
    )  # fmt: skip


def _copy_values(conn: Connection, source: int, target: int) -> None:
    run(
        conn,
        "INSERT INTO channel_values SELECT %s, value_id, value FROM channel_values WHERE thread = %s "
        "ON CONFLICT DO NOTHING",
        target, source,
    )  # fmt: skip
    run(
        conn,
        "INSERT INTO elements (thread, digest, value) "
        "SELECT %s, digest, value FROM elements WHERE thread = %s ORDER BY id ON CONFLICT DO NOTHING",
        target, source,
    )  # fmt: skip
    pairs = run(
        conn,
        "SELECT ours.id, theirs.id FROM elements AS ours JOIN elements AS theirs "
        "ON theirs.thread = %s AND theirs.digest = ours.digest WHERE ours.thread = %s",
        target, source,
    )  # fmt: skip
    held = run(conn, "SELECT value_id, id FROM lists WHERE thread = %s", target)
    rows = run(
        conn,
        "SELECT id, value_id, kind, depth, base, keep, elements FROM lists WHERE thread = %s ORDER BY id",
        source,
    )
    copies: dict[int, int] = dict(pairs.fetchall())
    there: dict[bytes, int] = dict(held.fetchall())
    lists: dict[int, int] = {}
    for id_, value_id, kind, depth, base, keep, elements in rows.fetchall():
        if value_id not in there:
            inserted = run(
                conn,
                "INSERT INTO lists (thread, value_id, kind, depth, base, keep, elements) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING id",
                target, value_id, kind, depth, None if base is None else lists[base], keep,
                dump_ids([copies[element] for element in load_ids(elements)]),
            ).fetchone()  # fmt: skip
            assert inserted is not None
            there[value_id] = inserted[0]
        lists[id_] = there[value_id]

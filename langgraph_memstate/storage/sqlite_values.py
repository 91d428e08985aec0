"""Channel values in SQLite: whole values once each, lists as versions that share their elements.

A version of a list is "the first `keep` elements of its base, then these". Which version is the base is the writer's
choice (skip deltas: a chain of bases is as long as the depth has binary digits); here a base is any row it names.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence

from langgraph_memstate.errors import CommitRaced, CorruptRowError
from langgraph_memstate.storage.operations import PutCheckpoint
from langgraph_memstate.storage.packing import packed, unpacked
from langgraph_memstate.storage.rows import (
    dump_ids,
    escaped,
    flattened,
    list_chain,
    load_ids,
    read_manifest,
    unescaped,
)
from langgraph_memstate.storage.values import AncestorWrite, Blob, ListValue, StepKey, StoredList, StoredWrite

# A base is older than what is based on it; a row that says otherwise is damaged, and must not make the walk endless.
_CHAIN = (
    "WITH RECURSIVE chain (id, value_id, kind, depth, base, keep, elements) AS ("
    "SELECT id, value_id, kind, depth, base, keep, elements FROM lists WHERE thread_id = ?1 AND {} "
    "UNION ALL SELECT lists.id, lists.value_id, lists.kind, lists.depth, lists.base, lists.keep, lists.elements "
    "FROM chain JOIN lists ON lists.id = chain.base AND lists.id < chain.id AND lists.thread_id = ?1) "
    "SELECT value_id, kind, depth, base, keep, elements FROM chain ORDER BY id DESC"
)
# Each channel is followed on its own; a row of the checkpoint itself starts the walk and is not part of the answer.
# `name`: what the channel is called in a manifest.
_ANCESTORS = (
    "WITH RECURSIVE wanted (channel, name) AS (VALUES {}), "
    "path (channel, name, distance, checkpoint_id, parent_id, manifest) AS ("
    "SELECT channel, name, 0, checkpoint_id, parent_id, '{{}}' FROM checkpoints, wanted "
    "WHERE thread_id = ?1 AND checkpoint_ns = ?2 AND checkpoint_id = ?3 "
    "UNION ALL SELECT channel, name, distance + 1, above.checkpoint_id, above.parent_id, above.manifest "
    "FROM path JOIN checkpoints AS above "
    "ON above.thread_id = ?1 AND above.checkpoint_ns = ?2 AND above.checkpoint_id = path.parent_id "
    "WHERE NOT EXISTS (SELECT 1 FROM json_each(path.manifest) WHERE key = path.name)) "
    "SELECT path.channel, (SELECT value FROM json_each(path.manifest) WHERE key = path.name), "
    "task_id, task_path, type, data, idx FROM path "
    "LEFT JOIN writes ON writes.thread_id = ?1 AND writes.checkpoint_ns = ?2 "
    "AND writes.checkpoint_id = path.checkpoint_id AND writes.channel = path.channel "
    "WHERE distance > 0 ORDER BY distance DESC, task_path, task_id, idx"
)


# -- writing ----------------------------------------------------------------------------------------


def put_values(conn: sqlite3.Connection, op: PutCheckpoint) -> None:
    """Store what is new, and make sure that the rest is there.

    Raises:
        CommitRaced: a value, list or element that the checkpoint refers to was deleted meanwhile.
    """
    thread_id = op.step.thread_id
    if op.values:
        conn.executemany(
            "INSERT OR IGNORE INTO channel_values VALUES (?, ?, ?, ?)",
            [(thread_id, value_id, blob.type, packed(blob.data)) for value_id, blob in op.values.items()],
        )
    for value_id, version in op.lists.items():
        if _list_id(conn, thread_id, value_id) is None:
            _put_list(conn, thread_id, value_id, version, op.elements)
    reused = set(op.manifest.values()) - op.values.keys() - op.lists.keys()
    if reused:
        (held,) = conn.execute(
            f"WITH wanted (value_id) AS (VALUES {', '.join(['(?)'] * len(reused))}) SELECT count(*) FROM wanted WHERE "
            "EXISTS (SELECT 1 FROM channel_values AS held WHERE thread_id = ? AND held.value_id = wanted.value_id) OR "
            "EXISTS (SELECT 1 FROM lists AS held WHERE thread_id = ? AND held.value_id = wanted.value_id)",
            (*reused, thread_id, thread_id),
        ).fetchone()
        if held < len(reused):
            raise _raced()


def _raced() -> CommitRaced:
    return CommitRaced("values of the checkpoint before this one were deleted meanwhile")


def _list_id(conn: sqlite3.Connection, thread_id: str, value_id: str) -> int | None:
    row = conn.execute("SELECT id FROM lists WHERE thread_id = ? AND value_id = ?", (thread_id, value_id)).fetchone()
    return None if row is None else int(row[0])


def _put_list(
    conn: sqlite3.Connection, thread_id: str, value_id: str, version: ListValue, fresh: Mapping[bytes, Blob]
) -> None:
    base = None if version.base is None else _list_id(conn, thread_id, version.base)
    if base is None and version.base is not None:
        raise _raced()
    ids = [_element_id(conn, thread_id, digest, fresh) for digest in version.tail]
    conn.execute(
        "INSERT INTO lists (thread_id, value_id, kind, depth, base, keep, elements) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (thread_id, value_id, version.kind, version.depth, base, version.keep, dump_ids(ids)),
    )


def _element_id(conn: sqlite3.Connection, thread_id: str, digest: bytes, fresh: Mapping[bytes, Blob]) -> int:
    row = conn.execute("SELECT id FROM elements WHERE thread_id = ? AND digest = ?", (thread_id, digest)).fetchone()
    if row is not None:
        return int(row[0])
    if digest not in fresh:
        raise _raced()
    blob = fresh[digest]
    inserted = conn.execute(
        "INSERT INTO elements (thread_id, digest, type, data) VALUES (?, ?, ?, ?)",
        (thread_id, digest, blob.type, packed(blob.data)),
    ).lastrowid
    assert inserted is not None
    return inserted


# -- reading ----------------------------------------------------------------------------------------


def read_values(conn: sqlite3.Connection, thread_id: str, value_ids: Sequence[str]) -> dict[str, Blob]:
    marks = ", ".join("?" * len(value_ids))  # less work than json_each, and there are as few as a graph has channels
    rows = conn.execute(
        f"SELECT value_id, type, data FROM channel_values WHERE thread_id = ? AND value_id IN ({marks})",
        (thread_id, *value_ids),
    )
    return {value_id: Blob(type_, unpacked(data)) for value_id, type_, data in rows}


def read_list_chain(conn: sqlite3.Connection, thread_id: str, value_id: str) -> list[StoredList]:
    return list_chain(conn.execute(_CHAIN.format("value_id = ?2"), (thread_id, value_id)).fetchall())


def read_digests(conn: sqlite3.Connection, thread_id: str, ids: Sequence[int]) -> dict[int, bytes]:
    return dict(
        conn.execute(
            "SELECT id, digest FROM elements WHERE id IN (SELECT value FROM json_each(?)) AND thread_id = ?",
            (json.dumps(list(ids)), thread_id),
        )
    )


def read_elements(conn: sqlite3.Connection, thread_id: str, ids: Sequence[int]) -> dict[int, Blob]:
    wanted = set(ids)
    first, last = min(wanted, default=0), max(wanted, default=-1)
    if last - first < 2 * len(wanted):  # most of them are neighbours, and a range is found fastest
        rows = conn.execute(
            "SELECT id, type, data FROM elements WHERE id BETWEEN ? AND ? AND thread_id = ?", (first, last, thread_id)
        )
    else:
        rows = conn.execute(
            "SELECT id, type, data FROM elements WHERE id IN (SELECT value FROM json_each(?)) AND thread_id = ?",
            (json.dumps(list(ids)), thread_id),
        )
    return {id_: Blob(type_, unpacked(data)) for id_, type_, data in rows if id_ in wanted}


def read_ancestor_writes(conn: sqlite3.Connection, step: StepKey, channels: Sequence[str]) -> list[AncestorWrite]:
    if not channels:
        return []
    found = []
    marks = ", ".join(f"(?{number}, ?{number + 1})" for number in range(4, 4 + 2 * len(channels), 2))
    names = [text for channel in channels for text in (channel, escaped(channel))]
    rows = conn.execute(_ANCESTORS.format(marks), (*step, *names))
    for channel, value_id, task_id, task_path, type_, data, idx in rows:
        write = None
        if task_id is not None:
            write = StoredWrite(task_id, task_path, channel, Blob(type_, unpacked(data)), idx)
        found.append(AncestorWrite(channel, None if value_id is None else unescaped(value_id), write))
    return found


# -- freeing and copying ----------------------------------------------------------------------------


def sweep(conn: sqlite3.Connection, thread_id: str) -> None:
    """Free the values, lists and elements of a thread that no checkpoint refers to."""
    used: set[str] = set()
    for (manifest,) in conn.execute("SELECT manifest FROM checkpoints WHERE thread_id = ?", (thread_id,)):
        used.update(read_manifest(manifest).values())
    held = conn.execute("SELECT value_id FROM channel_values WHERE thread_id = ?", (thread_id,)).fetchall()
    conn.executemany(
        "DELETE FROM channel_values WHERE thread_id = ? AND value_id = ?",
        [(thread_id, value_id) for (value_id,) in held if value_id not in used],
    )
    bases: dict[int, int | None] = {}
    keeps: dict[int, int] = {}
    live: set[int] = set()
    for id_, base, keep, value_id in conn.execute(
        "SELECT id, base, keep, value_id FROM lists WHERE thread_id = ?", (thread_id,)
    ):
        bases[id_], keeps[id_] = base, keep
        if value_id in used:
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
    conn.executemany("DELETE FROM lists WHERE id = ?", [(id_,) for id_ in dead])
    _sweep_elements(conn, thread_id)


def _base_on(conn: sqlite3.Connection, thread_id: str, id_: int, base: int | None, keep: int) -> None:
    keep = 0 if base is None else keep
    chain = list_chain(conn.execute(_CHAIN.format("id = ?2"), (thread_id, id_)).fetchall())
    elements = dump_ids(flattened(chain)[keep:])
    conn.execute("UPDATE lists SET base = ?, keep = ?, elements = ? WHERE id = ?", (base, keep, elements, id_))


def _sweep_elements(conn: sqlite3.Connection, thread_id: str) -> None:
    used: set[int] = set()
    for (elements,) in conn.execute("SELECT elements FROM lists WHERE thread_id = ?", (thread_id,)):
        used.update(load_ids(elements))
    held = [id_ for (id_,) in conn.execute("SELECT id FROM elements WHERE thread_id = ?", (thread_id,))]
    conn.executemany("DELETE FROM elements WHERE id = ?", [(id_,) for id_ in held if id_ not in used])


def copy_values(conn: sqlite3.Connection, source: str, target: str) -> None:
    conn.execute(
        "INSERT OR IGNORE INTO channel_values SELECT ?, value_id, type, data FROM channel_values WHERE thread_id = ?",
        (target, source),
    )
    conn.execute(
        "INSERT OR IGNORE INTO elements (thread_id, digest, type, data) "
        "SELECT ?, digest, type, data FROM elements WHERE thread_id = ? ORDER BY id",
        (target, source),
    )
    copies: dict[int, int] = dict(
        conn.execute(
            "SELECT ours.id, theirs.id FROM elements AS ours JOIN elements AS theirs "
            "ON theirs.thread_id = ? AND theirs.digest = ours.digest WHERE ours.thread_id = ?",
            (target, source),
        )
    )
    lists: dict[int, int] = {}
    for id_, value_id, kind, depth, base, keep, elements in conn.execute(
        "SELECT id, value_id, kind, depth, base, keep, elements FROM lists WHERE thread_id = ? ORDER BY id", (source,)
    ).fetchall():
        held = _list_id(conn, target, value_id)
        if held is None:
            held = conn.execute(
                "INSERT INTO lists (thread_id, value_id, kind, depth, base, keep, elements) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (target, value_id, kind, depth, None if base is None else lists[base], keep,
                 dump_ids([copies[element] for element in load_ids(elements)])),
            ).lastrowid  # fmt: skip
            assert held is not None
        lists[id_] = held

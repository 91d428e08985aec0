"""What must hold of a database file at any moment, asked of SQLite itself and not of the code under test."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from langgraph_memstate import MemoryStore
from langgraph_memstate.storage.rows import load_ids

Rows = list[tuple[object, ...]]


def audit(path: Path, *, settled: bool = False, pruned: bool = False) -> list[str]:
    """Violations found in a database.

    `settled`: nothing may wait for the index either. `pruned`: checkpoints were deleted, the facts of their steps not.
    """
    with closing(sqlite3.connect(path)) as connection:

        def rows(query: str) -> Rows:
            return connection.execute(query).fetchall()

        found = [f"integrity check: {line}" for (line,) in rows("PRAGMA integrity_check") if line != "ok"]
        if not rows("SELECT 1 FROM sqlite_master"):
            return found  # killed before the first migration landed
        sequence = [row[0] for row in rows("SELECT seq FROM facts ORDER BY seq")]
        if sequence != list(range(1, len(sequence) + 1)):
            found.append(f"the log has gaps: {sequence}")
        found += _wrong_items(rows("SELECT seq, ns, key, op, version, value FROM facts ORDER BY seq"),
                              rows("SELECT seq, ns, key, version, value FROM items"))  # fmt: skip
        queries = _NEVER | (_NEVER_WHEN_SETTLED if settled else {}) | ({} if pruned else _NEVER_BEFORE_PRUNING)
        for what, query in queries.items():
            found += [f"{what}: {row}" for row in rows(query)]
        found += _wrong_elements(rows("SELECT thread_id, elements FROM lists"),
                                 rows("SELECT thread_id, id FROM elements"))  # fmt: skip
    return found


def _wrong_elements(lists: Rows, elements: Rows) -> list[str]:
    """Every element of a list is there, in its thread, and every element is of a list."""
    used = {(thread_id, id_) for thread_id, ids in lists for id_ in load_ids(ids)}
    lost = [f"an element that a list refers to is not there: {one}" for one in sorted(used - set(elements), key=str)]
    return lost + [f"an element of no list: {one}" for one in sorted(set(elements) - used, key=str)]


def _wrong_items(log: Rows, items: Rows) -> list[str]:
    """Items are what the log says, read from its start."""
    current: dict[object, tuple[object, ...]] = {}
    for seq, ns, key, op, version, value in log:
        if op == "delete":
            current.pop((ns, key), None)
        else:
            current[ns, key] = (seq, ns, key, version, value)
    differing = set(current.values()) ^ set(items)
    return [f"items and log differ: {row}" for row in sorted(differing, key=str)]


_NEVER_BEFORE_PRUNING = {
    "a fact of a step whose checkpoint is not there": (
        "SELECT version FROM facts WHERE checkpoint_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM checkpoints AS c "
        "WHERE c.thread_id = facts.thread_id AND c.checkpoint_ns = facts.checkpoint_ns "
        "AND c.checkpoint_id = facts.checkpoint_id)"
    ),
}
_NEVER = {
    "a checkpoint that refers to a value that is not there": (
        "SELECT c.checkpoint_id, used.key FROM checkpoints AS c, json_each(c.manifest) AS used WHERE NOT EXISTS "
        "(SELECT 1 FROM channel_values AS v WHERE v.thread_id = c.thread_id AND v.value_id = used.value) AND "
        "NOT EXISTS (SELECT 1 FROM lists AS l WHERE l.thread_id = c.thread_id AND l.value_id = used.value)"
    ),
    "a value that no checkpoint refers to": (
        "SELECT thread_id, value_id FROM (SELECT thread_id, value_id FROM channel_values UNION ALL "
        "SELECT thread_id, value_id FROM lists) AS v WHERE NOT EXISTS (SELECT 1 FROM checkpoints AS c, "
        "json_each(c.manifest) AS used WHERE c.thread_id = v.thread_id AND used.value = v.value_id)"
    ),
    "a list whose base is not an older version of the same thread": (
        "SELECT id FROM lists AS l WHERE base IS NOT NULL AND NOT EXISTS (SELECT 1 FROM lists AS b WHERE "
        "b.id = l.base AND b.id < l.id AND b.thread_id = l.thread_id)"
    ),
    "staged work that is in the log already": (
        "SELECT version FROM staged WHERE version IN (SELECT version FROM facts)"
    ),
    "staged work of a task that did not finish": (
        "SELECT s.task_id FROM staged AS s JOIN writes AS w USING (thread_id, checkpoint_ns, checkpoint_id, "
        "task_id) GROUP BY s.task_id HAVING max(w.idx) < 0"
    ),
    "staged work without the writes of its task": (
        "SELECT DISTINCT task_id FROM staged AS s WHERE NOT EXISTS (SELECT 1 FROM writes AS w WHERE "
        "w.thread_id = s.thread_id AND w.checkpoint_id = s.checkpoint_id AND w.task_id = s.task_id)"
    ),
    "a current version whose vector has no embedding": (
        "SELECT version FROM vectors JOIN items USING (version) WHERE text_hash NOT IN "
        "(SELECT text_hash FROM embeddings)"
    ),
    "vectors of a version that is not in the log": (
        "SELECT version FROM vectors WHERE version NOT IN (SELECT version FROM facts)"
    ),
}
_NEVER_WHEN_SETTLED = {
    "index work that is still waiting": "SELECT id, op, vector_id, attempts, error FROM outbox",
    "a prepare record that nobody settled": "SELECT id, owner FROM prepared",
}


def rows_of(path: Path) -> dict[str, Rows]:
    """Every row of every table, as the ids in it order them."""
    with closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
        return {name: sorted(connection.execute(f"SELECT * FROM {name}").fetchall(), key=repr) for (name,) in tables}


def facts_of_checkpoints(path: Path, thread_id: str) -> dict[str, set[str]]:
    """By checkpoint id of a thread's root graph, the keys of the items that were current as it committed."""
    with closing(sqlite3.connect(path)) as connection:
        log = connection.execute("SELECT seq, key, op FROM facts WHERE thread_id = ? ORDER BY seq", (thread_id,))
        entries = log.fetchall()
        found: dict[str, set[str]] = {}
        keys: set[str] = set()
        position = 0
        for checkpoint_id, seq in connection.execute(
            "SELECT checkpoint_id, seq FROM checkpoints WHERE thread_id = ? AND checkpoint_ns = '' ORDER BY seq",
            (thread_id,),
        ):
            while position < len(entries) and entries[position][0] <= seq:
                _, key, op = entries[position]
                keys = keys - {key} if op == "delete" else keys | {key}
                position += 1
            found[checkpoint_id] = set(keys)
    return found


def vector_ids(path: Path) -> set[str]:
    """Ids of the vectors of every current version, as SQL has them."""
    with closing(sqlite3.connect(path)) as connection:
        return {row[0] for row in connection.execute("SELECT vector_id FROM vectors JOIN items USING (version)")}


def untrue_search(memory: MemoryStore, latest: int = 12) -> list[str]:
    """What search by meaning says and SQL does not.

    A search for everything finds every fact, once. A search for the text of one of the latest finds it, or one with the
    same vector, even where the index has not heard of it: asking for a single fact gives no other reason to scan SQL.
    """
    facts = memory.query(limit=1_000_000)
    wanted = sorted((fact.namespace, fact.id) for fact in facts)
    found = sorted((fact.namespace, fact.id) for fact in memory.search("memory", limit=len(facts) + 10))
    wrong = [] if found == wanted else [f"search finds {found} of {wanted}"]
    for fact in facts[:latest]:
        first = memory.search(fact.payload["text"], limit=1)
        if not first or (first[0].score or 0.0) < 0.9999:
            wrong.append(f"search for the text of {fact.id} finds {[(one.id, one.score) for one in first]}")
    return wrong


def journal_ids(path: Path) -> set[str]:
    """Ids that a `JournalHook` file holds."""
    held: set[str] = set()
    for line in path.read_text().splitlines()[1:]:
        id_, vector, _ = json.loads(line)
        held = held - {id_} if vector is None else held | {id_}
    return held

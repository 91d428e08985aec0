"""A memory as plain rows: the neutral form in which it moves from one storage to another.

A row is a tuple of texts, numbers, bytes and None. It begins with its key, and what it says does not depend on the
storage: bytes are not compressed, namespaces are encoded as in facts.py, times are seconds since 1970. Two storages
hold the same memory exactly if they give the same rows in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from langgraph_memstate.errors import CorruptRowError

Row = tuple[str | int | float | bytes | None, ...]


class Table(NamedTuple):
    columns: tuple[str, ...]
    key: int
    """how many of the first columns are the primary key"""


def _table(key: str, rest: str = "") -> Table:
    names = key.split()
    return Table((*names, *rest.split()), len(names))


_STEP = "thread_id checkpoint_ns checkpoint_id"

META = "meta"
"""Notes about the database itself, such as its id. It belongs to no memory, and does not move."""

UNFINISHED = "unfinished"
"""Key in `meta`: says what a database is to become, and nothing ("") where it is a memory."""

TABLES: Mapping[str, Table] = {
    META: _table("key", "value"),
    # The log; the columns are those of `LogEntry`, `Origin` and `Draft`. `value` and `index_paths` are JSON.
    "facts": _table(
        "seq",
        "version commit_id ns key op type value supersedes undoes created_at index_paths ttl schema schema_version "
        "thread_id checkpoint_ns checkpoint_id task_id node run_id actor reason ts committed_at",
    ),
    "items": _table("ns key", "version seq type value created_at updated_at ttl expires_at"),
    # `head` is the serialised checkpoint, `metadata` JSON, `manifest` a JSON object of channels and ids of values.
    "checkpoints": _table(_STEP, "parent_id run_id seq ts head_type head metadata manifest"),
    "channel_values": _table("thread_id value_id", "type data"),
    # `base` is the id of another row; `elements` are ids of elements, as a JSON list.
    "lists": _table("id", "thread_id value_id kind depth base keep elements"),
    "elements": _table("id", "thread_id digest type data"),
    "writes": _table(f"{_STEP} task_id idx", "task_path channel type data"),
    # `draft` is what `Draft.dumps` gives.
    "staged": _table(f"{_STEP} task_id ord", "task_path version ns key draft"),
    "indexes": _table("name", "model dims generation"),
    "embeddings": _table("model text_hash", "vector"),
    "vectors": _table("id", "version index_name ord vector_id text_hash"),
    "outbox": _table("id", "index_name op vector_id version attempts retry_at error"),
}

MOVED = tuple(name for name in TABLES if name != META)
"""What a memory consists of. Prepare records are not among it: they speak of calls of the process that made them."""


def dump_manifest(manifest: Mapping[str, str]) -> str:
    return json.dumps(manifest, ensure_ascii=False, separators=(",", ":"))


def load_manifest(text: object) -> dict[str, str]:
    """Channel -> id of its value, in the order of the text."""
    try:
        return dict(json.loads(str(text)))
    except (TypeError, ValueError) as error:
        raise CorruptRowError(f"the manifest of a checkpoint is not JSON: {error}") from error

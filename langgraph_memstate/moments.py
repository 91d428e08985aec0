"""Moments of the past: a checkpoint, a sequence of the log or a time, as one place in the log."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from langgraph_memstate.errors import UnknownMomentError
from langgraph_memstate.facts import check_text
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.values import StoredHead

When = int | datetime | str | Mapping[str, Any] | Any
"""A sequence, an aware time, or a checkpoint: its id, its config, or a snapshot or tuple that has a config."""


class Moment(NamedTuple):
    """After the log's entry `seq`, at `at` (seconds since 1970), which decides what had expired."""

    seq: int
    at: float


class CheckpointRef(NamedTuple):
    """How a caller names a checkpoint; None where anything will do."""

    thread_id: str | None
    checkpoint_ns: str | None
    checkpoint_id: str | None


def checkpoint_ref(when: object) -> CheckpointRef:
    """The checkpoint that an id, a config, or something with a config names.

    Raises:
        UnknownMomentError: it is nothing of the kind.
    """
    if isinstance(when, str) and when:
        return CheckpointRef(None, None, when)
    config = getattr(when, "config", when)
    configurable = config.get("configurable") if isinstance(config, Mapping) else None
    if not isinstance(configurable, Mapping):
        raise UnknownMomentError(
            f"{when!r:.200} names no moment: give a sequence of the log, an aware datetime, a checkpoint id, "
            "or the config of a checkpoint"
        )
    ns = configurable.get("checkpoint_ns")
    thread_id, checkpoint_id = configurable.get("thread_id"), configurable.get("checkpoint_id")
    return CheckpointRef(
        None if thread_id is None else str(thread_id), ns, None if checkpoint_id is None else str(checkpoint_id)
    )


def find_checkpoint(reader: Reader, when: object, thread_id: str | None = None) -> StoredHead:
    """The checkpoint that `when` names; without an id, the latest of its thread.

    Raises:
        UnknownMomentError: there is none, or more than one.
    """
    ref = checkpoint_ref(when)
    for name, text in ref._asdict().items():
        check_text(name, text)
    if thread_id is not None and ref.thread_id not in (None, thread_id):
        raise UnknownMomentError(f"that checkpoint is of thread {ref.thread_id!r}, not {thread_id!r}")
    thread_id = ref.thread_id if thread_id is None else thread_id
    if thread_id is not None and (ref.checkpoint_ns is not None or ref.checkpoint_id is None):
        found = next(reader.ancestors(thread_id, ref.checkpoint_ns or "", ref.checkpoint_id), None)
        if found is None:
            raise UnknownMomentError(
                f"thread {thread_id!r} has no such checkpoint: {ref.checkpoint_id or 'none at all'}"
            )
        return found
    if ref.checkpoint_id is None:
        raise UnknownMomentError("a checkpoint's config needs a thread_id or a checkpoint_id")
    matching = reader.checkpoints(
        thread_id=thread_id, checkpoint_ns=ref.checkpoint_ns, checkpoint_id=ref.checkpoint_id, before=None, limit=2
    )
    if not matching:
        raise UnknownMomentError(f"no thread has a checkpoint {ref.checkpoint_id!r}")
    if len(matching) > 1:
        raise UnknownMomentError(
            f"checkpoint {ref.checkpoint_id!r} is of more than one thread; give its config, with the thread_id"
        )
    return matching[0]


def find_moment(reader: Reader, when: When) -> Moment:
    """The moment that `when` names.

    Raises:
        UnknownMomentError: it names none.
    """
    if isinstance(when, Moment):
        return when
    if isinstance(when, datetime):
        if when.tzinfo is None:
            raise UnknownMomentError(f"{when} has no time zone; use an aware datetime, such as datetime.now(UTC)")
        return Moment(reader.seq_at(when.timestamp()), when.timestamp())
    if isinstance(when, int) and not isinstance(when, bool):
        if not 0 <= when <= reader.last_seq():
            raise UnknownMomentError(f"the log goes from 0 to {reader.last_seq()}; {when} is not in it")
        entry = next(reader.log(after=when - 1, until=when), None)
        return Moment(when, 0.0 if entry is None else entry.ts.timestamp())
    found = find_checkpoint(reader, when)
    return Moment(found.seq, datetime.fromisoformat(found.ts).timestamp())

"""Sessions: facts that last as long as a conversation, unless they are promoted.

A fact of a session is an ordinary fact in a namespace of its own: ``("@session", session_id, *namespace)``. So it is
searched, staged, undone and audited like any other, and schemas hold for it as if it were in its namespace already.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from langgraph_memstate.facts import (
    SESSION,
    Draft,
    Fact,
    Namespace,
    Origin,
    Record,
    check_namespace,
    new_version,
    split_session,
)
from langgraph_memstate.reading import View

Selector = Callable[[Fact], bool]


def promoted(
    view: View, session_id: str, selector: Selector | None, actor: str | None, reason: str | None
) -> tuple[list[Draft], list[Draft], list[tuple[Namespace, str, str | None]]]:
    """The writes that make facts of a session long-term ones, the deletes that end them there, and what was read.

    The new version keeps the fact's actor and reason where none are given. It keeps neither thread nor step: a rollback
    of those would take it for theirs and undo half of the promotion. They stay in the history of the session's address.
    """
    puts: list[Draft] = []
    ends: list[Draft] = []
    read: list[tuple[Namespace, str, str | None]] = []
    for record in _facts_of(view, session_id, selector):
        source = view.written(record.version)
        if source is None:
            continue  # discarded a moment ago
        origin = Origin(actor=actor or source.origin.actor, reason=reason or source.origin.reason)
        puts.append(
            replace(
                source,
                version=new_version(),
                namespace=split_session(record.namespace)[1],
                origin=origin,
                ts=time.time(),
                patch=None,
            )
        )
        ends.append(_end(record, Origin(actor=actor, reason=reason or "promoted")))
        read.append((record.namespace, record.key, record.version))
    return puts, ends, read


def discarded(view: View, session_id: str, actor: str | None, reason: str | None) -> list[Draft]:
    """The deletes that end a session."""
    origin = Origin(actor=actor, reason=reason or "discarded")
    return [_end(record, origin) for record in _facts_of(view, session_id, None)]


def _facts_of(view: View, session_id: str, selector: Selector | None) -> Iterator[Record]:
    """Oldest first."""
    prefix = check_namespace((SESSION, session_id))
    found = view.search(prefix, matches=None, query=None, limit=sys.maxsize, offset=0)
    for record, _ in reversed(found):
        if record.namespace != prefix and (selector is None or selector(Fact.of(record))):
            yield record


def _end(record: Record, origin: Origin) -> Draft:
    return Draft(new_version(), record.namespace, record.key, "delete", None, origin=origin, overrides=True)

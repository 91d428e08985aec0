"""Erasing content on purpose: the one change that the log allows to what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from langgraph_memstate.errors import ForgetError
from langgraph_memstate.facts import (
    SESSION,
    Draft,
    LogEntry,
    Namespace,
    Origin,
    decode_namespace,
    in_session,
    new_version,
    split_session,
)
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.operations import Commit, DeleteThread, Expect, Forget
from langgraph_memstate.storage.tables import TABLES


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """What was erased: current items, contents of versions, vectors, and the checkpoints of these threads."""

    items: int
    versions: int
    vectors: int
    threads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Erasure:
    """One commit that forgets: deletes of what is current, then the operations that erase."""

    drafts: tuple[Draft, ...]
    before: Commit
    after: Commit
    report: ForgetReport


def plan_forget(reader: Reader, subject: Forget, *, checkpoints: bool, origin: Origin) -> Erasure:
    """What erases a subject. With `checkpoints`, also the threads whose steps wrote what is erased."""
    waiting = _staged(reader)
    subjects = [subject, *_in_sessions(reader, subject, waiting)]
    entries = [entry for each in subjects for entry in _entries(reader, each) if entry.value is not None]
    copies = _copies(reader, subject, entries)
    entries += copies
    versions = {entry.version for entry in entries}
    drafts, current = [], []
    for namespace, key in sorted({entry.address for entry in entries}):
        item = reader.item(namespace, key, now=0.0)
        current.append((namespace, key, None if item is None else item.version))
        if item is not None and item.version in versions:
            drafts.append(Draft(new_version(), namespace, key, "delete", None, origin=origin))
    threads: set[str] = set()
    if checkpoints:
        threads = {entry.thread_id for entry in entries if entry.thread_id is not None}
        threads |= {one.thread_id for one in waiting if any(one.is_of(each) for each in subjects)}
        threads |= {subject.thread_id} if subject.thread_id is not None else set()
    report = ForgetReport(len(drafts), len(entries), reader.vectors_of(sorted(versions)), tuple(sorted(threads)))
    subjects[0] = replace(subject, copies=tuple(entry.version for entry in copies))
    erase: Commit = (*subjects, *map(DeleteThread, sorted(threads)))
    return Erasure(tuple(drafts), (Expect(tuple(current)),), erase, report)


class _Staged(NamedTuple):
    """A write that waits for its step."""

    thread_id: str
    namespace: Namespace
    key: str

    def is_of(self, subject: Forget) -> bool:
        return (
            self.namespace[: len(subject.prefix)] == subject.prefix
            and subject.key in (None, self.key)
            and subject.thread_id in (None, self.thread_id)
        )


def _staged(reader: Reader) -> list[_Staged]:
    thread_id, ns, key = map(TABLES["staged"].columns.index, ("thread_id", "ns", "key"))
    return [
        _Staged(str(row[thread_id]), decode_namespace(str(row[ns])), str(row[key])) for row in reader.dump("staged")
    ]


def _in_sessions(reader: Reader, subject: Forget, waiting: Sequence[_Staged]) -> list[Forget]:
    """The same subject in every session that ever had facts of it, or will have."""
    if not subject.prefix or subject.prefix[0] == SESSION:
        return []  # that is everywhere, or in sessions already
    written = (entry.namespace for entry in reader.log(prefix=(SESSION,), key=subject.key))
    places = (split_session(namespace) for namespace in chain(written, (one.namespace for one in waiting)))
    prefix = subject.prefix
    sessions = {session for session, namespace in places if namespace[: len(prefix)] == prefix}
    return [replace(subject, prefix=in_session(prefix, session)) for session in sorted(filter(None, sessions))]


def _entries(reader: Reader, subject: Forget) -> list[LogEntry]:
    origin = None if subject.thread_id is None else {"thread_id": subject.thread_id}
    return list(reader.log(prefix=subject.prefix, key=subject.key, origin=origin))


def _copies(reader: Reader, subject: Forget, entries: Sequence[LogEntry]) -> list[LogEntry]:
    """The entries by which undoing or promoting, for whomever, has brought the same content back.

    Who names a session means what is in it, not what was promoted.
    """
    contents: dict[tuple[Namespace, str], list[Any]] = {}
    for entry in entries:
        contents.setdefault(entry.address, []).append(entry.value)
    promotions: dict[tuple[Namespace, str], set[int]] = {}
    for (place, key), values in list(contents.items()):
        session, namespace = split_session(place)
        if session is not None and namespace[: len(subject.prefix)] == subject.prefix:
            contents.setdefault((namespace, key), []).extend(values)
            ends = (entry.commit_id for entry in reader.versions(place, key) if entry.op == "delete")
            promotions.setdefault((namespace, key), set()).update(ends)
    known = {entry.version for entry in entries}
    return [
        entry
        for address, values in contents.items()
        for entry in reader.versions(*address)
        if entry.version not in known
        and entry.value in values
        and (entry.undoes is not None or entry.commit_id in promotions.get(address, ()))
    ]


def subject_of(prefix: Namespace, key: str | None, thread_id: str | None) -> Forget:
    """Whose content is erased.

    Raises:
        ForgetError: nobody is named, which would be everybody.
    """
    if not prefix and thread_id is None:
        raise ForgetError("name whom to forget: a namespace, with or without a key, or a thread_id")
    return Forget(prefix, key, thread_id)

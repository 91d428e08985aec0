"""SQL and the indexes compared, and made equal again."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from langgraph_memstate.embedding import text_hash
from langgraph_memstate.facts import Draft
from langgraph_memstate.follower import Follower, draft_of
from langgraph_memstate.index import VectorIndex
from langgraph_memstate.storage.base import Reader, Storage

_ALL = 1_000_000_000
_HORIZON = 86_400.0  # seconds; entries wait less than a day for their next try


@dataclass(frozen=True, slots=True)
class IndexReport:
    """One index beside SQL.

    `missing` and `orphaned` are vector ids. `pending` and `quarantined` count entries of its outbox: work that is still
    to be applied, and work that failed for good. `unembedded` counts current values that should have a vector and have
    none. An index that is not `reachable` (`error` says why, or another process owns it) is not compared.
    """

    index: str
    reachable: bool
    missing: tuple[str, ...] = ()
    orphaned: tuple[str, ...] = ()
    pending: int = 0
    quarantined: int = 0
    unembedded: int = 0
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.reachable and not (self.missing or self.orphaned or self.quarantined or self.unembedded)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    indexes: tuple[IndexReport, ...]

    @property
    def ok(self) -> bool:
        return all(report.ok for report in self.indexes)


def verify_index(storage: Storage, index: VectorIndex) -> IndexReport:
    """Compare one index with SQL, both ways. Changes nothing."""
    report = _compare(storage, index)
    if not (report.missing or report.orphaned):
        return report
    # The index was read before SQL. What a commit changed in between is as it should be at a second look.
    again = _compare(storage, index)
    return replace(
        again,
        missing=tuple(id_ for id_ in again.missing if id_ in report.missing),
        orphaned=tuple(id_ for id_ in again.orphaned if id_ in report.orphaned),
    )


def _compare(storage: Storage, index: VectorIndex) -> IndexReport:
    held: set[str] | None = None
    error: str | None = None
    if index.follows:
        try:
            held = index.held_ids()
        except Exception as failure:
            error = repr(failure)
    with storage.snapshot() as reader:
        wanted = set(reader.vector_ids(index.name))
        entries = reader.outbox(index.name, due=None, limit=_ALL)
        due = reader.outbox(index.name, due=time.time() + _HORIZON, limit=_ALL)
        to_embed = [record for _, record, _ in reader.to_embed(index.name, _ALL) if record is not None]
        in_flight = {id_ for row in reader.prepared() for id_ in row.vector_ids}
        embedding = {record.version for record in to_embed}
        unembedded = [draft for draft in unembedded_drafts(reader, index) if draft.version not in embedding]
    waiting = {row.vector_id for row in due}
    return IndexReport(
        index.name,
        reachable=index.hook is None or held is not None,
        missing=() if held is None else tuple(sorted(wanted - held - waiting)),
        orphaned=() if held is None else tuple(sorted(held - wanted - waiting - in_flight)),
        pending=len(due) + len(to_embed),
        quarantined=len(entries) - len(due),
        unembedded=len(unembedded),
        error=error,
    )


def repair_index(storage: Storage, follower: Follower, index: VectorIndex) -> None:
    """Queue what makes one index equal to SQL, entries that had failed for good included."""
    follower.settle_abandoned()
    report = verify_index(storage, index)
    if not report.reachable:
        follower.reopen(index)
        report = verify_index(storage, index)
    with storage.snapshot() as reader:
        unembedded = unembedded_drafts(reader, index)
    follower.mend(index, report.missing, report.orphaned, unembedded)


def unembedded_drafts(reader: Reader, index: VectorIndex) -> list[Draft]:
    """Current versions with text that this index embeds, and no vector for it."""
    drafts = (draft_of(record, paths) for record, paths in reader.unindexed(index.name))
    return [draft for draft in drafts if _has_direction(reader, index, draft)]


def _has_direction(reader: Reader, index: VectorIndex, draft: Draft) -> bool:
    """Whether a text of the draft is not known to be one that cosine cannot rank."""
    hashes = [text_hash(text) for text in index.texts(draft)]
    known = reader.embeddings(index.model, hashes)
    return any(known.get(hash_) != b"" for hash_ in hashes)

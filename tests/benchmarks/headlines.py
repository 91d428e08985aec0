"""The few rows of many that the README shows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.measure import Row


@dataclass(frozen=True)
class Headline:
    """Of a case, the last row whose `what` matches and that has this contender; of several journals, the first."""

    case: str
    what: str
    peer: str
    label: str


@dataclass(frozen=True)
class Pair:
    label: str
    ours: Row
    theirs: Row

    @property
    def ratio(self) -> float:
        assert self.theirs.ratio is not None
        return self.theirs.ratio


_PAIR = "SqliteSaver + SqliteStore"
_ASYNC_PAIR = "AsyncSqliteSaver + AsyncSqliteStore"

HEADLINES = (
    Headline("steps", "invoke, sync", _PAIR, "a run of three nodes, a memory each"),
    Headline("steps", "ainvoke, sync", _ASYNC_PAIR, "the same, async"),
    Headline("chat", r"sync, (\d+) turns", "SqliteSaver", "a turn of a chat of {} turns"),
    Headline("chat", r"get_tuple, new saver, (\d+) messages", "SqliteSaver", "its latest state of {} messages, cold"),
    Headline("chat", r"history, all \d+, (\d+) messages", "SqliteSaver", "its whole history, of {} messages"),
    Headline("fanout", "(.+) tasks, invoke, sync", "SqliteSaver", "a superstep of {} tasks, above no saver"),
    Headline("fanout", "(.+) tasks, ainvoke, sync", "AsyncSqliteSaver", "the same, async"),
    Headline("checkpointer", "put", "SqliteSaver", "checkpointer: put"),
    Headline("checkpointer", "get_tuple", "SqliteSaver", "checkpointer: get_tuple"),
    Headline("store", "put", "SqliteStore", "store: put"),
    Headline("store", "batch of 100 puts", "SqliteStore", "store: batch of 100 puts"),
    Headline("callers", r"store put, (\d+) threads", "SqliteStore", "the store's put, {} threads at once"),
    Headline("callers", r"store aput, (\d+) tasks", "AsyncSqliteStore", "the same, {} tasks"),
    Headline("store", "get", "SqliteStore", "store: get"),
    Headline("store", "search, (.+), 1 in 10 matches", "SqliteStore", "store: a filter that 1 in 10 of {} match"),
    Headline("crowd", r"(\d+) threads, a .*", "one SqliteSaver", "{} threads on one saver, a cycle"),
    Headline("crowd", r"(\d+) processes, a .*", "a SqliteSaver each", "{} processes on one file, a cycle"),
    Headline("search", "(.+): wide", "SqliteStore, sqlite-vec", "semantic search in {} facts"),
    Headline("search", "(.+): 1 in 10 matches", "SqliteStore, sqlite-vec", "the same, with a filter"),
    Headline("opening", "(.+ facts, .*)", _PAIR, "opening {}"),
    Headline("postgres", "put", "PostgresSaver", "PostgreSQL: put"),
    Headline("postgres", r"chat, (\d+) turns", "PostgresSaver", "PostgreSQL: a turn of a chat of {} turns"),
    Headline("postgres", "(.+): wide", "PostgresStore, HNSW", "PostgreSQL: semantic search in {} facts"),
)
"""A cycle is put, put_writes and get_tuple."""

LEAST = (
    Headline("chat", r"sync, (\d+) turns", "TrustingSaver", "a turn of a chat of {} turns"),
    Headline("fanout", "(.+) tasks, invoke, sync", "BareSaver", "a superstep of {} tasks, above no saver"),
    Headline("crowd", r"(\d+) threads, a .*", "one BareSaver", "{} threads on one saver, a cycle"),
)
"""Beside the least that a durable saver can do: see bare.py."""


def pairs(rows: Sequence[Row], headlines: Sequence[Headline] = HEADLINES) -> Iterator[Pair]:
    """In this order; what was not measured is left out."""
    for headline in headlines:
        found: Pair | None = None
        for row in rows:
            matched = re.fullmatch(headline.what, row.what)
            if row.case != headline.case or row.contender != headline.peer or row.ratio is None or matched is None:
                continue
            if found is None or found.theirs.what != row.what:
                ours = next(one for one in rows if (one.case, one.what) == (row.case, row.what))
                found = Pair(headline.label.format(*matched.groups()), ours, row)
        if found is not None:
            yield found

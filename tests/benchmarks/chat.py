"""A chat of many turns with `add_messages`: time inside the saver, bytes on disk, the first turns and the last."""

from __future__ import annotations

import math
import os
import random
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import UUID

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import _messages_delta_reducer, add_messages
from langgraph.graph.state import CompiledStateGraph

from langgraph_memstate import MemoryStore, MemStateCheckpointer
from tests.benchmarks.bare import TrustingSaver, bare
from tests.benchmarks.measure import Row, Session, quartiles
from tests.benchmarks.peers import Peer, ours, upstream

CASE = "chat"
EARLY = 10
LENGTH = 512  # characters of a message
BLOCK = 10  # turns
WINDOW = 10  # turns around one that is named, of which the median is taken
_CALLS = ("get_tuple", "put", "put_writes", "get_delta_channel_history")
_SENTENCE = (
    "the a of to and in is that for it as with on by this from at an be are was or which not you have can we will "
    "flight train hotel ticket morning evening price budget table window garden station weather report customer "
    "order invoice number street city river mountain coffee vegetarian dinner meeting project schedule question "
    "answer reason example system message memory network database index vector search result summary travel"
)


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


class DeltaState(TypedDict):
    messages: Annotated[list[AnyMessage], DeltaChannel(_messages_delta_reducer)]


def text(dice: random.Random) -> str:
    vocabulary = _SENTENCE.split()
    words = ""
    while len(words) < LENGTH:
        words += dice.choice(vocabulary) + " "
    return words[:LENGTH]


@dataclass
class Meter:
    """Seconds inside a saver, by turn."""

    turns: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _inside: threading.local = field(default_factory=threading.local)

    def watch(self, saver: Any) -> None:
        for name in _CALLS:
            setattr(saver, name, self._timed(getattr(saver, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "call", False):
                return call(*args, **kwargs)  # one that a saver makes of itself
            self._inside.call = True
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside.call = False
                with self._lock:
                    self.turns[-1] += time.perf_counter() - start

        return timed

    def around(self, turn: int) -> float:
        first = max(0, min(turn - WINDOW // 2, len(self.turns) - WINDOW))
        return statistics.median(self.turns[first : first + WINDOW])


@dataclass
class Chat:
    """One contender: a graph of one node that answers, on a thread of its own."""

    name: str
    peer: Peer
    folder: Path
    graph: CompiledStateGraph
    dice: random.Random
    meter: Meter = field(default_factory=Meter)
    took: float = 0.0
    """seconds of all turns, end to end"""
    sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, name: str, peer: Peer, folder: Path, state: type) -> Chat:
        dice = random.Random(1)
        meter = Meter()
        meter.watch(peer.saver)
        answers = random.Random(2)

        def answer(state: Any) -> dict[str, Any]:
            made = AIMessage(text(answers), id=str(UUID(int=answers.getrandbits(128))))
            return {"messages": [made]}

        graph = StateGraph(state)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        return cls(name, peer, folder, graph.compile(checkpointer=peer.saver), dice, meter)

    @property
    def thread(self) -> Any:
        return {"configurable": {"thread_id": str(UUID(int=7))}}

    def turn(self, durability: Any) -> None:
        said = HumanMessage(text(self.dice), id=str(UUID(int=self.dice.getrandbits(128))))
        self.meter.turns.append(0.0)
        start = time.perf_counter()
        self.graph.invoke({"messages": [said]}, self.thread, durability=durability)
        self.took += time.perf_counter() - start

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir() if not path.name.endswith("-wal"))


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    turns = BLOCK * session.rounds(session.pick(100, 20))
    rows: list[Row] = []
    for durability in ("sync", "async", "exit"):
        with ExitStack() as stack:
            chats = list(_contenders(stack, folder / durability))
            _talk(session, chats, turns, durability)
            rows += _rows(chats, turns, durability)
    with ExitStack() as stack:
        chats = list(_contenders(stack, folder / "read"))[:2]
        turns = BLOCK * session.rounds(session.pick(34, 10))
        _talk(session, chats, turns, "exit" if session.quick else "sync")
        rows += _reads(session, chats)
    return rows


def _contenders(stack: ExitStack, folder: Path) -> Iterator[Chat]:
    folder.mkdir()
    for name, opener, state in (
        ("MemStateCheckpointer", ours, State),
        ("SqliteSaver", upstream, State),
        ("MemStateCheckpointer, DeltaChannel", ours, DeltaState),
        ("SqliteSaver, DeltaChannel", upstream, DeltaState),
    ):
        place = folder / name.replace(", ", "-")
        yield Chat.begin(name, stack.enter_context(opener(place)), place, state)
    place = folder / "least"
    place.mkdir()
    saver = stack.enter_context(bare(place / "least.db", TrustingSaver))
    yield Chat.begin("TrustingSaver", Peer(saver, None, "WAL", ""), place, State)


def _talk(session: Session, chats: list[Chat], turns: int, durability: str) -> None:
    """In blocks of turns, in the opposite order every other block. Each block waits for its own syncs only."""
    for block, start in enumerate(range(0, turns, BLOCK)):
        session.tell(f"{CASE}: {durability} {start}/{turns}")
        for chat in reversed(chats) if block % 2 else chats:
            os.sync()
            for turn in range(start + 1, min(start + BLOCK, turns) + 1):
                chat.turn(durability)
                if turn in (turns // 10, turns):
                    chat.sizes[turn] = _settled_size(chat)
    session.tell("")


def _settled_size(chat: Chat) -> int:
    """Bytes of the files, once the write-ahead log is copied back."""
    for path in chat.folder.glob("*.db"):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    return chat.bytes_on_disk()


def _rows(chats: list[Chat], turns: int, durability: str) -> list[Row]:
    rows = []
    first = chats[0]
    for chat in chats:
        took, early, late = sum(chat.meter.turns), chat.meter.around(EARLY), chat.meter.around(turns)
        low, median, high = quartiles(chat.meter.turns)
        notes: dict[str, float | str] = {
            "s in the saver": took,
            "s end to end": chat.took,
            f"ms at {EARLY}": early * 1e3,
            f"ms at {turns}": late * 1e3,
            "late/early": late / early,
            "kB": chat.sizes[turns] / 1e3,
            "bytes ratio": first.sizes[turns] / chat.sizes[turns],
            "disk grows as N^": math.log10(chat.sizes[turns] / chat.sizes[turns // 10]),
        }
        ratio = None if chat is first else sum(first.meter.turns) / took
        what = f"{durability}, {turns} turns"
        rows.append(Row(CASE, what, chat.name, chat.peer.saver_journal, median, low, high, ratio, notes))
    return rows


def _reads(session: Session, chats: list[Chat]) -> list[Row]:
    """Reading a finished chat; a new saver on its file has seen nothing of it."""
    rows = []
    turns = len(chats[0].meter.turns)
    whats: dict[str, tuple[int, Callable[[Any, Any], object]]] = {
        "get_tuple": (40, lambda saver, thread: saver.get_tuple(thread)),
        "history, 10": (20, lambda saver, thread: list(saver.list(thread, limit=10))),
        f"history, all {3 * turns}": (3, lambda saver, thread: list(saver.list(thread))),
    }
    for what, (times, read) in whats.items():
        for cold in (False, True):
            seconds: list[list[float]] = [[] for _ in chats]
            for _ in range(times):
                for chat, taken in zip(chats, seconds, strict=True):
                    with _reopened(chat) if cold else nullcontext(chat.peer.saver) as saver:
                        start = time.perf_counter()
                        read(saver, chat.thread)
                        taken.append(time.perf_counter() - start)
            session.tell(f"{CASE}: {what}")
            named = f"{what}{', new saver' if cold else ''}, {2 * turns} messages"
            for chat, taken in zip(chats, seconds, strict=True):
                ratio = None if chat is chats[0] else statistics.median(seconds[0]) / statistics.median(taken)
                low, median, high = quartiles(taken)
                rows.append(Row(CASE, named, chat.name, chat.peer.saver_journal, median, low, high, ratio))
    session.tell("")
    return rows


@contextmanager
def _reopened(chat: Chat) -> Iterator[Any]:
    if isinstance(chat.peer.saver, MemStateCheckpointer):
        with MemoryStore.open(chat.folder / "memory.db") as memory:
            yield memory.checkpointer
    else:
        with SqliteSaver.from_conn_string(str(chat.folder / "checkpoints.db")) as saver:
            saver.setup()
            yield saver

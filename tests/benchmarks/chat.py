"""A chat of many turns with `add_messages`: time inside the saver, bytes on disk, the first turns and the last."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import UUID

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import START, StateGraph
from langgraph.graph.message import _messages_delta_reducer, add_messages
from langgraph.graph.state import CompiledStateGraph

from tests.benchmarks.measure import Row, Session
from tests.benchmarks.peers import Peer, ours, upstream

CASE = "chat"
EARLY = 10
LENGTH = 512  # characters of a message
WINDOW = 10  # turns around one that is named, of which the median is taken
_CALLS = ("get_tuple", "put", "put_writes")
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

    def watch(self, saver: Any) -> None:
        for name in _CALLS:
            setattr(saver, name, self._timed(getattr(saver, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
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
    sizes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, name: str, peer: Peer, folder: Path, state: type, durability: str) -> Chat:
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
        self.graph.invoke({"messages": [said]}, self.thread, durability=durability)

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir() if not path.name.endswith("-wal"))


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    turns = session.pick(1000, 200)
    rows: list[Row] = []
    for durability in ("sync", "async", "exit"):
        with ExitStack() as stack:
            chats = list(_contenders(stack, folder / durability, durability))
            _talk(session, chats, turns, durability)
            rows += _rows(chats, turns, durability)
            if durability == "sync":
                rows += _reads(session, chats)
    return rows


def _contenders(stack: ExitStack, folder: Path, durability: str) -> Iterator[Chat]:
    folder.mkdir()
    for name, opener, state in (
        ("MemStateCheckpointer", ours, State),
        ("SqliteSaver", upstream, State),
        ("MemStateCheckpointer, DeltaChannel", ours, DeltaState),
        ("SqliteSaver, DeltaChannel", upstream, DeltaState),
    ):
        place = folder / name.replace(", ", "-")
        yield Chat.begin(name, stack.enter_context(opener(place)), place, state, durability)


def _talk(session: Session, chats: list[Chat], turns: int, durability: str) -> None:
    """Turn by turn, in the opposite order every other turn."""
    for turn in range(1, turns + 1):
        session.tell(f"{CASE}: {durability} {turn}/{turns}")
        for chat in chats if turn % 2 else reversed(chats):
            chat.turn(durability)
            if turn in (turns // 10, turns):
                chat.sizes[turn] = _settled_size(chat)
    session.tell("")


def _settled_size(chat: Chat) -> int:
    """Bytes of the files, once the write-ahead log is copied back."""
    import sqlite3

    for path in chat.folder.glob("*.db"):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    return chat.bytes_on_disk()


def _rows(chats: list[Chat], turns: int, durability: str) -> list[Row]:
    import math

    rows = []
    first = chats[0]
    for chat in chats:
        took, early, late = sum(chat.meter.turns), chat.meter.around(EARLY), chat.meter.around(turns)
        low, _, high = statistics.quantiles(chat.meter.turns, n=4)
        growth = math.log10(chat.sizes[turns] / chat.sizes[turns // 10])
        notes: dict[str, float | str] = {
            "s in the saver": took,
            f"ms at {EARLY}": early * 1e3,
            f"ms at {turns}": late * 1e3,
            "late/early": late / early,
            "kB": chat.sizes[turns] / 1e3,
            "bytes ÷ ours": chat.sizes[turns] / first.sizes[turns],
            "disk grows as N^": growth,
        }
        ratio = None if chat is first else sum(first.meter.turns) / took
        median = statistics.median(chat.meter.turns)
        rows.append(
            Row(
                CASE,
                f"{durability}, {turns} turns",
                chat.name,
                chat.peer.saver_journal,
                median,
                low,
                high,
                ratio,
                notes,
            )
        )
    return rows


def _reads(session: Session, chats: list[Chat]) -> list[Row]:
    return []

"""Conversations played by an agent whose process is killed at random until it has heard them all.

    python tests/crash/conversations.py conversations.json [SEED]

plays a file: a list of ``{"id", "sessions": [{"turns": [{"id", "speaker", "text"}]}]}``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, TypedDict

from forks import PRELOAD
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.store.base import BaseStore

from langgraph_memstate import MemoryStore

Turn = tuple[str, str]  # id, text
DURABILITIES = ("sync", "async", "exit")


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


@dataclass
class Report:
    """What came of it. Ghosts and losses are counted after every kill as well as at the end."""

    turns: int = 0
    kills: int = 0
    ghosts: int = 0
    losses: int = 0
    duplicates: int = 0
    index_faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def embed(texts: list[str]) -> list[list[float]]:
    """Feature hashing of words into 64 buckets."""
    vectors = []
    for text in texts:
        vector = [0.0] * 64
        for word in text.lower().split():
            vector[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=2).digest(), "big") % 64] += 1.0
        vectors.append(vector)
    return vectors


def opened(path: str) -> MemoryStore:
    return MemoryStore.open(path, index={"dims": 64, "embed": embed, "fields": ["text"]})


def build(memory: MemoryStore, thread: str) -> Any:
    def remember(state: State, *, store: BaseStore) -> dict[str, Any]:
        heard = state["messages"][-1]
        store.put(("conversation", thread), heard.id or "", {"text": heard.content})
        return {}

    def reply(state: State) -> dict[str, Any]:
        return {"messages": [AIMessage("I see.", id=f"re-{state['messages'][-1].id}")]}

    graph = StateGraph(State).add_node(remember).add_node(reply)
    graph.add_edge(START, "remember").add_edge("remember", "reply")
    return graph.compile(checkpointer=memory.checkpointer, store=memory.store)


def play(path: str, thread: str, turns: list[Turn], durability: str, told: Connection) -> None:
    """Go on with a conversation from wherever the last process left it, and tell of every turn that is over."""
    config = {"configurable": {"thread_id": thread}}
    with opened(path) as memory:
        graph = build(memory, thread)
        if memory.checkpointer.get_tuple(config) is not None:
            graph.invoke(None, config, durability=durability)  # the step that was under way, if any
        heard = {message.id for message in graph.get_state(config).values.get("messages", [])}
        for turn, text in turns:
            if turn not in heard:
                graph.invoke({"messages": [HumanMessage(text, id=turn)]}, config, durability=durability)
                told.send_bytes(b".")


def examine(path: str, thread: str, turns: list[Turn], *, ended: bool) -> Report:
    """Compare state, facts and vectors. A turn whose step has not landed yet may lack its memory: one at most."""
    report = Report(turns=len(turns))
    with opened(path) as memory:
        state = build(memory, thread).get_state({"configurable": {"thread_id": thread}}).values
        messages = [message.id for message in state.get("messages", [])]
        facts = [fact.id for fact in memory.query(("conversation", thread), limit=1_000_000)]
        said = [id_ for id_ in messages if not id_.startswith("re-")]
        answered = {id_.removeprefix("re-") for id_ in messages if id_.startswith("re-")}
        report.ghosts = len(set(facts) - set(said))
        report.losses = len(answered - set(facts)) + (len({turn for turn, _ in turns} - set(facts)) if ended else 0)
        report.duplicates = sum(len(memory.history(("conversation", thread), id_)) - 1 for id_ in facts)
        report.duplicates += len(messages) - len(set(messages))
        if ended and said != [turn for turn, _ in turns]:
            report.losses += 1
        memory.flush()
        verified = memory.verify()
        report.index_faults = [] if verified.ok else [repr(verified)]
        for fact in facts[:3]:
            text = dict(turns)[fact]
            found = memory.search(text, namespace=("conversation", thread), limit=1)
            if not found or (found[0].score or 0) < 0.999:
                report.index_faults.append(f"{fact} is not found by its own text")
    return report


def ends_within(child: Connection, turns: int, seconds: float) -> bool:
    """Whether a process ends before it has told of so many turns, and for so long after."""
    try:
        for _ in range(turns):
            child.recv_bytes()
        deadline = time.monotonic() + seconds
        while child.poll(max(0.0, deadline - time.monotonic())):
            child.recv_bytes()
    except EOFError:
        return True
    return False


def conversation(path: str, thread: str, turns: list[Turn], durability: str, seed: int, patience: int) -> Report:
    """Play a conversation in processes that live up to `patience` turns, and look at the database after each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    rng = random.Random(seed)
    total = Report(turns=len(turns))
    started = time.monotonic()
    while True:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=play, args=(path, thread, turns, durability, sender))
        child.start()
        sender.close()
        killed = not ends_within(receiver, rng.randint(0, patience), rng.uniform(0.0, 0.02))
        if killed:
            child.kill()
            total.kills += 1
        child.join()
        if not killed and child.exitcode:
            raise RuntimeError(f"the agent died with status {child.exitcode}")
        found = examine(path, thread, turns, ended=not killed)
        total.ghosts += found.ghosts
        total.losses += found.losses
        total.duplicates += found.duplicates
        total.index_faults += found.index_faults
        if not killed:
            total.seconds = time.monotonic() - started
            return total


def main(file: str, seed: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, talk in enumerate(json.loads(Path(file).read_text())):
            turns = [(turn["id"], turn["text"]) for session in talk["sessions"] for turn in session["turns"]]
            durability = DURABILITIES[number % 2]  # a run that saves at exit differs from `sync` by less than a turn
            report = conversation(f"{folder}/{number}.db", talk["id"], turns, durability, seed + number, 100)
            print(talk["id"], durability, asdict(report), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], *map(int, sys.argv[2:]))

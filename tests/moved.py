"""A memory with something of everything, and what must hold of its copies."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from langchain_core.messages import AIMessage, AnyMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.store.base import BaseStore
from langgraph.types import Command, Send, interrupt
from pydantic import BaseModel
from truth import DIMS, Words
from typing_extensions import TypedDict

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.tables import MOVED, Row
from langgraph_memstate.urls import storage_at

MODEL = {"dims": DIMS, "embed": Words(), "fields": ["text"]}


faults = {"on": True}
"""while on, one of two looks fails where the user says so"""


class Plan(BaseModel):
    title: str
    steps: list[str] = []


def _merged(left: list[int], right: list[int]) -> list[int]:
    return sorted({*left, *right})


class State(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    seen: Annotated[list[int], _merged]
    plan: Plan
    note: dict[str, Any]


def _think(state: State, *, store: BaseStore) -> State:
    said = str(state["messages"][-1].content)
    store.put(("users", "ada"), f"said {len(state['messages'])}", {"text": f"ada said {said}"})
    plan = Plan(title=said, steps=["look", "answer"])
    return {"messages": [AIMessage(f"you said {said}")], "seen": [len(said)], "plan": plan, "note": {"n": said}}


def _ask(state: State, *, store: BaseStore) -> State:
    if "ask" in str(state["messages"][-2].content):
        store.put(("users", "ada"), "answer", {"text": f"ada answered {interrupt('sure?')}"})
    return {"note": {"asked": True}}


def _fan_out(state: State) -> list[Send]:
    said = state["messages"][-2].content
    return [Send("look", {"seen": [number], "note": {"said": said}}) for number in (1, 2)]


def _look(state: State, *, store: BaseStore) -> State:
    number = state.get("seen", [0])[0]
    if number == 2 and faults["on"] and "fail" in str((state.get("note") or {}).get("said")):
        time.sleep(0.2)  # LangGraph takes no writes of the other look once this one has failed
        raise ConnectionError("a look that failed")
    store.put(("looks",), str(number), {"text": f"a look at {number}"}, ttl=60)
    return {"seen": [number * 10]}


def graph_on(saver: Any, store: Any) -> Any:
    """Messages, a model, memories, an interrupt, sends and a subgraph with checkpoints of its own."""
    inner = StateGraph(State).add_node("look", _look).add_edge(START, "look").add_edge("look", END)
    builder = StateGraph(State)
    builder.add_node("think", _think).add_node("ask", _ask).add_node("look", _look)
    builder.add_node("inner", inner.compile(checkpointer=True))
    builder.add_edge(START, "think").add_edge("think", "ask").add_conditional_edges("ask", _fan_out, ["look"])
    builder.add_edge("look", "inner").add_edge("inner", END)
    return builder.compile(checkpointer=saver, store=store)


def config(thread_id: str) -> dict[str, Any]:
    return {"configurable": {"thread_id": thread_id}}


def say(graph: Any, thread_id: str, *texts: str) -> None:
    for text in texts:
        graph.invoke({"messages": [("user", text)]}, config(thread_id))


def answer(graph: Any, thread_id: str) -> Any:
    return graph.invoke(Command(resume="yes"), config(thread_id))


def fill(url: str | Path, *, more: int = 0) -> None:
    """Graphs, an interrupt that waits, rollbacks, what was forgotten and expires, sessions, vectors; `more` facts."""
    with MemoryStore.open(url, index=MODEL, vector_sync="deferred") as memory:
        graph = graph_on(memory.checkpointer, memory.store)
        say(graph, "one", "hello", "green tea", "trains to berlin")
        say(graph, "two", "a cat \0 on the roof")
        say(graph, "waits", "ask me")
        with suppress(ConnectionError):
            say(graph, "half", "fail once")
        memory.rollback(1, thread_id="one")
        memory.commit([Fact("note", {"text": f"note {n}", "n": n}, id=f"n{n}") for n in range(20)])
        memory.commit(Fact("note", {"text": "note 3 again"}, id="n3"), actor="me", reason="because")
        memory.delete("note", "n4")
        memory.forget("note", "n5")
        memory.commit(Fact("note", {"text": "undone"}, id="undone"))
        memory.rollback(1)
        memory.commit(Fact("note", {"text": "in a session"}, id="s"), session_id="s1")
        memory.store.put(("short",), "lived", {"text": "soon gone"}, ttl=0.0)
        memory.store.put(("odd", "%_", "a\x1fb"), "\0", {"text": "é 😀", "deep": [{"a": [1.5, None]}]}, index=False)
        graph.update_state(config("two"), {"note": {"by": "hand"}})
        for start in range(0, more, 500):
            memory.commit([Fact("more", {"text": str(n)}, id=str(n)) for n in range(start, min(more, start + 500))])
    with MemoryStore.open(url) as memory:  # without the index: what it commits is left to embed
        memory.commit(Fact("note", {"text": "embed me later"}, id="later"))


def rows_of(place: str | Path | Storage) -> dict[str, list[Row]]:
    """All that moves."""
    storage = place if isinstance(place, Storage) else storage_at(place)
    storage.open()
    try:
        with storage.snapshot() as reader:
            return {table: list(reader.dump(table)) for table in MOVED}
    finally:
        storage.close()

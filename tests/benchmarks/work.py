"""The work that every contender is given: a three-node graph, a chain of small checkpoints, a thousand items."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, TypedDict
from uuid import uuid4

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore

NODES = ("plan", "act", "answer")
SENTENCE = "The user prefers vegetarian food and lives in Porto."


class State(TypedDict):
    run: str
    messages: Annotated[list[str], operator.add]


def three_nodes(saver: Any, store: Any, *, awaited: bool) -> CompiledStateGraph:
    """Each node writes one memory and one message."""
    graph = StateGraph(State)
    before = START
    for name in NODES:
        graph.add_node(name, _awaiting_node(name) if awaited else _node(name))
        graph.add_edge(before, name)
        before = name
    return graph.compile(checkpointer=saver, store=store)


def _node(name: str) -> Any:
    def node(state: State, *, store: BaseStore) -> dict[str, Any]:
        store.put(("users", "u1"), f"{state['run']}-{name}", {"text": SENTENCE, "node": name})
        return {"messages": [f"{name} is done"]}

    return node


def _awaiting_node(name: str) -> Any:
    async def node(state: State, *, store: BaseStore) -> dict[str, Any]:
        await store.aput(("users", "u1"), f"{state['run']}-{name}", {"text": SENTENCE, "node": name})
        return {"messages": [f"{name} is done"]}

    return node


def new_run() -> tuple[dict[str, Any], RunnableConfig]:
    """Input and config of a run on a thread of its own."""
    run = uuid4().hex
    return {"run": run, "messages": ["hello"]}, {"configurable": {"thread_id": run}}


def checkpoint_chain(thread_id: str) -> Iterator[tuple[RunnableConfig, Checkpoint, dict[str, Any], dict[str, str]]]:
    """Arguments of `put`, each checkpoint the parent of the next: of three channels, one changes."""
    config: RunnableConfig = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    step = 0
    while True:
        checkpoint = empty_checkpoint()
        checkpoint["id"] = str(uuid6(clock_seq=step))
        checkpoint["ts"] = datetime.now(UTC).isoformat()
        checkpoint["channel_values"] = {"count": step, "profile": {"text": SENTENCE}, "run": thread_id}
        checkpoint["channel_versions"] = {"count": f"{step + 1:032}.0", "profile": f"{1:032}.0", "run": f"{1:032}.0"}
        checkpoint["versions_seen"] = {"node": {"count": f"{step:032}.0"}}
        changed = checkpoint["channel_versions"] if step == 0 else {"count": checkpoint["channel_versions"]["count"]}
        yield config, checkpoint, {"source": "loop", "step": step, "parents": {}}, dict(changed)
        config = {"configurable": {"thread_id": thread_id, "checkpoint_ns": "", "checkpoint_id": checkpoint["id"]}}
        step += 1


def pending_writes(config: RunnableConfig) -> Iterator[tuple[RunnableConfig, list[tuple[str, Any]], str]]:
    """Arguments of `put_writes` on one checkpoint, for one task after the other."""
    while True:
        yield config, [("messages", [SENTENCE]), ("branch:to:act", None)], str(uuid4())


def items(count: int, users: int) -> list[tuple[tuple[str, str], str, dict[str, Any]]]:
    """Arguments of the store's `put`: one item in ten is a preference, each number occurs once."""
    return [
        (
            ("users", f"u{number % users}"),
            f"item-{number}",
            {"text": SENTENCE, "role": "preference" if number % 10 == 0 else "note", "number": number},
        )
        for number in range(count)
    ]

"""An agent that remembers through a tool, on one SQLite file and an embedded Chroma.

    python examples/agent_with_tools.py [agent.db]

Run it twice with the same file: the second conversation knows what the first one stored. The model is a deterministic
fake; with OPENAI_API_KEY set (and `langchain` and `langchain-openai` installed) it is a real one.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Annotated, Any

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import InjectedStore, ToolNode, tools_condition
from langgraph.store.base import BaseStore
from typing_extensions import TypedDict

from langgraph_memstate import MemoryStore

USER = ("users", "ada")


class State(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


@tool
def remember(fact: str, store: Annotated[BaseStore, InjectedStore()]) -> str:
    """Remember a fact about the user for later conversations."""
    store.put(USER, hashlib.blake2b(fact.encode(), digest_size=8).hexdigest(), {"text": fact})
    return "remembered"


@tool
def recall(question: str, store: Annotated[BaseStore, InjectedStore()]) -> str:
    """Look up what is known about the user."""
    found = store.search(USER, query=question, limit=3)
    return "\n".join(item.value["text"] for item in found) or "nothing"


class ScriptedModel(GenericFakeChatModel):
    """A fake that may be given tools; its answers are fixed."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> ScriptedModel:
        return self


def call(name: str, **args: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": name, "type": "tool_call"}])


def chat_model() -> Any:
    if os.environ.get("OPENAI_API_KEY"):
        from langchain.chat_models import init_chat_model

        return init_chat_model("openai:gpt-4o-mini")
    script = [
        call("remember", fact="Ada plays the cello"),
        AIMessage("How lovely! I will remember that."),
        call("recall", question="which instrument does Ada play: the cello?"),
        AIMessage("You play the cello."),
    ]
    return ScriptedModel(messages=iter(script))


def embed(texts: list[str]) -> list[list[float]]:
    """Feature hashing: texts that share words are near each other. No download, no network."""
    vectors = []
    for text in texts:
        vector = [0.0] * 256
        for word in text.lower().split():
            vector[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=2).digest(), "big") % 256] += 1.0
        vectors.append(vector)
    return vectors


def build(memory: MemoryStore) -> Any:
    tools = [remember, recall]
    model = chat_model().bind_tools(tools)
    graph = StateGraph(State)
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile(checkpointer=memory.checkpointer, store=memory.store)


def main(path: str) -> None:
    index = {"dims": 256, "embed": embed, "fields": ["text"]}
    with MemoryStore.open(path, index=index) as memory:
        graph = build(memory)
        for thread, text in (("monday", "I play the cello."), ("tuesday", "Which instrument do I play?")):
            config = {"configurable": {"thread_id": thread}}
            answer = graph.invoke({"messages": [HumanMessage(text)]}, config)["messages"][-1]
            print(f"{thread:8} you: {text}\n{'':8} agent: {answer.text}")
        for fact in memory.query(USER):
            entry = memory.history(fact.namespace, fact.id)[-1]
            print(f"fact {fact.payload['text']!r}, written by node {entry.node!r} of thread {entry.thread_id!r}")
        print("SQL and Chroma agree:", memory.verify().ok)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "agent.db")

"""The agent: it listens, remembers what the user says, and replies. Both sides run this graph."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict
from uuid import uuid4

from langchain_core.language_models import ParrotFakeChatModel
from langchain_core.messages import AIMessage, SystemMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import RetryPolicy, interrupt

from langgraph_memstate.demo.faults import RateLimited
from langgraph_memstate.demo.sides import Side


class Memory(TypedDict):
    key: str
    text: str


class Conversation(MessagesState):
    """`remembered` is the ground truth: what the conversation itself says it has put into memory, oldest first."""

    heard: str
    remembered: Annotated[list[Memory], operator.add]
    answer: str


def build_agent(side: Side) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The same three nodes for both sides, which differ in how one memory is saved."""
    model = ParrotFakeChatModel()  # says the last message again

    def listen(state: Conversation) -> dict[str, Any]:
        extracted = model.invoke([SystemMessage("Write down what to remember."), state["messages"][-1]])
        return {"heard": extracted.text}

    def remember(state: Conversation) -> dict[str, Any]:
        memory = Memory(key=_key(state["heard"]), text=state["heard"])
        side.save(memory["key"], memory["text"])
        answer = model.invoke([SystemMessage("Confirm it."), AIMessage(f"I will remember: {memory['text']}")])
        if "book" in memory["text"]:
            interrupt("May I book that for you?")
        return {"remembered": [memory], "answer": answer.text}

    def reply(state: Conversation) -> dict[str, Any]:
        polished = model.invoke([SystemMessage("Be brief."), AIMessage(state["answer"])])
        return {"messages": [AIMessage(polished.text)]}

    return (
        StateGraph(Conversation)
        .add_node("listen", listen)
        .add_node("remember", remember, retry_policy=RetryPolicy(initial_interval=0.01, retry_on=RateLimited))
        .add_node("reply", reply)
        .add_edge(START, "listen")
        .add_edge("listen", "remember")
        .add_edge("remember", "reply")
        .add_edge("reply", END)
        .compile(checkpointer=side.checkpointer, store=side.store)
    )


def _key(text: str) -> str:
    """One key for the one home a user has, so that a new one replaces it; a random one for everything else."""
    return "home" if "I live in" in text else str(uuid4())

"""An agent whose model answers badly twice: each time, a rollback node takes back what was believed of the answer.

    python examples/rollback_on_bad_output.py [folder]

A conversation is summarised into a profile. `listen` asks the model and keeps its answer as a note, in memory and in
the state, as an agent does that works on it further. `understand` makes a `Profile` of it. An answer that is none sends
the graph to the rollback node: state, facts and vectors are as they were before the model was asked, but for the number
of attempts, and it is asked again. The third answer lands. The model is a deterministic fake; with OPENAI_API_KEY set
(and `langchain` and `langchain-openai` installed) it is a real one, which may answer well at once.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import chromadb
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from langgraph_memstate import MemoryStore, RollbackNode, TypedReducer, typed_node
from langgraph_memstate.hooks.chroma import ChromaSyncHook

SAID = "I am Ada, 36, and I eat no meat."
ANSWERS = [
    '{"name": "Ada", "age": "thirty-six", "diet": "vegetarian"}',  # an age in words
    'Here it is: {"name": "Ada", "age": 36, "diet":',  # breaks off
    '```json\n{"name": "Ada", "age": 36, "diet": "vegetarian"}\n```',
]
NOTES = ("users", "ada")


class Profile(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)
    diet: str


class State(TypedDict, total=False):
    said: str
    answer: str
    attempts: int
    profile: Annotated[Profile, TypedReducer(Profile)]


def chat_model() -> Any:
    if os.environ.get("OPENAI_API_KEY"):
        from langchain.chat_models import init_chat_model

        return init_chat_model("openai:gpt-4o-mini")
    return GenericFakeChatModel(messages=iter(AIMessage(answer) for answer in ANSWERS))


def embed(texts: list[str]) -> list[list[float]]:
    """Counts words in buckets: texts that share words are near each other."""
    vectors = []
    for text in texts:
        vector = [1e-3] * 64
        for word in text.lower().split():
            vector[hashlib.blake2b(word.encode(), digest_size=1).digest()[0] % 64] += 1.0
        vectors.append(vector)
    return vectors


def build(model: Any) -> StateGraph[Any, Any, Any, Any]:
    def listen(state: State, *, store: BaseStore) -> State:
        prompt = f"Answer with JSON that fits {Profile.model_json_schema()}. {state['said']}"
        answer = str(model.invoke(prompt).content)
        store.put(NOTES, "answer", {"text": answer})
        return {"answer": answer, "attempts": state.get("attempts", 0) + 1}

    def understand(state: State) -> dict[str, Any]:
        return {"profile": state["answer"]}

    return (
        StateGraph(State)
        .add_node("listen", listen)
        .add_node("understand", typed_node(understand, State, on_error="undo"))
        .add_node("undo", RollbackNode(steps=2, goto="listen", keep=["attempts"], max_rollbacks=5))
        .add_edge(START, "listen")
        .add_edge("listen", "understand")
        .add_edge("understand", END)
    )


def main(folder: Path) -> None:
    client = chromadb.PersistentClient(str(folder / "chroma"))
    memory = MemoryStore.open(
        folder / "agent.db",
        index={"dims": 64, "embed": embed, "fields": ["text"]},
        vectors=ChromaSyncHook(client=client, collection_name="notes", store_documents=True),
    )
    with memory:
        memory.store.put(NOTES, "greeting", {"text": "Ada said hello"})
        graph = build(chat_model()).compile(checkpointer=memory.checkpointer, store=memory.store)
        thread: Any = {"configurable": {"thread_id": "ada"}}
        show("before the run", folder, client, memory)
        for step in graph.stream({"said": SAID}, thread, stream_mode="updates", durability="sync"):
            if "understand" in step or "undo" in step:
                show(f"after {next(iter(step))!r}", folder, client, memory)
        state = graph.get_state(thread).values
        print(f"profile: {state['profile']!r} after {state['attempts']} attempts")
        print(memory.timeline("ada"))


def show(when: str, folder: Path, client: Any, memory: MemoryStore) -> None:
    """What SQL and Chroma hold, asked directly."""
    memory.flush()
    with closing(sqlite3.connect(folder / "agent.db")) as connection:
        facts = [value for (value,) in connection.execute("SELECT value FROM items ORDER BY key")]
    print(f"{when}:\n  SQL:    {facts}\n  Chroma: {sorted(client.get_collection('notes').get()['documents'])}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))

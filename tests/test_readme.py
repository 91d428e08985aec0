"""The code of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import chromadb
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore
from pydantic import BaseModel
from typing_extensions import TypedDict

from langgraph_memstate import Constraint, Fact, MemoryStore, RollbackNode, TypedReducer, enforce
from langgraph_memstate.errors import ConstraintError
from langgraph_memstate.hooks.faiss import FaissSyncHook

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class ProfileUpdate(BaseModel):
    content: str
    role: str


class State(TypedDict):
    text: str


def test_a_graph_in_fifteen_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == "{'text': 'Ada eats no meat'}\n"
    assert (tmp_path / "agent.db").is_file()


def test_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"embeddings": DeterministicFakeEmbedding(size=384)}
    exec("from langgraph_memstate import MemoryStore", names)
    index, embedded, server, qdrant, faiss = (line for line in BLOCKS[1].splitlines() if line)
    exec(index, names)
    with eval(embedded.partition("#")[0], names) as memory:
        memory.store.put(("n",), "k", {"text": "hello"})
        assert memory.store.search(("n",), query="hello")[0].score == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "agent.db.chroma").is_dir()
    assert "chromadb.HttpClient()" in server  # the server itself is in test_chroma_hook
    assert "QdrantClient(" in qdrant  # and Qdrant in test_qdrant_hook
    names["FaissSyncHook"] = FaissSyncHook
    with eval(faiss.partition("#")[0], names) as memory:
        assert memory.store.search(("n",), query="hello")[0].score == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "agent.faiss").is_dir()


def test_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workflow = StateGraph(State).add_node("n", lambda state: state).add_edge(START, "n")
    names: dict[str, Any] = {
        "client": chromadb.PersistentClient(tmp_path / "chroma"),
        "embeddings": DeterministicFakeEmbedding(size=16),
        "ProfileUpdate": ProfileUpdate,
        "workflow": workflow,
        "fact_id": "1",
    }
    exec(compile(BLOCKS[2], "README.md", "exec"), names)
    memory = names["memory"]
    try:
        assert names["graph"].invoke({"text": "x"}, {"configurable": {"thread_id": "1"}}) == {"text": "x"}
        (fact,) = memory.query("profile_update")
        assert names["client"].get_collection("memory").get()["ids"] == [fact.version]
        assert memory.verify().ok
    finally:
        memory.close()


def block(about: str) -> str:
    (found,) = [block for block in BLOCKS if about in block]
    return found


def test_in_redis(redis_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("from langgraph_memstate import MemoryStore, RedisStorage", names)
    for line in block("redis://").replace("localhost:6379", f"127.0.0.1:{redis_server.port}").splitlines():
        with eval(line, names) as memory:
            assert memory.query() == []
    assert (tmp_path / "agents.replica.db").is_file()
    redis_server.remove("agents")


def remember(state: State, *, store: BaseStore) -> State:
    store.put(("users", "ada"), "destination", {"text": state["text"]})
    return state


def test_undo_and_the_past(tmp_path: Path) -> None:
    index = {"dims": 16, "embed": DeterministicFakeEmbedding(size=16), "fields": ["text"]}
    with MemoryStore.open(tmp_path / "agent.db", index=index) as memory:
        workflow = StateGraph(State).add_node(remember).add_edge(START, "remember")
        graph = workflow.compile(checkpointer=memory.checkpointer, store=memory.store)
        for text in ("Lisbon", "Porto"):
            graph.invoke({"text": text}, {"configurable": {"thread_id": "ada"}})
        names: dict[str, Any] = {"memory": memory}
        exec(compile(block("turns=1"), "README.md", "exec"), names)
        assert names["report"].restored == ((("users", "ada"), "destination"),)
        values = [entry.value["text"] for entry in memory.history(("users", "ada"), "destination")]
        assert values == ["Lisbon", "Porto", "Lisbon", "Porto"]
        node = StateGraph(State)
        exec(compile(block("RollbackNode("), "README.md", "exec"), {"workflow": node, "RollbackNode": RollbackNode})
        assert "undo" in node.nodes


class Preference(BaseModel):
    name: str
    value: str


def test_typed_state() -> None:
    names: dict[str, Any] = {
        "Annotated": Annotated, "TypedDict": TypedDict, "TypedReducer": TypedReducer, "enforce": enforce,
        "StateGraph": StateGraph, "Profile": ProfileUpdate, "Preference": Preference,
        "extract": lambda state: {"profile": "no JSON", "preferences": {"name": "diet", "value": "vegetarian"}},
        "ask_again": lambda error, output: {**output, "profile": '```json\n{"content": "x", "role": "y"}\n```'},
    }  # fmt: skip
    exec(
        compile(
            block("TypedReducer(Profile)").replace("add_node(extract)", 'add_node("n", extract)'),
            "R",
            "exec",
            dont_inherit=True,
        ),
        names,
    )
    graph = names["workflow"].add_edge(START, "n").compile()
    assert graph.invoke({}) == {
        "profile": ProfileUpdate(content="x", role="y"),
        "preferences": [Preference(name="diet", value="vegetarian")],
    }


class Contact(BaseModel):
    email: str
    phone: str | None = None


class ProfileV2(BaseModel):
    full_name: str


def test_typed_facts() -> None:
    with MemoryStore.open(":memory:") as memory:
        memory.store.put(("users", "ada", "profile"), "main", {"name": "Ada"})
        names: dict[str, Any] = {
            "memory": memory, "Contact": Contact, "Constraint": Constraint, "ProfileV2": ProfileV2, "Fact": Fact,
            "to_v2": lambda value: {"full_name": value["name"]},
        }  # fmt: skip
        exec(
            compile(block('register_schema("contact"').replace("upcast={1:", "upcast={0: dict, 1:"), "R", "exec"), names
        )
        contact = memory.get("contact", "ada")
        assert contact is not None
        assert contact.payload == {"email": "ada@example.org", "phone": "555-0100"}
        assert memory.store.get(("users", "ada", "profile"), "main").value == {"full_name": "Ada"}
        assert [fact.payload for fact in memory.query("note")] == [{"text": "only for now"}]
        with pytest.raises(ConstraintError):
            memory.commit_model(Contact(email="ada@example.org"), id="other")

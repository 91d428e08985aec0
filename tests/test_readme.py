"""The code of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypedDict

import chromadb
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langgraph.graph import START, StateGraph
from pydantic import BaseModel

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
    index, embedded, server = (line for line in BLOCKS[1].splitlines() if line)
    exec(index, names)
    with eval(embedded.partition("#")[0], names) as memory:
        memory.store.put(("n",), "k", {"text": "hello"})
        assert memory.store.search(("n",), query="hello")[0].score == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "agent.db.chroma").is_dir()
    assert "chromadb.HttpClient()" in server  # the server itself is in test_chroma_hook


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

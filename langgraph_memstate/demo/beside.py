"""With this package: one memory, whose checkpointer, store and vectors land together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chromadb

from langgraph_memstate.demo.embedding import DIMS, embed
from langgraph_memstate.demo.sides import ALL, NAMESPACE, Side
from langgraph_memstate.memory import MemoryStore


@contextmanager
def open_with(directory: Path) -> Iterator[Side]:
    """One SQLite file, and the embedded Chroma beside it that `index` asks for."""
    path = directory / "agent.db"
    with MemoryStore.open(path, index={"dims": DIMS, "embed": embed, "fields": ["text"]}) as memory:

        def save(key: str, text: str) -> None:
            memory.store.put(NAMESPACE, key, {"text": text})

        def vectors() -> list[str]:
            memory.flush()  # removals of superseded versions follow the commit
            texts = {fact.version: str(fact.payload["text"]) for fact in memory.query(NAMESPACE, limit=ALL)}
            ids = chromadb.PersistentClient(f"{path}.chroma").get_collection("memory").get(include=[])["ids"]
            return [texts.get(id_, f"vector {id_}, which no memory has") for id_ in ids]

        yield Side(memory.checkpointer, memory.store, save, vectors)

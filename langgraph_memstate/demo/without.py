"""Without this package: LangGraph's SQLite saver and SQLite store, and Chroma updated by the node that remembers.

Put together as the documentation of the three does it (https://docs.langchain.com/oss/python/langgraph/add-memory): a
new memory gets a random key, and an error of Chroma is an error of the node, not a line in a log.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chromadb
import numpy as np
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.store.sqlite import SqliteStore

from langgraph_memstate.demo.embedding import embed
from langgraph_memstate.demo.sides import NAMESPACE, Side


@contextmanager
def open_without(directory: Path) -> Iterator[Side]:
    """Two SQLite files, so that the saver and the store never wait for each other's lock, and one Chroma directory."""
    client = chromadb.PersistentClient(directory / "chroma")
    collection = client.get_or_create_collection(
        "memory", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    with (
        SqliteSaver.from_conn_string(str(directory / "checkpoints.db")) as checkpointer,
        SqliteStore.from_conn_string(str(directory / "store.db")) as store,
    ):
        checkpointer.setup()
        store.setup()

        def save(key: str, text: str) -> None:
            store.put(NAMESPACE, key, {"text": text})
            collection.upsert(ids=[key], embeddings=np.array(embed([text]), np.float32), documents=[text])

        def vectors() -> list[str]:
            return list(collection.get(include=["documents"])["documents"] or ())

        yield Side(checkpointer, store, save, vectors)

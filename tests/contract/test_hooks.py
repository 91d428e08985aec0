"""Every hook of this package keeps the contract of a hook; search without one keeps what of it is about search."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

import chromadb
import pytest
from qdrant_client import QdrantClient

from langgraph_memstate import PostgresStorage
from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from langgraph_memstate.hooks.faiss import FaissSyncHook
from langgraph_memstate.hooks.pgvector import PgvectorSyncHook
from langgraph_memstate.hooks.qdrant import QdrantSyncHook
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.testing import SyncHookContract
from langgraph_memstate.testing.hook_search import HookSearch

FIELDS = ("text", "ns0", "a.b")


class TestChromaInMemory(SyncHookContract):
    persists = False

    def make_hook(self, tmp_path: Path) -> SyncHook:
        client, name = chromadb.EphemeralClient(), f"c{tmp_path.name}c"
        if name in (collection.name for collection in client.list_collections()):
            client.delete_collection(name)  # as if the process had ended: its vectors had gone with it
        return ChromaSyncHook(client, name, metadata_fields=FIELDS)


class TestChromaInADirectory(SyncHookContract):
    preload = ("chromadb",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return ChromaSyncHook(path=tmp_path / "chroma", metadata_fields=FIELDS)


class Served(ChromaSyncHook):
    """Closes its connections, which Chroma leaves open, and the user usually keeps."""

    def close(self) -> None:
        client = self._client
        super().close()
        if client is not None:
            client.close()
            for api in (client._server, client._admin_client._server):
                api._session.close()


@pytest.mark.slow
@pytest.mark.usefixtures("chroma_server")
class TestChromaBehindAServer(SyncHookContract):
    preload = ("chromadb",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        client = chromadb.HttpClient(host="127.0.0.1", port=int(os.environ["MEMSTATE_CHROMA_PORT"]))
        return Served(client, f"c{tmp_path.name}c", metadata_fields=FIELDS)


class TestQdrantInMemory(SyncHookContract):
    persists = False

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return QdrantSyncHook(QdrantClient(":memory:"), metadata_fields=FIELDS)


class TestQdrantInADirectory(SyncHookContract):
    preload = ("qdrant_client",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return QdrantSyncHook(path=tmp_path / "qdrant", metadata_fields=FIELDS, store_documents=True)


class TestFaissInMemory(SyncHookContract):
    persists = False

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return FaissSyncHook()


class TestFaissInADirectory(SyncHookContract):
    preload = ("faiss",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return FaissSyncHook(tmp_path / "faiss")


@pytest.mark.slow
class TestFaissGraph(SyncHookContract):
    preload = ("faiss",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return FaissSyncHook(tmp_path / "faiss", kind="hnsw")


class Alone(PgvectorSyncHook):
    """Opens a database of its own where no memory has handed it one."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self._storage = storage

    def open(self, spec: IndexSpec) -> IndexState:
        if self._table is None:
            self._storage.open()
            self.join(self._storage.index_table(self.name))
        return super().open(spec)

    def close(self) -> None:
        super().close()
        self._storage.close()


@pytest.mark.usefixtures("pgvector_server")
class TestPgvector(SyncHookContract):
    preload = ("psycopg",)

    def make_storage(self, tmp_path: Path) -> Storage:
        schema = blake2b(os.fsencode(tmp_path), digest_size=8).hexdigest()
        return PostgresStorage(os.environ["MEMSTATE_POSTGRES_URI"], schema=schema, pool_size=2)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return Alone(self.make_storage(tmp_path))


class TestWithoutAHook(HookSearch):
    def hook_of_a_memory(self, tmp_path: Path) -> None:
        return None

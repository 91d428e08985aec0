"""Every hook of this package keeps the contract of a hook; search without one keeps what of it is about search."""

from __future__ import annotations

from pathlib import Path

import chromadb
from qdrant_client import QdrantClient

from langgraph_memstate.hooks.base import SyncHook
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from langgraph_memstate.hooks.faiss import FaissSyncHook
from langgraph_memstate.hooks.qdrant import QdrantSyncHook
from langgraph_memstate.testing import SyncHookContract
from langgraph_memstate.testing.hook_search import HookSearch


class TestChromaInMemory(SyncHookContract):
    persists = False  # its client does, in this process

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return ChromaSyncHook(chromadb.EphemeralClient(), tmp_path.name.ljust(3, "-") + "x")


class TestChromaInADirectory(SyncHookContract):
    preload = ("chromadb",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return ChromaSyncHook(path=tmp_path / "chroma")


class TestQdrantInMemory(SyncHookContract):
    persists = False

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return QdrantSyncHook(QdrantClient(":memory:"))


class TestQdrantInADirectory(SyncHookContract):
    preload = ("qdrant_client",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return QdrantSyncHook(path=tmp_path / "qdrant")


class TestFaissInMemory(SyncHookContract):
    persists = False

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return FaissSyncHook()


class TestFaissInADirectory(SyncHookContract):
    preload = ("faiss",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return FaissSyncHook(tmp_path / "faiss")


class TestFaissGraph(SyncHookContract):
    preload = ("faiss",)

    def make_hook(self, tmp_path: Path) -> SyncHook:
        return FaissSyncHook(tmp_path / "faiss", kind="hnsw")


class TestWithoutAHook(HookSearch):
    def hook_of_a_memory(self, tmp_path: Path) -> None:
        return None

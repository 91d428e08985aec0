"""Which hook follows the log into the object that a user has."""

from __future__ import annotations

from typing import Any

from langgraph_memstate.hooks.base import SyncHook


def hook_of(vectors: Any) -> SyncHook:
    """A hook is itself; clients and collections of Chroma and of Qdrant get one.

    Raises:
        IndexConfigError: there is no hook for such an object.
    """
    if isinstance(vectors, SyncHook):
        return vectors
    if type(vectors).__module__.partition(".")[0] == "qdrant_client":
        from langgraph_memstate.hooks.qdrant import QdrantSyncHook

        return QdrantSyncHook(vectors)
    from langgraph_memstate.hooks.chroma import ChromaSyncHook

    return ChromaSyncHook(vectors)

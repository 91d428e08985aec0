"""One directory of a local Qdrant, which one process at a time may use.

Measured on qdrant-client 1.20: a point is on the disk before the call returns and a kill leaves every collection
loadable, so no write is marked. What the loss of power leaves of the file that lists the collections may not load.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from langgraph_memstate.hooks.directory import OwnedDirectory

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

logger = logging.getLogger(__name__)


class QdrantDirectory(OwnedDirectory):
    """Owns the directory of one local Qdrant, and shares its client among the hooks of this process."""

    LOCK = "memstate-qdrant.lock"

    def __init__(self, path: str, lock: IO[str]) -> None:
        super().__init__(path, lock)
        self._client: QdrantClient | None = None

    def client(self) -> QdrantClient:
        from qdrant_client import QdrantClient

        with self._mutex:
            if self._client is None:
                # The thread check is Qdrant's: calls come from several threads, but one at a time.
                options: Mapping[str, Any] = {"path": str(self._path), "force_disable_check_same_thread": True}
                try:
                    self._client = QdrantClient(**options)
                except (json.JSONDecodeError, sqlite3.DatabaseError, LookupError, TypeError, ValueError) as error:
                    self._set_aside(error)
                    self._client = QdrantClient(**options)
            return self._client

    def _set_aside(self, error: Exception) -> None:
        """Start anew beside files that Qdrant cannot load; SQL holds what was in them."""
        damaged = Path(f"{self._path}.damaged-{os.urandom(4).hex()}")
        logger.warning(
            "the local Qdrant in %s cannot be loaded (%r); its files are now in %s", self._path, error, damaged
        )
        damaged.mkdir()
        for name in ("meta.json", "collection"):
            if (self._path / name).exists():
                os.replace(self._path / name, damaged / name)

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()

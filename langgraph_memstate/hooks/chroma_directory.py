"""One directory of embedded Chroma, which a crash can ruin.

Measured on Chroma 1.5.9: two processes on one directory corrupt it, its vector files are not crash-safe, a damaged one
can end every process that loads it, and its client hangs after a fork.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from langgraph_memstate.hooks.directory import OwnedDirectory

logger = logging.getLogger(__name__)

_FULL_TEXT = "embedding_fulltext_search"
_SEGMENT_HEADER = "????????-????-????-????-????????????/header.bin"  # a segment's directory is named by a UUID

FORKED = (
    "this process was forked after Chroma was opened, and Chroma's client hangs after a fork: open the memory in "
    "each process by itself, after the fork"
)


def owned_elsewhere(path: str) -> str:
    return (
        f"another process owns the Chroma directory {path}, which only one may use at a time; this process searches "
        f"SQL instead. For several processes start a server (chroma run --path {path}) and give the memory a "
        "chromadb.HttpClient"
    )


class ChromaDirectory(OwnedDirectory):
    """Owns the directory of one embedded Chroma, and shares one client among the hooks that brought none."""

    def __init__(self, path: str, lock: IO[str]) -> None:
        super().__init__(path, lock)
        self._client: Any = None

    def client(self) -> Any:
        """The client of this directory, one for all hooks that brought none."""
        import chromadb

        with self._mutex:
            if self._client is None:
                self._inspect()
                # Default settings, or Chroma would refuse the user a client of their own on this path.
                self._client = chromadb.PersistentClient(self._path)
            return self._client

    def renew(self) -> Any:
        """A fresh client where nobody shares the old one: Chroma keeps dropped vectors in memory and on disk."""
        with self._mutex:
            if self._client is not None and self._users == 1:
                self._client.close()
                self._client = None
                self._vacuum()
            return self.client()

    def _vacuum(self) -> None:
        """Rewrite Chroma's SQL without what was deleted from it. Like `_inspect`, never beside a client of ours."""
        try:
            with closing(sqlite3.connect(self._path / "chroma.sqlite3", isolation_level=None)) as connection:
                connection.execute(f"INSERT INTO {_FULL_TEXT} ({_FULL_TEXT}) VALUES ('rebuild')")
                connection.execute("VACUUM")
        except sqlite3.Error as error:
            logger.warning("%s: what was deleted from it could not be wiped: %s", self._path, error)

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _files(self) -> Iterator[Path]:
        """The vector files: Chroma brings only its SQL to the disk."""
        for header in self._path.glob(_SEGMENT_HEADER):
            yield from header.parent.iterdir()

    def _is_refusal(self, error: Exception) -> bool:
        return is_refusal(error)

    def _inspect(self) -> None:
        """Find collections whose vector files are gone, and remove the files of dropped ones, which Chroma leaves.

        Only ever without a client of ours: a second SQLite in the process would drop the first one's file locks.
        """
        database = self._path / "chroma.sqlite3"
        if not database.exists():
            return
        try:
            with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
                segments = connection.execute(
                    "SELECT s.id, s.collection, m.seq_id FROM segments s "
                    "LEFT JOIN max_seq_id m ON m.segment_id = s.id WHERE s.scope = 'VECTOR'"
                ).fetchall()
        except sqlite3.Error as error:
            logger.debug("%s was not inspected: %s", database, error)
            return
        for segment, collection_id, persisted in segments:
            if persisted and not (self._path / segment / "index_metadata.pickle").is_file():
                self._damaged.add(collection_id)
        live = {segment for segment, _, _ in segments}
        for header in self._path.glob(_SEGMENT_HEADER):
            if header.parent.name not in live:
                shutil.rmtree(header.parent, ignore_errors=True)


def is_refusal(error: Exception) -> bool:
    """Whether Chroma declined a call before doing anything, so that nothing is half done."""
    from chromadb.errors import ChromaError

    return isinstance(error, ValueError | TypeError) or (isinstance(error, ChromaError) and error.code() < 500)

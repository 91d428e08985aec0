"""A vector database in one append-only file: what it was told survives kill -9, and nothing else does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook, Vector, VectorRecord

DIMS = 32


def embed(texts: Sequence[str]) -> list[list[float]]:
    """Hash words into a vector of shape (DIMS,), with a sign bit each."""
    vectors = []
    for text in texts:
        vector = [0.0] * DIMS
        for word in re.findall(r"\w+", text.lower()):
            number = int.from_bytes(blake2b(word.encode(), digest_size=4).digest(), "big")
            vector[(number >> 1) % DIMS] += 1.0 if number & 1 else -1.0
        vectors.append(vector)
    return vectors


INDEX: dict[str, Any] = {"dims": DIMS, "embed": embed, "fields": ["text"], "model": "words"}


class JournalHook(SyncHook):
    """Args:
    path: the file; a line is the spec, one stored vector or one removed id.
    point: called before and after every line is written.
    """

    def __init__(self, path: Path, point: Callable[[], None] = lambda: None) -> None:
        self.name = "journal"
        self._path = path
        self._point = point
        self._file = -1
        self._held: dict[str, tuple[Vector, tuple[str, ...]]] = {}

    def open(self, spec: IndexSpec) -> IndexState:
        self._close_file()
        self._held.clear()
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content.rfind(b"\n") + 1  # a kill tears a line that crosses a page of memory
        lines = content[:whole].splitlines()
        if not lines:
            return IndexState.EMPTY
        if whole < len(content):
            os.truncate(self._path, whole)
        if json.loads(lines[0]) != _header(spec):
            return IndexState.MISMATCH
        for line in lines[1:]:
            id_, vector, namespace = json.loads(line)
            if vector is None:
                self._held.pop(id_, None)
            else:
                self._held[id_] = (np.array(vector, dtype=np.float32), tuple(namespace))
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        return IndexState.OK

    def reset(self, spec: IndexSpec) -> None:
        self._close_file()
        self._held.clear()
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
        self._write(_header(spec))

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        for record in upserts:
            self._write([record.id, [float(number) for number in record.vector], list(record.namespace)])
            self._held[record.id] = (record.vector, record.namespace)
        for id_ in deletes:
            self._write([id_, None, None])
            self._held.pop(id_, None)

    def _write(self, line: object) -> None:
        self._point()
        os.write(self._file, json.dumps(line).encode() + b"\n")
        self._point()

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        prefix = tuple(namespace)
        scores = {
            id_: float(vector @ held) for id_, (held, place) in self._held.items() if place[: len(prefix)] == prefix
        }
        return sorted(scores, key=scores.__getitem__, reverse=True)[:k]

    def ids(self) -> Iterator[str]:
        return iter(list(self._held))

    def count(self) -> int:
        return len(self._held)

    def close(self) -> None:
        self._close_file()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _header(spec: IndexSpec) -> list[Any]:
    return [spec.store_id, spec.generation, spec.dims, spec.model]

"""A FAISS index on disk: a snapshot that is replaced as a whole, and a journal of what came after it.

A write appends to the journal, which costs what was written; when the journal has outgrown the snapshot, a new one
takes the place of both. Everything carries a checksum: what does not read back as it was written is given up as a
whole, and built again from SQL. Nothing is pickled, and nothing that a user wrote names a file.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any
from uuid import UUID, uuid4

import numpy as np

from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.hooks.base import IndexSpec, VectorRecord
from langgraph_memstate.hooks.faiss_vectors import FaissVectors, Kind

_MAGIC = b"memstateF"
_FORMAT = 1
_FRAME = struct.Struct("<IQQ")  # checksum of what follows; length of the JSON and of the bytes after it
_LEAST_JOURNAL = 4 << 20  # bytes; so little is replayed in no time


class TornFileError(ValueError):
    """A file does not hold what was written to it."""


@dataclass(slots=True)
class Stored:
    """What a snapshot and its journal hold."""

    spec: IndexSpec
    kind: Kind
    vectors: FaissVectors


class FaissFiles:
    """The files of one collection. One process at a time uses them: who owns their directory."""

    def __init__(self, folder: Path, collection_name: str) -> None:
        self._folder = folder
        self.collection_id = blake2b(collection_name.encode(), digest_size=8).hexdigest()
        self._name = collection_name
        self._snapshot_id = ""  # a journal carries the id of the snapshot that it amends
        self._journal: IO[bytes] | None = None
        self._snapshot_size = 0

    @property
    def _snapshot_path(self) -> Path:
        return self._folder / f"{self.collection_id}.faiss"

    @property
    def _journal_path(self) -> Path:
        return self._journal_of(self._snapshot_id)

    def _journal_of(self, snapshot_id: str) -> Path:
        return self._folder / f"{self.collection_id}-{snapshot_id}.journal"

    # -- reading --------------------------------------------------------------------------------------

    def load(self) -> Stored | None:
        """What is there; None where nothing is.

        Raises:
            TornFileError: it cannot be trusted.
        """
        try:
            with open(self._snapshot_path, "rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise TornFileError(f"{self._snapshot_path} is not a snapshot of this package")
                frames = list(_frames(file, self._snapshot_path))
        except FileNotFoundError:
            return None
        if len(frames) != 1:
            raise TornFileError(f"{self._snapshot_path} holds {len(frames)} snapshots")
        described, index = frames[0]
        if described.get("format") != _FORMAT:
            raise TornFileError(f"{self._snapshot_path} has format {described.get('format')!r}, not {_FORMAT}")
        spec, kind = IndexSpec(**described["spec"]), described["kind"]
        self._snapshot_id, self._snapshot_size = UUID(described["id"]).hex, len(index)
        try:
            vectors = FaissVectors.load(spec.dims, kind, described, index)
        except (ValueError, RuntimeError) as error:  # FAISS refuses what it cannot read with a RuntimeError
            raise TornFileError(f"{self._snapshot_path}: {error}") from error
        self._replay(vectors)
        return Stored(spec, kind, vectors)

    def _replay(self, vectors: FaissVectors) -> None:
        try:
            with open(self._journal_path, "rb") as file:
                for described, data in _frames(file, self._journal_path):
                    if described["ids"]:
                        rows = np.frombuffer(data, "<f4").reshape(len(described["ids"]), vectors.dims)
                        vectors.add(described["ids"], described["paths"], rows)
                    vectors.remove(described["removed"])
        except FileNotFoundError as error:
            raise TornFileError(f"{self._journal_path} is gone") from error

    # -- writing --------------------------------------------------------------------------------------

    def append(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        """Note one write. It is on the disk when the directory is synced."""
        described = {
            "ids": [record.id for record in upserts],
            "paths": [encode_namespace(record.namespace) for record in upserts],
            "removed": list(deletes),
        }
        if self._journal is None:
            self._journal = open(self._journal_path, "ab", buffering=0)  # noqa: SIM115  open until the next snapshot
        _write(self._journal, described, b"".join(record.vector.astype("<f4").tobytes() for record in upserts))

    @property
    def is_journalled(self) -> bool:
        """Whether anything was written since the snapshot, by this process."""
        return self._journal is not None

    def is_long(self) -> bool:
        """Whether the journal has outgrown what it amends."""
        return self._journal is not None and self._journal.tell() > max(_LEAST_JOURNAL, self._snapshot_size)

    def save(self, spec: IndexSpec, vectors: FaissVectors) -> None:
        """Replace the snapshot, and the journal with it: first the one, which names the other."""
        snapshot_id = uuid4().hex
        described, index = vectors.dump()
        described |= {
            "format": _FORMAT, "collection": self._name, "id": snapshot_id,
            "spec": asdict(spec), "kind": vectors.kind,
        }  # fmt: skip
        self.close()
        self._journal_of(snapshot_id).touch()  # so that a journal that is missing was lost
        unfinished = self._snapshot_path.with_suffix(".new")
        with open(unfinished, "wb", buffering=0) as file:
            file.write(_MAGIC)
            _write(file, described, index)
            os.fsync(file.fileno())
        os.replace(unfinished, self._snapshot_path)
        self._snapshot_id, self._snapshot_size = snapshot_id, len(index)
        _sync_folder(self._folder)
        for journal in self._folder.glob(f"{self.collection_id}-*.journal"):
            if journal != self._journal_path:
                journal.unlink(missing_ok=True)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _write(file: IO[bytes], described: dict[str, Any], data: bytes) -> None:
    head = json.dumps(described).encode()
    lengths = struct.pack("<QQ", len(head), len(data))
    checksum = zlib.crc32(data, zlib.crc32(head, zlib.crc32(lengths)))
    left = memoryview(struct.pack("<I", checksum) + lengths + head + data)
    while left:
        left = left[file.write(left) :]


def _frames(file: IO[bytes], path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """What `_write` wrote, one by one.

    Raises:
        TornFileError: at the first that is not whole.
    """
    end = os.fstat(file.fileno()).st_size
    while start := file.read(_FRAME.size):
        if len(start) < _FRAME.size:
            raise TornFileError(f"{path} ends in the middle of a write")
        checksum, head_size, size = _FRAME.unpack(start)
        if head_size + size > end - file.tell():
            raise TornFileError(f"{path} ends in the middle of a write")
        head, data = file.read(head_size), file.read(size)
        if zlib.crc32(data, zlib.crc32(head, zlib.crc32(start[4:]))) != checksum:
            raise TornFileError(f"{path} does not have the checksum it was written with")
        yield json.loads(head), data


def _sync_folder(folder: Path) -> None:
    """Make a rename last. Windows has no such call, and does not need one."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

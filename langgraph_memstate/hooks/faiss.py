"""The index in FAISS: in the memory of this process and, given a directory, in files of its own.

FAISS is a library and no database: it knows neither strings nor files that outlive a crash. So vectors are numbered,
files are replaced as a whole, and a directory belongs to one process; what a crash leaves unfinished is built again
from SQL.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, get_args

from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.hooks.base import Capabilities, IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.hooks.directory import OwnedDirectory
from langgraph_memstate.hooks.faiss_files import FaissFiles, TornFileError
from langgraph_memstate.hooks.faiss_vectors import FaissVectors, Kind

logger = logging.getLogger(__name__)

_BATCH = 500  # a flat index takes so many in a millisecond


class FaissSyncHook(SyncHook):
    """Keeps the vectors of a memory in one FAISS index.

    Args:
        path: a directory of our own. None keeps the index in memory: it is built from SQL at every open, and no other
            process may follow the same database.
        collection_name: tells the indexes in one directory, and of one memory, apart.
        text_field: path of the value that is embedded; None leaves it to the memory's index.
        embedding: a LangChain `Embeddings` or a function from texts to vectors; None leaves it to the memory's index.
        kind: ``"flat"`` scans every vector and is exact; ``"hnsw"`` walks a graph, which pays from about 50,000 on.

    FAISS holds vectors and nothing else: the fields of a value stay in SQL.

    Raises:
        IndexConfigError: FAISS is not installed, or the arguments do not fit together.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        collection_name: str = "memory",
        text_field: str | None = None,
        embedding: Any = None,
        *,
        kind: Kind = "flat",
    ) -> None:
        try:
            import faiss  # noqa: F401  what is missing shows here, not at the first write
        except ImportError as error:
            raise IndexConfigError(
                "FaissSyncHook needs FAISS: pip install 'langgraph-memstate[faiss]', or faiss-cpu"
            ) from error
        if kind not in get_args(Kind):
            raise IndexConfigError(f"kind is 'flat' or 'hnsw', not {kind!r}")
        if not isinstance(collection_name, str) or not collection_name:
            raise IndexConfigError(f"collection_name is a non-empty string, not {collection_name!r}")
        self.name = f"faiss:{collection_name}"
        self.fields = (text_field,) if text_field else None
        self.embedding = embedding
        self.capabilities = Capabilities(max_batch=_BATCH)
        self._kind = kind
        self._collection_name = collection_name
        self._path = None if path is None else os.path.realpath(path)
        self._directory: FaissDirectory | None = None
        self._collection: FaissCollection | None = None
        self._spec: IndexSpec | None = None
        self._closed = False
        self._told = False
        self._pid = os.getpid()

    def open(self, spec: IndexSpec) -> IndexState:
        if self._closed:
            raise VectorSyncError(f"index {self.name} is closed")
        if self._collection is None:
            if self._path is None:
                self._collection = FaissCollection(None, None)
            else:
                self._directory = FaissDirectory.acquire(self._path)
                if self._directory is None:
                    self._tell_busy()
                    return IndexState.BUSY
                self._collection = self._directory.collection(self._collection_name)
        self._spec = spec
        return self._collection.open(spec, self._kind)

    def _tell_busy(self) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "another process owns the FAISS directory %s, which only one may use at a time; this process "
                "searches SQL instead",
                self._path,
            )

    def reset(self, spec: IndexSpec) -> None:
        self._spec = spec
        self._opened().reset(spec, self._kind)

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        self._opened().apply(self._spec, upserts, deletes)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        return self._opened().query(self._spec, vector, k, namespace)

    def ids(self) -> Iterator[str]:
        return self._opened().ids(self._spec)

    def count(self) -> int:
        return self._opened().count(self._spec)

    def close(self) -> None:
        self._collection, self._closed = None, True
        if self._directory is not None:
            self._directory.release()
            self._directory = None

    def _opened(self) -> FaissCollection:
        if self._collection is None or (self._path is not None and self._pid != os.getpid()):
            raise VectorSyncError(f"index {self.name} is not open: it was closed, or another process owns it")
        return self._collection


class FaissCollection:
    """One index and its files, if it has any; shared by the hooks of this process that name it."""

    def __init__(self, files: FaissFiles | None, directory: FaissDirectory | None) -> None:
        self._files = files
        self._directory = directory
        self._spec: IndexSpec | None = None
        self._vectors: FaissVectors | None = None
        self._lock = threading.RLock()

    def open(self, spec: IndexSpec, kind: Kind) -> IndexState:
        with self._lock:
            if self._is_suspect():
                self._vectors = None
                return IndexState.SUSPECT
            if self._vectors is None and not self._load():
                return IndexState.SUSPECT
            if self._vectors is None:
                return IndexState.EMPTY
            if (self._spec, self._vectors.kind) != (spec, kind):
                return IndexState.MISMATCH
            return IndexState.OK if len(self._vectors) else IndexState.EMPTY

    def _is_suspect(self) -> bool:
        if self._directory is None or self._files is None:
            return False
        return self._directory.is_suspect(self._files.collection_id)

    def _load(self) -> bool:
        """Read the files; False where they cannot be trusted."""
        if self._files is None:
            return True
        try:
            stored = self._files.load()
        except TornFileError as error:
            logger.warning("%s", error)
            return False
        if stored is not None:
            self._spec, self._vectors = stored.spec, stored.vectors
        return True

    def reset(self, spec: IndexSpec, kind: Kind) -> None:
        with self._lock:
            self._vectors = None
            empty = FaissVectors(spec.dims, kind)
            if self._files is not None and self._directory is not None:
                self._files.save(spec, empty)  # then nothing that was there before is read again
                self._directory.forget(self._files.collection_id)
            self._spec, self._vectors = spec, empty

    def apply(self, spec: IndexSpec | None, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        with self._lock:
            vectors = self._opened(spec)
            for record in upserts:
                if record.vector.shape != (vectors.dims,):
                    raise ValueError(f"vector {record.id} has shape {record.vector.shape}, not ({vectors.dims},)")
            if self._files is None or self._directory is None:
                self._change(vectors, upserts, deletes)
                return
            with self._directory.writing(self._files.collection_id):
                self._files.append(upserts, deletes)
                self._change(vectors, upserts, deletes)
                if self._files.is_long():
                    assert self._spec is not None
                    self._files.save(self._spec, vectors)

    @staticmethod
    def _change(vectors: FaissVectors, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        if upserts:
            vectors.put(upserts)
        vectors.remove(deletes)

    def query(self, spec: IndexSpec | None, vector: Vector, k: int, namespace: Sequence[str]) -> list[str]:
        with self._lock:
            return self._opened(spec).nearest(vector, k, namespace)

    def ids(self, spec: IndexSpec | None) -> Iterator[str]:
        with self._lock:
            return iter(self._opened(spec))

    def count(self, spec: IndexSpec | None) -> int:
        with self._lock:
            return len(self._opened(spec))

    def _opened(self, spec: IndexSpec | None) -> FaissVectors:
        """The vectors, for a hook that opened the index for `spec`."""
        if self._vectors is None:
            raise VectorSyncError("this FAISS index has yet to be rebuilt")
        if self._spec != spec:
            raise VectorSyncError(
                "this FAISS index is that of another memory now, or of another model: give each a collection_name"
            )
        return self._vectors

    def close(self) -> None:
        with self._lock:
            vectors, self._vectors = self._vectors, None
            if self._files is not None:
                if vectors is not None and vectors.kind == "hnsw" and self._files.is_journalled:
                    assert self._spec is not None
                    self._files.save(self._spec, vectors)  # to replay a journal is to build the graph again
                self._files.close()


class FaissDirectory(OwnedDirectory):
    """Owns a directory of FAISS files."""

    LOCK = "memstate-faiss.lock"

    def __init__(self, path: str, lock: IO[str]) -> None:
        super().__init__(path, lock)
        self._collections: dict[str, FaissCollection] = {}

    def collection(self, name: str) -> FaissCollection:
        """The collection of a name, one for all hooks of this process."""
        with self._mutex:
            if name not in self._collections:
                self._collections[name] = FaissCollection(FaissFiles(self._path, name), self)
            return self._collections[name]

    def _close(self) -> None:
        for collection in self._collections.values():
            collection.close()

    def _files(self) -> Iterator[Path]:
        """The journals: snapshots are brought to the disk as they are written."""
        return self._path.glob("*.journal")

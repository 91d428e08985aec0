"""One vector index: what it embeds, with which model, and the hook that follows the log (if any)."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid5

from langgraph_memstate.embedding import Embedder, check_paths, text_hash, texts_of
from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.facts import Draft, decode_value
from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.matrix import VectorMatrix
from langgraph_memstate.storage.base import Reader, Snapshots
from langgraph_memstate.storage.operations import PutIndexMeta
from langgraph_memstate.storage.values import EXACT, EmbeddingRow, ScoredRow, VectorRow

logger = logging.getLogger("langgraph_memstate")

_REST = 2.0  # seconds in which a search does not ask an index again that did not answer
_RECENT = 256  # embeddings kept for writes that are not committed yet


def vector_id(version: str, ord_: int) -> str:
    """The id of a version's text number `ord_`: always a UUID, which some vector databases insist on."""
    return version if ord_ == 0 else str(uuid5(UUID(version), str(ord_)))


def to_bytes(vector: Vector | None) -> bytes:
    """How SQL holds an embedding; no bytes for a text without direction."""
    return b"" if vector is None else vector.astype("<f4").tobytes()


def to_vector(data: bytes) -> Vector:
    import numpy as np

    return np.frombuffer(data, dtype="<f4")


class VectorIndex:
    """Binds a model and the fields it embeds to a hook. Without a hook, search scans SQL exactly."""

    def __init__(self, embedder: Embedder, fields: Sequence[str], hook: SyncHook | None = None) -> None:
        self.embedder = embedder
        self.fields = check_paths(tuple(fields))
        self.hook = hook
        self.name = EXACT if hook is None else hook.name
        self.state: IndexState | None = None
        self.is_taken = False
        """another process has started the index anew, in a memory of its own: it is the one that SQL speaks of"""
        self._generation = 0
        self.matrix = VectorMatrix(self.name, embedder.model)
        self._found = IndexState.OK
        self._silent = False
        self._rests_until = 0.0
        self._recent: OrderedDict[bytes, bytes] = OrderedDict()
        self._recent_lock = threading.Lock()
        self._lock = threading.RLock()

    @property
    def model(self) -> str:
        return self.embedder.model

    @property
    def is_kept(self) -> bool:
        """Whether the database keeps the index itself: commits write it, and there is nothing to apply."""
        return self.hook is not None and self.hook.capabilities.transactional

    @property
    def is_shared(self) -> bool:
        """Whether several processes may apply its work."""
        return self.hook is not None and self.hook.capabilities.multiprocess

    @property
    def has_outbox(self) -> bool:
        """Whether commits leave it work, or may."""
        return self.hook is not None and not self.is_kept

    @property
    def follows(self) -> bool:
        """Whether this process applies the index's work; else search scans SQL."""
        return self.hook is not None and self.state is IndexState.OK

    # -- what is embedded ---------------------------------------------------------------------------

    def texts(self, draft: Draft) -> list[str]:
        """The texts of a draft that this index embeds."""
        if draft.op != "put" or draft.index is False or draft.value is None:
            return []
        return texts_of(decode_value(draft.value), self.fields if draft.index is None else draft.index)

    def embed(
        self, drafts: Sequence[Draft], storage: Snapshots, just_embedded: Sequence[EmbeddingRow] = ()
    ) -> tuple[list[VectorRow], list[EmbeddingRow], dict[str, Vector]]:
        """Vector rows of `drafts`, the embeddings SQL does not hold yet, and every vector by id.

        A text is embedded once, however often it occurs, whichever version held it before, and whether or not a search
        inside its step has seen it already. The model is called outside of any snapshot: it may take long, and an async
        one may need the very thread that waits to read.
        """
        texts = {(draft.version, ord_): text for draft in drafts for ord_, text in enumerate(self.texts(draft))}
        hashes = {text: text_hash(text) for text in texts.values()}
        with storage.snapshot() as reader:
            known = reader.embeddings(self.model, list(hashes.values()))
        known |= {row.text_hash: row.vector for row in just_embedded if row.model == self.model}
        absent = {text: hash_ for text, hash_ in hashes.items() if hash_ not in known}
        known |= self._embed(absent)
        fresh = [EmbeddingRow(self.model, hash_, known[hash_]) for hash_ in absent.values()]
        rows: list[VectorRow] = []
        vectors: dict[str, Vector] = {}
        for (version, ord_), text in texts.items():
            data = known[hashes[text]]
            if data:
                id_ = vector_id(version, ord_)
                rows.append(VectorRow(self.name, id_, version, ord_, hashes[text]))
                vectors[id_] = to_vector(data)
        return rows, fresh, vectors

    def _embed(self, hashes: Mapping[str, bytes]) -> dict[bytes, bytes]:
        with self._recent_lock:
            known = {hash_: self._recent[hash_] for hash_ in hashes.values() if hash_ in self._recent}
        missing = [text for text, hash_ in hashes.items() if hash_ not in known]
        if missing:
            for text, vector in zip(missing, self.embedder.documents(missing), strict=True):
                known[hashes[text]] = to_bytes(vector)
        with self._recent_lock:
            self._recent |= known
            while len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return known

    def record(
        self, id_: str, ord_: int, vector: Vector, namespace: tuple[str, ...], value: str, index: Any = None
    ) -> VectorRecord:
        """What the hook stores for one vector of a value."""
        assert self.hook is not None
        fields = decode_value(value)
        metadata: Mapping[str, Any] = {
            name: fields[name]
            for name in self.hook.metadata_fields
            if isinstance(fields.get(name), str | int | float | bool)
        }
        document = None
        if self.hook.store_documents:
            texts = texts_of(fields, self.fields if index is None else index)
            document = texts[ord_] if ord_ < len(texts) else None
        return VectorRecord(id_, vector, namespace, metadata, document)

    def record_of(self, row: ScoredRow) -> VectorRecord:
        """What the hook stores for a current version."""
        return self.record(
            row.vector_id, row.ord, to_vector(row.vector), row.record.namespace, row.record.value, row.paths
        )

    # -- the hook -----------------------------------------------------------------------------------

    def open(self, store_id: str, meta: PutIndexMeta | None, *, anew: bool = False) -> tuple[PutIndexMeta, bool]:
        """Open the hook; returns what SQL must record and whether the index has to be rebuilt from SQL.

        With `anew` it is emptied and rebuilt in any case. It is used once `ready` says that SQL has recorded it.

        Raises:
            IndexConfigError: the database was indexed with another model or dimension.
            VectorSyncError: the vector database cannot be reached.
        """
        dims = self._check(meta)
        generation = meta.generation if meta else 1
        if self.hook is None:
            return PutIndexMeta(self.name, self.model, dims, generation), False
        spec = IndexSpec(store_id, generation, dims, self.model)
        with self._lock:
            try:
                found = self.hook.open(spec)
                anew = anew and found is IndexState.OK
                rebuild = anew or found in (IndexState.EMPTY, IndexState.MISMATCH, IndexState.SUSPECT)
                if rebuild:
                    if found is not IndexState.EMPTY and not anew:
                        logger.warning("index %s is %s; rebuilding it from SQL", self.name, found.value)
                    if meta is not None:  # others that had opened it hold an index that is followed no more
                        spec = IndexSpec(store_id, generation + 1, dims, self.model)
                    if self.state is IndexState.OK:
                        # An empty index must not be written before SQL knows that it is empty.
                        self.state = IndexState.BUSY if anew else None
                    self.hook.reset(spec)
                    found = IndexState.OK
            except IndexConfigError:
                raise
            except Exception as error:
                self.state = None
                raise VectorSyncError(f"index {self.name} cannot be opened: {error!r}") from error
        self._found, self._generation = found, spec.generation
        return PutIndexMeta(self.name, self.model, dims, spec.generation), rebuild

    def ready(self) -> None:
        """What `open` returned is in SQL: the index may be followed and asked."""
        self.state = self._found

    def is_current(self, reader: Reader) -> bool:
        """Whether this is the index that SQL speaks of. If not, it is to be opened again, or left to who started it."""
        meta = reader.index_meta(self.name)
        if meta is None or self.hook is None or meta.generation == self._generation:
            return True
        if meta.generation < self._generation:
            return False  # a snapshot from before it was started anew here
        if self.hook.capabilities.multiprocess:
            self.state = None
        elif not self.is_taken:
            logger.warning("index %s was started anew by another process; this one searches SQL", self.name)
            self.state, self.is_taken = IndexState.BUSY, True
        return False

    def _check(self, meta: PutIndexMeta | None) -> int:
        if meta is None:
            return self.embedder.dims
        if self.embedder.fixed_dims not in (None, meta.dims) or meta.model != self.model:
            raise IndexConfigError(
                f"index {self.name!r} of this database was built with model {meta.model!r} and dims={meta.dims}, "
                f"not {self.model!r} and dims={self.embedder.fixed_dims}; open it with those, "
                "or give the new model's index another collection_name"
            )
        self.embedder.fixed_dims = meta.dims
        return meta.dims

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        """Hand work to the hook in batches it accepts. Raises whatever the client library raises."""
        assert self.hook is not None
        size = self.hook.capabilities.max_batch
        with self._lock:
            for start in range(0, len(upserts), size):
                self.hook.apply(upserts[start : start + size], ())
            for start in range(0, len(deletes), size):
                self.hook.apply((), deletes[start : start + size])

    def propose(self, vector: Vector, k: int, prefix: Sequence[str]) -> list[str] | None:
        """Ids of up to `k` nearest vectors; None while the index does not answer, which is told once."""
        assert self.hook is not None
        if self._silent and time.monotonic() < self._rests_until:
            return None
        try:
            with self._lock:
                found = self.hook.query(vector, k, prefix)
        except Exception as error:
            if not self._silent:
                logger.warning("index %s does not answer (%r); search scans SQL until it does", self.name, error)
            self._silent, self._rests_until = True, time.monotonic() + _REST
            return None
        if self._silent:
            logger.info("index %s answers again", self.name)
            self._silent = False
        return found

    def held_ids(self) -> set[str]:
        """Every id in the vector database."""
        assert self.hook is not None
        with self._lock:
            return set(self.hook.ids())

    def answers(self) -> bool:
        """Whether the vector database is there at all: tells an outage from an entry it cannot digest."""
        assert self.hook is not None
        try:
            with self._lock:
                self.hook.count()
        except Exception as error:
            logger.debug("index %s does not answer: %r", self.name, error)
            return False
        return True

    def close(self) -> None:
        if self.hook is not None:
            with self._lock:
                self.hook.close()


def check_index_config(index: Mapping[str, Any]) -> None:
    """Whether a LangGraph `IndexConfig` is complete.

    Raises:
        IndexConfigError: naming what is missing or wrong.
    """
    for name in ("dims", "embed"):
        if name not in index:
            raise IndexConfigError(f"index has no {name!r}; it needs dims and embed, as LangGraph's IndexConfig")
    dims = index["dims"]
    if not isinstance(dims, int) or isinstance(dims, bool) or dims < 1:
        raise IndexConfigError(f"index dims={dims!r} is not a positive number of dimensions")
    if index.get("fields") is not None:
        check_paths(index["fields"])

"""The index in Chroma: inside this process, in a directory of this machine, or behind a Chroma server.

A directory of embedded Chroma belongs to one process: two writers break its filtered queries, and a second reader
sees old vectors. A process that is killed while the vectors are being written to disk can leave files that fail for
ever, crash whoever loads them, or lack records without saying so (chroma #7238, #7069, #6979). So a directory
has one owner, a marker lies in it while a write runs, and a collection whose marker was left behind is
dropped without being loaded.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

import numpy as np

from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.hooks.base import (
    Capabilities,
    IndexSpec,
    IndexState,
    SyncHook,
    Vector,
    VectorRecord,
)
from langgraph_memstate.hooks.chroma_directory import FORKED, ChromaDirectory, is_refusal, owned_elsewhere

if TYPE_CHECKING:  # chromadb takes half a second to import: only who makes a hook pays
    from chromadb import Collection

logger = logging.getLogger(__name__)

_EMBEDDED_BATCH = 50  # an embedded write holds the GIL: 0.8 s for 1,000 vectors
_SERVER_BATCH = 250  # Chroma Cloud accepts 300
_PAGE = 1000
# With 16 neighbours and several threads that insert, two in a hundred graphs of eighteen vectors lost one of them.
_HNSW: Mapping[str, Any] = {
    "space": "cosine",
    "ef_search": 200,
    "ef_construction": 200,
    "max_neighbors": 32,
    "num_threads": 1,
    "sync_threshold": 1000,
}
_FORMAT = 1
_OURS = "memstate:"  # prefix of our keys in a collection's metadata
_ADOPTED = _OURS + "adopted"
_BESIDE = "-memstate"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,500}[a-zA-Z0-9]")
_RESERVED_FIELD = re.compile(r"[#$].*|chroma:document|", re.DOTALL)
_OUR_FIELD = re.compile(r"ns\d+")
_FIRST_LEVEL = ("ns0", "_memstate_ns0")
_LABEL_END = encode_namespace(("label",))[-1]


class ChromaSyncHook(SyncHook):
    """Keeps the vectors of a memory in one Chroma collection.

    Args:
        client: a `chromadb` client (in-process, persistent, HTTP), a `chromadb.Collection`, or a
            `langchain_chroma.Chroma`. Of the last two the client, the name and the embedding function are taken.
        collection_name: the collection that holds the vectors; default ``"memory"``, or the name of the object given.
        text_field: path of the value that is embedded; None leaves it to the memory's index.
        metadata_fields: top-level fields of the value to copy into the records' metadata.
        embedding: a LangChain `Embeddings` or a function from texts to vectors. Default: the embedding function the
            collection was made with, but never Chroma's own default, which has to download a model.
        path: instead of `client`: a directory for an embedded Chroma of our own.
        store_documents: also keep the embedded text. Chroma's queue holds on to deleted text for a while.

    A collection that somebody else made is used if it is empty, and is never dropped. Where an object's collection
    already holds other records, ours go to ``<name>-memstate`` beside it.

    Raises:
        IndexConfigError: the arguments do not fit together, or (from `open`) the named collection holds records of
            somebody else.
    """

    def __init__(
        self,
        client: Any = None,
        collection_name: str | None = None,
        text_field: str | None = None,
        metadata_fields: Sequence[str] = (),
        embedding: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
        store_documents: bool = False,
    ) -> None:
        if (client is None) == (path is None):
            raise IndexConfigError("ChromaSyncHook needs a client, or the path of a directory (not both)")
        import chromadb  # noqa: F401  a missing or broken Chroma shows here, not at the first write

        given = _Given(None) if client is None else _unwrap(client)
        named = collection_name or given.name or "memory"
        if not _NAME.fullmatch(named):
            raise IndexConfigError(
                f"collection_name {named!r}: Chroma takes 3 to 502 characters of a-z A-Z 0-9 . _ -, "
                "beginning and ending with a letter or digit"
            )
        self.name = f"chroma:{named}"
        self.fields = (text_field,) if text_field else None
        self.metadata_fields = _check_fields(metadata_fields)
        self.store_documents = store_documents
        self._collection_name = named
        self._beside_allowed = named == given.name
        clash = any(_OUR_FIELD.fullmatch(name) for name in self.metadata_fields)
        self._level_key = "_memstate_ns" if clash else "ns"

        self._client = given.client
        self._pid = os.getpid()
        self._directory: ChromaDirectory | None = None
        self._path, server = (os.path.realpath(path), False) if path is not None else _location(given.client)
        self._makes_client = path is not None
        self.capabilities = Capabilities(
            multiprocess=server,
            max_batch=_SERVER_BATCH if server else _EMBEDDED_BATCH,
            keeps_removed=self._makes_client,  # the files of a client that was given are not ours to rewrite
        )
        self._closed = False
        self._collection: Collection | None = None
        self._target = named  # the collection that `reset` makes where `_find` found none
        self._suspect = False
        self._told: set[str] = set()

        if embedding is None:
            embedding = given.embedding
        if embedding is None and given.client is not None and (existing := self._get(named)) is not None:
            embedding = _configured_embedding(existing)
        self.embedding = embedding

    # -- life -----------------------------------------------------------------------------------------

    def open(self, spec: IndexSpec) -> IndexState:
        self._collection = None
        if self._closed:
            raise VectorSyncError(f"index {self.name} is closed")
        if self._client is not None and self._pid != os.getpid():
            self._tell(FORKED)
            return IndexState.BUSY
        if self._path is not None and self._directory is None:
            self._directory = ChromaDirectory.acquire(self._path)
            if self._directory is None:
                self._tell(owned_elsewhere(self._path))
                return IndexState.BUSY
        try:
            if self._client is None and self._directory is not None:
                self._client, self._pid = self._directory.client(), os.getpid()
            size = min(self.capabilities.max_batch, self._client.get_max_batch_size())
            self.capabilities = replace(self.capabilities, max_batch=size)
            return self._compare(spec)
        except BaseException:
            self._release()
            raise

    def _compare(self, spec: IndexSpec) -> IndexState:
        collection = self._find()
        self._suspect = (
            collection is not None and self._directory is not None and self._directory.is_suspect(str(collection.id))
        )
        if collection is None or not _is_ours(collection):
            return IndexState.EMPTY
        if self._suspect:
            return IndexState.SUSPECT
        if not self._carries(collection, spec):
            return IndexState.MISMATCH
        try:
            records = collection.count()  # the first call that loads the vectors
        except Exception as error:
            if self._directory is None or is_refusal(error):
                raise
            logger.warning("Chroma collection %s cannot be loaded: %r", collection.name, error)
            self._suspect = True
            return IndexState.SUSPECT
        self._collection = collection
        return IndexState.OK if records else IndexState.EMPTY

    def reset(self, spec: IndexSpec) -> None:
        self._check_client()
        self._collection = None
        collection = self._find()
        if collection is None:
            self._collection = self._create(self._target, spec)
        elif not _is_ours(collection) or collection.metadata.get(_ADOPTED):
            self._collection = self._adopt(collection, spec)
        elif self._suspect or not self._carries(collection, spec) or collection.count():
            self._drop(collection)
            self._collection = self._create(collection.name, spec)
        else:  # as it should be already, perhaps by another process behind the same server
            self._collection = collection
        self._suspect = False

    def close(self) -> None:
        self._collection = None
        self._release()
        self._client, self._closed = None, True

    def _release(self) -> None:
        if self._directory is not None:
            if self._makes_client:
                self._client = None
            self._directory.release()
            self._directory = None

    # -- the collection -------------------------------------------------------------------------------

    def _get(self, name: str) -> Collection | None:
        """Look a collection up, which reads SQL only and loads no vectors."""
        from chromadb.errors import NotFoundError

        try:
            collection: Collection = self._client.get_collection(name, embedding_function=None)
        except NotFoundError:
            return None
        return collection

    def _find(self) -> Collection | None:
        """The collection to use; None if it has yet to be made, under the name `_target`.

        Raises:
            IndexConfigError: the one that was asked for holds records of somebody else.
        """
        beside = self._collection_name + _BESIDE
        self._target = beside
        if (collection := self._get(beside)) is not None and _is_ours(collection):
            return collection
        self._target = self._collection_name
        collection = self._get(self._collection_name)
        if collection is None or _is_ours(collection) or collection.count() == 0:
            return collection
        if not self._beside_allowed:
            raise _foreign(collection)
        self._use_beside("holds other records")
        return None

    def _use_beside(self, because: str) -> str:
        self._target = self._collection_name + _BESIDE
        self._tell(
            f"Chroma collection {self._collection_name} {because} and is left alone; "
            f"the vectors of this memory go to {self._target}"
        )
        return self._target

    def _metadata(self, spec: IndexSpec) -> dict[str, Any]:
        """What marks a collection as built from `spec` in the form this class reads."""
        return {
            _OURS + "store_id": spec.store_id,
            _OURS + "generation": spec.generation,
            _OURS + "model": spec.model,
            _OURS + "dims": spec.dims,
            _OURS + "format": _FORMAT,
            _OURS + "level_key": self._level_key,
        }

    def _carries(self, collection: Collection, spec: IndexSpec) -> bool:
        return self._metadata(spec).items() <= collection.metadata.items()

    def _create(self, name: str, spec: IndexSpec) -> Collection:
        collection: Collection = self._client.create_collection(
            name,
            embedding_function=None,
            configuration={"hnsw": dict(_HNSW)},
            metadata=self._metadata(spec),
            get_or_create=True,  # several processes may start at once
        )
        if not _is_ours(collection):
            raise _foreign(collection)
        return collection

    def _adopt(self, collection: Collection, spec: IndexSpec) -> Collection:
        """Use a collection that somebody else made: our records in it go, it stays."""
        if self._suspect:
            return self._create(self._use_beside("may be damaged, cannot be dropped by us"), spec)
        stale = list(self._our_ids(collection))
        with self._in_flight(collection):
            for batch in self._batches(stale):
                collection.delete(ids=batch)
        dimension = _dimension(collection)
        if dimension not in (None, spec.dims):
            return self._create(self._use_beside(f"holds vectors of {dimension} dimensions only"), spec)
        kept = {key: value for key, value in (collection.metadata or {}).items() if key != "hnsw:space"}
        collection.modify(metadata={**kept, **self._metadata(spec), _ADOPTED: True})
        return collection

    def _drop(self, collection: Collection) -> None:
        self._client.delete_collection(collection.name)
        if self._directory is not None:
            self._directory.forget(str(collection.id))
            if self._makes_client:
                self._client = self._directory.renew()

    # -- records --------------------------------------------------------------------------------------

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        collection = self._opened()
        records = list({record.id: record for record in upserts}.values())
        with self._in_flight(collection):
            for batch in self._batches(records):
                documents = [record.document for record in batch]
                # Not `upsert`: what is there is the same, and HNSW loses its neighbours when it is put in again.
                collection.add(
                    ids=[record.id for record in batch],
                    embeddings=np.stack([record.vector for record in batch]),
                    metadatas=[self._record_metadata(record) for record in batch],
                    documents=None if documents.count(None) == len(documents) else documents,
                )
            for ids in self._batches(list(dict.fromkeys(deletes))):
                collection.delete(ids=ids)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        collection = self._opened()
        if k < 1:
            return []
        where: Any = None
        if namespace:
            where = {self._level(len(namespace) - 1): {"$eq": encode_namespace(namespace)}}
        found = collection.query(
            query_embeddings=np.asarray(vector, np.float32)[None, :], n_results=k, where=where, include=[]
        )
        return list(found["ids"][0])

    def ids(self) -> Iterator[str]:
        return self._our_ids(self._opened())

    def count(self) -> int:
        collection = self._opened()
        if collection.metadata.get(_ADOPTED):
            return sum(1 for _ in self._our_ids(collection))
        return collection.count()

    def _our_ids(self, collection: Collection) -> Iterator[str]:
        """Ids of the records that carry a namespace: in an adopted collection others may have come since."""
        offset = 0
        while True:
            page = collection.get(include=["metadatas"], limit=_PAGE, offset=offset)
            for id_, metadata in zip(page["ids"], page["metadatas"] or (), strict=True):
                if any(str((metadata or {}).get(key)).endswith(_LABEL_END) for key in _FIRST_LEVEL):
                    yield id_
            if len(page["ids"]) < _PAGE:
                return
            offset += _PAGE

    def _level(self, depth: int) -> str:
        return f"{self._level_key}{depth}"

    def _record_metadata(self, record: VectorRecord) -> dict[str, Any]:
        """The record's fields, and each prefix of its namespace under a key of its own.

        Chroma compares strings only for equality, so every prefix that can be asked for is stored whole.
        """
        fields = {name: value for name, value in record.metadata.items() if _fits(value)}
        for depth in range(len(record.namespace)):
            fields[self._level(depth)] = encode_namespace(record.namespace[: depth + 1])
        return fields

    def _batches(self, items: list[Any]) -> Iterator[list[Any]]:
        size = self.capabilities.max_batch
        return (items[start : start + size] for start in range(0, len(items), size))

    # -- guards ---------------------------------------------------------------------------------------

    def _in_flight(self, collection: Collection) -> AbstractContextManager[None]:
        return nullcontext() if self._directory is None else self._directory.writing(str(collection.id))

    def _opened(self) -> Collection:
        self._check_client()
        if self._collection is None:
            raise VectorSyncError(f"index {self.name} is not open, or has to be rebuilt first")
        return self._collection

    def _check_client(self) -> None:
        if self._client is not None and self._pid != os.getpid():
            raise VectorSyncError(FORKED)
        if self._client is None or (self._path is not None and self._directory is None):
            raise VectorSyncError(f"index {self.name} is not open: it was closed, or another process owns it")

    def _tell(self, message: str) -> None:
        """Log what is the case until somebody changes it, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)


# -- what the user has ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """What an argument of the user holds."""

    client: Any
    name: str | None = None
    embedding: Any = None


def _unwrap(given: Any) -> _Given:
    from chromadb import Collection
    from chromadb.api.client import Client

    langchain = sys.modules.get("langchain_chroma")  # who passes its object has imported it
    if langchain is not None and isinstance(given, langchain.Chroma):
        return _Given(given._client, given._collection_name, given.embeddings)
    if isinstance(given, Collection):
        # Client.from_system would open a second connection to a server, which Client.close does not close.
        client = object.__new__(Client)
        client._server, client.tenant, client.database = given._client, given.tenant, given.database
        return _Given(client, given.name, _configured_embedding(given))
    lookup = getattr(given, "get_collection", None)
    if lookup is None or iscoroutinefunction(lookup):
        raise IndexConfigError(
            f"ChromaSyncHook cannot use a {type(given).__name__}; give it a chromadb client that is not async, "
            "a chromadb.Collection or a langchain_chroma.Chroma"
        )
    return _Given(given)


def _location(client: Any) -> tuple[str | None, bool]:
    """The directory of an embedded Chroma (None: it is in memory), and whether there is a server instead."""
    settings = client.get_settings()
    if not settings.chroma_api_impl.endswith(("RustBindingsAPI", "SegmentAPI")):
        return None, True
    return (os.path.realpath(settings.persist_directory) if settings.is_persistent else None), False


def _configured_embedding(collection: Collection) -> Callable[[list[str]], Any] | None:
    """The embedding function that was chosen for a collection, as a plain function; None if none was."""
    from chromadb.api.types import DefaultEmbeddingFunction

    function: Any = collection._embedding_function
    if function is None or isinstance(function, DefaultEmbeddingFunction):
        stored = (collection.configuration_json or {}).get("embedding_function") or {}
        if stored.get("type") != "known" or stored.get("name") == "default":
            return None
        try:
            function = collection.configuration["embedding_function"]
        except ValueError as error:  # an unregistered class, or a key that is not in the environment
            logger.warning("collection %s: its embedding function is not used: %s", collection.name, error)
            return None

    def embed(texts: list[str]) -> Any:
        return function(texts)

    # Embeddings are cached by model: two functions must not share a name.
    vars(embed)["model"] = str(getattr(function, "model_name", None) or type(function).__qualname__)
    return embed


def _check_fields(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise IndexConfigError(f"metadata_fields is a list of names, not the string {names!r}")
    for name in names:
        if not isinstance(name, str) or _RESERVED_FIELD.fullmatch(name):
            raise IndexConfigError(f"metadata_fields: Chroma does not accept the key {name!r}")
    return tuple(names)


def _fits(value: object) -> bool:
    """Whether Chroma can hold a metadata value: its integers have 64 bits."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _is_ours(collection: Collection) -> bool:
    return _OURS + "store_id" in (collection.metadata or {})


def _foreign(collection: Collection) -> IndexConfigError:
    return IndexConfigError(
        f"Chroma collection {collection.name!r} was not made by this package and holds {collection.count()} records; "
        "it is left alone. Give the hook another collection_name"
    )


def _dimension(collection: Collection) -> int | None:
    """The length of vectors a collection was ever given; it stays when they are deleted."""
    return collection._model.dimension

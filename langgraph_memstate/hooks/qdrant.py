"""The index in Qdrant: a server, or the client's local mode in memory or in a directory.

Local mode writes every point through SQLite before it shows it, so a crash leaves nothing half done in a directory;
what it needs is that one process at a time has it open.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.hooks.base import Capabilities, IndexSpec, IndexState, SyncHook, Vector, VectorRecord
from langgraph_memstate.hooks.qdrant_directory import QdrantDirectory

if TYPE_CHECKING:  # qdrant_client takes most of a second to import: only who makes a hook pays
    from qdrant_client import QdrantClient
    from qdrant_client.models import CollectionInfo, Filter

logger = logging.getLogger(__name__)

_LOCAL_BATCH = 50  # a point is a transaction of SQLite: a millisecond each
_SERVER_BATCH = 250
_PAGE = 5_000
_FORMAT = 1
_OURS = "memstate:"  # prefix of our keys in a collection's metadata
_ADOPTED = _OURS + "adopted"
_NAMESPACES = "memstate_ns"
_DOCUMENT = "document"
_NAME = re.compile(r'(?!\.+$)[^<>:"/\\|?*\x00-\x1f]{1,255}')


class QdrantSyncHook(SyncHook):
    """Keeps the vectors of a memory in one Qdrant collection.

    Args:
        client: a `qdrant_client.QdrantClient` (a server, or local), or what names one: a URL, ``":memory:"``. With a
            client in memory, no other process may follow the same database.
        collection_name: the collection that holds the vectors.
        text_field: path of the value that is embedded; None leaves it to the memory's index.
        metadata_fields: top-level fields of the value to copy into the points' payload.
        embedding: a LangChain `Embeddings` or a function from texts to vectors; None leaves it to the memory's index.
        path: instead of `client`: a directory for a local Qdrant of our own. A second process searches SQL.
        store_documents: also keep the embedded text, as ``document``.

    A point's payload holds ``memstate_ns``, the encoded prefixes of its namespace, by which queries are filtered. A
    collection that somebody else made is used if it is empty and fits, and is never dropped.

    Raises:
        IndexConfigError: qdrant-client is not installed, the arguments do not fit together, or (from `open`) the
            collection holds points of somebody else.
    """

    def __init__(
        self,
        client: Any = None,
        collection_name: str = "memory",
        text_field: str | None = None,
        metadata_fields: Sequence[str] = (),
        embedding: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
        store_documents: bool = False,
    ) -> None:
        if (client is None) == (path is None):
            raise IndexConfigError("QdrantSyncHook needs a client, or the path of a directory (not both)")
        try:
            from qdrant_client import QdrantClient
        except ImportError as error:
            raise IndexConfigError(
                "QdrantSyncHook needs its client: pip install 'langgraph-memstate[qdrant]', or qdrant-client"
            ) from error
        if not isinstance(collection_name, str) or not _NAME.fullmatch(collection_name):
            raise IndexConfigError(
                f"collection_name {collection_name!r}: Qdrant takes 1 to 255 characters, none of them a control "
                'character or one of < > : " / \\ | ? *'
            )
        self.name = f"qdrant:{collection_name}"
        self.fields = (text_field,) if text_field else None
        self.metadata_fields = _check_fields(metadata_fields)
        self.store_documents = store_documents
        self.embedding = embedding
        self._collection_name = collection_name
        self._makes_client = isinstance(client, str)
        self._client: QdrantClient | None = QdrantClient(client) if isinstance(client, str) else client
        self._path = None if path is None else os.path.realpath(path)
        self._directory: QdrantDirectory | None = None
        self._is_local = self._path is not None or _is_local(self._client)
        self.capabilities = Capabilities(
            multiprocess=not self._is_local, max_batch=_LOCAL_BATCH if self._is_local else _SERVER_BATCH
        )
        self._pid = os.getpid()
        self._spec: IndexSpec | None = None  # what the collection was built from, once it is known to be
        self._adopted = False
        self._closed = False
        self._told: set[str] = set()

    # -- life -----------------------------------------------------------------------------------------

    def open(self, spec: IndexSpec) -> IndexState:
        self._spec = None
        if self._closed:
            raise VectorSyncError(f"index {self.name} is closed")
        if self._client is not None and self._pid != os.getpid():
            self._tell(
                "this process was forked after Qdrant was opened, whose connections it must not share: open the memory "
                "in each process by itself, after the fork"
            )
            return IndexState.BUSY
        if self._path is not None and self._directory is None:
            self._directory = QdrantDirectory.acquire(self._path)
            if self._directory is None:
                self._tell(
                    f"another process owns the Qdrant directory {self._path}, which only one may use at a time; this "
                    "process searches SQL instead. For several processes start a Qdrant server"
                )
                return IndexState.BUSY
        try:
            if self._directory is not None:
                self._client, self._pid = self._directory.client(), os.getpid()
            return self._compare(spec)
        except BaseException:
            self._release()
            raise

    def _compare(self, spec: IndexSpec) -> IndexState:
        info = self._find()
        if info is None:
            return IndexState.EMPTY
        if not _is_ours(info):
            self._check_adoptable(info, spec)
            return IndexState.EMPTY
        if not self._carries(info, spec):
            return IndexState.MISMATCH
        self._spec, self._adopted = spec, bool(_metadata_of(info).get(_ADOPTED))
        return IndexState.OK if self.count() else IndexState.EMPTY

    def reset(self, spec: IndexSpec) -> None:
        client = self._check_client()
        self._spec = None
        info = self._find()
        if info is None:
            self._create(spec)
        elif not _is_ours(info) or _metadata_of(info).get(_ADOPTED):
            self._adopt(info, spec)
        elif not self._carries(info, spec) or client.count(self._collection_name).count:
            client.delete_collection(self._collection_name)
            self._create(spec)
        self._spec = spec

    def close(self) -> None:
        self._spec = None
        if self._makes_client and self._client is not None and self._pid == os.getpid():
            self._client.close()
        self._release()
        self._client, self._closed = None, True

    def _release(self) -> None:
        if self._directory is not None:
            self._client = None
            self._directory.release()
            self._directory = None

    # -- the collection -------------------------------------------------------------------------------

    def _find(self) -> CollectionInfo | None:
        client = self._check_client()
        if not client.collection_exists(self._collection_name):
            return None
        return client.get_collection(self._collection_name)

    def _metadata(self, spec: IndexSpec) -> dict[str, Any]:
        """What marks a collection as built from `spec` in the form this class reads."""
        return {
            _OURS + "store_id": spec.store_id,
            _OURS + "generation": spec.generation,
            _OURS + "model": spec.model,
            _OURS + "dims": spec.dims,
            _OURS + "format": _FORMAT,
        }

    def _carries(self, info: CollectionInfo, spec: IndexSpec) -> bool:
        return self._metadata(spec).items() <= _metadata_of(info).items() and _fits(info, spec.dims)

    def _create(self, spec: IndexSpec) -> None:
        from qdrant_client.models import Distance, PayloadSchemaType, VectorParams

        client = self._check_client()
        try:
            client.create_collection(
                self._collection_name,
                vectors_config=VectorParams(size=spec.dims, distance=Distance.COSINE),
                metadata=self._metadata(spec),
            )
        except Exception:  # several processes may start at once, and one be faster
            if (made := self._find()) is None or not self._carries(made, spec):
                raise
        if (made := self._find()) is None or not _is_ours(made):
            raise IndexConfigError(
                "this Qdrant server keeps no metadata of collections; it takes release 1.16 or later"
            )
        if not self._is_local:
            client.create_payload_index(self._collection_name, _NAMESPACES, PayloadSchemaType.KEYWORD, wait=True)
        self._adopted = False

    def _check_adoptable(self, info: CollectionInfo, spec: IndexSpec) -> None:
        count = self._check_client().count(self._collection_name).count
        if count:
            raise IndexConfigError(
                f"Qdrant collection {self._collection_name!r} was not made by this package and holds {count} points; "
                "it is left alone. Give the hook another collection_name"
            )
        if not _fits(info, spec.dims):
            raise IndexConfigError(
                f"Qdrant collection {self._collection_name!r} was not made by this package and is left alone; to be "
                f"used it must have one unnamed vector of {spec.dims} dimensions with cosine distance. Delete it, or "
                "give the hook another collection_name"
            )

    def _adopt(self, info: CollectionInfo, spec: IndexSpec) -> None:
        """Use a collection that somebody else made: our points in it go, it stays."""
        from qdrant_client.models import FilterSelector

        client = self._check_client()
        if _is_ours(info):
            client.delete(self._collection_name, FilterSelector(filter=_ours()), wait=True)
        if not _is_ours(info) or not _fits(info, spec.dims):
            self._check_adoptable(info, spec)
        client.update_collection(self._collection_name, metadata={**self._metadata(spec), _ADOPTED: True})
        self._adopted = True

    # -- points ---------------------------------------------------------------------------------------

    def apply(self, upserts: Sequence[VectorRecord], deletes: Sequence[str]) -> None:
        from qdrant_client.models import PointIdsList, PointStruct

        client = self._opened()
        records = list({record.id: record for record in upserts}.values())
        if records:
            points = [
                PointStruct(id=record.id, vector=record.vector.tolist(), payload=_payload(record)) for record in records
            ]
            client.upsert(self._collection_name, points, wait=True)
        if deletes:
            client.delete(self._collection_name, PointIdsList(points=list(dict.fromkeys(deletes))), wait=True)

    def query(self, vector: Vector, k: int, namespace: Sequence[str] = ()) -> list[str]:
        from qdrant_client.models import FieldCondition, Filter, MatchValue

        client = self._opened()
        if k < 1:
            return []
        under = None
        if namespace:
            match = MatchValue(value=encode_namespace(namespace))
            under = Filter(must=[FieldCondition(key=_NAMESPACES, match=match)])
        found = client.query_points(
            self._collection_name, query=vector.tolist(), query_filter=under, limit=k, with_payload=False
        )
        return [str(point.id) for point in found.points]

    def ids(self) -> Iterator[str]:
        client = self._opened()
        offset: Any = None
        while True:
            page, offset = client.scroll(
                self._collection_name,
                scroll_filter=_ours() if self._adopted else None,
                limit=_PAGE, offset=offset, with_payload=False,
            )  # fmt: skip
            yield from (str(point.id) for point in page)
            if offset is None:
                return

    def count(self) -> int:
        client = self._opened()
        return client.count(self._collection_name, count_filter=_ours() if self._adopted else None, exact=True).count

    # -- what may be used -------------------------------------------------------------------------------

    def _opened(self) -> QdrantClient:
        client = self._check_client()
        if self._spec is None:
            raise VectorSyncError(f"index {self.name} has yet to be rebuilt")
        if not self._carries(client.get_collection(self._collection_name), self._spec):
            raise VectorSyncError(
                f"Qdrant collection {self._collection_name!r} was taken by another memory, or built anew by another "
                "process: give each memory a collection_name of its own"
            )
        return client

    def _check_client(self) -> QdrantClient:
        if self._client is None or self._closed or (self._path is not None and self._directory is None):
            raise VectorSyncError(f"index {self.name} is not open: it was closed, or another process owns it")
        if self._pid != os.getpid():
            raise VectorSyncError(f"index {self.name} was opened before this process was forked")
        return self._client

    def _tell(self, message: str) -> None:
        """Log what is the case until somebody changes it, once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)


def _is_local(client: Any) -> bool:
    """Whether a client of the user is in local mode.

    Raises:
        IndexConfigError: it cannot be used.
    """
    from qdrant_client import QdrantClient

    if not isinstance(client, QdrantClient):
        is_async = iscoroutinefunction(getattr(client, "get_collection", None))
        raise IndexConfigError(
            f"QdrantSyncHook cannot use {'an async client' if is_async else type(client).__name__}; give it a "
            "qdrant_client.QdrantClient, or the URL of a server"
        )
    options = client.init_options
    local = options.get("location") == ":memory:" or options.get("path") is not None
    checks_thread = sqlite3.threadsafety < 3 and not options.get("force_disable_check_same_thread")
    if options.get("path") is not None and checks_thread:
        raise IndexConfigError(
            "vectors are written from several threads, one at a time, which this client refuses; make it with "
            "QdrantClient(path=…, force_disable_check_same_thread=True)"
        )
    return local


def _check_fields(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise IndexConfigError(f"metadata_fields is a list of names, not the string {names!r}")
    for name in names:
        if not isinstance(name, str) or not name or name in (_NAMESPACES, _DOCUMENT):
            raise IndexConfigError(f"metadata_fields: the key {name!r} of a payload is not free")
    return tuple(names)


def _payload(record: VectorRecord) -> dict[str, Any]:
    """The prefixes of a namespace in one list: a filter on any of them is a filter on a prefix."""
    payload: dict[str, Any] = {
        name: value
        for name, value in record.metadata.items()
        if not isinstance(value, int) or -(2**63) <= value < 2**63  # what Qdrant's integers can hold
    }
    payload[_NAMESPACES] = [encode_namespace(record.namespace[: depth + 1]) for depth in range(len(record.namespace))]
    if record.document is not None:
        payload[_DOCUMENT] = record.document
    return payload


def _ours() -> Filter:
    """Points of ours: in an adopted collection others may have come since."""
    from qdrant_client.models import Filter, IsEmptyCondition, PayloadField

    return Filter(must_not=[IsEmptyCondition(is_empty=PayloadField(key=_NAMESPACES))])


def _metadata_of(info: CollectionInfo) -> Mapping[str, Any]:
    return getattr(info.config, "metadata", None) or {}


def _is_ours(info: CollectionInfo) -> bool:
    return _OURS + "store_id" in _metadata_of(info)


def _fits(info: CollectionInfo, dims: int) -> bool:
    from qdrant_client.models import Distance, VectorParams

    vectors = info.config.params.vectors
    return isinstance(vectors, VectorParams) and vectors.size == dims and vectors.distance == Distance.COSINE

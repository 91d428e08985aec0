"""Channel values of checkpoints: what a new checkpoint has to bring, and the values of a stored one.

Lists are stored by their elements (`lists`), anything else whole, once per distinct value of a thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Generic, TypeVar

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_memstate.errors import CorruptRowError
from langgraph_memstate.graph.codec.wire import DeltaSnapshot
from langgraph_memstate.graph.elements import Element, is_worth_splitting
from langgraph_memstate.graph.lists import Lists, ListVersion
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.values import Blob, ListValue, StepKey, StoredCheckpoint

_LIST, _DELTA = "list", "delta"

Manifest = Mapping[str, tuple[Any, str]]
"""channel -> (its version, the id of its value)"""

Fetched = Mapping[str, Blob | ListVersion]
"""value id -> its value, not made yet"""


@dataclass(slots=True)
class Encoded:
    """What a checkpoint brings that its parent does not have."""

    values: dict[str, Blob] = field(default_factory=dict)
    versions: list[ListVersion] = field(default_factory=list)
    elements: dict[bytes, Blob] = field(default_factory=dict)

    @property
    def lists(self) -> dict[str, ListValue]:
        return {version.value_id: version.to_store() for version in self.versions}


class ChannelValues:
    """Encodes and decodes channel values; clones of a checkpointer share it, each with its own serializer."""

    def __init__(self) -> None:
        self._lists = Lists()
        self.seeds: Recent[tuple[str, str, str], str] = Recent()
        """What a `DeltaChannel` went on from when it was last read, by thread, namespace and channel.

        Checkpoints between two of its snapshots have no value of it; the next one is probably based on this.
        """

    def encode(
        self,
        serde: SerializerProtocol,
        thread_id: str,
        value: Any,
        before: str | None,
        encoded: Encoded,
        *,
        whole: bool = False,
    ) -> str:
        """Add a value to what a checkpoint brings, and return its id.

        `before`: the channel's value until now. `whole`: never by its elements.
        """
        kind = None if whole else _kind(value)
        if kind is None:
            blob = Blob(*serde.dumps_typed(value))
            value_id = blake2b(blob.type.encode() + b"\0" + blob.data, digest_size=16).hexdigest()
            encoded.values[value_id] = blob
            return value_id
        items = value if kind == _LIST else value.value
        parent = None if before is None else self._lists.recall(thread_id, before)
        version, elements = self._lists.encode(serde, kind, items, parent)
        if version is not parent:
            encoded.versions.append(version)
            encoded.elements.update(elements)
        return version.value_id

    def landed(self, thread_id: str, encoded: Encoded) -> None:
        """Keep what was committed for the next checkpoint."""
        for version in encoded.versions:
            self._lists.remember(thread_id, version)

    def fetch(self, reader: Reader, serde: SerializerProtocol, page: Sequence[StoredCheckpoint]) -> list[Fetched]:
        """The values of checkpoints, from their snapshot.

        Raises:
            CorruptRowError: a value is not there, or not what was written; the message names the checkpoint.
        """
        seen: dict[int, Element] = {}
        return [self.fetch_some(reader, serde, stored.step, stored.manifest, seen) for stored in page]

    def fetch_some(
        self,
        reader: Reader,
        serde: SerializerProtocol,
        step: StepKey,
        manifest: Mapping[str, str],
        seen: dict[int, Element] | None = None,
    ) -> Fetched:
        """The values of some channels of one checkpoint, by channel and value id.

        `seen`: elements by id that this snapshot has shown; grows.
        """
        wanted = list(dict.fromkeys(manifest.values()))
        if not wanted:
            return {}
        try:
            unseen = [value_id for value_id in wanted if self._lists.recall(step.thread_id, value_id) is None]
            values = reader.values(step.thread_id, unseen) if unseen else {}
            rest = [value_id for value_id in wanted if value_id not in values]
            lists = self._lists.fetch(reader, serde, step.thread_id, rest, {} if seen is None else seen)
        except CorruptRowError as error:
            raise CorruptRowError(f"checkpoint {step.checkpoint_id}: {error}") from error
        missing = [channel for channel, value_id in manifest.items() if value_id not in lists.keys() | values.keys()]
        if missing:
            raise CorruptRowError(f"checkpoint {step.checkpoint_id} lost the value of {missing}")
        return {**lists, **values}

    def decode(self, serde: SerializerProtocol, fetched: Blob | ListVersion) -> Any:
        """The value, made anew."""
        if isinstance(fetched, Blob):
            return serde.loads_typed(fetched)
        items = fetched.items(serde)
        return items if fetched.kind == _LIST else DeltaSnapshot(items)

    def forget(self, thread_id: str | None) -> None:
        self._lists.forget(thread_id)
        self.seeds.forget(thread_id)


def weight_of(fetched: Fetched) -> int:
    """Bytes that values are made of."""
    return sum(len(each.data) if isinstance(each, Blob) else each.weight for each in fetched.values())


def _kind(value: Any) -> str | None:
    """How a value is split; None where it is stored whole."""
    kind, items = (_DELTA, value.value) if type(value) is DeltaSnapshot else (_LIST, value)
    return kind if type(items) is list and is_worth_splitting(items) else None


K = TypeVar("K", bound=tuple[Any, ...])
V = TypeVar("V")


class Recent(Generic[K, V]):
    """What was remembered last, by keys that begin with a thread id; clones of a checkpointer share it."""

    _SIZE = 4096

    def __init__(self) -> None:
        self._known: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def recall(self, key: K) -> V | None:
        with self._lock:
            return self._known.get(key)

    def remember(self, key: K, value: V) -> None:
        with self._lock:
            self._known[key] = value
            self._known.move_to_end(key)
            while len(self._known) > self._SIZE:
                self._known.popitem(last=False)

    def forget(self, thread_id: str | None) -> None:
        """Forget a thread, or everything."""
        with self._lock:
            for key in [key for key in self._known if thread_id in (None, key[0])]:
                del self._known[key]

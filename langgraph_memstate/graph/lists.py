"""Lists as versions of each other: what of a list is new, and the list a stored version stands for.

A version is based on an earlier one, chosen as in the skip deltas of Subversion: the version at depth `n` is based on
the one at depth `n & (n - 1)`, so that a list is put together from as many rows as its depth has binary digits, and an
element is listed about as often.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import chain, pairwise
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_memstate.errors import CorruptRowError, SerializationError
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.graph.slices import is_atom, packed_array
from langgraph_memstate.graph.templates import (
    ATOMS,
    Outline,
    Template,
    copy_into,
    gc_paused,
    is_same,
    template_of,
)
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.values import Blob, ListValue, StoredList

_RUN = 256  # bytes of atoms that make one element; anything else is an element of its own
_SINGLE = frozenset(packed_array([first]) for first in map(bytes, zip(range(256))) if not is_atom(first))
_MANY = 64  # objects, from which on it pays to pause the garbage collection
CACHE_BYTES = 64 * 1024 * 1024  # of serialised elements, each counted with every cached version that has it

_hash = partial(blake2b, digest_size=16)


class Element:
    """One item of a list, or a run of atoms: its digest, and what makes it again."""

    __slots__ = ("__weakref__", "blob", "count", "digest", "is_cold", "is_open", "size", "template")

    def __init__(
        self, digest: bytes, blob: Blob, count: int, template: Template | None, is_open: bool, is_cold: bool = False
    ) -> None:
        self.digest = digest
        self.count = count
        self.size = len(blob.data)
        self.template = template
        self.blob = blob if template is None else None
        self.is_open = is_open
        """a run of atoms that more may join"""
        self.is_cold = is_cold
        """whether nobody has tried to make its template yet"""

    def is_at(self, items: Sequence[Any], place: int) -> bool:
        """Whether it surely is what a list has at a place."""
        return self.template is not None and is_same(items[place : place + self.count], self.template)


class Ancestor(NamedTuple):
    """A version that a list is based on, and how many elements they have in common."""

    depth: int
    value_id: str
    keep: int


class ListVersion:
    """A list as its elements. Nothing changes but the outline, which the version after this one takes over.

    What was loaded has no templates at first: a process that reads it once and never writes has no use for them.
    """

    __slots__ = ("_is_used", "_outline", "chain", "depth", "elements", "hash", "kind", "length", "value_id", "weight")

    def __init__(
        self, kind: str, elements: tuple[Element, ...], parent: ListVersion | None = None, common: int = 0
    ) -> None:
        self.kind = kind
        self.elements = elements
        self.depth = 0
        self.chain: tuple[Ancestor, ...] = ()
        if parent is not None and common:
            self.depth, self.chain = parent.depth + 1, parent.ancestors(common)
        self.hash = _hash(kind.encode())
        self.length = self.weight = known = 0
        if parent is not None and common == len(parent.elements) and kind == parent.kind:
            self.hash, self.length, self.weight, known = parent.hash.copy(), parent.length, parent.weight, common
        for element in elements[known:]:
            self.hash.update(element.digest)
            self.length += element.count
            self.weight += element.size + 16
        self.value_id: str = self.hash.hexdigest()
        self._outline: deque[Outline] = deque(maxlen=1)
        self._is_used = False

    def ancestors(self, common: int) -> tuple[Ancestor, ...]:
        """What a version after this one, with so many first elements of it, is based on, nearest first."""
        target = (self.depth + 1) & self.depth
        above = (Ancestor(self.depth, self.value_id, len(self.elements)), *self.chain)
        return tuple(each._replace(keep=min(common, each.keep)) for each in above if each.depth <= target)

    def to_store(self) -> ListValue:
        base = self.chain[0] if self.chain else None
        keep = 0 if base is None else base.keep
        tail = tuple(element.digest for element in self.elements[keep:])
        return ListValue(self.kind, self.depth, None if base is None else base.value_id, keep, tail)

    def begins(self, items: Sequence[Any]) -> bool:
        """Whether `items` surely begin with this list, as far as its elements have templates."""
        outline = self._take_outline() or _outlined(Outline(), self.elements)
        if outline is None:
            return False
        begins = outline.begins(items)
        self._outline.append(outline)
        return begins

    def hand_outline(self, heir: ListVersion) -> None:
        """Give the outline to a version that continues this one."""
        outline = self._take_outline()
        if outline is not None:
            extended = _outlined(outline, heir.elements[len(self.elements) :])
            if extended is not None:
                heir._outline.append(extended)

    def _take_outline(self) -> Outline | None:
        try:
            return self._outline.pop()  # atomic: no two callers get the same one
        except IndexError:
            return None

    def items(self, serde: SerializerProtocol) -> list[Any]:
        """The list, made anew: it shares nothing that can change with any other."""
        if self._is_used:
            self.warm(serde)
        self._is_used = True
        if self.length < _MANY:
            return self._items(serde)
        with gc_paused():
            return self._items(serde)

    def _items(self, serde: SerializerProtocol) -> list[Any]:
        blobs = [element.blob for element in self.elements]  # first: it goes when there is a template
        runs = _decoded_all(serde, [blob for blob in blobs if blob is not None])
        if len(runs) == len(blobs):
            return list(chain.from_iterable(runs))
        decoded = iter(runs)
        items: list[Any] = []
        for element, blob in zip(self.elements, blobs, strict=True):
            template = element.template
            if blob is not None or template is None:
                items.extend(next(decoded))
            else:
                copy_into(items, template)
        return items

    def warm(self, serde: SerializerProtocol) -> None:
        """Make the templates of elements that were only loaded: to copy them, and to compare with what is written."""
        cold = [(element, blob) for element in self.elements if element.is_cold and (blob := element.blob) is not None]
        if cold:
            with gc_paused():
                templates = _templates(serde, [blob for _, blob in cold])
            for (element, _), template in zip(cold, templates, strict=True):
                element.is_cold = False
                if template is not None:
                    element.template, element.blob = template, None  # in this order: readers take the blob first


def _outlined(outline: Outline, elements: Sequence[Element]) -> Outline | None:
    for element in elements:
        if element.template is None:
            return None
        outline.add(element.template)
    return outline


def _decoded_all(serde: SerializerProtocol, blobs: Sequence[Blob]) -> list[list[Any]]:
    """Many runs: with our own serializer by few calls."""
    if type(serde) is MemStateSerializer and {blob.type for blob in blobs} == {"msgpack"}:
        runs = serde.loads_all([blob.data for blob in blobs])
        return runs if set(map(type, runs)) == {list} else list(map(_run_of, runs))
    return [_run_of(serde.loads_typed(blob)) for blob in blobs]


def _is_single(blob: Blob) -> bool:
    """Whether a run of our own serializer surely is one item and no atom, which shows before it is decoded."""
    type_, data = blob
    return type_ == "msgpack" and data[:2] in _SINGLE


def _templates(serde: SerializerProtocol, blobs: Sequence[Blob]) -> list[Template | None]:
    """Templates of what decoding gives; None where there is none, or where this serializer refuses to decode."""
    try:
        return list(map(template_of, _decoded_all(serde, blobs)))
    except Exception:  # whoever reads it is told
        return [None] if len(blobs) == 1 else [template for blob in blobs for template in _templates(serde, [blob])]


def _run_of(decoded: Any) -> list[Any]:
    if type(decoded) is not list:
        raise CorruptRowError(f"an element of a list is a {type(decoded).__name__} where a run of items should be")
    return decoded


class Lists:
    """The list versions that this process has seen lately, by thread and value id, and their decoded elements."""

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        self._budget = budget
        self._held = 0
        self._versions: OrderedDict[tuple[str, str], ListVersion] = OrderedDict()
        self._elements: WeakValueDictionary[bytes, Element] = WeakValueDictionary()
        self._unlisted: deque[Element] = deque()  # read, and entered when an element is looked for
        self._lock = threading.Lock()

    def recall(self, thread_id: str, value_id: str) -> ListVersion | None:
        with self._lock:
            version = self._versions.get((thread_id, value_id))
            if version is not None:
                self._versions.move_to_end((thread_id, value_id))
            return version

    def remember(self, thread_id: str, version: ListVersion) -> None:
        key = (thread_id, version.value_id)
        with self._lock:
            if version.weight > self._budget or key in self._versions:
                return
            self._versions[key] = version
            self._held += version.weight
            while self._held > self._budget:
                self._held -= self._versions.popitem(last=False)[1].weight

    def forget(self, thread_id: str | None) -> None:
        """Forget the versions of a thread, or of all."""
        with self._lock:
            for key in [key for key in self._versions if thread_id in (None, key[0])]:
                self._held -= self._versions.pop(key).weight

    # -- writing ------------------------------------------------------------------------------------

    def encode(
        self, serde: SerializerProtocol, kind: str, items: list[Any], parent: ListVersion | None
    ) -> tuple[ListVersion, dict[bytes, Blob]]:
        """The version that a list is, after `parent`, and those of its elements that `parent` does not have."""
        try:
            return self._encode(serde, kind, items, parent)
        except SerializationError:
            serde.dumps_typed(items)  # says where in the list the value is
            raise

    def _encode(
        self, serde: SerializerProtocol, kind: str, items: list[Any], parent: ListVersion | None
    ) -> tuple[ListVersion, dict[bytes, Blob]]:
        fresh: dict[bytes, Blob] = {}
        old: tuple[Element, ...] = ()
        if parent is not None:
            parent.warm(serde)
            old = parent.elements
        continues = parent is not None and parent.begins(items)
        elements = list(old) if continues else []
        place = parent.length if continues and parent is not None else 0  # in `items`
        turn = len(elements)  # in `old`
        turns: dict[bytes, int] | None = None
        while place < len(items):
            element = old[turn] if turn < len(old) else None
            if element is None or not element.is_at(items, place):
                last = elements[-1] if elements else None
                if last is not None and last.is_open and type(items[place]) in ATOMS:
                    place -= elements.pop().count
                element = self._element(serde, items[place : _run_end(items, place)], fresh)
                if turn < len(old):  # those in between were taken out, or it was put in
                    if turns is None:
                        turns = {each.digest: number for number, each in enumerate(old)}
                    turn = turns.get(element.digest, turn)
            elements.append(element)
            place += element.count
            turn += 1
        common = len(old) if elements[: len(old)] == list(old) else _common(old, elements)
        if parent is not None and common == len(old) == len(elements) and kind == parent.kind:
            return parent, {}
        version = ListVersion(kind, tuple(elements), parent, common)
        if parent is not None and continues and common == len(old):
            parent.hand_outline(version)
        return version, fresh

    def _element(self, serde: SerializerProtocol, run: list[Any], fresh: dict[bytes, Blob]) -> Element:
        blob = Blob(*serde.dumps_typed(run))
        digest = _digest(blob)
        fresh[digest] = blob
        known = self._known(digest)
        if known is not None:
            return known
        element = self._elements[digest] = Element(digest, blob, len(run), _template(serde, run, blob), _is_open(run))
        return element

    def _known(self, digest: bytes) -> Element | None:
        while self._unlisted:
            with suppress(IndexError):  # another thread was faster
                element = self._unlisted.popleft()
                self._elements.setdefault(element.digest, element)
        return self._elements.get(digest)

    # -- reading ------------------------------------------------------------------------------------

    def fetch(
        self, reader: Reader, serde: SerializerProtocol, thread_id: str, value_ids: Sequence[str]
    ) -> dict[str, ListVersion]:
        """Those of a thread's values that are lists.

        Raises:
            CorruptRowError: what is stored of one of them does not make the list that was written.
        """
        found: dict[str, ListVersion] = {}
        seen: dict[int, Element] = {}
        for value_id in value_ids:
            version = self.recall(thread_id, value_id)
            if version is None:
                chain = reader.list_chain(thread_id, value_id)
                if not chain:
                    continue
                version = self._load(reader, serde, thread_id, chain, seen)
                self.remember(thread_id, version)
            found[value_id] = version
        return found

    def _load(
        self,
        reader: Reader,
        serde: SerializerProtocol,
        thread_id: str,
        chain: Sequence[StoredList],
        seen: dict[int, Element],
    ) -> ListVersion:
        cached = ((place, self.recall(thread_id, stored.value_id)) for place, stored in enumerate(chain))
        nearest = next(((place, version) for place, version in cached if version is not None), None)
        place, base = nearest if nearest is not None else (len(chain), None)
        parts: list[Element | int] = [] if base is None else list(base.elements)
        for stored in reversed(chain[:place]):
            parts[stored.keep :] = stored.tail
        unseen = [part for part in parts if isinstance(part, int) and part not in seen]
        self._resolve(reader, serde, thread_id, unseen, seen)
        elements = tuple(seen[part] if isinstance(part, int) else part for part in parts)
        version = ListVersion(chain[0].kind, elements)
        if version.value_id != chain[0].value_id:
            raise CorruptRowError("a list is not what was written: its elements have other digests")
        keep = len(elements)
        ancestors: list[Ancestor] = []
        for stored, above in pairwise(chain):
            keep = min(keep, stored.keep)
            ancestors.append(Ancestor(above.depth, above.value_id, keep))
        version.depth, version.chain = chain[0].depth, tuple(ancestors)
        return version

    def _resolve(
        self, reader: Reader, serde: SerializerProtocol, thread_id: str, ids: Sequence[int], seen: dict[int, Element]
    ) -> None:
        """Add the elements with these ids to what the snapshot has shown."""
        if not ids:
            return
        missing = list(ids)
        if self._has_seen(reader, thread_id, ids[:1]):  # as a rule then more of them, or none
            digests = reader.digests(thread_id, ids)
            known = {id_: self._known(digest) for id_, digest in digests.items()}
            seen.update({id_: element for id_, element in known.items() if element is not None})
            missing = [id_ for id_ in ids if id_ not in seen]
        with gc_paused():
            self._read(serde, reader.elements(thread_id, missing) if missing else {}, seen)
        if not seen.keys() >= set(ids):
            raise CorruptRowError("a list lost an element")

    def _has_seen(self, reader: Reader, thread_id: str, ids: Sequence[int]) -> bool:
        if not self._elements and not self._unlisted:
            return False
        return any(self._known(digest) for digest in reader.digests(thread_id, ids).values())

    def _read(self, serde: SerializerProtocol, blobs: Mapping[int, Blob], seen: dict[int, Element]) -> None:
        """Make elements of stored ones. That they are what was written shows in the list: its id is made of digests."""
        is_ours = type(serde) is MemStateSerializer
        whole: dict[int, Blob] = {}
        for id_, blob in blobs.items():
            if is_ours and _is_single(blob):
                seen[id_] = Element(_digest(blob), blob, 1, None, is_open=False, is_cold=True)
            else:
                whole[id_] = blob
        for (id_, blob), run in zip(whole.items(), _decoded_all(serde, list(whole.values())), strict=True):
            seen[id_] = Element(_digest(blob), blob, len(run), template_of(run), _is_open(run))
        self._unlisted.extend(seen[id_] for id_ in blobs)


def version_of(kind: str, before: ListVersion | None, kept: int, blobs: Sequence[Blob]) -> ListVersion:
    """A list of which only the serialised elements are known: the first `kept` of another version, then these."""
    old = () if before is None else before.elements[:kept]
    fresh = (Element(_digest(blob), blob, 1, None, False) for blob in blobs)
    return ListVersion(kind, (*old, *fresh), before, kept)


def is_worth_splitting(items: Sequence[Any]) -> bool:
    """Whether a list is more than a few atoms."""
    return bool(items) and not (_run_end(items, 0) == len(items) and _is_open(items))


def _template(serde: SerializerProtocol, run: list[Any], blob: Blob) -> Template | None:
    """A template of what decoding gives; where it can, one that shares the writer's atoms: they compare fastest."""
    template = template_of(run)
    if template is None:
        return None
    try:
        decoded = serde.loads_typed(blob)
    except Exception:  # a serializer that can write this and not read it says so to whoever reads
        return None
    return template if type(decoded) is list and is_same(decoded, template) else template_of(_run_of(decoded))


def _digest(blob: Blob) -> bytes:
    type_, data = blob
    hash = _hash_of(type_).copy()
    hash.update(data)
    return hash.digest()


@lru_cache(maxsize=16)
def _hash_of(type_: str) -> blake2b:
    return _hash(type_.encode() + b"\0")


def _common(old: Sequence[Element], elements: Sequence[Element]) -> int:
    for position, (before, now) in enumerate(zip(old, elements, strict=False)):
        if before.digest != now.digest:
            return position
    return min(len(old), len(elements))


def _size(atom: Any) -> int:
    return len(atom) if type(atom) in (str, bytes) else 8


def _run_end(items: Sequence[Any], place: int) -> int:
    """Where the element ends that begins at a place: depends on what is before the end only."""
    size = 0
    for end in range(place, len(items)):
        if type(items[end]) not in ATOMS:
            return max(end, place + 1)
        size += _size(items[end])
        if size >= _RUN:
            return end + 1
    return len(items)


def _is_open(run: Sequence[Any]) -> bool:
    return all(type(item) in ATOMS for item in run) and sum(map(_size, run)) < _RUN

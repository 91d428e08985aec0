"""Lists as versions of each other: what of a list is new, and the list a stored version stands for.

A version is based on an earlier one, chosen as in the skip deltas of Subversion: the version at depth `n` is based on
the one at depth `n & (n - 1)`, so that a list is put together from as many rows as its depth has binary digits, and an
element is listed about as often.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, pairwise
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_memstate.errors import CorruptRowError, SerializationError
from langgraph_memstate.graph.allocation import gc_paused
from langgraph_memstate.graph.elements import (
    Element,
    decoded_all,
    hashed,
    is_open,
    loaded,
    run_end,
    template_for,
    templates_of,
)
from langgraph_memstate.graph.outlines import Outline
from langgraph_memstate.graph.templates import ATOMS, copy_into
from langgraph_memstate.storage.base import Reader
from langgraph_memstate.storage.values import Blob, ListValue, StoredList, digest_of

_STEADY = 4  # times that a list has only grown, from which on it pays to lay out what it is compared with
_MANY = 64  # objects, from which on it pays to pause the garbage collection
CACHE_BYTES = 64 * 1024 * 1024  # of serialised elements, each counted with every cached version that has it


class Ancestor(NamedTuple):
    """A version that a list is based on, and how many elements they have in common."""

    depth: int
    value_id: str
    keep: int


class ListVersion:
    """A list as its elements. Nothing changes but the outline, which the version after this one takes over.

    What was loaded has no templates at first: a process that reads it once and never writes has no use for them.
    """

    __slots__ = (
        "_growths", "_is_used", "_outline", "chain", "depth", "elements", "hash", "kind", "length", "value_id",
        "weight",
    )  # fmt: skip

    def __init__(
        self, kind: str, elements: tuple[Element, ...], parent: ListVersion | None = None, common: int = 0
    ) -> None:
        self.kind = kind
        self.elements = elements
        self.depth = 0
        self.chain: tuple[Ancestor, ...] = ()
        if parent is not None and common:
            self.depth, self.chain = parent.depth + 1, parent.ancestors(common)
        self.hash = hashed(kind.encode())
        self.length = self.weight = self._growths = known = 0
        if parent is not None and common == len(parent.elements) and kind == parent.kind:
            self.hash, self.length, self.weight, known = parent.hash.copy(), parent.length, parent.weight, common
            self._growths = parent._growths + 1
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
        outline = self._take_outline()
        if outline is not None:
            begins = outline.begins(items)
            self._outline.append(outline)
            return begins
        begins = self._begins(items)
        if begins and self._growths >= _STEADY and (outline := _outlined(Outline(), self.elements)) is not None:
            self._outline.append(outline)
        return begins

    def _begins(self, items: Sequence[Any]) -> bool:
        place = 0
        for element in self.elements:
            if not element.is_at(items, place):
                return False
            place += element.count
        return True

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
        runs = decoded_all(serde, [blob for blob in blobs if blob is not None])
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
                templates = templates_of(serde, [blob for _, blob in cold])
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
                element = self._element(serde, items[place : run_end(items, place)], fresh)
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
        digest = digest_of(blob)
        fresh[digest] = blob
        known = self._known(digest)
        if known is not None:
            return known
        element = self._elements[digest] = Element(digest, blob, len(run), template_for(serde, run, blob), is_open(run))
        return element

    def _known(self, digest: bytes) -> Element | None:
        while self._unlisted:
            with suppress(IndexError):  # another thread was faster
                element = self._unlisted.popleft()
                self._elements.setdefault(element.digest, element)
        return self._elements.get(digest)

    # -- reading ------------------------------------------------------------------------------------

    def fetch(
        self,
        reader: Reader,
        serde: SerializerProtocol,
        thread_id: str,
        value_ids: Sequence[str],
        seen: dict[int, Element],
    ) -> dict[str, ListVersion]:
        """Those of a thread's values that are lists. `seen`: elements by id that this snapshot has shown; grows.

        Raises:
            CorruptRowError: what is stored of one of them does not make the list that was written.
        """
        found: dict[str, ListVersion] = {}
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
            fresh = loaded(serde, reader.elements(thread_id, missing) if missing else {})
        seen.update(fresh)
        self._unlisted.extend(fresh.values())
        if not seen.keys() >= set(ids):
            raise CorruptRowError("a list lost an element")

    def _has_seen(self, reader: Reader, thread_id: str, ids: Sequence[int]) -> bool:
        if not self._elements and not self._unlisted:
            return False
        return any(self._known(digest) for digest in reader.digests(thread_id, ids).values())


def version_of(kind: str, before: ListVersion | None, kept: int, blobs: Sequence[Blob]) -> ListVersion:
    """A list of which only the serialised elements are known: the first `kept` of another version, then these."""
    old = () if before is None else before.elements[:kept]
    fresh = (Element(digest_of(blob), blob, 1, None, False) for blob in blobs)
    return ListVersion(kind, (*old, *fresh), before, kept)


def _common(old: Sequence[Element], elements: Sequence[Element]) -> int:
    for position, (before, now) in enumerate(zip(old, elements, strict=False)):
        if before.digest != now.digest:
            return position
    return min(len(old), len(elements))

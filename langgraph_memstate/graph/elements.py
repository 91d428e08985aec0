"""Elements of a list: how it is cut into them, and what each is serialised to, decoded from and compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_memstate.errors import CorruptRowError
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.graph.outlines import is_same
from langgraph_memstate.graph.slices import is_atom, packed_array
from langgraph_memstate.graph.templates import ATOMS, Template, template_of
from langgraph_memstate.storage.values import Blob, digest_of

_RUN = 256  # bytes of atoms that make one element; anything else is an element of its own
_SINGLE = frozenset(packed_array([first]) for first in map(bytes, zip(range(256))) if not is_atom(first))
hashed = partial(blake2b, digest_size=16)


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


# -- cutting ----------------------------------------------------------------------------------------


def is_worth_splitting(items: Sequence[Any]) -> bool:
    """Whether a list is more than a few atoms."""
    return bool(items) and not (run_end(items, 0) == len(items) and is_open(items))


def _size(atom: Any) -> int:
    return len(atom) if type(atom) in (str, bytes) else 8


def run_end(items: Sequence[Any], place: int) -> int:
    """Where the element ends that begins at a place: depends on what is before the end only."""
    size = 0
    for end in range(place, len(items)):
        if type(items[end]) not in ATOMS:
            return max(end, place + 1)
        size += _size(items[end])
        if size >= _RUN:
            return end + 1
    return len(items)


def is_open(run: Sequence[Any]) -> bool:
    return all(type(item) in ATOMS for item in run) and sum(map(_size, run)) < _RUN


# -- serialised and decoded -------------------------------------------------------------------------


def decoded_all(serde: SerializerProtocol, blobs: Sequence[Blob]) -> list[list[Any]]:
    """Many runs: with our own serializer by few calls."""
    if type(serde) is MemStateSerializer and {blob.type for blob in blobs} == {"msgpack"}:
        runs = serde.loads_all([blob.data for blob in blobs])
        return runs if set(map(type, runs)) == {list} else list(map(_run_of, runs))
    return [_run_of(serde.loads_typed(blob)) for blob in blobs]


def loaded(serde: SerializerProtocol, blobs: Mapping[int, Blob]) -> dict[int, Element]:
    """Elements of stored ones, by id. That they are what was written shows in their list: its id is made of digests."""
    is_ours = type(serde) is MemStateSerializer
    found: dict[int, Element] = {}
    whole: dict[int, Blob] = {}
    for id_, blob in blobs.items():
        if is_ours and _is_single(blob):
            found[id_] = Element(digest_of(blob), blob, 1, None, is_open=False, is_cold=True)
        else:
            whole[id_] = blob
    for (id_, blob), run in zip(whole.items(), decoded_all(serde, list(whole.values())), strict=True):
        found[id_] = Element(digest_of(blob), blob, len(run), template_of(run), is_open(run))
    return found


def _is_single(blob: Blob) -> bool:
    """Whether a run of our own serializer surely is one item and no atom, which shows before it is decoded."""
    type_, data = blob
    return type_ == "msgpack" and data[:2] in _SINGLE


def templates_of(serde: SerializerProtocol, blobs: Sequence[Blob]) -> list[Template | None]:
    """Templates of what decoding gives; None where there is none, or where this serializer refuses to decode."""
    try:
        return list(map(template_of, decoded_all(serde, blobs)))
    except Exception:  # whoever reads it is told
        return [None] if len(blobs) == 1 else [template for blob in blobs for template in templates_of(serde, [blob])]


def _run_of(decoded: Any) -> list[Any]:
    if type(decoded) is not list:
        raise CorruptRowError(f"an element of a list is a {type(decoded).__name__} where a run of items should be")
    return decoded


def template_for(serde: SerializerProtocol, run: list[Any], blob: Blob) -> Template | None:
    """A template of what decoding gives; where it can, one that shares the writer's atoms: they compare fastest."""
    template = template_of(run)
    if template is None:
        return None
    try:
        decoded = serde.loads_typed(blob)
    except Exception:  # a serializer that can write this and not read it says so to whoever reads
        return None
    return template if type(decoded) is list and is_same(decoded, template) else template_of(_run_of(decoded))

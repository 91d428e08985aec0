"""What a conversation says it remembers, against what memory holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from langgraph_memstate.demo.agent import Memory


@dataclass(frozen=True, slots=True)
class Census:
    """Texts, by what is wrong with them.

    A *ghost* is held although the conversation never took it up (or has replaced it), a *loss* is not held although
    it did, and a *duplicate* is every copy beyond the first.
    """

    ghosts: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()


def take_census(remembered: Sequence[Memory], held: Sequence[str]) -> Census:
    """Compare the memories of a finished state with the texts of one database."""
    wanted = Counter({memory["key"]: memory["text"] for memory in remembered}.values())  # the last of a key counts
    found = Counter(held)
    return Census(
        ghosts=tuple(text for text in found.elements() if text not in wanted),
        losses=tuple((wanted - found).elements()),
        duplicates=tuple(text for text in (found - wanted).elements() if text in wanted),
    )

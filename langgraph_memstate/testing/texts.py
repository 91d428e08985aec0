"""Texts, and a model that embeds them without a download: words hashed into buckets, so that related texts are near."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from langgraph_memstate.facts import Fact

DIMS = 64
QUERIES = ("green tea in the morning", "trains to berlin", "a cat on the roof")

_TOPICS = ("green tea", "black coffee", "trains to berlin", "a cat", "the roof", "morning runs")


def vector_of(text: str) -> list[float]:
    vector = [0.0] * DIMS
    for word in text.lower().split():
        vector[int.from_bytes(blake2b(word.encode(), digest_size=4).digest(), "big") % DIMS] += 1.0
    return vector


class Words:
    """The model. `texts` notes what it was asked to embed; it fails while `error` is set."""

    model = "words"

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.error: Exception | None = None

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        if self.error is not None:
            raise self.error
        self.texts += texts
        return [vector_of(text) for text in texts]


def cosine(left: str, right: str) -> float:
    a, b = np.array(vector_of(left)), np.array(vector_of(right))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def note(key: str, text: str, **rest: Any) -> Fact:
    return Fact("note", {"text": text, **rest}, id=key)


def notes(count: int, start: int = 0) -> dict[str, str]:
    """Texts by key, related to `QUERIES` in different degrees."""
    return {
        f"n{n}": f"{_TOPICS[n % len(_TOPICS)]} number {n} {_TOPICS[n * 7 % 5]}" for n in range(start, start + count)
    }

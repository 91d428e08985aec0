"""Vectors from words alone: no model, no network, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from math import sqrt

DIMS = 64


def embed(texts: Sequence[str]) -> list[list[float]]:
    """Hash the words, word pairs and letter triples of each text into a vector of length 1 and shape (DIMS,).

    Feature hashing with a sign bit: Weinberger et al., Feature Hashing for Large Scale Multitask Learning (2009).
    """
    return [_vector(text) for text in texts]


def _vector(text: str) -> list[float]:
    vector = [0.0] * DIMS
    for feature in _features(text.lower()):
        number = int.from_bytes(blake2b(feature.encode(), digest_size=8).digest(), "big")
        vector[(number >> 1) % DIMS] += 1.0 if number & 1 else -1.0
    length = sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _features(text: str) -> Iterator[str]:
    words = text.split()
    yield from words
    yield from (" ".join(pair) for pair in pairwise(words))
    yield from (text[start : start + 3] for start in range(len(text) - 2))

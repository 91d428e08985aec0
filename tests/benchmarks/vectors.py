"""Embeddings that cost nothing and look like a model's: unit vectors in clusters, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIMS = 384
QUERIES = 100
_CLUSTER = 100  # vectors around one centre
_SPREAD = 0.7  # of a vector around its centre, as a share of the centre's length


class Vectors:
    """`rows` embeds the texts ``"0"``, ``"1"``, …; `queries` embeds ``"query 0"``, … ."""

    def __init__(self, count: int, seed: int = 1) -> None:
        dice = np.random.default_rng(seed)
        centres = _unit(dice.standard_normal((max(count // _CLUSTER, 1), DIMS), dtype=np.float32))
        self.rows = self._around(centres, np.arange(count), dice)
        self.queries = self._around(centres, np.arange(QUERIES) * 7, dice)

    def _around(
        self, centres: NDArray[np.float32], places: NDArray[Any], dice: np.random.Generator
    ) -> NDArray[np.float32]:
        noise = _unit(dice.standard_normal((len(places), DIMS), dtype=np.float32))
        return _unit(centres[places % len(centres)] + np.float32(_SPREAD) * noise)

    @property
    def index(self) -> Any:
        """LangGraph's `IndexConfig`."""
        return {"dims": DIMS, "embed": self.embed, "fields": ["text"]}

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [self._of(text).tolist() for text in texts]

    def _of(self, text: str) -> NDArray[np.float32]:
        kind, _, number = text.rpartition(" ")
        row: NDArray[np.float32] = self.queries[int(number)] if kind else self.rows[int(number)]
        return row


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(rows, np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)

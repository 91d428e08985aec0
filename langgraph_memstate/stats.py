"""What a memory holds, in rows and bytes."""

from __future__ import annotations

from collections.abc import Mapping


class Stats(dict[str, int]):
    """Rows by table.

    `bytes` has what each table's rows take, without indexes and free space, and as ``"total"`` what the whole database
    takes, with both. It is empty where a storage does not tell.
    """

    def __init__(self, rows: Mapping[str, int], *, bytes: Mapping[str, int]) -> None:
        super().__init__(rows)
        self.bytes = dict(bytes)

    def __repr__(self) -> str:
        return f"Stats({dict(self)}, bytes={self.bytes})"

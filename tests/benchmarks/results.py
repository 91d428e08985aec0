"""What a run found, as JSON: its environment and its rows, times in seconds, with four digits of a number.

What is shown of a run is made of that too: rounded twice, a number may come out differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Row


@dataclass(frozen=True)
class Results:
    environment: dict[str, Any]
    quick: bool
    rows: list[Row]

    @classmethod
    def of(cls, environment: dict[str, Any], quick: bool, rows: Iterable[Row]) -> Results:
        return cls(environment, quick, [Row(**_short(asdict(row))) for row in rows])

    def write(self, path: Path) -> None:
        """A line a row."""
        head = json.dumps({"environment": self.environment, "quick": self.quick}, indent=1)[:-2]
        rows = ",\n  ".join(json.dumps(_short(asdict(row)), ensure_ascii=False) for row in self.rows)
        path.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["environment"], found["quick"], [Row(**row) for row in found["rows"]])


def _short(value: Any) -> Any:
    """Without what is empty, and with four digits of a number."""
    if isinstance(value, dict):
        return {name: _short(held) for name, held in value.items() if held not in (None, "", {})}
    return float(f"{value:.4g}") if isinstance(value, float) else value

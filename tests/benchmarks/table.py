"""Rows as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.benchmarks.measure import Row

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """An aligned table; columns that nothing fills are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row.notes))
    header = ["what", "contender", "journal", "median", "quartiles", "ratio", *names]
    table = [[*_cells(row), *(_note(row.notes.get(name)) for name in names)] for row in rows]
    used = [place for place in range(len(header)) if any(row[place] for row in table)]
    widths = {place: max(len(row[place]) for row in [header, *table]) for place in used}
    before = None
    for cells in (header, *table):
        shown = [cells[place] if place or cells[0] != before else "" for place in used]
        before = cells[0]
        padded = (
            text.ljust(widths[place]) if place < 3 else text.rjust(widths[place])
            for place, text in zip(used, shown, strict=True)
        )
        yield "  ".join(("", *padded)).rstrip()


def _cells(row: Row) -> list[str]:
    if row.median is None:
        return [row.what, row.contender, row.journal, "", "", ""]
    assert row.low is not None
    assert row.high is not None
    spread = f"{seconds(row.low)} … {seconds(row.high)}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return [row.what, row.contender, row.journal, seconds(row.median), spread, ratio]


def seconds(value: float) -> str:
    """Three digits and the unit that fits."""
    size, unit = next((unit for unit in _UNITS if abs(value) >= unit[0]), _UNITS[-1])
    return f"{value / size:.3g} {unit}"


def _note(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

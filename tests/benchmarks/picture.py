"""Ratios as a picture: an SVG by itself, with bars on a logarithmic axis, for a light page or a dark one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from tests.benchmarks.headlines import Pair

_LABELS, _PLOT, _VALUES = 330, 420, 90  # widths
_ROW, _BAR, _HEAD, _FOOT = 24, 14, 40, 30  # heights
_INK, _FASTER, _SLOWER = "#6e7781", "#3b82d6", "#c4701a"  # each legible on white and on near-black
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def picture(pairs: Sequence[Pair]) -> str:
    """A bar a pair: to the left of 1 we are faster, to the right slower."""
    ratios = [pair.ratio for pair in pairs]
    low = max((tick for tick in _TICKS if tick <= min([0.5, *ratios])), default=_TICKS[0])
    high = min((tick for tick in _TICKS if tick >= max([2.0, *ratios])), default=_TICKS[-1])
    width, height = _LABELS + _PLOT + _VALUES, _HEAD + _ROW * len(pairs) + _FOOT

    def across(ratio: float) -> float:
        share = math.log(min(max(ratio, low), high) / low) / math.log(high / low)
        return round(_LABELS + share * _PLOT, 1)

    body = [*_axis(across, low, high, height), *_bars(across, pairs)]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="system-ui, sans-serif" font-size="13" fill="{_INK}">',
            "<title>Time of langgraph-memstate divided by that of LangGraph's own savers and stores</title>",
            *body,
            "</svg>",
            "",
        )
    )


def _axis(across: Callable[[float], float], low: float, high: float, height: int) -> Iterator[str]:
    bottom = height - _FOOT
    for tick in _TICKS:
        if low <= tick <= high:
            place, strength = across(tick), 0.9 if tick == 1 else 0.25
            yield (
                f'<line x1="{place}" y1="{_HEAD - 8}" x2="{place}" y2="{bottom}" '
                f'stroke="{_INK}" stroke-opacity="{strength}"/>'
            )
            yield f'<text x="{place}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
    yield f'<text x="{across(1) - 8}" y="18" text-anchor="end" fill="{_FASTER}">less time than LangGraph\'s own</text>'
    yield f'<text x="{across(1) + 8}" y="18" fill="{_SLOWER}">more</text>'


def _bars(across: Callable[[float], float], pairs: Sequence[Pair]) -> Iterator[str]:
    for place, pair in enumerate(pairs):
        top = _HEAD + place * _ROW
        left, right = sorted((across(1), across(pair.ratio)))
        colour = _FASTER if pair.ratio < 1 else _SLOWER
        base = top + _BAR - 2
        yield f'<text x="{_LABELS - 12}" y="{base}" text-anchor="end">{escape(pair.label)}</text>'
        yield (
            f'<rect x="{left}" y="{top}" width="{max(round(right - left, 1), 1)}" height="{_BAR}" '
            f'rx="2" fill="{colour}"/>'
        )
        yield f'<text x="{_LABELS + _PLOT + _VALUES - 8}" y="{base}" text-anchor="end">{pair.ratio:.2f}</text>'

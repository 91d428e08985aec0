"""The block of the README that a run fills in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.headlines import LEAST, Pair, pairs
from tests.benchmarks.results import Results
from tests.benchmarks.table import seconds

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
FOLDER = "tests/benchmarks"


def fill_in(readme: Path, results: Results) -> None:
    """Replace what stands between the two marks."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{readme} has no {START} … {END}")
    readme.write_text(f"{before}{block(results)}{after}", encoding="utf-8")


def block(results: Results) -> str:
    """With its marks."""
    return "\n".join((START, *_lines(results), END))


def _lines(results: Results) -> Iterator[str]:
    yield f"![Time here divided by that of LangGraph's own]({FOLDER}/results.svg)"
    yield ""
    yield "| | here | LangGraph's own | | ratio |"
    yield "|---|--:|--:|---|--:|"
    yield from map(_line, pairs(results.rows))
    yield ""
    yield (
        "And beside the least that a durable saver can do: a row a call, no memory, no undo. `TrustingSaver` takes for "
        "granted that nobody changes a message in place, and hands out the very list it was given."
    )
    yield ""
    yield "| | here | the least | | ratio |"
    yield "|---|--:|--:|---|--:|"
    yield from map(_line, pairs(results.rows, LEAST))
    env = results.environment
    yield ""
    yield (
        f"Python {env['python']}, SQLite {env['sqlite']}, {env['system']}; an fsync takes {env['fsync']}; "
        f"{env['packages']}{'; a quick run' if results.quick else ''}. LangGraph's own are opened as their "
        f"documentation says. Medians; the ratio is that of rounds in turns, and below 1 it is faster here. "
        f"A cycle is `put`, `put_writes` and `get_tuple`. [All rows]({FOLDER}/results.json)."
    )


def _line(pair: Pair) -> str:
    ours, theirs = pair.ours.median, pair.theirs.median
    assert ours is not None
    assert theirs is not None
    name = pair.theirs.contender.removeprefix("one ").removeprefix("a ").removesuffix(" each")
    return f"| {pair.label} | {seconds(ours)} | {seconds(theirs)} | {name} | {pair.ratio:.2f} |"

"""The command line: run the cases, print a table of each, write JSON."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.benchmarks import (
    callers,
    chat,
    checkpointer,
    crowd,
    fanout,
    imports,
    limits,
    opening,
    postgres,
    scale,
    search,
    steps,
    store,
    transactions,
    undo,
)
from tests.benchmarks.headlines import pairs
from tests.benchmarks.limits import appending
from tests.benchmarks.measure import Row, Session, timed
from tests.benchmarks.picture import picture
from tests.benchmarks.readme import fill_in
from tests.benchmarks.results import Results
from tests.benchmarks.table import lines, seconds

CASES = {
    module.CASE: module
    for module in (
        steps,
        chat,
        checkpointer,
        store,
        fanout,
        transactions,
        callers,
        crowd,
        search,
        opening,
        scale,
        postgres,
        undo,
        limits,
        imports,
    )
}
README = Path(__file__).parents[2] / "README.md"
PACKAGES = (
    "langgraph",
    "langgraph-checkpoint",
    "langgraph-checkpoint-sqlite",
    "langgraph-checkpoint-postgres",
    "sqlite-vec",
    "chromadb",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure langgraph-memstate beside LangGraph's own savers and stores, on disk, with syncs on.",
        epilog="Cases: " + "; ".join(f"{name}: {_about(module)}" for name, module in CASES.items()),
    )
    parser.add_argument("--quick", action="store_true", help="about three minutes, with wider error bars")
    parser.add_argument(
        "--large", action="store_true", help="a million facts, and Chroma where it takes minutes to build"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="no more rounds of anything than this")
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME", help="one case; may be repeated")
    parser.add_argument("--folder", type=Path, help="the disk to measure (default: the temporary folder)")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="measure nothing: use an earlier run")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every row here, times in seconds")
    parser.add_argument("--svg", type=Path, metavar="PATH", help="draw the ratios that the README shows")
    parser.add_argument("--readme", action="store_true", help="fill in the README's table")
    options = parser.parse_args(arguments)

    results = Results.read(options.source) if options.source else _measured(options)
    if options.json:
        results.write(options.json)
    if options.svg:
        options.svg.write_text(picture(list(pairs(results.rows))), encoding="utf-8")
    if options.readme:
        fill_in(README, results)


def _measured(options: argparse.Namespace) -> Results:
    started = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="memstate-bench-", dir=options.folder) as folder:
        environment = _environment(Path(folder))
        print(*(f"{name}: {what}" for name, what in environment.items()), f"files: {folder}", sep="\n")
        session = Session(Path(folder), options.quick, options.large, options.rounds)
        for name in options.only or CASES:
            before = time.monotonic()
            found = CASES[name].run(session)
            took = f"{time.monotonic() - before:.0f} s"
            print(f"\n{name}: {_about(CASES[name])} ({took})", *lines(found), sep="\n", flush=True)
            rows += found
    environment["seconds"] = round(time.monotonic() - started)
    print(f"\n{environment['seconds']} s. Ratio: our time ÷ the contender's, median of rounds; below 1 we are faster.")
    return Results.of(environment, options.quick, rows)


def _about(module: Any) -> str:
    return str(module.__doc__).strip().rstrip(".")


def _environment(folder: Path) -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores (load {load:.1f} before)",
        "sqlite": sqlite3.sqlite_version,
        "packages": ", ".join(_versions()),
        "fsync": seconds(_fsync(folder / "appended")),
    }


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def _fsync(path: Path) -> float:
    with appending(path) as append:
        return statistics.median(timed(append)(1) for _ in range(50))


if __name__ == "__main__":
    main()

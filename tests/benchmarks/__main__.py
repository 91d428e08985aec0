"""The command line: run the cases, print a table of each, write JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
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
    scale,
    search,
    steps,
    store,
    transactions,
    undo,
)
from tests.benchmarks.measure import Row, Session
from tests.benchmarks.table import lines

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
        undo,
        limits,
        imports,
    )
}
PACKAGES = ("langgraph", "langgraph-checkpoint", "langgraph-checkpoint-sqlite", "chromadb")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure langgraph-memstate beside LangGraph's SQLite savers and stores, on files, with syncs on.",
        epilog="Cases: " + "; ".join(f"{name}: {_about(module)}" for name, module in CASES.items()),
    )
    parser.add_argument("--quick", action="store_true", help="about a minute, with wider error bars")
    parser.add_argument(
        "--large", action="store_true", help="a million facts, and Chroma where it takes minutes to build"
    )
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME", help="one case; may be repeated")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every row here, times in seconds")
    parser.add_argument("--folder", type=Path, help="the disk to measure (default: the temporary folder)")
    options = parser.parse_args()

    started = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="memstate-bench-", dir=options.folder) as folder:
        environment = _environment(Path(folder))
        print(*(f"{name}: {what}" for name, what in environment.items()), sep="\n")
        session = Session(Path(folder), options.quick, options.large)
        for name in options.only or CASES:
            found = CASES[name].run(session)
            print(f"\n{name}: {_about(CASES[name])}", *lines(found), sep="\n", flush=True)
            rows += found
    environment["seconds"] = round(time.monotonic() - started)
    print(f"\n{environment['seconds']} s. Ratio: our time ÷ the contender's, median of rounds; below 1 we are faster.")
    if options.json:
        report = {"environment": environment, "quick": options.quick, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _about(module: Any) -> str:
    return str(module.__doc__).strip().rstrip(".")


def _environment(folder: Path) -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {load} at the start",
        "sqlite": sqlite3.sqlite_version,
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "files": str(folder),
    }


if __name__ == "__main__":
    main()

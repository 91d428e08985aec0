"""What importing this package adds to importing LangGraph, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.measure import Row, Session, quartiles

CASE = "imports"
ROOT = Path(__file__).parents[2]
PROMISED = 0.1  # seconds

SCRIPT = """
import sys, time
start = time.perf_counter()
import langgraph.graph, langgraph.store.base, langgraph.checkpoint.base
middle = time.perf_counter()
import langgraph_memstate
end = time.perf_counter()
print(middle - start, end - middle, *({"chromadb", "numpy"} & sys.modules.keys()))
"""


def run(session: Session) -> list[Row]:
    rounds = session.rounds(session.pick(15, 7))
    before, added, loaded = [], [], set()
    for turn in range(rounds + 1):
        session.tell(f"{CASE} {turn}/{rounds}")
        langgraph, ours, *heavy = _fresh_process()
        if turn:  # the first one compiles
            before.append(float(langgraph))
            added.append(float(ours))
            loaded.update(heavy)
    session.tell("")
    notes: dict[str, float | str] = {
        "promised, ms": PROMISED * 1000,
        "loads": ", ".join(sorted(loaded)) or "nothing heavy",
    }
    return [_row("langgraph", before, {}), _row("langgraph_memstate, on top", added, notes)]


def _row(name: str, seconds: list[float], notes: dict[str, float | str]) -> Row:
    low, median, high = quartiles(seconds)
    return Row(CASE, "import", name, median=median, low=low, high=high, notes=notes)


def _fresh_process() -> list[str]:
    # Bytecode is written, as it is where a package is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split()

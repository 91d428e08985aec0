"""Write transactions and syncs of one call: counted by SQLite's trace callback, and by strace where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from tests.benchmarks.counting import END
from tests.benchmarks.measure import Row, Session

CASE = "transactions"
ROOT = Path(__file__).parents[2]

_SYNC = re.compile(r"\b(?:fsync|fdatasync)\(\d+<(?P<path>[^>]*)>")

Syncs = dict[str, tuple[float, float]]
"""By call: syncs of SQL files, and of the vector database's"""


def run(session: Session) -> list[Row]:
    folder = session.room(CASE)
    session.tell(CASE)
    trace = folder / "trace"
    command = [sys.executable, "-m", "tests.benchmarks.counted", str(folder)]
    if _strace_works(folder):
        command = ["strace", "-f", "-y", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(trace), *command]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    session.tell("")
    transactions: dict[str, list[int]] = json.loads(done.stdout)
    syncs = _syncs(trace) if trace.exists() else {}
    rows = []
    for name, counts in transactions.items():
        notes: dict[str, float | str] = {"write transactions": sum(counts) / len(counts)}
        if name in syncs:
            sql, index = (total / len(counts) for total in syncs[name])
            notes |= {"syncs of SQL": sql} | ({"syncs of the index": index} if index else {})
        else:
            notes["syncs"] = "not counted: no strace here"
        rows.append(Row(CASE, "one call", name, notes=notes))
    return rows


def _strace_works(folder: Path) -> bool:
    """Whether there is one, and it may trace."""
    if shutil.which("strace") is None:
        return False
    probe = ["strace", "-f", "-y", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(folder / "probe"), "true"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def _syncs(trace: Path) -> Syncs:
    """Syncs between the marks of each call."""
    found: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    call: str | None = None
    for line in trace.read_text().splitlines():
        if sync := _SYNC.search(line):
            path = Path(sync["path"])
            if path.parent.name == "marks":
                call = None if path.name == END else path.name
            elif call is not None:
                found[call][any(".chroma" in part for part in path.parts)] += 1
    return {name: (sql, index) for name, (sql, index) in found.items()}

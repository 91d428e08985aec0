"""What the kernel sees: the log is on the disk before an index is written, and before anybody is told."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sqlite3, sys
from pathlib import Path

path, mode, synchronous = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
from journal_hook import INDEX, JournalHook
from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from writers import converse

if synchronous != "FULL":  # as if we had forgotten it
    connect = SQLiteStorage._connect
    def careless(self):
        connection = connect(self)
        connection.execute("PRAGMA synchronous=" + synchronous)
        return connection
    SQLiteStorage._connect = careless

with MemoryStore(SQLiteStorage(path / "memory.db"), index=INDEX, vector_sync=mode) as memory:
    memory.add_hook(JournalHook(path / "index.journal"))
    memory.flush()
    for n in range(3):
        os.write(1, b"BEGIN")
        memory.commit(Fact(type="note", id=str(n), payload={"text": f"memory {n}"}))
        os.write(1, b"ACKNOWLEDGED")
        memory.flush()
    os.write(1, b"BEGIN RUN")
    converse(memory, "graph", 0)
    os.write(1, b"ACKNOWLEDGED")
"""
CALL = re.compile(r"^(?P<pid>\d+) +(?:(?P<name>\w+)\((?P<args>.*)|<\.\.\. (?P<resumed>\w+) resumed>.*)$")


def breaches(trace: str, *, alone: bool) -> tuple[list[str], int, int]:
    """Writes to the log that were not synced when an index or a caller heard of them; and how many heard.

    `alone`: nothing else writes the log meanwhile, so nothing at all may be unsynced. Else the first write, at least.
    Within a run, pending writes and a step's end are written side by side, so the index is not looked at.
    """
    found: list[str] = []
    unsynced, syncs, in_run = False, 0, False
    acknowledged = indexed = 0
    syncing: dict[str, bool] = {}  # by thread: a sync of the log that has begun
    for line in trace.splitlines():
        call = CALL.match(line)
        if call is None:
            continue
        name, args = call["name"], call["args"] or ""
        to_log = ".db-wal>" in args.split(",")[0].split(")")[0]
        ended = not line.endswith("<unfinished ...>")
        if name in ("fdatasync", "fsync") and to_log:
            syncing[call["pid"]] = True
        if (name in ("fdatasync", "fsync") and to_log and ended) or (
            call["resumed"] in ("fdatasync", "fsync") and syncing.pop(call["pid"], False)
        ):
            unsynced, syncs = False, syncs + 1
        elif name == "pwrite64" and to_log:
            unsynced = True
        elif name == "write" and '"BEGIN' in args:
            syncs, in_run = 0, '"BEGIN RUN"' in args
        elif name == "write" and '"ACKNOWLEDGED"' in args:
            acknowledged += 1
            if (unsynced and alone) or not syncs:
                found.append(f"acknowledged before it was synced: {line}")
        elif name == "write" and "index.journal>" in args and "[" in args and alone and not in_run:
            indexed += 1
            if unsynced or not syncs:
                found.append(f"indexed before it was synced: {line}")
    return found, acknowledged, indexed


def traced(path: Path, mode: str, synchronous: str) -> str:
    path.mkdir()
    here = Path(__file__).parent
    calls = "trace=fdatasync,fsync,pwrite64,write"
    subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "-e",
            calls,
            "-o",
            path / "trace",
            sys.executable,
            "-c",
            SCRIPT,
            path,
            mode,
            synchronous,
        ],
        check=True,
        timeout=120,
        cwd=here,
        env={"PYTHONPATH": f"{here.parents[1]}:{here}", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
    )
    return (path / "trace").read_text()


def _strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not _strace_works(), reason="strace is not installed, or may not trace here")
@pytest.mark.parametrize("mode", ["atomic", "deferred"])
def test_the_log_is_synced_before_the_index_and_the_caller_hear_of_it(mode: str, tmp_path: Path) -> None:
    alone = mode == "atomic"
    found, acknowledged, indexed = breaches(traced(tmp_path / "full", mode, "FULL"), alone=alone)
    assert not found
    assert acknowledged == 4
    assert indexed >= 3 or not alone
    careless, _, _ = breaches(traced(tmp_path / "normal", mode, "NORMAL"), alone=alone)
    assert careless

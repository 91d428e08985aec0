"""A write-ahead log that was cut or garbled: what opens is what had been committed up to some moment, whole."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from audit import audit
from census import GRAPHS, THREAD, Cell, Env, compare

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate.errors import MemStateError

SECTOR = 512
BATCHES = 7
SIZE = 3  # facts of a batch


def write_log(path: Path) -> list[int]:
    """Commit batches, with a graph run in the middle; keep the files as they were before they are closed.

    Returns the length of the log after each batch was acknowledged.
    """
    path.mkdir(parents=True)
    with MemoryStore(SQLiteStorage(path / "first.db")):
        pass  # the migrations are not in the log
    ends = []
    with MemoryStore(SQLiteStorage(path / "first.db")) as memory:
        for batch in range(BATCHES):
            if batch == BATCHES // 2:
                cell = Cell("memstate", "line", True, "sync")
                graph = GRAPHS["line"][0](Env(cell, path, memory.checkpointer, memory.store, 0, memory))
                graph.invoke({"log": []}, THREAD, durability="sync")
            memory.commit([Fact(type="batch", id=f"{batch}.{n}", payload={"n": n}) for n in range(SIZE)])
            ends.append((path / "first.db-wal").stat().st_size)
        for name in ("memory.db", "memory.db-wal"):
            shutil.copy(path / name.replace("memory", "first"), path / name)
    return ends


def reopen(path: Path, log: bytes) -> tuple[int, list[str]]:
    """How many batches there are when the database is opened with this log, and what is wrong with them."""
    image = path / uuid4().hex
    image.mkdir()
    database = image / "memory.db"
    shutil.copy(path / "memory.db", database)
    (image / "memory.db-wal").write_bytes(log)
    with MemoryStore(SQLiteStorage(database)) as memory:
        batches = sorted(fact.id for fact in memory.query("batch", limit=1000))
        found = memory.checkpointer.get_tuple(THREAD)
        remembered = [fact.id for fact in memory.query(("memories",), limit=1000)]
    count = len(batches) // SIZE
    wrong = audit(database)
    if batches != [f"{batch}.{n}" for batch in range(count) for n in range(SIZE)]:
        wrong.append(f"no prefix of whole batches: {batches}")
    difference = compare(found.checkpoint["channel_values"].get("log", []) if found else [], remembered)
    if not difference.clean:
        wrong.append(f"state and memory: {difference}")
    shutil.rmtree(image)
    return count, wrong


def cut(root: str, first: int, stride: int) -> tuple[int, list[str]]:
    """Cut the log at every `stride`-th sector. What was acknowledged within what is left is there, and no more."""
    path = Path(root) / uuid4().hex
    ends = write_log(path)
    log = (path / "memory.db-wal").read_bytes()
    violations: list[str] = []
    lengths = [*range(first * SECTOR, len(log), stride * SECTOR), len(log)]
    for length in lengths:
        count, wrong = reopen(path, log[:length])
        wanted = sum(end <= length for end in ends)
        if count != wanted:
            wrong.append(f"{count} batches, not {wanted}")
        violations += [f"cut at {length}: {what}" for what in wrong]
    return len(lengths), violations


def garble(root: str, seed: int, images: int) -> tuple[int, list[str]]:
    """Damage the log somewhere. What was acknowledged before the damage is there, and nothing is half there."""
    path = Path(root) / uuid4().hex
    ends = write_log(path)
    log = (path / "memory.db-wal").read_bytes()
    violations: list[str] = []
    for kind, position, damaged in _damages(random.Random(seed), log, images):
        try:
            count, wrong = reopen(path, damaged)
            least = sum(end <= position for end in ends)
            if count < least:
                wrong.append(f"{count} batches of at least {least}")
        except MemStateError as error:
            wrong = [f"refused: {error}"]
        violations += [f"seed {seed}, {kind} at {position}: {what}" for what in wrong]
    return images, violations


def _damages(dice: random.Random, log: bytes, images: int) -> Iterator[tuple[str, int, bytes]]:
    """What was done, the first byte that may differ, and the log."""
    for _ in range(images):
        kind = dice.choice(("noise", "zeros", "swap", "repeat", "tail"))
        position = dice.randrange(len(log) // SECTOR) * SECTOR
        other = dice.randrange(len(log) // SECTOR) * SECTOR
        damaged = bytearray(log)
        if kind == "noise":
            damaged[position : position + 16] = dice.randbytes(16)
        elif kind == "zeros":
            damaged[position : position + SECTOR] = bytes(SECTOR)
        elif kind == "swap":
            here, there = log[position : position + SECTOR], log[other : other + SECTOR]
            damaged[position : position + SECTOR], damaged[other : other + SECTOR] = there, here
            position = min(position, other)
        elif kind == "repeat":
            damaged[position : position + SECTOR] = log[other : other + SECTOR]
        else:
            damaged += dice.randbytes(3 * SECTOR)
            position = len(log)
        yield kind, position, bytes(damaged)

"""Commits as bytes: what goes in comes out, what was written stays readable, and nothing else is read."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langgraph_memstate.errors import CorruptRowError, MemStateError, NewerSchemaError
from langgraph_memstate.facts import Draft, Origin
from langgraph_memstate.storage.op_codec import dump_commit, pack, unpack
from langgraph_memstate.storage.operations import (
    Append,
    CheckUnchanged,
    CheckUnique,
    Clear,
    Commit,
    CopyThread,
    DeleteCheckpoints,
    DeleteRuns,
    DeleteThread,
    Drain,
    DropWrites,
    Expect,
    Forget,
    Load,
    Op,
    OutboxDone,
    OutboxFailed,
    Prepare,
    PutCheckpoint,
    PutEmbeddings,
    PutIndexed,
    PutIndexMeta,
    PutVectors,
    PutWrites,
    QueueIndex,
    RebuildIndex,
    Settle,
    Stage,
    Touch,
    Unstage,
)
from langgraph_memstate.storage.redis_log import dump_entry, load_entry
from langgraph_memstate.storage.redis_view import MARKS
from langgraph_memstate.storage.values import (
    Blob,
    Claim,
    EmbeddingRow,
    IndexedRow,
    ListValue,
    OutboxRow,
    PreparedRow,
    StepKey,
    VectorRow,
    WriteRow,
)

STEP = StepKey("t\0", "", "1")
DRAFT = Draft(
    "v", ("a", "\x1f"), "k", "put", '{"n":1}', "type", ("x",), 1.5, "s", 2, 1.25, Origin("t", actor="é"), 7, 0.5, "{}",
    True, True,
)  # fmt: skip
PLAIN = Draft("w", ("a",), "k", "delete", None, ts=3, index=False)
COMMIT: Commit = (
    PutCheckpoint(
        STEP, None, "2026", Blob("m", b"\0\xff"), "{}", "run", {"b": "1", "a": "2"}, {"1": Blob("", b"")},
        {"2": ListValue("list", 1, None, 0, (b"d", b"e"))}, {b"d": Blob("x", b"1")},
    ),
    PutWrites(STEP, "task", "", (WriteRow(-1, "c", Blob("n", b"")), WriteRow(0, "c", Blob("n", b"1")))),
    DropWrites(STEP, "task", (1, 2)),
    Stage(STEP, "task", "path", (DRAFT, PLAIN)),
    Unstage(STEP),
    Unstage(STEP, "task"),
    Drain(STEP, frozenset(["b", "a"])),
    Append((DRAFT,), ("i",), frozenset(["z", "y"])),
    Append((PLAIN,)),
    CheckUnchanged((DRAFT,), ("type", ("a", "*"))),
    CheckUnique(DRAFT, Claim("type", (("s", "x"), ("i", 1), ("f", 1.0), ("b", True), ("big", 10**400)), ("a",)), True),
    PutEmbeddings((EmbeddingRow("m", b"h", b"\0\0\0\0"),)),
    PutVectors((VectorRow("i", "id", "v", 0, b"h"),), frozenset(["i"])),
    Prepare(PreparedRow("p", "i", ("x", "y"), "me", 1.5)),
    Settle("p"),
    OutboxDone((OutboxRow(1, "i", "embed", "x", None, 0),)),
    OutboxFailed((1, 2), "why", None),
    QueueIndex("i", ("a",), ()),
    RebuildIndex("i"),
    PutIndexMeta("i", "m", 2, 3),
    Touch(((("a",), "k"),), 1.0),
    DeleteThread("t"),
    DeleteRuns(("r",)),
    CopyThread("s", "t"),
    DeleteCheckpoints((STEP,)),
    Expect(((("a",), "k", None), (("a",), "l", "v")), (STEP,)),
    Forget(("a",), "k", None, ("c",)),
    Load("facts", ((1, "text", 0.5, b"bytes", None), ())),
    Clear(),
    PutIndexed("i", (IndexedRow("id", "v", b"\0\1"),)),
)  # fmt: skip
"""Every operation."""

WRITTEN = Path(__file__).with_name("redis_entry_1.bin")
"""An entry of format 1, as the release wrote it that introduced it."""


def test_every_operation_comes_back() -> None:
    assert {type(op) for op in COMMIT} == set(get_args(Op))
    numbers, (found, empty) = unpack(pack((1.5, 2), [dump_commit(COMMIT), dump_commit(())]), 2)
    assert numbers == [1.5, 2]
    assert empty == ()
    for before, after in zip(COMMIT, found, strict=True):
        assert before == after
        assert repr(before) == repr(after) or isinstance(before, Drain | Append | PutVectors)


def test_what_was_written_stays_readable() -> None:
    """Entries outlive releases. Where this fails, the format needs another number, and a reader of the old one."""
    entry = load_entry(WRITTEN.read_bytes(), MARKS)
    assert entry.commits == [COMMIT, ()]
    assert (entry.before, entry.id, entry.now, entry.mark) == (b"b" * 16, b"i" * 16, 1.5, (1, 2, 3, 4, 5))
    written = dump_entry(b"b" * 16, b"i" * 16, 1.5, (1, 2, 3, 4, 5), [dump_commit(COMMIT), dump_commit(())])
    assert load_entry(written, MARKS) == entry


@pytest.mark.parametrize(
    "op",
    [
        DeleteThread(1),  # type: ignore[arg-type]
        DeleteThread("\ud800"),
        DeleteThread(b"t"),  # type: ignore[arg-type]
        OutboxFailed((True,), "", None),
        OutboxFailed((1,), "", "now"),  # type: ignore[arg-type]
        Drain(STEP, ["a"]),  # type: ignore[arg-type]
        Unstage(("t", "ns")),  # type: ignore[arg-type]
        Append(("no draft",)),  # type: ignore[arg-type]
        "DeleteThread",
    ],
)
def test_what_is_of_another_type_is_not_written(op: Any) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
        dump_commit((op,))


def test_an_operation_of_a_newer_release() -> None:
    with pytest.raises(NewerSchemaError, match="Explode"):
        unpack(pack((), [ormsgpack.packb([["Explode", 1]])]), 0)


@pytest.mark.parametrize(
    "dumped",
    [
        [["DeleteThread"]], [["DeleteThread", "t", "u"]], [["DeleteThread", 1]], [[]], [["Settle", ["p"]]], ["Settle"],
        [[["DeleteThread"], "t"]], [["PutEmbeddings", [["m", "h", b""]]]],
        [["DeleteThread", ormsgpack.Ext(2, b"x")]], 7,
    ],
)  # fmt: skip
def test_what_no_operation_is(dumped: Any) -> None:
    with pytest.raises(CorruptRowError):
        unpack(pack((), [ormsgpack.packb(dumped)]), 0)


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 8))
def test_damaged_bytes_are_refused_or_another_commit(rng: random.Random, times: int) -> None:
    content = bytearray(pack((1.5,), [dump_commit(COMMIT)]))
    for _ in range(times):
        content[rng.randrange(len(content))] = rng.randrange(256)
    with suppress(MemStateError):  # anything else is a fault
        _, commits = unpack(bytes(content), 1)
        assert {type(op) for commit in commits for op in commit} <= set(get_args(Op))

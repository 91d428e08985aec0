"""FaissSyncHook beyond the contract: its files, what a crash leaves of them, and how near its graph comes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import pytest

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.hooks import faiss_files, faiss_vectors
from langgraph_memstate.hooks.base import IndexSpec, IndexState, VectorRecord
from langgraph_memstate.hooks.faiss import FaissSyncHook

ROOT = Path(__file__).parents[1]
DIMS = 8
SPEC = IndexSpec("store", 1, DIMS, "model")
MakeHook = Callable[..., FaissSyncHook]


def id_of(number: int) -> str:
    return str(uuid5(NAMESPACE_OID, str(number)))


def records(
    count: int, start: int = 0, namespace: tuple[str, ...] = ("users",), dims: int = DIMS
) -> list[VectorRecord]:
    vectors = np.random.default_rng(start).normal(size=(count, dims)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [VectorRecord(id_of(start + n), vector, namespace) for n, vector in enumerate(vectors)]


def nearest(query: np.ndarray, among: list[VectorRecord], k: int) -> list[str]:
    return [one.id for one in sorted(among, key=lambda one: float(query @ one.vector), reverse=True)[:k]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "faiss"


@pytest.fixture
def make(folder: Path) -> Iterator[MakeHook]:
    """Makes hooks on the folder, and closes them."""
    hooks: list[FaissSyncHook] = []

    def make_hook(**arguments: Any) -> FaissSyncHook:
        hooks.append(FaissSyncHook(folder, **arguments))
        return hooks[-1]

    yield make_hook
    for hook in hooks:
        hook.close()


def filled(hook: FaissSyncHook, count: int = 30) -> FaissSyncHook:
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    for start in range(0, count, 10):
        hook.apply(records(10, start), [])
    return hook


def files(folder: Path) -> tuple[Path, Path]:
    """The snapshot and its journal."""
    (snapshot,), (journal,) = folder.glob("*.faiss"), folder.glob("*.journal")
    return snapshot, journal


# -- what a user does ---------------------------------------------------------------------------------


def vectors_of(texts: list[str]) -> list[list[float]]:
    return [[1.0 + text.count(letter) for letter in "abcdefgh"] for text in texts]


@pytest.mark.parametrize("where", ["in memory", "directory"])
def test_under_a_memory(tmp_path: Path, folder: Path, where: str) -> None:
    hook = FaissSyncHook(None if where == "in memory" else folder, text_field="content", embedding=vectors_of)
    with MemoryStore.open(tmp_path / "memory.db", vectors=hook) as memory:
        memory.commit(Fact("profile", {"content": "a cab", "other": "hhh"}))
        memory.commit(Fact("profile", {"content": "egg"}))
        assert [fact.payload["content"] for fact in memory.search("a cab")] == ["a cab", "egg"]
        assert list(hook.ids()) == [fact.version for fact in reversed(memory.query("profile"))]
        memory.rollback(1)
        memory.flush()
        assert hook.count() == 1
        assert memory.verify().ok


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "ivf"}, "ivf"),
        ({"collection_name": ""}, "collection_name"),
        ({"collection_name": 7}, "collection_name"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(IndexConfigError, match=named):
        FaissSyncHook(**arguments)


def test_a_missing_library_is_named() -> None:
    script = """
import sys
sys.modules["faiss"] = None
from langgraph_memstate.errors import IndexConfigError
from langgraph_memstate.hooks.faiss import FaissSyncHook
try:
    FaissSyncHook()
except IndexConfigError as error:
    print(error)
"""
    done = python(script)
    assert "langgraph-memstate[faiss]" in done.stdout, done.stderr


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/b", "*", "é", "x" * 5_000, "\x00", "a", "A"])
def test_a_name_is_never_a_path(folder: Path, make: MakeHook, name: str) -> None:
    other = filled(make(collection_name="another"), 10)
    hook = filled(make(collection_name=name))
    hook.close()
    other.close()
    assert {path.parent for path in folder.parent.rglob("*") if path.is_file()} == {folder}
    assert len(list(folder.glob("*.faiss"))) == 2
    hook = make(collection_name=name)
    assert hook.open(SPEC) is IndexState.OK
    assert hook.count() == 30


def test_hooks_of_one_process_share_an_index(make: MakeHook) -> None:
    first, second = filled(make()), make()
    assert second.open(SPEC) is IndexState.OK
    first.apply(records(1, 500), [])
    assert id_of(500) in set(second.ids())
    first.close()
    second.apply(records(1, 501), [])
    second.close()
    third = make()
    assert third.open(SPEC) is IndexState.OK
    assert third.count() == 32
    with pytest.raises(VectorSyncError, match="closed"):
        first.open(SPEC)
    with pytest.raises(VectorSyncError, match="closed"):
        first.count()


def test_a_vector_of_another_length_does_no_harm(make: MakeHook) -> None:
    hook = filled(make())
    with pytest.raises(ValueError, match="shape"):
        hook.apply([*records(1, 500), *records(1, 501, dims=DIMS + 1)], [])
    assert hook.count() == 30
    hook.close()
    assert make().open(SPEC) is IndexState.OK


# -- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["snapshot", "journal"])
def test_torn_files_are_never_believed(
    folder: Path, make: MakeHook, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut anywhere but between two writes, or with one byte changed anywhere."""
    hook = filled(make(kind="hnsw"))
    if which == "snapshot":
        hook.close()  # a graph is saved as a whole
    else:
        hook._collection._files._journal.flush()  # type: ignore[union-attr]
    path = files(folder)[which == "journal"]
    content = path.read_bytes()
    assert len(content) > 500
    hook.close()
    if which == "journal":
        shutil.rmtree(folder)
        filled(make(), 0).close()
        path = files(folder)[1]
    writes = [0] if which == "snapshot" else [n * len(content) // 3 for n in range(4)]
    damaged = [content[:size] for size in range(1, len(content), 97) if size not in writes]
    damaged += [content[:n] + bytes([content[n] ^ 0x41]) + content[n + 1 :] for n in range(0, len(content), 61)]
    for bytes_ in damaged:
        path.write_bytes(bytes_)
        hook = make(kind="hnsw" if which == "snapshot" else "flat")
        assert hook.open(SPEC) is IndexState.SUSPECT
        with pytest.raises(VectorSyncError, match="rebuilt"):
            hook.count()
        hook.close()
    assert "middle of a write" in caplog.text
    assert "checksum" in caplog.text
    path.write_bytes(content)
    hook = make(kind="hnsw" if which == "snapshot" else "flat")
    assert hook.open(SPEC) is IndexState.OK
    assert sorted(hook.ids()) == sorted(map(id_of, range(30)))


def test_what_is_suspect_is_built_anew(folder: Path, make: MakeHook) -> None:
    filled(make()).close()
    snapshot, _ = files(folder)
    snapshot.write_bytes(snapshot.read_bytes()[:-1])
    hook = make()
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.reset(SPEC)
    hook.apply(records(5), [])
    hook.close()
    hook = make()
    assert hook.open(SPEC) is IndexState.OK
    assert hook.count() == 5
    assert len(list(folder.glob("*.journal"))) == 1


@pytest.mark.parametrize("lost", ["snapshot", "journal", "both", "folder"])
def test_lost_files(folder: Path, make: MakeHook, lost: str) -> None:
    filled(make()).close()
    snapshot, journal = files(folder)
    if lost == "folder":
        shutil.rmtree(folder)
    if lost in ("snapshot", "both"):
        snapshot.unlink()
    if lost in ("journal", "both"):
        journal.unlink()
    hook = make()
    assert hook.open(SPEC) is (IndexState.SUSPECT if lost == "journal" else IndexState.EMPTY)
    hook.reset(SPEC)
    assert (hook.count(), list(hook.ids())) == (0, [])


def test_a_journal_of_another_snapshot_is_not_read(folder: Path, make: MakeHook) -> None:
    """Killed after the new snapshot took its place and before the old journal was removed."""
    hook = filled(make())
    _, journal = files(folder)
    shutil.copy(journal, folder.with_name("kept"))
    hook.reset(IndexSpec("store", 2, DIMS, "model"))
    assert not journal.exists()
    hook.close()
    shutil.copy(folder.with_name("kept"), journal)
    hook = make()
    assert hook.open(IndexSpec("store", 2, DIMS, "model")) is IndexState.EMPTY
    assert list(hook.ids()) == []


def test_a_long_journal_becomes_a_snapshot(folder: Path, make: MakeHook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_files, "_LEAST_JOURNAL", 2_000)
    hook = make()
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    snapshots = set()
    for start in range(0, 300, 10):
        hook.apply(records(10, start), [id_of(start)])
        snapshots.add(files(folder)[1].name)
        assert files(folder)[1].stat().st_size < 2_000 + files(folder)[0].stat().st_size + 1_000
    assert 3 < len(snapshots) < 15
    assert not list(folder.glob("*.new"))
    hook.close()
    hook = make()
    assert hook.open(SPEC) is IndexState.OK
    assert set(hook.ids()) == {id_of(n) for n in range(300) if n % 10}


@pytest.mark.parametrize("failing", ["append", "save"])
def test_a_full_disk(folder: Path, make: MakeHook, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = filled(make())
    write = faiss_files._write

    def full(file: Any, described: Any, data: bytes) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(faiss_files, "_write", full)
        with pytest.raises(OSError, match="space"):
            hook.apply(records(1, 500), []) if failing == "append" else hook.reset(SPEC)
    assert faiss_files._write is write
    hook.close()
    hook = make()
    found = hook.open(SPEC)
    if failing == "append":
        assert found is IndexState.SUSPECT
    else:
        assert found is IndexState.OK  # the new snapshot did not take the place of the old one
        assert hook.count() == 30
    hook.reset(SPEC)
    assert not list(folder.glob("INFLIGHT-*"))


def test_the_machine_went_down(folder: Path, make: MakeHook) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_faiss_hook import *
hook = filled(FaissSyncHook(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(script, folder).returncode == -signal.SIGKILL
    (boot,) = folder.glob("BOOT-*")
    told = boot.read_text()
    if not told:
        pytest.skip("this system does not say when it booted")
    hook = make()
    assert hook.open(SPEC) is IndexState.OK, "a kill leaves what was written with the system"
    assert hook.count() == 30
    hook._directory._unsynced.clear()  # type: ignore[union-attr]  # or closing would sync it, in good order
    hook.close()
    boot.write_text("the boot before")
    hook = make()
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.reset(SPEC)
    assert not boot.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_searches_sql(folder: Path) -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_faiss_hook import *
hook = filled(FaissSyncHook(sys.argv[1]))
child = os.fork()
if child == 0:
    code = 1
    try:
        assert FaissSyncHook(sys.argv[1]).open(SPEC) is IndexState.BUSY
        try:
            hook.count()
        except VectorSyncError:
            code = 0
        hook.close()
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
hook.apply(records(10, 100), [])
assert hook.count() == 40
hook.close()
"""
    done = python(script, folder)
    assert done.returncode == 0, done.stderr


def test_busy_is_told_once(folder: Path, make: MakeHook, caplog: pytest.LogCaptureFixture) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_faiss_hook import *
hook = filled(FaissSyncHook(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
hook.close()
"""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        hook = make()
        with caplog.at_level(logging.WARNING):
            assert hook.open(SPEC) is IndexState.BUSY
            assert hook.open(SPEC) is IndexState.BUSY
        assert len(caplog.records) == 1
        with pytest.raises(VectorSyncError, match="another process owns it"):
            hook.query(np.zeros(DIMS, np.float32), 1)
        owner.communicate()
    assert hook.open(SPEC) is IndexState.OK


# -- vectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_removed_vectors_do_not_pile_up(make: MakeHook, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_vectors, "_WASTE", 50)
    hook = filled(make(kind=kind), 0)
    assert hook._collection is not None
    live: list[VectorRecord] = []
    for start in range(0, 1_000, 20):
        batch = records(20, start, ("users", str(start % 3)))
        hook.apply(batch, [one.id for one in live[:15]])
        live = [*live[15:], *batch][-200:]
        vectors = hook._collection._vectors
        assert vectors is not None
        assert vectors._index.ntotal == len(vectors._ids) <= 2 * len(vectors) + 50 + 20
    live = [one for one in live if one.id in set(hook.ids())]
    assert hook.count() == len(set(hook.ids())) >= len(live) > 100
    hook.apply([], [id_ for id_ in hook.ids() if id_ not in {one.id for one in live}])
    for query in records(20, 5_000):
        assert hook.query(query.vector, 10) == nearest(query.vector, live, 10)
        third = [one for one in live if one.namespace[1] == "1"]
        assert hook.query(query.vector, 10, ("users", "1")) == nearest(query.vector, third, 10)
    hook.close()
    hook = make(kind=kind)
    assert hook.open(SPEC) is IndexState.OK
    assert set(hook.ids()) == {one.id for one in live}
    assert hook.query(query.vector, 10) == nearest(query.vector, live, 10)


def test_another_kind_is_rebuilt(make: MakeHook) -> None:
    filled(make()).close()
    assert make(kind="hnsw").open(SPEC) is IndexState.MISMATCH


@pytest.mark.slow
def test_the_graph_finds_nearly_all(make: MakeHook) -> None:
    """10,000 vectors in 300 clusters, as texts are; with a filter that keeps three of four, and after removals."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(300, 64))
    vectors = centres[random.integers(300, size=10_000)] + 0.6 * random.normal(size=(10_000, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    all_ = [VectorRecord(id_of(n), vector, (f"u{min(n % 4, 1)}",)) for n, vector in enumerate(vectors)]
    hook = make(kind="hnsw")
    spec = IndexSpec("store", 1, 64, "model")
    assert hook.open(spec) is IndexState.EMPTY
    hook.reset(spec)
    for start in range(0, 10_000, 500):
        hook.apply(all_[start : start + 500], [])
    removed = {one.id for one in all_[:1_500]}
    hook.apply([], list(removed))
    live = [one for one in all_ if one.id not in removed]
    most = [one for one in live if one.namespace == ("u1",)]
    found = kept = 0
    for query in vectors[::200]:
        found += len(set(hook.query(query, 10)) & set(nearest(query, live, 10)))
        kept += len(set(hook.query(query, 10, ("u1",))) & set(nearest(query, most, 10)))
    assert len(most) > faiss_vectors._SCAN_BELOW, "or the graph is not asked"
    assert found / 500 >= 0.97
    assert kept / 500 >= 0.97

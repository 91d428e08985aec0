"""QdrantSyncHook beyond the contract: clients and collections of the user, and a directory of our own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.hooks.base import IndexSpec, IndexState, VectorRecord
from langgraph_memstate.hooks.qdrant import QdrantSyncHook

ROOT = Path(__file__).parents[1]
DIMS = 8
SPEC = IndexSpec("store", 1, DIMS, "model")
MakeHook = Callable[..., QdrantSyncHook]


def id_of(number: int) -> str:
    return str(uuid5(NAMESPACE_OID, str(number)))


def records(count: int, start: int = 0) -> list[VectorRecord]:
    vectors = np.random.default_rng(start).normal(size=(count, DIMS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [VectorRecord(id_of(start + n), vector, ("users", "u1")) for n, vector in enumerate(vectors)]


def filled(hook: QdrantSyncHook, count: int = 3) -> QdrantSyncHook:
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    hook.apply(records(count), [])
    return hook


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "qdrant"


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    made = QdrantClient(":memory:")
    yield made
    made.close()


@pytest.fixture
def in_folder(folder: Path) -> Iterator[MakeHook]:
    """Makes hooks with a directory of their own; closes them."""
    hooks: list[QdrantSyncHook] = []

    def make_hook(**arguments: Any) -> QdrantSyncHook:
        hooks.append(QdrantSyncHook(path=folder, **arguments))
        return hooks[-1]

    yield make_hook
    for hook in hooks:
        hook.close()


def vectors_of(texts: list[str]) -> list[list[float]]:
    return [[1.0 + text.count(letter) for letter in "abcdefgh"] for text in texts]


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    prelude = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom test_qdrant_hook import *\n"
    command = [sys.executable, "-c", prelude + script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# -- what a user does ---------------------------------------------------------------------------------


def test_the_public_example(tmp_path: Path, client: QdrantClient) -> None:
    index = {"dims": DIMS, "embed": vectors_of, "fields": ["content"]}
    memory = MemoryStore(SQLiteStorage(tmp_path / "memory.db"), index=index)
    memory.add_hook(QdrantSyncHook(client, "memory", "content", ["role", "size"], store_documents=True))
    with memory:
        memory.commit(Fact("profile", {"content": "a cab", "role": "preference", "size": 10**30, "more": "x"}))
        (found,) = memory.search("a cab")
        assert found.score == pytest.approx(1, abs=1e-6)
        assert found.version is not None
        (point,) = client.retrieve("memory", [found.version])
        assert point.payload == {"role": "preference", "memstate_ns": ["profile\x1f"], "document": "a cab"}
        memory.rollback(1)
        memory.flush()
        assert client.count("memory").count == 0
        assert memory.verify().ok


@pytest.mark.parametrize("where", ["in memory", "directory"])
def test_a_client_is_enough(tmp_path: Path, folder: Path, where: str) -> None:
    index = {"dims": DIMS, "embed": vectors_of, "fields": ["text"]}
    for _ in range(2):  # again on what the first one left
        client = QdrantClient(":memory:") if where == "in memory" else QdrantClient(path=str(folder))
        with MemoryStore.open(tmp_path / "memory.db", index=index, vectors=client) as memory:
            memory.commit([Fact("note", {"text": "a cab"}, id="1"), Fact("note", {"text": "egg"}, id="2")])
            memory.flush()
            assert [fact.id for fact in memory.search("a cab")] == ["1", "2"]
            assert memory.verify().ok
        assert client.count("memory").count == 2, "the client is the user's: it stays open"
        client.close()


def test_a_client_by_its_name(tmp_path: Path) -> None:
    hook = filled(QdrantSyncHook(":memory:"))
    assert not hook.capabilities.multiprocess
    hook.close()
    with pytest.raises(VectorSyncError, match="closed"):
        hook.open(SPEC)
    with pytest.raises(VectorSyncError, match="closed"):
        hook.count()


def test_a_server_that_is_away(tmp_path: Path) -> None:
    """Nothing listens on port 9 of this machine."""
    hook = QdrantSyncHook(QdrantClient("http://127.0.0.1:9", timeout=2, check_compatibility=False))
    assert hook.capabilities.multiprocess
    index = {"dims": DIMS, "embed": vectors_of, "fields": ["text"]}
    with MemoryStore.open(tmp_path / "memory.db", index=index, vectors=hook, vector_sync="deferred") as memory:
        memory.commit([Fact("note", {"text": "a cab"}, id="1"), Fact("note", {"text": "egg"}, id="2")])
        assert [fact.id for fact in memory.search("a cab")] == ["1", "2"]
        assert not memory.verify().ok


def test_arguments_that_do_not_fit(client: QdrantClient, folder: Path) -> None:
    for arguments, named in (
        ({}, "client"),
        ({"client": client, "path": folder}, "not both"),
        ({"client": object()}, "object"),
        ({"client": AsyncQdrantClient(":memory:")}, "async"),
        ({"client": client, "collection_name": "a/b"}, "a/b"),
        ({"client": client, "collection_name": ".."}, r"\.\."),
        ({"client": client, "collection_name": ""}, "collection_name"),
        ({"client": client, "metadata_fields": "role"}, "role"),
        ({"client": client, "metadata_fields": ["role", "memstate_ns"]}, "memstate_ns"),
        ({"client": client, "metadata_fields": ["document"]}, "document"),
    ):
        with pytest.raises(IndexConfigError, match=named):
            QdrantSyncHook(**arguments)  # type: ignore[arg-type]
    assert not folder.exists()


def test_an_async_client_for_a_memory(tmp_path: Path) -> None:
    index = {"dims": DIMS, "embed": vectors_of}
    with pytest.raises(IndexConfigError, match="async"):
        MemoryStore.open(tmp_path / "memory.db", index=index, vectors=AsyncQdrantClient(":memory:"))


def test_a_missing_library_is_named() -> None:
    script = """
import sys
sys.modules["qdrant_client"] = None
from langgraph_memstate.errors import IndexConfigError
from langgraph_memstate.hooks.qdrant import QdrantSyncHook
try:
    QdrantSyncHook(path="x")
except IndexConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "langgraph-memstate[qdrant]" in done.stdout, done.stderr


# -- collections --------------------------------------------------------------------------------------

FITTING = VectorParams(size=DIMS, distance=Distance.COSINE)


def stranger(number: int) -> PointStruct:
    return PointStruct(id=number, vector=[1.0] * DIMS, payload={"role": "theirs"})


def test_a_collection_of_somebody_else_is_refused(client: QdrantClient) -> None:
    client.create_collection("memory", vectors_config=FITTING)
    client.upsert("memory", [stranger(1)])
    with pytest.raises(IndexConfigError, match="holds 1 points"):
        QdrantSyncHook(client).open(SPEC)
    assert client.count("memory").count == 1


@pytest.mark.parametrize(
    "config",
    [
        VectorParams(size=DIMS + 1, distance=Distance.COSINE),
        VectorParams(size=DIMS, distance=Distance.EUCLID),
        {"text": FITTING},
        {},
    ],
    ids=["dims", "distance", "named", "none"],
)
def test_an_empty_collection_that_does_not_fit_is_refused(client: QdrantClient, config: Any) -> None:
    client.create_collection("memory", vectors_config=config)
    with pytest.raises(IndexConfigError, match="cosine"):
        QdrantSyncHook(client).open(SPEC)
    assert client.collection_exists("memory")


def test_an_empty_collection_is_adopted_and_never_dropped(client: QdrantClient) -> None:
    client.create_collection("memory", vectors_config=FITTING, metadata={"theirs": True})
    hook = filled(QdrantSyncHook(client))
    client.upsert("memory", [stranger(1), stranger(2)])
    assert hook.open(SPEC) is IndexState.OK
    assert (hook.count(), sorted(hook.ids())) == (3, sorted(map(id_of, range(3))))
    newer = IndexSpec("store", 2, DIMS, "model")
    assert hook.open(newer) is IndexState.MISMATCH
    hook.reset(newer)
    assert (hook.count(), list(hook.ids())) == (0, [])
    assert client.count("memory").count == 2
    assert (client.get_collection("memory").config.metadata or {})["theirs"] is True
    hook.apply(records(1), [])
    assert hook.open(newer) is IndexState.OK
    hook.reset(IndexSpec("store", 3, DIMS, "model"))
    with pytest.raises(IndexConfigError, match="holds 2 points"):
        hook.reset(IndexSpec("store", 4, DIMS + 1, "model"))


def test_a_collection_deleted_behind_our_back(client: QdrantClient) -> None:
    hook = filled(QdrantSyncHook(client))
    client.delete_collection("memory")
    for call in (hook.count, lambda: hook.apply(records(1), []), lambda: hook.query(records(1)[0].vector, 1)):
        with pytest.raises(ValueError, match="not found"):
            call()
    assert hook.open(SPEC) is IndexState.EMPTY
    with pytest.raises(VectorSyncError, match="rebuilt"):
        hook.count()
    hook.reset(SPEC)
    assert hook.count() == 0


def test_a_point_that_is_refused_does_no_harm(client: QdrantClient) -> None:
    hook = filled(QdrantSyncHook(client))
    bad = VectorRecord(id_of(9), np.ones(DIMS + 1, np.float32), ("users",))
    with pytest.raises(ValueError, match=r"shape|dim|broadcast"):
        hook.apply([*records(1, 20), bad], [])
    assert hook.count() == 3


class Interfering(QdrantClient):
    """A client whose collection somebody else makes a moment earlier, or whose server knows no metadata."""

    how = ""

    def create_collection(self, *args: Any, **kwargs: Any) -> bool:
        if self.how == "old server":
            kwargs.pop("metadata")
            return super().create_collection(*args, **kwargs)
        if self.how == "another store":
            kwargs["metadata"] = {**kwargs["metadata"], "memstate:store_id": "another"}
        super().create_collection(*args, **kwargs)
        raise RuntimeError("already exists")


@pytest.mark.parametrize("how", ["the same", "another store", "old server"])
def test_making_a_collection_goes_wrong(how: str) -> None:
    client = Interfering(":memory:")
    client.how = how
    hook = QdrantSyncHook(client)
    assert hook.open(SPEC) is IndexState.EMPTY
    if how == "the same":
        hook.reset(SPEC)
        hook.apply(records(1), [])
        assert hook.open(SPEC) is IndexState.OK
    elif how == "another store":
        with pytest.raises(RuntimeError, match="already exists"):
            hook.reset(SPEC)
    else:
        with pytest.raises(IndexConfigError, match=r"1\.16"):
            hook.reset(SPEC)
    client.close()


# -- a directory --------------------------------------------------------------------------------------


def test_hooks_of_one_process_share_the_directory(folder: Path, in_folder: MakeHook) -> None:
    first, second = filled(in_folder(collection_name="one")), filled(in_folder(collection_name="two"))
    again = in_folder(collection_name="one")
    assert again.open(SPEC) is IndexState.OK
    assert first._client is second._client is again._client
    first.close()
    again.close()
    second.apply(records(1, 50), [])
    assert second.count() == 4
    second.close()
    with pytest.raises(VectorSyncError, match="closed"):
        second.count()
    users = QdrantClient(path=str(folder))  # nothing of ours holds it any more
    assert (users.count("one").count, users.count("two").count) == (3, 4)
    users.close()


@pytest.mark.parametrize("damage", ["collections", "points", "both"])
def test_files_that_cannot_be_loaded_are_set_aside(
    folder: Path, in_folder: MakeHook, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(in_folder()).close()
    if damage != "points":
        os.truncate(folder / "meta.json", 10)
    if damage != "collections":
        (folder / "collection" / "memory" / "storage.sqlite").write_bytes(b"no database" * 100)
    hook = in_folder()
    with caplog.at_level(logging.WARNING):
        assert hook.open(SPEC) is IndexState.EMPTY
    (aside,) = folder.parent.glob("qdrant.damaged-*")
    assert str(aside) in caplog.text
    assert sorted(path.name for path in aside.iterdir()) == ["collection", "meta.json"]
    hook.reset(SPEC)
    hook.apply(records(5), [])
    hook.close()
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.OK
    assert hook.count() == 5


def test_busy_while_another_process_owns_it(
    folder: Path, in_folder: MakeHook, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_qdrant_hook import *
hook = filled(QdrantSyncHook(path=sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        hook = in_folder()
        with caplog.at_level(logging.WARNING):
            assert hook.open(SPEC) is IndexState.BUSY
            assert hook.open(SPEC) is IndexState.BUSY
        assert [f"{folder}" in entry.message for entry in caplog.records] == [True]
        with pytest.raises(VectorSyncError, match="another process owns it"):
            hook.count()
        owner.communicate()
    assert owner.returncode == -signal.SIGKILL
    assert hook.open(SPEC) is IndexState.OK
    assert hook.count() == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kind", ["path", "client"])
def test_a_forked_process_is_told(folder: Path, kind: str) -> None:
    script = """
hook = filled(QdrantSyncHook(path=sys.argv[1]) if sys.argv[2] == "path" else QdrantSyncHook(QdrantClient(":memory:")))
child = os.fork()
if child == 0:
    code = 1
    try:
        assert hook.open(SPEC) is IndexState.BUSY
        try:
            hook.count()
        except VectorSyncError as error:
            code = "fork" not in str(error)
        hook.close()
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
hook.apply(records(2, 10), [])
assert hook.count() == 5
hook.close()
"""
    done = python(script, folder, kind)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("when", ["reset", "create"])
def test_killed_while_a_collection_is_replaced(folder: Path, in_folder: MakeHook, when: str) -> None:
    filled(in_folder()).close()
    script = """
from qdrant_client.local.qdrant_local import QdrantLocal
hook = QdrantSyncHook(path=sys.argv[1])
newer = IndexSpec("store", 2, DIMS, "model")
assert hook.open(newer) is IndexState.MISMATCH
saved = QdrantLocal._save
calls = []
def dying(self):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    saved(self)
QdrantLocal._save = dying
hook.reset(newer)
"""
    done = python(script, folder, 1 if when == "reset" else 2)
    assert done.returncode == -signal.SIGKILL, done.stderr
    newer = IndexSpec("store", 2, DIMS, "model")
    hook = in_folder()
    assert hook.open(newer) in (IndexState.EMPTY, IndexState.MISMATCH)
    hook.reset(newer)
    assert list(hook.ids()) == []
    hook.apply(records(2), [])
    assert hook.open(newer) is IndexState.OK

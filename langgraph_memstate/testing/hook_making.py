"""What the parts of `SyncHookContract` share: how its tests come to hooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from langgraph_memstate.hooks.base import IndexSpec, IndexState, SyncHook
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.sqlite import SQLiteStorage
from langgraph_memstate.testing.kills import Children

SPEC = IndexSpec("store", 1, 8, "model")

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def needs_outbox(hook: SyncHook) -> None:
    """Skip a test of what becomes of index work that is left for later."""
    if hook.capabilities.transactional:
        pytest.skip("the commit itself writes these vectors, and leaves no work")


class HookMaking:
    """How the contract comes to hooks."""

    persists: ClassVar[bool] = True
    """Whether another hook on the same `tmp_path`, in another process too, finds the vectors."""
    preload: ClassVar[Sequence[str]] = ()
    """Modules to import before processes are forked and killed, so that each need not import them; they must start no
    thread."""

    def make_hook(self, tmp_path: Path) -> SyncHook:
        """A hook that is not open yet. Each call stands for a restart, before which the hook made last was closed.

        The tests see more of a hook that has metadata fields, such as ``text`` or any other name.
        The hook keeps what it keeps under `tmp_path`, or in a place named after it. It leaves the model to the memory,
        and embeds the field ``text`` or leaves that to the memory, too.
        """
        raise NotImplementedError("a SyncHookContract says how its hooks are made: override make_hook")

    def make_storage(self, tmp_path: Path) -> Storage:
        """Where the memories of these tests keep their facts; not open yet. A transactional hook needs one of its own.

        The same `tmp_path` means the same database, in another process too.
        """
        return SQLiteStorage(tmp_path / "memory.db")

    def filled(self, hook: SyncHook) -> SyncHook:
        """The hook, open and empty."""
        assert hook.open(SPEC) is IndexState.EMPTY
        hook.reset(SPEC)
        return hook

    @pytest.fixture
    def restart(self, tmp_path: Path) -> Iterator[Callable[[], SyncHook]]:
        """Makes a hook, after closing the one before."""
        made: list[SyncHook] = []

        def make() -> SyncHook:
            for hook in made:
                hook.close()
            made[:] = [self.make_hook(tmp_path)]
            return made[0]

        yield make
        for hook in made:
            hook.close()

    @pytest.fixture
    def hook(self, restart: Callable[[], SyncHook]) -> SyncHook:
        """A hook that is open, and empty."""
        return self.filled(restart())

    _children: ClassVar[Children | None] = None

    @pytest.fixture
    def children(self) -> Children:
        """Runs methods of this class in processes of their own."""
        tests = type(self)
        if tests._children is None:
            tests._children = Children(tests, self.preload)
        return tests._children

    @classmethod
    def teardown_class(cls) -> None:
        if cls._children is not None:
            cls._children.close()
            cls._children = None

"""The contract of a vector database's hook. Subclass it, say how a hook is made, and run pytest.

class TestMyHook(SyncHookContract):
    def make_hook(self, tmp_path: Path) -> SyncHook:
        return MyHook(tmp_path / "index")
"""

from __future__ import annotations

from langgraph_memstate.testing.hook_calls import HookCalls
from langgraph_memstate.testing.hook_memory import HookFollows


class SyncHookContract(HookCalls, HookFollows):
    """Everything that a memory counts on: the hook's own methods, and search over them while everything fails."""

"""For people who write a storage or a hook of their own: contracts to subclass, and faults to inject.

The contracts are pytest classes, so pytest is imported with the first of them and not before.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langgraph_memstate.testing.hooks import SyncHookContract as SyncHookContract

_CONTRACTS = {"SyncHookContract": "hooks"}
_COMPARE = ("hook_calls", "hook_making", "hook_memory", "hook_search")
"""Modules whose asserts show, when they fail, the values they compared."""


def __getattr__(name: str) -> Any:
    if name not in _CONTRACTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    modules = (f"{__name__}.{module}" for module in _COMPARE)
    pytest.register_assert_rewrite(*(module for module in modules if module not in sys.modules))
    return getattr(import_module(f"{__name__}.{_CONTRACTS[name]}"), name)

"""What `import langgraph_memstate` costs a program that has LangGraph loaded already."""

from __future__ import annotations

import json
import subprocess
import sys

IMPORT = """
import json, sys, time
started = time.process_time()
import langgraph.graph, langgraph.store.base
before, between = set(sys.modules), time.process_time()
import langgraph_memstate
print(json.dumps([between - started, time.process_time() - between, sorted(set(sys.modules) - before)]))
"""


def imported() -> tuple[float, float, list[str]]:
    """Seconds of CPU time for LangGraph and for us on top of it, and the modules that we brought in."""
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60, check=True)
    theirs, ours, modules = json.loads(result.stdout)
    return theirs, ours, modules


def test_no_vector_database_is_imported() -> None:
    _, _, modules = imported()
    packages = {module.partition(".")[0] for module in modules}
    assert "langgraph_memstate" in packages
    assert packages.isdisjoint({"chromadb", "langchain_chroma", "qdrant_client", "faiss", "psycopg", "redis"})


def test_importing_adds_at_most_a_third_to_importing_langgraph() -> None:
    times = [imported()[:2] for _ in range(3)]
    assert min(ours for _, ours in times) <= min(theirs for theirs, _ in times) / 3

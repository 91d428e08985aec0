"""What `import langgraph_memstate` costs a program that has LangGraph loaded already."""

from __future__ import annotations

import json
import subprocess
import sys

IMPORT = """
import json, sys, time
import langgraph.graph, langgraph.store.base
before, started = set(sys.modules), time.process_time()
import langgraph_memstate
print(json.dumps([time.process_time() - started, sorted(set(sys.modules) - before)]))
"""


def imported() -> tuple[float, list[str]]:
    """Seconds of CPU time (so that a busy machine does not count), and the modules that came in."""
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60, check=True)
    seconds, modules = json.loads(result.stdout)
    return seconds, modules


def test_no_vector_database_is_imported() -> None:
    _, modules = imported()
    packages = {module.partition(".")[0] for module in modules}
    assert "langgraph_memstate" in packages
    assert packages.isdisjoint({"chromadb", "langchain_chroma", "qdrant_client", "faiss", "psycopg", "redis"})


def test_importing_adds_at_most_a_tenth_of_a_second() -> None:
    assert min(imported()[0] for _ in range(3)) <= 0.1

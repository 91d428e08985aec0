"""The examples run as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *args: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *args], capture_output=True, text=True, timeout=120, env=env, check=True
    )
    return done.stdout


def test_an_agent_with_tools_remembers_between_threads_and_processes(tmp_path: Path) -> None:
    path = str(tmp_path / "agent.db")
    for _ in range(2):
        shown = run("agent_with_tools.py", path)
        assert "agent: You play the cello." in shown
        assert "fact 'Ada plays the cello', written by node 'tools' of thread 'monday'" in shown
        assert "SQL and Chroma agree: True" in shown

"""The examples run as a user would run them."""

from __future__ import annotations

import ast
import json
import os
import re
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


def test_a_rollback_takes_a_bad_answer_out_of_state_facts_and_vectors(tmp_path: Path) -> None:
    shown = run("rollback_on_bad_output.py", str(tmp_path))
    looks = re.findall(r"(\w.*):\n  SQL: +(\[.*\])\n  Chroma: (\[.*\])\n", shown)
    answered, undone = "after 'understand'", "after 'undo'"
    assert [when for when, _, _ in looks] == ["before the run", answered, undone, answered, undone, answered]
    for when, sql, chroma in looks:
        facts = sorted(json.loads(value)["text"] for value in ast.literal_eval(sql))
        assert facts == sorted(ast.literal_eval(chroma)), "SQL and Chroma hold the same"
        assert len(facts) == (2 if when == answered else 1)
    assert "profile: Profile(name='Ada', age=36, diet='vegetarian') after 3 attempts" in shown

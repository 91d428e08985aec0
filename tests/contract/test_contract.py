"""The contract finds fault with a storage that breaks a promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = {
    "half a commit stays": (
        "def apply(self, commits):\n"
        "        alone = lambda commit: [super(Broken, self).apply(((op,),))[0] for op in commit]\n"
        "        return [next(filter(None, alone(commit)), None) for commit in commits]",
        "test_a_commit_that_fails_leaves_nothing and append",
    ),
    "a group is one commit": (
        "def apply(self, commits): return super().apply((tuple(op for commit in commits for op in commit),)) "
        "* len(commits)",
        "test_of_a_group_each_commit_stays_whole and append",
    ),
    "nothing is kept": (
        "def open(self): self._path.unlink(missing_ok=True); return super().open()",
        "test_what_landed_is_there_when_opened_again",
    ),
}
SUITE = """
import pytest
from langgraph_memstate import SQLiteStorage
from langgraph_memstate.testing.storage import StorageContract

class Broken(SQLiteStorage):
    {body}

class TestBroken(StorageContract):
    @pytest.fixture
    def make_storage(self, tmp_path):
        return lambda: Broken(tmp_path / "contract.db")
"""


def run(folder: Path, suite: str, *options: str) -> subprocess.CompletedProcess[str]:
    file = folder / "test_suite.py"
    file.write_text(suite)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)],
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_promise_is_found(fault: str, tmp_path: Path) -> None:
    body, test = BROKEN[fault]
    done = run(tmp_path, SUITE.format(body=body), "-k", test)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed" in done.stdout


@pytest.mark.slow
def test_the_storage_in_contributing_keeps_the_contract(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    section = page.partition("## Write your own storage")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200  # type: ignore[index]

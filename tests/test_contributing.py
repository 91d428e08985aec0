"""The hook that CONTRIBUTING.md writes step by step is a whole one: it keeps the contract, and it is used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder() -> Iterator[Path]:
    """The files of the section, whose blocks name the file that they continue; in memory where that can be."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Write your own hook")[2].partition("\n## ")[0]
    files: dict[str, str] = defaultdict(str)
    for name, block in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", section, re.DOTALL):
        files[name] += ("\n" if files[name] else "") + block
    assert sorted(files) == ["folder_hook.py", "test_folder_hook.py", "use.py"]
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="memstate-", dir=shared if shared.is_dir() else None))
    for name, text in files.items():
        (path / name).write_text(text)
    yield path
    shutil.rmtree(path)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_hook_keeps_the_contract(folder: Path) -> None:
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:asyncio", f"--basetemp={folder / 'tmp'}"]
    done = python(folder, "-m", "pytest", *options, "test_folder_hook.py")
    assert done.returncode == 0, done.stdout + done.stderr
    passed, skipped = re.search(r"(\d+) passed", done.stdout), re.search(r"(\d+) skipped", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50
    assert skipped is None, "it persists, so nothing is left out"


def test_the_hook_is_used(folder: Path) -> None:
    done = python(folder, "use.py")
    assert done.stdout == "a cat sat True\n", done.stderr
    assert (folder / "vectors" / "vectors.npz").is_file()

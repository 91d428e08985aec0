"""The command `memstate` and its demo: run as a user runs it, without a network, and checked against what it leaves."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chromadb
import pytest

from langgraph_memstate import MemoryStore
from langgraph_memstate.cli import main
from langgraph_memstate.demo import run
from langgraph_memstate.demo.agent import Memory
from langgraph_memstate.demo.census import Census, take_census
from langgraph_memstate.demo.embedding import DIMS, embed
from langgraph_memstate.demo.play import Outcome
from langgraph_memstate.demo.sides import SIDES
from langgraph_memstate.demo.story import STORIES
from langgraph_memstate.progress import ProgressBar

ROOT = Path(__file__).parents[1]
KINDS = {"ghosts", "losses", "duplicates"}
NO_NETWORK = """
import socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family != getattr(socket, "AF_UNIX", None):
        raise RuntimeError(f"a connection to {address} in an offline test")
    return connect(self, address)
socket.socket.connect = refuse
"""


def memstate(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "langgraph_memstate", *arguments, **environment)


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment, "PYTHONPATH": paths},
    )


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str
    results: dict[str, Any]
    kept: Path


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for PYTHONPATH: no process that has it there can open a connection from Python."""
    directory = tmp_path_factory.mktemp("offline")
    (directory / "sitecustomize.py").write_text(NO_NETWORK)
    return str(directory)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, offline: str) -> Run:
    directory = tmp_path_factory.mktemp("demo")
    kept, results = directory / "kept", directory / "results.json"
    done = memstate("demo", "--json", results, "--keep", kept, PYTHONPATH=offline)
    assert results.exists(), done.stderr
    return Run(done.returncode, done.stdout, done.stderr, json.loads(results.read_text()), kept)


def numbers(found: dict[str, int]) -> list[int]:
    return [found[kind] for kind in ("ghosts", "losses", "duplicates")]


# -- the demo ---------------------------------------------------------------------------------------


def test_the_run_is_offline(offline: str) -> None:
    tried = python("-c", "import socket; socket.create_connection(('127.0.0.1', 9))", PYTHONPATH=offline)
    assert "in an offline test" in tried.stderr


def test_with_memstate_nothing_goes_wrong(demo: Run) -> None:
    assert demo.status == 0, demo.out + demo.err
    for place in ("facts", "vectors"):
        assert demo.results["totals"]["with"][place] == dict.fromkeys(KINDS, 0)


def test_without_it_every_fault_leaves_traces_and_no_fault_leaves_none(demo: Run) -> None:
    for fault in demo.results["faults"]:
        traces = [text for place in ("facts", "vectors") for kind in KINDS for text in fault["without"][place][kind]]
        assert bool(traces) == (fault["name"] != "none"), fault


def test_the_faults_happened_in_both(demo: Run) -> None:
    happened = {fault["name"]: fault["times"] for fault in demo.results["faults"]}
    assert happened == {"none": 0, "failure": 3, "retry": 3, "interrupt": 2, "upsert": 5, "kill": 16}
    for fault in demo.results["faults"]:
        assert fault["times"] == fault["with"]["faults"] == fault["without"]["faults"]


def test_the_json_adds_up(demo: Run) -> None:
    assert demo.results.keys() == {"versions", "seconds", "faults", "totals"}
    assert demo.results["versions"].keys() >= {"langgraph", "langgraph-memstate", "chromadb"}
    assert 0 < demo.results["seconds"] < 60
    for side in SIDES:
        for place in ("facts", "vectors"):
            totals = demo.results["totals"][side][place]
            assert totals.keys() == KINDS
            for kind in KINDS:
                assert totals[kind] == sum(len(fault[side][place][kind]) for fault in demo.results["faults"])


def test_the_table_says_what_the_json_says(demo: Run) -> None:
    place_rows = re.findall(r"^(.*?)(facts|vectors) ([ \d]+)$", demo.out, re.MULTILINE)
    found = [(place, list(map(int, cells.split()))) for _, place, cells in place_rows]
    assert found == [
        (place, [len(fault[side][place][kind]) for side in SIDES for kind in ("ghosts", "losses", "duplicates")])
        for fault in demo.results["faults"]
        for place in ("facts", "vectors")
    ] + [
        (place, [number for side in SIDES for number in numbers(demo.results["totals"][side][place])])
        for place in ("facts", "vectors")
    ]
    for fault in demo.results["faults"]:
        assert re.search(rf"^{re.escape(fault['title'])} +{fault['times']} ", demo.out, re.MULTILINE)


def test_the_progress_is_lines_where_there_is_no_terminal(demo: Run) -> None:
    percents = [int(line.removesuffix("%")) for line in demo.err.split()]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(percents) == 10


@pytest.mark.parametrize("story", [story.name for story in STORIES])
def test_the_databases_it_leaves_hold_what_it_counted(demo: Run, story: str) -> None:
    """Measured again by other means: SQL for the upstream store, `verify` and the log for ours."""
    fault = next(fault for fault in demo.results["faults"] if fault["name"] == story)
    without = demo.kept / "without" / story
    with closing(sqlite3.connect(without / "store.db")) as connection:
        texts = [json.loads(value)["text"] for (value,) in connection.execute("SELECT value FROM store")]
    with closing(chromadb.PersistentClient(without / "chroma")) as client:
        documents = client.get_collection("memory", embedding_function=None).get()["documents"]
    for place, held in (("facts", texts), ("vectors", documents)):
        counted = fault["without"][place]
        extra = len(counted["ghosts"]) + len(counted["duplicates"]) - len(counted["losses"])
        replaced = {"none": 1}.get(story, 0)  # the one home that took the place of another
        assert len(held) == fault["without"]["remembered"] - replaced + extra
        for kind in ("ghosts", "duplicates"):
            assert set(counted[kind]) <= set(held)
        for text in counted["duplicates"]:
            assert held.count(text) > 1

    index = {"dims": DIMS, "embed": embed, "fields": ["text"]}
    with MemoryStore.open(demo.kept / "with" / story / "agent.db", index=index) as memory:
        assert memory.verify().ok
        facts = memory.query(limit=1000)
        assert len(facts) == fault["with"]["remembered"] - {"none": 1}.get(story, 0)
        assert len({fact.payload["text"] for fact in facts}) == len(facts)
        for fact in facts:
            assert memory.search(fact.payload["text"], limit=1)[0].payload == fact.payload


def outcome(**found: Any) -> Outcome:
    return Outcome(faults=1, remembered=1, facts=Census(**found), vectors=Census())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_trace_on_our_side_is_exit_status_1(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, dirty = outcome(), outcome(**{kind: ("I am Ada.",)})
    for ours, status in ((clean, 0), (dirty, 1)):
        comparison = run.Comparison(STORIES[1], {"without": dirty, "with": ours})
        monkeypatch.setattr(run, "compare", lambda *_, found=comparison: [found])
        assert main(["demo"]) == status
        out = capsys.readouterr().out
        assert "without: 'I am Ada.'" in out
        assert ("with memstate: 'I am Ada.'" in out) == bool(status)


def test_a_comparison_that_fails_says_so(tmp_path: Path) -> None:
    """A fault that does not happen proves nothing, so the demo does not report it as zero."""
    never = STORIES[2].turns[0]
    assert never.trap is not None
    turn = replace(never, trap=replace(never.trap, route=("before nothing that exists",)))
    with pytest.raises(run.MemStateError, match="ended unexpectedly"):
        run.compare(tmp_path, lambda side, story: None, [replace(STORIES[2], turns=(turn,))])


class Alone:
    """A process that sends its outcome at once, and fails if another is started or awaited meanwhile."""

    _turn = threading.Lock()
    exitcode = 0
    Pipe = staticmethod(multiprocessing.Pipe)

    def __init__(self, target: Any = None, args: Sequence[Any] = ()) -> None:
        self._args = args

    Process = classmethod(lambda cls, target, args: cls(target, args))

    def start(self) -> None:
        self.join()
        self._args[-1].send(outcome())

    def join(self) -> None:
        assert self._turn.acquire(blocking=False)
        time.sleep(0.001)
        self._turn.release()


def test_one_process_at_a_time_is_started_or_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads that ask after a process at a time, `multiprocessing` tells one a status that is not true."""
    monkeypatch.setattr(run, "_context", Alone)
    stories = [replace(STORIES[0], name=str(number)) for number in range(20)]
    assert len(run.compare(tmp_path, lambda side, story: None, stories)) == 20


# -- counting ---------------------------------------------------------------------------------------


def test_the_census_tells_ghosts_losses_and_duplicates() -> None:
    remembered = [Memory(key="1", text="kept"), Memory(key="2", text="lost"), Memory(key="3", text="twice")]
    census = take_census(remembered, ["kept", "twice", "twice", "ghost", "ghost"])
    assert census == Census(ghosts=("ghost", "ghost"), losses=("lost",), duplicates=("twice",))


def test_the_last_memory_of_a_key_counts() -> None:
    remembered = [Memory(key="home", text="Oslo"), Memory(key="home", text="Bergen")]
    assert take_census(remembered, ["Bergen"]) == Census()
    assert take_census(remembered, ["Oslo"]) == Census(ghosts=("Oslo",), losses=("Bergen",))


def test_the_embedding_is_of_length_1_and_knows_what_is_related() -> None:
    ada, again, other, empty = embed(["Ada plays the cello", "Ada played a cello", "rain in Bergen", ""])
    assert all(len(vector) == DIMS for vector in (ada, again, other, empty))
    assert math.isclose(sum(x * x for x in ada), 1.0)
    assert not any(empty)
    assert sum(a * b for a, b in zip(ada, again, strict=True)) > 0.4
    assert abs(sum(a * b for a, b in zip(ada, other, strict=True))) < 0.3


# -- the progress bar -------------------------------------------------------------------------------


class Terminal:
    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)

    def flush(self) -> None:
        self.written.append("")

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_bar_redraws_itself_and_is_gone_at_the_end() -> None:
    terminal: Any = Terminal()
    bar = ProgressBar(2, terminal)
    bar.advance(STORIES[0].title)
    bar.advance(STORIES[1].title)
    bar.close()
    assert terminal.written[0].startswith("\r[###############---------------]  50%  nothing goes wrong")
    assert "100%" in terminal.written[2]
    assert "\n" not in "".join(terminal.written)
    assert "".join(terminal.written).endswith("\r\x1b[K")


# -- the command line -------------------------------------------------------------------------------


def test_without_a_command_it_prints_its_help() -> None:
    done = memstate()
    assert done.returncode == 0
    assert done.stdout.startswith("usage: memstate")
    assert "demo" in done.stdout


def test_its_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert re.fullmatch(r"memstate \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_the_help_of_the_demo_tells_every_option_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for word in ("--json PATH", "--keep DIR", "exit status: 0", "ghosts", "losses", "duplicates"):
        assert word in out


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["demo", "--fast"], ["demo", "--json"], ["demo", "--json", "no/such/directory/x.json"], ["demo", "x"]],
)
def test_a_wrong_command_line_is_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_databases_are_never_kept_among_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--keep", str(tmp_path)])
    assert exit_.value.code == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_without_the_upstream_saver_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "langgraph.checkpoint.sqlite", None)
    assert main(["demo"]) == 2
    assert "pip install 'langgraph-memstate[demo]'" in capsys.readouterr().err

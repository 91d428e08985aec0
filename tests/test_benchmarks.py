"""The benchmarks run, and the README shows what they found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmarks.__main__ import CASES, README, main
from tests.benchmarks.crowding import Tally
from tests.benchmarks.headlines import HEADLINES, LEAST, Pair, pairs
from tests.benchmarks.measure import Row
from tests.benchmarks.picture import picture
from tests.benchmarks.readme import END, START, fill_in
from tests.benchmarks.results import Results

FOLDER = Path(__file__).parent / "benchmarks"
RESULTS = Results.read(FOLDER / "results.json")
CHEAP = ("steps", "chat", "checkpointer", "store", "fanout", "callers", "opening", "scale", "limits")
DEAR = tuple(CASES.keys() - set(CHEAP))


def test_the_readme_shows_the_results(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(re.sub(f"{START}.*{END}", f"{START}{END}", README.read_text(), flags=re.DOTALL))
    fill_in(copy, RESULTS)
    assert copy.read_text() == README.read_text()
    shown = README.read_text().partition(START)[2].partition(END)[0]
    assert len(re.findall(r"^\| .* \|$", shown, re.MULTILINE)) >= 12
    for path in re.findall(r"\((tests/[^)]*)\)", shown):
        assert (README.parent / path).is_file()


def test_the_picture_shows_the_results() -> None:
    drawn = (FOLDER / "results.svg").read_text(encoding="utf-8")
    assert drawn == picture(list(pairs(RESULTS.rows)))
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for pair in pairs(RESULTS.rows):
        assert pair.label in texts
        assert f"{pair.ratio:.2f}" in texts


def test_bars_stay_within_the_picture_and_labels_are_escaped() -> None:
    ours = Row("case", "what", "ours", median=1.0)
    extremes = [
        Pair("a < b & c", ours, Row("case", "what", "theirs", median=1.0, ratio=ratio)) for ratio in (1e-9, 1e9)
    ]
    root = ElementTree.fromstring(picture(extremes))
    width = float(root.attrib["width"])
    bars = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(bars) == 2
    for bar in bars:
        assert 0 <= float(bar.attrib["x"]) < float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
    assert "a < b & c" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_results_come_back_as_written(tmp_path: Path) -> None:
    RESULTS.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == RESULTS
    assert (tmp_path / "results.json").read_text() == (FOLDER / "results.json").read_text()


def test_what_is_shown_is_what_is_written(tmp_path: Path) -> None:
    found = Results.of({}, True, [Row("case", "what", "ours", median=0.00023449, notes={"kB": 1.23449})])
    found.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == found


def test_results_name_no_path_of_the_machine() -> None:
    assert not re.search(r'"/|tmp|/home|/work', (FOLDER / "results.json").read_text())


def quick(case: str, tmp_path: Path) -> list[Row]:
    """Beside other work, what a saver costs above no saver can come out as nothing: then it is measured again."""
    found = tmp_path / "found.json"
    shown = {headline.peer for headline in (*HEADLINES, *LEAST)}
    for rounds in ("1", "5", "9"):
        folder = tmp_path / rounds
        folder.mkdir()
        main(["--quick", "--rounds", rounds, "--only", case, "--folder", str(folder), "--json", str(found)])
        rows = Results.read(found).rows
        if not any(row.contender in shown and row.median is not None and row.median <= 0 for row in rows):
            break
    return rows


@pytest.mark.parametrize("case", CHEAP)
def test_a_cheap_case_runs(case: str, tmp_path: Path) -> None:
    check(case, quick(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(DEAR))
def test_a_case_runs(case: str, tmp_path: Path) -> None:
    check(case, quick(case, tmp_path))


def check(case: str, rows: list[Row]) -> None:
    """It measures something, and what the README takes from it."""
    assert rows
    assert {row.case for row in rows} == {case}
    # Beside much other work, a saver may cost nothing above no saver the third time too.
    skipped = any("not measured" in row.notes or (row.median is not None and row.median <= 0) for row in rows)
    for headlines in (HEADLINES, LEAST):
        wanted = [headline for headline in headlines if headline.case == case]
        assert len(list(pairs(rows, headlines))) == len(wanted) or skipped
    for row in rows:
        assert "errors" not in row.notes or "SqliteSaver" in row.contender or row.notes["errors"] == "none"


def test_a_tally_with_errors_comes_back() -> None:
    tally = Tally([0.5])
    tally.failed(OSError("database is locked"))
    assert Tally(**json.loads(tally.dumped())) == tally

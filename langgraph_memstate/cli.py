"""The command `memstate`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from langgraph_memstate.cli_moving import add_commands
from langgraph_memstate.errors import MemStateError
from langgraph_memstate.progress import ProgressBar

_DEMO = """\
Runs one small LangGraph agent twice with the same faults: without this package (LangGraph's
SQLite saver, its SQLite store, and Chroma updated by the node that remembers) and with it.
Then compares what the finished conversation says it remembers with what is in SQL and in
Chroma, and counts

  ghosts      memories of work that never landed
  losses      memories that the conversation has and the database lacks
  duplicates  the same memory a second time

Every number is measured in the run. Nothing leaves this machine; it takes less than a minute.

exit status: 0 if this package left none of the three, 1 if it did or the run failed, 2 for a
wrong command line or a package that is not installed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return int(arguments.run(arguments))
    except MemStateError as error:
        print(f"memstate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memstate",
        description="A LangGraph step and everything it remembers commit together, or not at all.",
    )
    parser.add_argument("--version", action="version", version=f"memstate {version('langgraph-memstate')}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="count ghosts, losses and duplicates after the same faults, without this package and with it",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--json", type=_new_file, metavar="PATH", help="also write the results to PATH, as JSON")
    demo.add_argument(
        "--keep", type=_new_directory, metavar="DIR", help="keep the databases and logs in DIR, a new directory"
    )
    demo.set_defaults(run=_demo)
    add_commands(commands)
    return parser


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file in a directory that exists")
    return path


def _new_directory(text: str) -> Path:
    path = Path(text)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{text} exists and is not an empty directory")
    return path


def _demo(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("langgraph.checkpoint.sqlite") is None:
        print(
            "memstate demo compares with LangGraph's own SQLite saver and store, which are not installed:\n"
            "    pip install 'langgraph-memstate[demo]'",
            file=sys.stderr,
        )
        return 2
    from langgraph_memstate.demo import report, run

    started = time.monotonic()
    bar = ProgressBar(run.count_processes(), sys.stderr)
    directory: Any = nullcontext(arguments.keep) if arguments.keep else TemporaryDirectory(prefix="memstate-demo-")
    with directory as path:
        try:
            comparisons = run.compare(Path(path).resolve(), lambda _, story: bar.advance(story.title))
        finally:
            bar.close()
    seconds = time.monotonic() - started
    print(report.text(comparisons, seconds))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(comparisons, seconds), indent=2) + "\n")
    return 0 if report.is_clean(comparisons, "with") else 1

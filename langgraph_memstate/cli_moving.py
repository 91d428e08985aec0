"""The commands `memstate migrate` and `memstate import`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from langgraph_memstate.errors import MemStateError
from langgraph_memstate.progress import ProgressBar

_MIGRATE = """\
Copies a whole memory from SRC to DST, a new one: threads with all their checkpoints, the log,
current memories, embeddings and what waits to be done. Sequences, versions and times stay, so
that history, as_of and rollback answer in the copy as in the source.

SRC and DST are each a path, sqlite:///path, postgresql://user@host/database or
redis://host:port/0?name=agents.

SRC is read in one snapshot and not changed. Who writes to it is not held up, but what is
written after the beginning is not in the copy: stop the application first. DST cannot be
opened as a memory before every row in it has been compared with what was read. If the copy
is broken off, run the same command again: it goes on, or begins anew where SRC was written
in between. Vectors in a vector database are not copied; it is built from DST when it is
opened with an index, and no text is embedded again.
"""
_IMPORT = """\
Makes a new memory, DST, of what LangGraph's own savers and stores hold: SqliteSaver and
SqliteStore (AsyncSqlite... too), PostgresSaver and PostgresStore. Threads come with all their
checkpoints, pending writes and subgraphs, memories with their times and times to live.

SRC is a file, sqlite:///path or postgresql://user@host/database; name several where saver and
store do not share one. It is only read. Values are moved as they were serialised, and none is
made into an object: your classes need not be there, and nothing is imported or run.

The log begins with the import: what a memory was before is not in LangGraph's database.
Vectors are not copied; texts are embedded when DST is opened with an index. If the import is
broken off, run the same command again: it begins anew.
"""
_STATUS = "\nexit status: 0 if all of it is in DST, 1 if not, 2 for a wrong command line.\n"

Report = Callable[[str, int, int], object]


def add_commands(commands: Any) -> None:
    """Add the two to the subparsers of a parser; each puts what runs it into `run`."""
    for name, about, summary, run in (
        ("migrate", _MIGRATE, "copy a memory into another database: SQLite, PostgreSQL or Redis", _migrate),
        ("import", _IMPORT, "make a memory of the databases of LangGraph's own savers and stores", _import),
    ):
        parser = commands.add_parser(
            name, help=summary, description=about + _STATUS, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("source", metavar="SRC", nargs="+" if name == "import" else None)
        parser.add_argument("destination", metavar="DST")
        parser.set_defaults(run=run)


def _migrate(arguments: argparse.Namespace) -> int:
    from langgraph_memstate.graph.upstream import is_upstream
    from langgraph_memstate.migration import is_memory, migrate

    try:
        return _run(
            lambda report: migrate(arguments.source, arguments.destination, on_progress=report), "copied, verified"
        )
    except MemStateError:
        if not is_memory(arguments.source) and is_upstream(arguments.source):
            print("memstate: SRC is LangGraph's own database; for that there is: memstate import", file=sys.stderr)
        raise


def _import(arguments: argparse.Namespace) -> int:
    from langgraph_memstate.graph.importing import import_langgraph

    return _run(
        lambda report: import_langgraph(arguments.source, arguments.destination, on_progress=report), "imported"
    )


def _run(move: Callable[[Report], Mapping[str, int]], done: str) -> int:
    started = time.monotonic()
    bar = ProgressBar(1, sys.stderr)
    try:
        rows = move(bar.show)
    finally:
        bar.close()
    found = ", ".join(f"{number:,} {table.replace('_', ' ')}" for table, number in rows.items() if number)
    print(f"{done} in {time.monotonic() - started:.1f} s: {found or 'nothing was there'}")
    return 0

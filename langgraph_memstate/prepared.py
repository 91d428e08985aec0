"""Prepare records: vectors that a commit has sent to an index ahead of itself, and whether it may still land."""

from __future__ import annotations

import os
import socket
import sys
import time

from langgraph_memstate.facts import new_version
from langgraph_memstate.storage.values import PreparedRow

LEASE = 120.0  # seconds after which another process may take back what an unfinished commit sent to the index

_under_way: set[str] = set()
"""The records of commits that are running in this process."""


def begin(index: str, vector_ids: tuple[str, ...]) -> PreparedRow:
    """The record of a commit that starts now and, whatever becomes of it, is to be ended with `end`."""
    row = PreparedRow(new_version(), index, vector_ids, f"{socket.gethostname()}/{os.getpid()}", time.time() + LEASE)
    _under_way.add(row.id)
    return row


def end(row: PreparedRow) -> None:
    """The commit is over. A record that it could not settle is now anybody's."""
    _under_way.discard(row.id)


def is_abandoned(row: PreparedRow) -> bool:
    """Whether the commit that left a record cannot land any more, or has taken too long."""
    host, _, pid = row.owner.partition("/")
    if host == socket.gethostname() and pid.isdecimal():
        if int(pid) == os.getpid():  # ours, or of one that had our number before, as containers often do
            return row.id not in _under_way
        if not _is_running(int(pid)):
            return True
    return row.expires_at < time.time()


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # asking there would send it a Ctrl-C, so only the lease can tell
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's process, but alive
    return True

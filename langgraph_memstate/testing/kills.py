"""Calls a test's methods in processes that are killed in the middle.

One process loads the test's module and starts no thread; every call runs in a fork of it. What a call says comes
back line by line, however the call ends.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

_ENDED = "-- ended with status "


def die_in(seconds: float) -> None:
    """Kill this process from outside of Python, wherever it is then: nothing is cleaned up."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def say(line: object) -> None:
    """Tell the test that called: the whole line, or nothing where the process dies now."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


class Children:
    """Runs methods of a test class in processes of their own.

    The class is made without arguments, in a process that imported its file and, before any fork, `preload`.
    """

    def __init__(self, tests: type, preload: Sequence[str] = ()) -> None:
        self._given = {
            "path": [*filter(None, sys.path)], "file": inspect.getfile(tests), "module": tests.__module__,
            "name": tests.__qualname__, "preload": list(preload),
        }  # fmt: skip

    @cached_property
    def _process(self) -> subprocess.Popen[str]:
        """Started with the first call."""
        places = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _serve; _serve()", json.dumps(self._given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": places}, start_new_session=True,
        )  # fmt: skip

    def call(self, method: str, *arguments: Any, timeout: float = 60.0) -> tuple[list[str], int]:
        """The lines that a call said, and how its process ended (as `os.waitstatus_to_exitcode` says)."""
        self.start(method, *arguments)
        stuck = threading.Timer(timeout, self._kill)
        stuck.start()
        try:
            lines = []
            while not (line := self.line()).startswith(_ENDED):
                lines.append(line)
            return lines, int(line.removeprefix(_ENDED))
        finally:
            stuck.cancel()

    def start(self, method: str, *arguments: Any) -> None:
        """Begin a call, whose lines `line` returns."""
        assert self._process.stdin is not None
        print(json.dumps([method, *map(str, arguments)]), file=self._process.stdin, flush=True)

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs the test's methods is gone; its errors are above")
        return line.rstrip("\n")

    def close(self) -> None:
        if "_process" not in vars(self):
            return
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()

    def _kill(self) -> None:
        """The process and, where one is stuck, its fork."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _serve() -> None:
    given = json.loads(sys.argv[1])
    sys.path[:] = given["path"]
    for name in given["preload"]:
        import_module(name)
    found: Any = _load(given["file"], given["module"])
    for name in given["name"].split("."):
        found = getattr(found, name)
    while request := sys.stdin.readline():
        method, *arguments = json.loads(request)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                getattr(found(), method)(*arguments)
                status = 0
            finally:
                if status:
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        say(f"{_ENDED}{os.waitstatus_to_exitcode(ended)}")


def _load(file: str, name: str) -> Any:
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

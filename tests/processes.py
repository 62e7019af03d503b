"""kdprof's commands as processes with output, exit status, signals and environment of their own.

Importing torch and timm takes longer than what most tested commands do. So these processes are
forked from one that has imported them and has never computed anything: multiprocessing's fork
server, started once by each process of tests.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 280
VARIABLES = {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytest", "kdprof.cli", "kdprof.workflow", "kdprof.launch.local", "kdprof.measure.study_step",
     "kdprof.evaluate", "kdprof.reports.table", "kdprof.reports.costs", "scipy.stats", "frozen"]
)  # fmt: skip


class Command:
    """A running ``kdprof`` command.

    Args:
        arguments: of the command line, after ``kdprof``.
        cwd: the folder it runs in.
        environment: further variables.
    """

    def __init__(self, *arguments, cwd=None, **environment):
        self._arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        variables = {**os.environ, **VARIABLES, **environment}
        self._process = _SERVER.Process(
            target=_command,
            args=(self._arguments, str(cwd or Path.cwd()), variables, self._outputs),
        )
        self._process.start()
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def runs(self) -> bool:
        return self._process.is_alive()

    def end(self) -> subprocess.CompletedProcess:
        """Wait for its end and return what it printed."""
        self._process.join(LIMIT_S)
        if self.runs():
            self._process.kill()
            self._process.join()
        texts = [path.read_text() if path.exists() else "" for path in self._outputs]
        self._folder.cleanup()
        return subprocess.CompletedProcess(self._arguments, self._process.exitcode, *texts)


def kdprof(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end; see :class:`Command`."""
    return Command(*arguments, cwd=cwd, **environment).end()


def cold(*arguments, cwd=None) -> subprocess.CompletedProcess:
    """Run ``python -m kdprof`` in a new Python, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "kdprof", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=LIMIT_S,
        env={**os.environ, **VARIABLES},
    )  # fmt: skip


def side_by_side(function: Callable, *arguments: tuple) -> None:
    """Call a module's function in a process for each tuple of arguments, at the same time."""
    processes = [_SERVER.Process(target=function, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def _command(arguments, cwd, variables, outputs) -> None:
    from kdprof.cli import main

    # What a shell starts in the background ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = ["kdprof", *arguments]
    sys.path.insert(0, cwd)  # as -m does
    main()

"""Programs in processes of their own that need not import Keras first.

A server has imported it, and nothing of the backend has run there: each
process is a fork of it. What proves that a program starts from nothing is left
to `subprocess`.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing import reduction
from pathlib import Path
from typing import Any
from typing import TextIO

import keras

ROOT = Path(__file__).resolve().parents[1]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([keras.backend.backend(), "keras"])


class Fork:
    """A process that runs a program; what sweeps use of `subprocess.Popen`.

    Args:
        command: The interpreter, a program or `-c` and code, and arguments.
        cwd: The folder that it runs in. Default: this process's.
        env: Its environment. Default: this process's.
        stdout: An open file for its output. Default: none.
        stderr: The same of its errors.
    """

    def __init__(
        self,
        command: list[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: TextIO | int = subprocess.DEVNULL,
        stderr: TextIO | int = subprocess.DEVNULL,
    ) -> None:
        with open(os.devnull, "w") as nowhere:
            _serve(nowhere.fileno())
            files = [
                _Passed(nowhere if file == subprocess.DEVNULL else file)
                for file in (stdout, stderr)
            ]
            self._process = _SERVER.Process(
                target=_main,
                args=(
                    list(map(str, command[1:])),
                    str(cwd or Path.cwd()),
                    dict(os.environ if env is None else env),
                    files,
                ),
                daemon=True,
            )
            self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status; `None` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit status; `None` while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; its exit status."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still there after {timeout} s"
        return self.returncode

    def terminate(self) -> None:
        """Sends it SIGTERM, if it is there."""
        self._process.terminate()


def run(
    *command: Any, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs a program, or `-c` and code; what `subprocess.run` returns."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
    ):
        process = Fork(
            [sys.executable, *command], cwd, environment, output, errors
        )
        try:
            status = process.wait(timeout)
        finally:
            process.terminate()
        said = [file.seek(0) or file.read() for file in (output, errors)]
    return subprocess.CompletedProcess(command, status, *said)


def _serve(nowhere: int) -> None:
    """Starts the server, if it is not there, without what TensorFlow says."""
    stderr = os.dup(2)
    os.dup2(nowhere, 2)
    try:
        forkserver.ensure_running()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class _Passed:
    """An open file on its way to a fork, where it is a file descriptor."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return _descriptor, (reduction.DupFd(self.file.fileno()),)


def _descriptor(passed: Any) -> int:
    return passed.detach()


def _main(
    command: list[str], cwd: str, env: dict[str, str], files: list[int]
) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = command
    if command[0] == "-c":
        exec(compile(sys.argv.pop(1), "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")

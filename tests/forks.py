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
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [keras.backend.backend(), "keras", "sklearn.model_selection"]
)


class Fork:
    """A process that runs a program; what sweeps use of `subprocess.Popen`.

    Args:
        command: The interpreter, a program or `-c` and code, and arguments.
        cwd: The folder that it runs in. Default: this process's.
        env: Its environment. Default: this process's.
        stdout: An open file for its output, or `subprocess.PIPE`: what
            `communicate` returns. Default: none.
        stderr: The same of its errors.
        group: Whether it, with the forks of its own that its program makes,
            is a process group, which can be killed. Default: it is of the
            server's.
    """

    _context = SERVER
    _passed = staticmethod(lambda file: _Passed(file))

    def __init__(
        self,
        command: list[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: TextIO | int = subprocess.DEVNULL,
        stderr: TextIO | int = subprocess.DEVNULL,
        group: bool = False,
    ) -> None:
        self._said = [
            tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as this
            if file == subprocess.PIPE
            else None
            for file in (stdout, stderr)
        ]
        with open(os.devnull, "w") as nowhere:
            if self._context is SERVER:
                _serve(nowhere.fileno())
            files = [
                self._passed(nowhere if file == subprocess.DEVNULL else file)
                for file in (self._said[0] or stdout, self._said[1] or stderr)
            ]
            self._process = self._context.Process(
                target=_main,
                args=(
                    list(map(str, command[1:])),
                    str(cwd or Path.cwd()),
                    dict(os.environ if env is None else env),
                    files,
                    group,
                ),
                daemon=not group,  # or it could have none of its own
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

    def communicate(self, timeout: float | None = None) -> tuple:
        """Waits for its end; its output and its errors."""
        self.wait(timeout)
        return tuple(
            file and (file.seek(0) or file.read()) for file in self._said
        )

    def terminate(self) -> None:
        """Sends it SIGTERM, if it is there."""
        self._process.terminate()

    def kill(self) -> None:
        """Sends it SIGKILL, if it is there."""
        self._process.kill()


class OwnFork(Fork):
    """The same, as a fork of this process and in its process group.

    For programs that are forks themselves, and run nothing of the backend.
    """

    _context = multiprocessing.get_context("fork")
    _passed = staticmethod(lambda file: file.fileno())


def run(
    *command: Any, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs a program, or `-c` and code; what `subprocess.run` returns."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = Fork(
        [sys.executable, *command],
        cwd,
        environment,
        subprocess.PIPE,
        subprocess.PIPE,
    )
    try:
        said = process.communicate(timeout)
    finally:
        process.terminate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


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
    command: list[str],
    cwd: str,
    env: dict[str, str],
    files: list[int],
    group: bool,
) -> None:
    if group:
        os.setsid()
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

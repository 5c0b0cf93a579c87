"""One process at a run folder at a time."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from filelock import Timeout

from experiment.errors import Busy
from experiment.errors import UserError

LOCK = ".lock"
# Seconds to wait for a lock: another process may only have looked who is at it.
PATIENCE, POLL = 0.25, 0.05


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Callable[[], None]]:
    """Keeps other processes out of a run folder, however this one ends.

    Args:
        folder: The run's; it need not be there yet.

    Yields:
        A function that makes the folder where it is not there yet, and marks
        an existing one as unfinished.

    Raises:
        Busy: If another process is at it.
        UserError: If it cannot be made.
    """
    busy = Busy(
        f"{folder}: {Busy.SIGN}. Let it end, or "
        "choose another --seed or --runs_dir."
    )
    with contextlib.ExitStack() as locks:

        def lock() -> None:
            try:
                locks.enter_context(
                    FileLock(folder / LOCK).acquire(PATIENCE, POLL)
                )
            except Timeout:
                raise busy from None
            except (OSError, NotImplementedError) as error:
                raise UserError(
                    f"{folder}: cannot be locked ({error}), so that another "
                    "process might train the same run. Give a folder that can "
                    "be with --runs_dir."
                ) from error

        def make() -> None:
            try:
                if existed:
                    (folder / "result.json").unlink(missing_ok=True)
                    return
                folder.mkdir(parents=True)
            except FileExistsError:
                raise busy from None
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot be made ({error.strerror}). Give a "
                    "folder that can be written to with --runs_dir."
                ) from error
            lock()

        existed = folder.is_dir()
        if existed:
            lock()
        yield make


def is_held(folder: Path) -> bool:
    """Whether a process is at a run, as far as that can be seen."""
    if not (folder / LOCK).exists():  # or it would be made
        return False
    try:
        with FileLock(folder / LOCK).acquire(PATIENCE, POLL):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False

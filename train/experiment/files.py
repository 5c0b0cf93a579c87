"""Files that are the old one or the new one, never half of it."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from experiment.errors import UserError

# No room, or a disk that fails: the user's to put right, not a defect.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
FULL = ("no space left", "quota exceeded", "file too large")


def replace(
    path: Path, write: Callable[[Path], object], versions: int = 1
) -> None:
    """Writes a file aside and renames it when it is safely on the disk.

    Args:
        path: Where the file goes.
        write: Writes it to the path that it is given, of the same suffix.
        versions: How many are kept, at least 1: this one as `<stem><suffix>`,
            the ones before as `<stem>.1<suffix>`, `<stem>.2<suffix>`, ...
            Whenever the program is killed, one of them at least is whole.
    """
    aside = path.with_name(f"aside.{path.name}")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        places = [path, *(_version(path, i) for i in range(1, versions))]
        there = [place.exists() for place in places[:-1]] + [False]
        for i in reversed(range(there.index(False))):
            os.replace(places[i], places[i + 1])
        os.replace(aside, path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def check_writable(folder: Path, given: object, advice: str) -> None:
    """Refuses a folder that can be neither written to nor made."""
    there = next(p for p in [folder, *folder.parents] if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"{given}: {there} is not a folder that can be written to. {advice}"
        )


def kept(path: Path) -> list[Path]:
    """The versions of a file that are there, the newest first."""
    found = {0: path} if path.exists() else {}
    for other in path.parent.glob(f"{path.stem}.*{path.suffix}"):
        number = other.stem.removeprefix(f"{path.stem}.")
        if number.isdecimal():
            found[int(number)] = other
    return [found[number] for number in sorted(found)]


def disk_error(error: BaseException) -> str | None:
    """What the disk says, if it is what an error comes from; else `None`.

    Libraries that write for us keep no error number, but the words.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return os.strerror(error.errno)
        for words in FULL:
            if words in str(error).lower():
                return words.capitalize()
        error = error.__cause__ or error.__context__
    return None


def _version(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some file systems cannot; the renames are in order all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

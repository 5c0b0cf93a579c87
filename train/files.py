"""Files that are the old one or the new one, never half of it."""

import os
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file aside and renames it when it is safely on the disk.

    Args:
        path: Where the file goes.
        write: Writes it to the path that it is given, of the same suffix.
    """
    aside = path.with_name(f"aside.{path.name}")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise

"""Replace a file in one step, so that a crash leaves the old one or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def temporary(path: Path) -> Path:
    """The name under which the next version of ``path`` is written."""
    return path.with_name(path.name + ".tmp")


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, force it to the disk, then rename it."""
    new = temporary(path)
    try:
        write(new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace` the contents of ``path`` by ``text``, as UTF-8."""

    def write(new: Path) -> None:
        new.write_text(text, encoding="utf-8")

    replace(path, write)

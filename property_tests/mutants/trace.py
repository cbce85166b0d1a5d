"""Which lines of the project a test executes, in this process and in those that it starts.

The number of the test that is running lies in a file that all of them map: `MARK`. 0 stands for no
test: what is executed then, while modules are imported and tests gathered, counts for all of them.
A process writes what it has seen when it ends.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = "QUEST_MUTANTS_TRACE"  # the environment's name of the folder for what was seen
MARK = "mark"
WATCHED = ("quest", "kernels", "reference")


class Mark:
    """The number of the test that is running, as all processes see it."""

    def __init__(self, folder: Path) -> None:
        path = folder / MARK
        if not path.exists():
            path.write_bytes(bytes(4))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4)

    def set(self, number: int) -> None:
        self._map[:] = number.to_bytes(4, "little")

    def get(self) -> int:
        return int.from_bytes(self._map[:], "little")


def start(folder: Path, root: Path) -> None:
    """Trace this process until it ends; `root` is the project's."""
    mark = Mark(folder)
    seen: defaultdict[tuple[int, str], set[int]] = defaultdict(set)
    files: dict[str, str | None] = {}

    def watched(name: str) -> str | None:
        path = Path(os.path.realpath(name))
        # A name that is no path, as of code made from a string, may lead to the root itself.
        inside = any(path.is_relative_to(root / folder) for folder in WATCHED)
        return str(path.relative_to(root)) if inside else None

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in files:
            files[name] = watched(name)
        file = files[name]
        if file is None:
            return None
        lines, number = seen[mark.get(), file], mark.get()

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            # A module's own frame, or a long call, may see another test begin.
            nonlocal lines, number
            if mark.get() != number:
                number = mark.get()
                lines = seen[number, file]
            lines.add(frame.f_lineno)
            return line

        return line

    def write() -> None:
        sys.settrace(None)
        found = [[number, file, sorted(lines)] for (number, file), lines in seen.items()]
        (folder / f"{os.getpid()}.json").write_text(json.dumps(found))

    atexit.register(write)
    start.write = write  # type: ignore[attr-defined]
    sys.settrace(call)

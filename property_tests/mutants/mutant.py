"""A fault: where it is planted, and what it changes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("semantic", "systematic", "cuda", "court")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """One edit of one file.

    id: of the family semantic or court a name; else file:function:operator:occurrence, which edits
    elsewhere in the file leave alone. lines: first and last line of the statement that holds it.
    start, end: the bytes that `new` replaces. what: old and new text on one line. says: of a patch,
    the bug in a sentence.
    """

    id: str
    family: str
    file: str
    lines: tuple[int, int]
    start: int
    end: int
    new: str
    what: str
    says: str = ""

    def apply(self, source: bytes) -> bytes:
        """The mutated source."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def flat(text: str) -> str:
    """Text on one line."""
    return re.sub(r"\s+", " ", text).strip()


def read(file: str) -> bytes:
    """A file of the project."""
    return (ROOT / file).read_bytes()

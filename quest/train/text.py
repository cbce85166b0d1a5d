"""Find text on this machine, and part it into training and held-out text.

The default is the source of Python's own standard library: real text of about 30 MB that every
machine with Python has. It needs no download, but differs a little between versions of Python.

How the text is parted depends on its bytes alone, not on the tokenizer, the seed or the paths:

* 100 files or more: a file is held out where the SHA-256 of its contents, as an integer, is
  divisible by 20. Copies of one file therefore land on the same side.
* fewer files, or where that rule holds out less than 1% or more than 20% of the bytes: the last
  5% of all text, in the order of the files.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quest.train.errors import UserError

HELD_OUT = 20  # one part in this many
MANY_FILES = 100
INSTALLED = {"site-packages", "dist-packages"}  # other people's packages differ by machine


@dataclass(frozen=True)
class Text:
    """UTF-8 text in two parts that share no byte position, and where it came from."""

    train: bytes
    held_out: bytes
    files: int
    skipped: tuple[Path, ...]
    """Files of a folder or a glob that were left out because they are empty or not text."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both parts: equal for equal text."""
        digest = hashlib.sha256(len(self.train).to_bytes(8, "little"))
        digest.update(self.train)
        digest.update(self.held_out)
        return digest.hexdigest()


def load_text(sources: Sequence[str], shortest: int, but: Sequence[Path] = ()) -> Text:
    """Read ``sources`` (files, folders, globs; none means the standard library) and part them.

    ``shortest`` is the least number of bytes to hold out. A file that is named must be text; in a
    folder (read recursively, without hidden files) or a glob, whatever is not is skipped, and so
    are the files ``but``: what a run writes there is not what it reads.

    Raises `UserError` for a source that is missing, unreadable, empty or binary, that is: holds a
    NUL byte or is not UTF-8.
    """
    documents: list[bytes] = []
    skipped: list[Path] = []
    seen: set[Path] = set()
    apart = {path.resolve() for path in but}
    for source in sources or [standard_library()]:
        if not source:  # a variable of a shell that is not set, and not the current folder
            raise UserError("the name of a text is empty: need a file, folder or glob")
        named = Path(source).is_file()
        found = 0
        for path in [Path(source)] if named else _listing(source):
            if path.resolve() in seen:
                found += 1
                continue
            if not named and path.resolve() in apart:
                continue
            contents = _read(path)
            problem = _problem(contents)
            if problem and named:
                raise UserError(f"{path} is {problem}: need a file of UTF-8 text")
            if problem:
                skipped.append(path)
                continue
            seen.add(path.resolve())
            documents.append(contents)
            found += 1
        if not found:
            raise UserError(f"{source} holds no file of UTF-8 text")
    train, held_out = split(documents, shortest)
    return Text(train, held_out, len(documents), tuple(skipped))


def standard_library() -> str:
    """The folder of the standard library that this Python runs with."""
    return sysconfig.get_path("stdlib")


def split(documents: Sequence[bytes], shortest: int) -> tuple[bytes, bytes]:
    """Part ``documents`` into training and held-out bytes, by the rule at the top of this file."""
    if len(documents) >= MANY_FILES:
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        for document in documents:
            digest = int.from_bytes(hashlib.sha256(document).digest(), "big")
            sides[digest % HELD_OUT == 0].append(document)
        train, held_out = (b"\n".join(side) for side in sides)
        share = len(held_out) / (len(train) + len(held_out))
        if 0.01 <= share <= 0.2 and len(held_out) >= shortest:
            return train, held_out
    whole = b"\n".join(documents)
    cut = max(0, len(whole) - max(len(whole) // HELD_OUT, shortest))
    while cut and whole[cut] & 0xC0 == 0x80:  # not inside a character of several bytes
        cut -= 1
    return whole[:cut], whole[cut:]


def _listing(source: str) -> list[Path]:
    """The files of a folder or a glob, sorted."""
    root = Path(source)
    if root.is_dir():
        standard = source == standard_library()
        relative = sorted(p.relative_to(root) for p in root.rglob("*.py" if standard else "*"))
        return [
            root / path
            for path in relative
            if not any(part.startswith(".") for part in path.parts)
            and not (standard and INSTALLED.intersection(path.parts))
            and (root / path).is_file()
        ]
    if not glob.has_magic(source):
        raise UserError(f"{source}: no such file or folder")
    paths = sorted(Path(match) for match in glob.glob(source, recursive=True))
    if not paths:
        raise UserError(f"{source}: no file matches")
    return [path for path in paths if path.is_file()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _problem(contents: bytes) -> str | None:
    """Why ``contents`` are no text, or None."""
    if not contents.strip():
        return "empty"
    if b"\0" in contents:
        return "binary (it holds NUL bytes)"
    try:
        contents.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"binary (byte {error.start} is not UTF-8)"
    return None

"""Files of properties to skip, or that must fail: one name a line, # begins a comment.

A name is that of the summary, `test_hadamard.py::test_transform[float32-12]`; without the brackets
it stands for all parameters. An entry that matches nothing that is covered is stale, and so is an
expected failure that passes (pytest's strict xfail). Where the adapter can't run, nothing is asked
of it, and no entry is held against that.

An expected failure is a wrong result, for every input. Behind its name may stand the class of an
exception or a base of it, `test_hadamard.py::test_inputs ValueError`: then that is what the adapter
must raise.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

# A name, whose parameters may have spaces; an exception.
_ENTRY = re.compile(r"([^\s\[]+(?:\[.*\])?)(?:\s+(\S+))?")


class ListError(ValueError):
    """A list can't be read; the message names the option."""


@dataclass
class Listed:
    """The entries of one file, and which of them matched. checked: whether others are stale.

    errors: by entry, the name of the exception that is expected.
    """

    option: str
    origin: str
    entries: tuple[str, ...]
    errors: dict[str, str] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)
    checked: bool = True

    def match(self, name: str) -> bool:
        """Whether a property is listed; notes the entries that say so."""
        found = {e for e in self.entries if e in (name, name.partition("[")[0])}
        self.matched |= found
        return bool(found)

    def raises(self, name: str) -> str | None:
        """The exception that a property is to raise; None for a wrong result.

        What is said of one with its parameters goes before what is said of all.
        """
        listed = name if name in self.entries else name.partition("[")[0]
        return self.errors.get(listed)

    def stale(self) -> list[str]:
        """What to say of each entry that matched nothing, where they are checked."""
        return [
            f"{self.option} {self.origin}: {e!r} is no property that this adapter covers"
            for e in self.entries
            if self.checked and e not in self.matched
        ]


def read(option: str, given: str | None) -> Listed:
    """The list of an option; empty where it was not given. ListError for a file that can't be read.

    given: a path, or package:file for a file in an installed package.
    """
    if given is None:
        return Listed(option, "", ())
    path = _path(option, given)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ListError(f"{option} {given}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ListError(f"{option} {given}: it is no text: {error}") from None
    entries: list[str] = []
    errors: dict[str, str] = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        found = _ENTRY.fullmatch(line)
        if found is None or (found[2] and option != "--xfails"):
            kinds = "a name, or a name and an exception" if option == "--xfails" else "a name"
            raise ListError(f"{option} {given}: {line!r} is more than {kinds}")
        entries.append(found[1])
        if found[2]:
            errors[found[1]] = found[2]
    twice = sorted({e for e in entries if entries.count(e) > 1})
    if twice:
        raise ListError(f"{option} {given}: {twice[0]!r} stands there twice")
    return Listed(option, path.name, tuple(entries), errors)


def _path(option: str, given: str) -> Path:
    package, colon, name = given.partition(":")
    if not colon or Path(given).exists():
        return Path(given)
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        raise ListError(f"{option} {given}: there is no package {package!r}")
    return Path(found.origin).parent / name

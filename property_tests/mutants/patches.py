"""Mutants written by hand: semantic.toml and court.toml.

A patch whose old text does not stand in its file exactly once is an error: the code has moved on,
and the patch must.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from .mutant import Mutant, flat, read

HERE = Path(__file__).parent


def mutants(family: str) -> list[Mutant]:
    """The patches of a family: semantic or court."""
    with (HERE / f"{family}.toml").open("rb") as file:
        entries = tomllib.load(file)["patch"]
    made = [_made(family, entry) for entry in entries]
    names = [m.id for m in made]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{family}.toml names {', '.join(twice)} twice")
    return made


def _made(family: str, entry: dict[str, str]) -> Mutant:
    source = read(entry["file"])
    old, new = entry["old"].strip("\n"), entry["new"].strip("\n")
    count = source.count(old.encode())
    if count != 1:
        raise ValueError(
            f"{family}.toml, {entry['id']}: the old text stands {count} times in {entry['file']}, "
            "not once"
        )
    start = source.index(old.encode())
    first = source[:start].count(b"\n") + 1
    last = first + old.count("\n")
    # A patch that stands before a line, at its comment, is about that line.
    lines = source.decode().splitlines()
    while all(t.lstrip().startswith("#") for t in lines[first - 1 : last]):
        last += 1
    return Mutant(
        f"{family}:{entry['id']}", family, entry["file"], (first, last), start,
        start + len(old.encode()), new, f"{flat(old)} -> {flat(new)}", entry["says"],
    )  # fmt: skip

"""Are the wheel, the sdist and the wheel from the sdist complete, and is no file in them twice?

Usage: check_dist.py WHEEL SDIST WHEEL_FROM_SDIST, in the root of a checkout. Complete means: every
file that git tracks in quest/, kernels/ and reference/, as quest/..., quest/kernels/... and
quest/reference/..., and nothing else.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path


def tracked() -> dict[str, str]:
    """Path in the wheel to path in the checkout."""
    listed = subprocess.check_output(
        ["git", "ls-files", "--", "quest", "kernels", "reference"], text=True
    )
    paths = [p for p in listed.splitlines() if Path(p).is_file()]  # no symlinks to folders
    return {p if p.startswith("quest/") else f"quest/{p}": p for p in paths}


def wheel(path: str) -> dict[str, str]:
    """SHA-256 of what a wheel installs, metadata aside, by path."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        twice = [n for n, count in Counter(names).items() if count > 1]
        if twice:
            sys.exit(f"{path}: twice in the archive: {twice}")
        return {
            n: hashlib.sha256(archive.read(n)).hexdigest() for n in names if ".dist-info/" not in n
        }


def sdist(path: str) -> list[str]:
    """Files of an sdist, its top folder cut off."""
    with tarfile.open(path) as archive:
        return [m.name.partition("/")[2] for m in archive.getmembers() if not m.isdir()]


def main(direct: str, source: str, indirect: str) -> None:
    """Exit with what is wrong, or say what was seen."""
    installed, again, expected = wheel(direct), wheel(indirect), tracked()
    if installed != again:
        differing = sorted(set(installed.items()) ^ set(again.items()))
        sys.exit(f"the wheel and the wheel from the sdist differ: {differing}")
    if set(installed) != set(expected):
        sys.exit(
            f"in the checkout and not in the wheel: {sorted(set(expected) - set(installed))}; "
            f"in the wheel and not in the checkout: {sorted(set(installed) - set(expected))}"
        )
    for name, origin in expected.items():
        if hashlib.sha256(Path(origin).read_bytes()).hexdigest() != installed[name]:
            sys.exit(f"{name} in the wheel is not {origin}")
    contents = Counter(digest for n, digest in installed.items() if not n.endswith("__init__.py"))
    twice = [n for n, digest in installed.items() if contents[digest] > 1]
    if twice:
        sys.exit(f"the same contents twice in the wheel: {twice}")
    # In an sdist the two folders lie once: where the checkout has them.
    shipped = Counter(sdist(source))
    wrong = [n for n in expected.values() if shipped[n] != 1]
    wrong += [n for n in expected if n not in expected.values() and shipped[n]]
    if wrong:
        sys.exit(f"not once in the sdist: {wrong}")
    print(f"{len(installed)} files, each once, the same in the wheel, the sdist and its wheel")


if __name__ == "__main__":
    main(*sys.argv[1:])

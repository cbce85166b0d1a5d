"""Mutants of CUDA C++, made of its text: operators between spaces, numbers by ±1, lost calls.

Comments, strings (PTX among them), preprocessor lines and template arguments are left alone. A
mutant that NVRTC refuses is reported as refused, and counts for nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .mutant import Mutant, flat

OPERATORS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<<": ">>", ">>": "<<", "&": "|", "|": "&",
    "^": "|", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||",
    "||": "&&", "+=": "-=", "*=": "+=",
}  # fmt: skip
_SILENT = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|^[ \t]*#(?:\\\n|[^\n])*", re.DOTALL | re.MULTILINE
)
_COMMENT = re.compile(r"\"(?:\\.|[^\"\\])*\"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_SIGNS = "|".join(re.escape(o) for o in sorted(OPERATORS, key=len, reverse=True))
_OPERATOR = re.compile(rf"(?<= )({_SIGNS})(?= )")
_INTEGER = re.compile(r"(?<![\w.])(0x[0-9A-Fa-f]+|\d+)(?=u?(?:ll)?\b)(?![.\w]*[.])")
_FLOAT = re.compile(r"(?<![\w.])(\d+\.\d+(?:e[+-]?\d+)?)(?=f\b)")
_CALL = re.compile(r"^[ \t]*((?!return|else|for|if|while)[a-z_]\w*(?:\.\w+)?\([^;{}]*\);)", re.M)
_STEP = re.compile(
    r"^[ \t]*((?!const|return|int|float|u32|u64|i64|bool)[a-z_]\w* [-+*|&]?= [^;{}]+;)", re.M
)
_CHOICE = re.compile(r"(?<=\? )([\w.()+-]+)( : )([\w.()+-]+)")


def is_cuda(file: str) -> bool:
    """Whether a file is CUDA C++: a kernel or a header."""
    return file.endswith((".cu", ".cuh"))


def code(text: str) -> str:
    """A text without comments, empty lines and blanks at the ends of lines."""
    bare = _COMMENT.sub(lambda m: m[0] if m[0].startswith('"') else " ", text)
    return "\n".join(line.rstrip() for line in bare.splitlines() if line.strip())


def holders(file: str, root: Path) -> list[str]:
    """The .cu files that a text is part of: by itself, or as a header of theirs or of others."""
    includes = _includes(root)
    found, before = {file}, set[str]()
    while found != before:
        before = set(found)
        found |= {f for f, headers in includes.items() if headers & found}
    return sorted(f for f in found if f.endswith(".cu"))


def together(file: str, root: Path) -> list[str]:
    """The texts of every binary that a text is part of: its holders, and all that these include."""
    includes = _includes(root)
    found, before = set(holders(file, root)), set[str]()
    while found != before:
        before = set(found)
        found |= {h for f in before for h in includes.get(f, ())}
    return sorted(found)


def _includes(root: Path) -> dict[str, set[str]]:
    """The headers of ours that each text names."""
    return {
        f"kernels/{p.name}": {
            f"kernels/{h}" for h in re.findall(r'(?m)^#include "(.*)"', p.read_text())
        }
        for p in (root / "kernels").glob("*.cu*")
    }


def mutants(file: str, source: bytes) -> list[Mutant]:
    """All of one file, in the order of the source."""
    text = source.decode()
    masked = _SILENT.sub(lambda m: re.sub(r"[^\n]", "\0", m[0]), text)
    found = []
    counts = Counter[str]()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for operator, start, end, new in sorted(_changes(masked), key=lambda c: c[1]):
        first, last = text.count("\n", 0, start) + 1, text.count("\n", 0, end) + 1
        n = counts[operator]
        counts[operator] += 1
        # The whole line: a bare operator would not tell where it stands.
        line = text[starts[first - 1] : starts[last]]
        changed = text[starts[first - 1] : start] + new + text[end : starts[last]]
        found.append(Mutant(
            f"{file}:text:{operator}:{n}", "cuda", file, (first, last),
            len(text[:start].encode()), len(text[:end].encode()), new,
            f"{flat(line)} -> {flat(changed)}",
        ))  # fmt: skip
    return found


def _changes(text: str) -> Iterator[tuple[str, int, int, str]]:
    for m in _OPERATOR.finditer(text):
        yield "operator", *m.span(1), OPERATORS[m[1]]
    for m in _INTEGER.finditer(text):
        value = int(m[1], 0)
        for other in (value + 1, value - 1):
            if other >= 0:
                yield "constant", *m.span(1), hex(other) if m[1].startswith("0x") else str(other)
    for m in _FLOAT.finditer(text):
        yield "constant", *m.span(1), repr(float(m[1]) + 1) if float(m[1]) < 1e6 else f"2{m[1]}"
    for pattern in (_CALL, _STEP):
        for m in pattern.finditer(text):
            yield "remove", *m.span(1), ";"
    for m in _CHOICE.finditer(text):
        if m[1] != m[3]:  # of a longer arm it is but the first word
            yield "choice", *m.span(0), m[3] + m[2] + m[1]

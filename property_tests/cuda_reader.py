"""Reads CUDA C++ as launchers have it compiled: headers in, `#if` decided, constants computed.

As much of C as the sources have: statements with what they stand in, expressions of whole numbers,
the turns of loops. What has no value is a KeyError.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType
from typing import NamedTuple

from quest.kernels import cuda

Names = dict[str, int]
# What a statement stands in: ("if" or "else" or "while", condition), ("for", its head), ("lambda",
# ""); and what stands before it: ("let", "name = value"), ("array", "name[4]").
Around = tuple[tuple[str, str], ...]

NUMBER, WORD = r"(?:0x[0-9A-Fa-f]+|\d+)(?:u|ll|ull)?(?![.\w])", r"[A-Za-z_]\w*"
TOKEN = re.compile(rf"{NUMBER}|{WORD}|<<|>>|&&|\|\||[<>=!]=|[-+*/%&|^~!<>?:()]")
# The operators of C, the loosest first. A quotient is cut; what remains has the dividend's sign.
BINDING: list[tuple[str, ...]] = [
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="), ("<<", ">>"),
    ("+", "-"), ("*", "/", "%"),
]  # fmt: skip
PYTHON = {
    "||": "int(bool({} or {}))", "&&": "int(bool({} and {}))", "/": "cut({}, {})",
    "%": "rest({}, {})", "~": "(-1 - {})", "!": "int(not {})",
}  # fmt: skip
HEAD = re.compile(r"(if|for|while)(?: constexpr)? \(")
LEAVES = re.compile(r" \{? ?(?:return|continue|break)\b")
LAMBDA = re.compile(r"\[[&=]?\](?: ?\([^()]*\))? \{")
LOOP = re.compile(r"(?:int|u32) (\w+) = (.*?); (.*?); \1(?:(\+\+|--)| (.)= ([^,]*)).*")
CONSTANTS = re.compile(r"\bconst(?:expr)? (?:int|u32|bool) ([^;]*)")
ARRAYS = re.compile(r"(?:(?:static|const|__shared__) )*(?!return )\w+(?:<\w+>)? (\w+\[.*)")
ARRAY = re.compile(r"(\w+)((?:\[[^\[\]]+\])+)")
FUNCTION = re.compile(r"\b(\w+)\(((?:[^(){};]|\([^(){};]*\))*)\) ?(?:const )?\{")
CALL = re.compile(r"(?<![\w.])(\w+)(?:<[^<>()]*>)?\(")


def cut(a: int, b: int) -> int:
    """a / b as in C."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@functools.cache
def _code(c: str) -> CodeType:
    """A C expression of whole numbers in Python; of another, what raises a KeyError."""
    tokens = TOKEN.findall(c)[::-1]
    whole = "".join(tokens[::-1]) == c.replace(" ", "")

    def take(*signs: str) -> str:
        return tokens.pop() if tokens and tokens[-1] in signs else ""

    def choice() -> str:
        test = binary(0)
        if not take("?"):
            return test
        yes, colon = choice(), take(":")
        return f"({yes} if {test} else {choice()})" if colon else "?"

    def binary(level: int) -> str:
        if level == len(BINDING):
            return unary()
        left = binary(level + 1)
        while sign := take(*BINDING[level]):
            left = PYTHON.get(sign, f"({{}} {sign} {{}})").format(left, binary(level + 1))
        return left

    def unary() -> str:
        if sign := take("-", "+", "~", "!"):
            return PYTHON.get(sign, f"({sign}{{}})").format(unary())
        if take("("):
            inner = choice()
            return inner if take(")") else "?"
        token = tokens.pop() if tokens else "?"
        if token[0].isdigit():
            return str(int(token.rstrip("ul"), 0))
        return f"names[{token!r}]" if re.match(WORD, token) else "?"

    made = choice() if whole and tokens else "?"
    return compile(f"names[{c!r}]" if tokens or "?" in made else made, "<C>", "eval")


def value(c: str, names: Names) -> int:
    """Of a C expression of whole numbers; KeyError where it is none, or has other names."""
    return int(eval(_code(c), {"cut": cut, "rest": lambda a, b: a - b * cut(a, b), "names": names}))


def closing(text: str, at: int) -> int:
    """The place of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"no bracket closes that of {text[at : at + 80]}")


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _end(text: str, at: int) -> int:
    """Where the statement at `at` ends."""
    if text[at] == "{":
        return closing(text, at) + 1
    if head := HEAD.match(text, at):
        end = _end(text, closing(text, head.end() - 1) + 2)
        other = head[1] == "if" and text.startswith(" else ", end)
        return _end(text, end + len(" else ")) if other else end
    while text[at] != ";":
        at = closing(text, at) + 1 if text[at] in "([{" else at + 1
    return at + 1


def statements(text: str, around: Around = ()) -> Iterator[tuple[str, Around]]:
    """The simple statements and conditions of a body, in their order, each with what it is in."""
    at = 0
    while at < len(text):
        if text[at] == " ":
            at += 1
            continue
        end = _end(text, at)
        if head := HEAD.match(text, at):
            close = closing(text, head.end() - 1)
            told, then = text[head.end() : close], _end(text, close + 2)
            if head[1] != "for":
                yield told, around
            yield from statements(text[close + 1 : then], (*around, (head[1], told)))
            yield from statements(text[then:end].removeprefix(" else"), (*around, ("else", told)))
            if head[1] == "if" and then == end and LEAVES.match(text, close + 1):
                around = (*around, ("else", told))
        elif text[at] == "{":
            yield from statements(text[at + 1 : end - 1], around)
        else:
            line = text[at : end - 1]
            while inner := LAMBDA.search(line):
                close = closing(line, inner.end() - 1)
                yield from statements(line[inner.end() : close], (*around, ("lambda", "")))
                line = line[: inner.start()] + line[close + 1 :]
            arrays = _arrays(line)
            yield "" if arrays else line, around
            around = (*around, *arrays)
            if constants := CONSTANTS.fullmatch(line):
                around = (*around, *(("let", each) for each in split(constants[1])))
        at = end


def _arrays(line: str) -> Around:
    """Those that a statement declares."""
    found = ARRAYS.fullmatch(line.strip())
    declared = split(found[1]) if found else []
    return tuple(("array", each.partition("=")[0].strip()) for each in declared)


def worlds(around: Around, names: Names) -> Iterator[Names]:
    """The values of names in all turns of the loops around a statement, where they reach it."""
    for i, (kind, told) in enumerate(around):
        if kind == "for" and (loop := LOOP.fullmatch(told)):
            name, first, condition, one, sign, by = loop.groups()
            names = {n: v for n, v in names.items() if n != name}
            with suppress(KeyError):  # its turns are not known, and neither is its variable
                turns, now = [], value(first, names)
                while value(condition, {**names, name: now}):
                    turns.append(now)
                    now = value(f"{now} {(one or sign)[0]} ({by or 1})", names)
                    assert len(turns) < 2**12, f"does it end? for ({told})"
                for turn in turns:
                    yield from worlds(around[i + 1 :], {**names, name: turn})
                return
        elif kind == "let":
            name, _, told = told.partition(" = ")
            names = {n: v for n, v in names.items() if n != name}
            with suppress(KeyError):
                names[name] = value(told, names)
        elif kind in ("if", "else"):
            with suppress(KeyError):
                if bool(value(told, names)) != (kind == "if"):
                    return
    yield names


class Function(NamedTuple):
    """What stands before its name, its body, and the arrays that it is given."""

    before: str
    body: str
    arrays: Around


class Text(NamedTuple):
    """What is compiled; its constants, and its functions by their names."""

    code: str
    names: Names
    functions: dict[str, list[Function]]

    def statements(self) -> Iterator[tuple[str, Around]]:
        """Of all functions."""
        for f in itertools.chain(*self.functions.values()):
            yield from statements(f.body, f.arrays)


def _compiled(text: str, names: Names) -> str:
    """A text without comments and what `#if` leaves out; adds its constants to `names`."""
    kept, branches = [], list[int]()  # of each #if: 0 before the branch that is taken, 1 in it, 2
    for line in re.sub(r"//.*|\\\n", "", text).splitlines():
        word, _, told = line.strip().partition(" ")
        inside = all(b == 1 for b in branches)
        if word in ("#if", "#ifndef"):
            met = inside and (told not in names if word == "#ifndef" else value(told, names))
            branches.append(int(bool(met)))
        elif word in ("#elif", "#else"):
            met = not branches[-1] and (word == "#else" or value(told, names))
            branches[-1] = 2 if branches[-1] else int(bool(met))
        elif word == "#endif":
            branches.pop()
        elif inside and word == "#define":
            name, _, told = told.partition(" ")
            with suppress(KeyError):
                names[name] = value(told.strip(), names)
        elif inside and not word.startswith("#"):
            kept.append(line)
    code = " ".join(" ".join(kept).split())
    for declared in re.findall(r"\bconstexpr (?:int|u32|bool) ([^;]*);", code):
        for name, _, told in (each.partition(" = ") for each in split(declared)):
            with suppress(KeyError):
                names[name] = value(told, names)
    # No bracket and no semicolon in a string: they are counted.
    return re.sub(r'"[^"]*"', lambda s: re.sub(r'[^\w.%, "]', " ", s[0]), code)


@functools.cache
def read(source: str, macros: tuple[tuple[str, int], ...]) -> Text:
    """What is compiled of a source with macros, for a GPU of compute capability 9."""
    names = {"__CUDA_ARCH__": 900, **dict(macros)}
    code = _compiled(cuda._text(source), names)
    members: list[tuple[range, Around]] = []
    for struct in re.finditer(r"\bstruct [^;{}]*\{", code):
        end = closing(code, struct.end() - 1)
        lines = code[struct.end() : end].split("{")[0].split(";")  # before its first function
        members.append((range(struct.start(), end), sum(map(_arrays, lines), ())))
    functions: dict[str, list[Function]] = {}
    for f in FUNCTION.finditer(code):
        given = [("array", "".join(a)) for a in re.findall(r"\(&(\w+)\)((?:\[[^\]]+\])+)", f[2])]
        own = itertools.chain(*(arrays for where, arrays in members if f.start() in where))
        before = re.split("[;}]", code[: f.start()])[-1]
        body = code[f.end() : closing(code, f.end() - 1)]
        functions.setdefault(f[1], []).append(Function(before, body, (*own, *given)))
    return Text(code, names, functions)

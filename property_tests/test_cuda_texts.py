"""Rules of CUDA, PTX and C++ that the texts of CUDA C++ keep, read from the texts; no GPU.

Hardware forgives much: a mask that lacks a lane, a barrier with one arrival too many, an element
beyond the last. No result tells. Texts are read as launchers have them compiled: with their
headers, `#if` decided, constants computed. What has no value is a KeyError; it is passed over where
a rule is about what has one, and fails the test where the rule asks for it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
import torch

from quest.kernels import blocks, cuda, few, hopper, product, rows, sparse

pytestmark = pytest.mark.whole

Names = dict[str, int]
# What a statement stands in: ("if" or "else" or "while", condition), ("for", its head), ("lambda",
# ""); and what stands before it: ("let", "name = value"), ("array", "name[4]").
Around = tuple[tuple[str, str], ...]
HALF, FLOAT = torch.bfloat16, torch.float32

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


def _close(text: str, at: int) -> int:
    """The place of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"no bracket closes that of {text[at : at + 80]}")


def _split(text: str) -> list[str]:
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
        return _close(text, at) + 1
    if head := HEAD.match(text, at):
        end = _end(text, _close(text, head.end() - 1) + 2)
        other = head[1] == "if" and text.startswith(" else ", end)
        return _end(text, end + len(" else ")) if other else end
    while text[at] != ";":
        at = _close(text, at) + 1 if text[at] in "([{" else at + 1
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
            close = _close(text, head.end() - 1)
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
                close = _close(line, inner.end() - 1)
                yield from statements(line[inner.end() : close], (*around, ("lambda", "")))
                line = line[: inner.start()] + line[close + 1 :]
            arrays = _arrays(line)
            yield "" if arrays else line, around
            around = (*around, *arrays)
            if constants := CONSTANTS.fullmatch(line):
                around = (*around, *(("let", each) for each in _split(constants[1])))
        at = end


def _arrays(line: str) -> Around:
    """Those that a statement declares."""
    found = ARRAYS.fullmatch(line.strip())
    declared = _split(found[1]) if found else []
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


class Variant(NamedTuple):
    """What a launcher asks for: a source with macros, in clusters, with shared memory.

    consumers: threads of a block that compute, where others load for them.
    """

    source: str
    macros: tuple[tuple[str, int], ...]
    cluster: int = 1
    consumers: int = 0
    shared: int = 0


def _variants() -> Iterator[Variant]:
    made: Any = Variant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "compile_", lambda *told, cached: (told[0], tuple(told[2].items())))
        for bits, tiles, cluster in itertools.product((1, 2, 4), few.TILES, few.CLUSTERS):
            for dtype in (None, HALF):
                yield made(*few.compile_(bits, tiles, cluster, HALF, dtype), cluster)
        for out, epilogue in ((torch.int32, hopper.RAW), (HALF, hopper.CORRECTED)):
            for one in (*product.WIDE.values(), product.MIDDLE, product.NARROW):
                asked = product.compile_(one == product.WIDE[True], epilogue, out, 2, one)
                yield made(*asked, product.CLUSTER, product.THREADS - 128, one.shared)
            for tile in (sparse.WIDE, sparse.NARROW):
                asked = sparse.compile_(epilogue, out, tile)
                yield made(*asked, tile.cluster, tile.threads - 128, tile.shared)
    for dtype, prologue in ((FLOAT, blocks.PLAIN), *((HALF, n) for n in range(4))):
        for form, bits, saved in (
            (blocks.VALUES, 0, 0), (blocks.PACKED, 1, 0), (blocks.PACKED, 4, 0),
            (blocks.CODES, 0, 0), (blocks.INTEGERS, 0, 2), (blocks.INTEGERS, 0, 4),
        ):  # fmt: skip
            macros = blocks.macros(dtype, 4, True, form, bits, prologue, saved=saved)
            yield made("blocks.cu", tuple(macros.items()))
    for dtype, kind in itertools.product((HALF, FLOAT), blocks.OPERANDS):
        yield made("rows.cu", tuple(rows.macros(dtype, 2, kind).items()))


VARIANTS = list(_variants())
SOURCES = sorted(p.name for p in Path(blocks.__file__).parent.glob("*.cu"))
each_source = pytest.mark.parametrize("source", SOURCES)


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
        for name, _, told in (each.partition(" = ") for each in _split(declared)):
            with suppress(KeyError):
                names[name] = value(told, names)
    # No bracket and no semicolon in a string: they are counted.
    return re.sub(r'"[^"]*"', lambda s: re.sub(r'[^\w.%, "]', " ", s[0]), code)


@functools.cache
def read(variant: Variant) -> Text:
    """What is compiled of it, for a GPU of compute capability 9."""
    names = {"__CUDA_ARCH__": 900, **dict(variant.macros)}
    code = _compiled(cuda._text(variant.source), names)
    members: list[tuple[range, Around]] = []
    for struct in re.finditer(r"\bstruct [^;{}]*\{", code):
        end = _close(code, struct.end() - 1)
        lines = code[struct.end() : end].split("{")[0].split(";")  # before its first function
        members.append((range(struct.start(), end), sum(map(_arrays, lines), ())))
    functions: dict[str, list[Function]] = {}
    for f in FUNCTION.finditer(code):
        given = [("array", "".join(a)) for a in re.findall(r"\(&(\w+)\)((?:\[[^\]]+\])+)", f[2])]
        own = itertools.chain(*(arrays for where, arrays in members if f.start() in where))
        before = re.split("[;}]", code[: f.start()])[-1]
        body = code[f.end() : _close(code, f.end() - 1)]
        functions.setdefault(f[1], []).append(Function(before, body, (*own, *given)))
    return Text(code, names, functions)


def _of(source: str) -> Iterator[tuple[Variant, Text]]:
    found = [v for v in VARIANTS if v.source == source]
    assert found, f"no variant of {source}"
    return ((v, read(v)) for v in found)


@each_source
def test_instructions_of_a_warp_name_all_its_threads(source: str) -> None:
    """PTX ISA, shfl.sync, vote.sync, redux.sync, bar.warp.sync: undefined where the executing
    thread is not in the mask. Whole warps come to each of them here.
    """
    masks: set[str] = set()
    for _, text in _of(source):
        found = re.findall(r"\b__(?:\w+_sync|syncwarp)\(([^,()]+)", text.code)
        assert {m: hex(value(m, text.names)) for m in found} == dict.fromkeys(found, "0xffffffff")
        masks |= {*found}
    assert masks


NAMED = re.compile(
    r"(?<![\w.])bar(?:rier)?(?:\.cta)?\.(?:sync|arrive|red)[\w.]* ([%\w]+)(?:, ([%\w]+))?"
    r'[^"]*"([^;]*);'
)


@each_source
def test_named_barriers_are_there_and_apart(source: str) -> None:
    """PTX ISA, bar: a block has 16, numbered 0 to 15, where whole warps meet. 0 is that of
    __syncthreads; threads that meet by themselves need others, each group its own.
    """
    for variant, text in _of(source):
        for found in NAMED.finditer(text.code):
            given = re.findall(r'"\w*" ?\(([^()]*)\)', found[3])
            number, threads = (given[int(o[1:])] if o[0] == "%" else o for o in found.group(1, 2))
            together = value(threads, text.names)
            assert together % 32 == variant.consumers % together == 0
            group = {*re.findall(WORD, number)} - {*text.names}
            assert len(group) <= 1, number
            groups = range(variant.consumers // together)
            met = [value(number, {**text.names, **dict.fromkeys(group, g)}) for g in groups]
            assert len({*met}) == len(met) > 0, (number, met)
            assert {*met} <= {*range(1, 16)}, (number, met)


PROMISE = re.compile(
    r"different banks\.\n(?:template <int (\w+)> )?.*\(\w+ (\w+), \w+ (\w+)\) \{\n([^{}]*)\n\}"
)


def _places(source: str, names: Names, count: int, shape: tuple[int, int]) -> list[list[int]]:
    """What the function that promises different banks gives for both arguments below `shape`.

    count: its template argument, if it has one.
    """
    promise = PROMISE.search(cuda._text(source))
    assert promise is not None, f"no function of {source} promises different banks"
    body = " ".join(promise[4].split())
    ((line, around),) = (s for s in statements(body) if s[0].startswith("return "))
    of = line.removeprefix("return ")
    made = [
        value(of, world)
        for row, chunk in itertools.product(*map(range, shape))
        for world in worlds(
            around, {**names, promise[1]: count, promise[2]: row, promise[3]: chunk}
        )
    ]
    assert sorted(made) == [*range(shape[0] * shape[1])]  # each has its own, and none is left
    return [made[at : at + shape[1]] for at in range(0, len(made), shape[1])]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_chunks_of_blocks_lie_in_different_banks(count: int) -> None:
    """CUDA C++ Programming Guide, Shared Memory: 32 banks of 4 bytes. Chunks of 16 bytes lie in
    different ones where their places differ modulo 8.
    """
    found = _places("blocks.cu", {}, count, (blocks.TILE, count))
    for first, chunk in itertools.product(range(0, blocks.TILE, 8), range(count)):
        assert len({row[chunk] % 8 for row in found[first : first + 8]}) == 8, (first, chunk)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("tiles", few.TILES)
def test_chunks_of_few_rows_lie_in_different_banks(tiles: int, bits: int) -> None:
    """As above, for eight chunks in a row of A; of one bit a step has but four."""
    step, asked = 4 * few._parts(bits), {("BITS", bits), ("NT", tiles)}
    names = next(text.names for v, text in _of("few.cu") if asked <= {*v.macros})
    at_once = min(8, step)
    for row in _places("few.cu", names, 0, (8 * tiles, 3 * step)):
        for first in range(0, 3 * step, at_once):
            assert len({at % 8 for at in row[first : first + at_once]}) == at_once, first


def _meetings(body: str, text: Text, known: dict[str, list[str]]) -> list[str]:
    """What comes in turn: arrivals and waits at the cluster's barrier, and what is "remote"."""
    found: list[str] = []
    for line, around in statements(body):
        here: list[str] = []
        for word in re.finditer(rf"barrier\.cluster\.(\w+)|shared  cluster|{CALL.pattern}", line):
            if word[2] in text.functions and word[2] not in known:
                of = text.functions[word[2]]
                known[word[2]] = [m for f in of for m in _meetings(f.body, text, known)]
            here += known.get(word[2], []) if word[2] else [word[1] or "remote"]
        conditions = [each for each in around if each[0] not in ("let", "array")]
        if {*here} - {"remote"}:
            assert {kind for kind, _ in conditions} <= {"if", "else"}, (line, around)
            reached = all(bool(value(c, text.names)) == (kind == "if") for kind, c in conditions)
        else:
            reached = bool(here) and any(True for _ in worlds(around, text.names))
        found += here if reached else []
    return found


@each_source
def test_clusters_arrive_and_wait_in_turn(source: str) -> None:
    """PTX ISA, barrier.cluster: a thread arrives once before the barrier completes, and again only
    when it has waited; whole warps come to what is .aligned. So that it stands in no loop, and only
    under conditions of constants. CUDA C++ Programming Guide, Distributed Shared Memory: all blocks
    have begun before one writes to another, and none ends before they have. A kernel without a
    cluster has nobody to wait for.
    """
    for variant, text in _of(source):
        (kernel,) = (f for fs in text.functions.values() for f in fs if "__global__" in f.before)
        met = _meetings(kernel.body, text, {})
        barriers = [each for each in met if each != "remote"]
        assert barriers == ["arrive", "wait"] * (len(barriers) // 2), (variant, met)
        assert bool(barriers) == (variant.cluster > 1), (variant, met)
        others = (*met[: met.index("wait")], *met[-2:]) if barriers else ()
        assert "remote" not in others, (variant, met)


@each_source
def test_barriers_lie_apart_in_shared_memory(source: str) -> None:
    """PTX ISA, mbarrier: 8 bytes at a multiple of 8, and none is initialised where one is."""
    for variant, text in _of(source):
        inits = {
            n for n, fs in text.functions.items() if any("mbarrier.init" in f.body for f in fs)
        }
        at: list[int] = []
        for line, around in text.statements():
            for call in (found for found in CALL.finditer(line) if found[1] in inits):
                place = _split(line[call.end() : _close(line, call.end() - 1)])[0]
                for world in worlds(around, text.names):
                    (base,) = {*re.findall(WORD, place)} - {*world}  # where shared memory begins
                    at.append(value(place, {**world, base: 0}))
        assert bool(at) == bool(variant.consumers)
        assert len({*at}) == len(at), (variant, sorted(at))
        assert all(a % 8 == 0 <= a <= variant.shared - 8 for a in at), (variant, sorted(at))


def _bounds(subscript: str, names: Names) -> tuple[int, int]:
    """The least and the most that it is, by its value, or as a remainder or by a mask."""
    with suppress(KeyError):
        return value(subscript, names), value(subscript, names)
    last = re.fullmatch(r".* ([&%]) (\w+|\([^()]*\))", subscript)
    if last is None:
        raise KeyError(subscript)
    return 0, value(last[2], names) - (last[1] == "%")


@each_source
def test_subscripts_lie_in_their_arrays(source: str) -> None:
    """C++ standard, expr.add: what lies beyond the last element is undefined. Of all subscripts
    that constants and loops tell.
    """
    seen = 0
    for _, text in _of(source):
        for line, around in text.statements():
            told = (ARRAY.fullmatch(told) for kind, told in around if kind == "array")
            arrays = {a[1]: re.findall(r"\[(.+?)\]", a[2]) for a in told if a}
            used: list[tuple[str, str]] = []
            for name in re.finditer(rf"(?<![\w.>]){WORD}(?=\[)", line):
                at = name.end()
                for size in arrays.get(name[0], []):
                    end = _close(line, at)
                    used.append((line[at + 1 : end], size))
                    at = end + 1
            for world in worlds(around, text.names) if used else ():
                for subscript, size in used:
                    with suppress(KeyError):
                        least, most = _bounds(subscript, world)
                        assert 0 <= least <= most < value(size, text.names), (
                            line,
                            subscript,
                            world,
                        )
                        seen += 1
    assert seen


REFUSED = [
    *((HALF, form, 0, n) for form in range(4) if form != blocks.INTEGERS for n in (2, 4)),
    *((HALF, blocks.INTEGERS, 0, n) for n in (1, 3, 5, 6, 8)),
    *((FLOAT, blocks.INTEGERS, n, 0) for n in (blocks.GATED, blocks.NORMED, blocks.ADDED)),
]


@pytest.mark.parametrize(("dtype", "form", "prologue", "saved"), REFUSED, ids=str)
def test_what_a_static_assert_refuses(
    dtype: torch.dtype, form: int, prologue: int, saved: int
) -> None:
    """C++ standard, dcl.pre: a program whose static_assert fails is ill-formed."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(dtype, 4, True, form, 1, prologue, saved=saved)
    with pytest.raises(RuntimeError, match="static assertion failed"):
        cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)

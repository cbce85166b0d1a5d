"""Rules of CUDA, PTX and C++ that the texts of CUDA C++ keep, read from the texts; no GPU.

Hardware forgives much: a mask that lacks a lane, a barrier with one arrival too many, an element
beyond the last. No result tells. What has no value (`cuda_reader`) is passed over where a rule is
about what has one, and fails the test where the rule asks for it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from property_tests.cuda_reader import (
    ARRAY,
    CALL,
    WORD,
    Names,
    Text,
    closing,
    read,
    split,
    statements,
    value,
    worlds,
)  # fmt: skip
from quest import operands
from quest.grids import Grid
from quest.kernels import blocks, cuda, few, forms, hopper, masked, product, rows, sparse

pytestmark = pytest.mark.whole

SIXTEEN, FLOAT = torch.bfloat16, torch.float32


class Variant(NamedTuple):
    """What a launcher asks for: a source with macros, in clusters, with shared memory.

    consumers: threads of a block that compute, where others load for them.
    """

    source: str
    macros: tuple[tuple[str, int], ...]
    cluster: int = 1
    consumers: int = 0
    shared: int = 0


# Of rows.cu: a warp, several that are no power of two, and as many as there are for a long row.
WIDTHS = (1024, 5632, 17408)
FORMS = (  # with bits, and those in which codes are saved
    (forms.VALUES, 0, 0), (forms.PACKED, 1, 0), (forms.PACKED, 4, 0),
    (forms.CODES, 0, 0), (forms.INTEGERS, 0, 2), (forms.INTEGERS, 0, 4),
)  # fmt: skip


def _variants() -> Iterator[Variant]:
    made: Any = Variant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "compile_", lambda *told, cached: (told[0], tuple(told[2].items())))
        for bits, tiles, cluster in itertools.product((1, 2, 4), few.TILES, few.CLUSTERS):
            for out in (FLOAT, SIXTEEN, torch.float16):
                yield made(*few.compile_(bits, tiles, cluster, out), cluster)
        for out, epilogue in ((torch.int32, hopper.RAW), (SIXTEEN, hopper.CORRECTED)):
            for one in product.KINDS.values():
                binary = one == product.TALL
                asked = product.compile_(binary, epilogue, out, 2, one)
                yield made(*asked, product.CLUSTER, product.THREADS - 128, one.shared)
                if epilogue != hopper.RAW:
                    # With a gate, with a residual, and with heads that are turned.
                    for more in ((True,), (False, True), (False, False, 16), (False, False, 64)):
                        asked = product.compile_(binary, epilogue, out, 2, one, *more)
                        yield made(*asked, product.CLUSTER, product.THREADS - 128, one.shared)
            for tile in (sparse.WIDE, sparse.NARROW):
                asked = sparse.compile_(epilogue, out, tile)
                yield made(*asked, tile.cluster, tile.threads - 128, tile.shared)
    for dtype, prologue in ((FLOAT, blocks.PLAIN), *((SIXTEEN, n) for n in range(4))):
        for form, bits, saved in FORMS:
            for shape in (
                {}, {"warps": 0, "tile": 16}, {"warps": 2}, {"rows": 2, "warps": 3},
                {"tile": 16}, {"warps": 2, "tile": 16}, {"rows": 5, "warps": 2, "tile": 16},
            ):  # fmt: skip
                macros = blocks.macros(dtype, 4, True, form, bits, prologue, saved=saved, **shape)
                yield made("blocks.cu", tuple(macros.items()))
    for dtype, normed, width in itertools.product((SIXTEEN, FLOAT), (False, True), WIDTHS):
        for form, bits, saved in FORMS if dtype == SIXTEEN or not normed else ():
            shape, edge = rows.shape(width), not normed
            macros = rows.macros(dtype, 4, edge, form, bits, shape, normed, saved)
            yield made("rows.cu", tuple(macros.items()))
    for dtype, out in itertools.product((SIXTEEN, torch.float16), (None, FLOAT)):
        yield made("masked.cu", tuple(masked.macros(dtype, out or dtype).items()))


VARIANTS = list(_variants())
SOURCES = sorted(p.name for p in Path(blocks.__file__).parent.glob("*.cu"))
each_source = pytest.mark.parametrize("source", SOURCES)


def _of(source: str) -> Iterator[tuple[Variant, Text]]:
    found = [v for v in VARIANTS if v.source == source]
    assert found, f"no variant of {source}"
    return ((v, read(v.source, v.macros)) for v in found)


@each_source
def test_instructions_of_a_warp_name_all_its_threads(source: str) -> None:
    """PTX ISA, shfl.sync, vote.sync, redux.sync, bar.warp.sync: undefined where the executing
    thread is not in the mask. Whole warps come to each of them here; __syncwarp by itself is all.
    """
    masks: set[str] = set()
    for _, text in _of(source):
        found = re.findall(r"\b__(?:\w+_sync|syncwarp)\(([^,()]*)", text.code)
        found = [mask or "0xffffffff" for mask in found]
        assert {m: hex(value(m, text.names)) for m in found} == dict.fromkeys(found, "0xffffffff")
        masks |= {*found}
    assert bool(masks) == (source != "few.cu")  # whose threads meet in its barriers alone


def test_lanes_meet_before_the_tensor_cores() -> None:
    """PTX ISA, mma: all threads of a warp come to what is .aligned. Lanes whose block of masked.cu
    is not there pass over what reads it; they meet the others before a group is transformed.
    """
    for _, text in _of("masked.cu"):
        (kernel,) = text.functions["masked"]
        lines = [
            (line, [each for each in around if each[0] not in ("let", "array")])
            for line, around in statements(kernel.body)
        ]
        parted = [i for i, (_, around) in enumerate(lines) if ("if", "own < total") in around]
        meets = [i for i, (line, _) in enumerate(lines) if line == "__syncwarp()"]
        group = [i for i, (line, _) in enumerate(lines) if line.startswith("transform_group(")]
        assert len(parted) > 2
        assert len(meets) == len(group) == 1
        assert max(parted) < meets[0] < group[0]
        assert not lines[meets[0]][1]
        assert not lines[group[0]][1]


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
        named = [*NAMED.finditer(text.code)]
        assert bool(named) == bool(variant.consumers)
        for found in named:
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


def _places(name: str, text: Text, shape: tuple[int, int]) -> list[list[int]]:
    """What a function of a row and a chunk gives for all below `shape`: places of 16 bytes."""
    (function,) = text.functions[name]
    declared = re.search(rf"\b{name}\(\w+ (\w+), \w+ (\w+)\)", text.code)
    assert declared is not None
    ((line, around),) = (s for s in statements(function.body) if s[0].startswith("return "))
    of = line.removeprefix("return ")
    made = [
        value(of, world)
        for row, chunk in itertools.product(*map(range, shape))
        for world in worlds(around, {**text.names, declared[1]: row, declared[2]: chunk})
    ]
    assert sorted(made) == [*range(shape[0] * shape[1])]  # each has its own, and none is left
    return [made[at : at + shape[1]] for at in range(0, len(made), shape[1])]


def test_chunks_of_float32_lie_in_different_banks() -> None:
    """CUDA C++ Programming Guide, Shared Memory: 32 banks of 4 bytes. Chunks of 16 bytes lie in
    different ones where their places differ modulo 8. Of lanes 4 r + q eight at a time read or
    write, four of each of two blocks: wherever `turned` is asked for a place.
    """
    whole = re.sub(r"//.*", "", cuda._text("blocks.cu"))
    text = next(text for v, text in _of("blocks.cu") if ("IN", forms.INPUTS[FLOAT]) in v.macros)
    found = _places("turned", text, (8, 32))
    calls = [
        split(whole[use.end() : closing(whole, use.end() - 1)])
        for use in re.finditer(r"(?<!int )\bturned\(", whole)
    ]
    # A lane's own, turned(row, chunk), and how much further: turned(0, chunk).
    pairs = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(pairs) == 4, calls
    for (row, chunk), (none, further) in pairs:
        assert none == "0"
        for i, pair in itertools.product(range(8), range(0, 8, 2)):
            met = []
            for r, q in itertools.product((pair, pair + 1), range(4)):
                world = {"r": r, "eighth": r, "q": q, "quad": q, "i": i}
                own = found[value(row, world)][value(chunk, world)]
                met.append((own ^ found[0][value(further, world)]) % 8)
            assert len({*met}) == 8, (chunk, further, i, pair)


def test_chunks_of_sixteen_bits_lie_in_different_banks() -> None:
    """As above: a lane's chunks lie 32 apart, and those of lanes in a row in a row."""
    whole = re.sub(r"//.*", "", cuda._text("blocks.cu"))
    # A group begins at a slot, and its first chunks of lanes at their own.
    slots = re.findall(r"\btile \+ ([^,;)]+)", whole)
    assert {*slots} == {"g * SLOT", "g * SLOT + lane"}
    assert "const uint4 *const slot = tile + g * SLOT;" in whole
    within = re.findall(r"\bslot(?:\[| \+ )(lane.*?)(?:\]|$)", whole, re.M)
    within += re.findall(r"\bown\[(.*?)\]", whole)
    assert len(within) >= 4, within
    seen = 0
    for _, text in ((v, t) for v, t in _of("blocks.cu") if not t.names["WIDE"]):
        assert text.names["SLOT"] == 8 * 16  # blocks of a group, and chunks of a block
        for place, i in itertools.product(within, range(4)):
            for lane in (0, 1, 31):
                at = value(place, {**text.names, "lane": lane, "i": i})
                assert at % 32 == (lane if "lane" in place else 0)
                seen += 1
    assert seen


def test_tiles_and_what_is_gathered_have_room() -> None:
    """Of the shared memory that a warp is launched with; no variant leaves some that all leave."""
    (gathered,) = re.findall(r"struct Gathered \{([^{}]*)\}", cuda._text("blocks.cu"))
    left = set()
    for variant, text in _of("blocks.cu"):
        names, macros = text.names, dict(variant.macros)
        arrays = re.findall(r"u32 \w+\[(.+?)\]\[(.+?)\];", gathered)
        bytes_ = 4 * sum(value(a, names) * value(b, names) for a, b in arrays)
        bytes_ += 16 * names["GROUPS"] * 8 * names["CHUNKS"]
        dtype = next(t for t, number in forms.INPUTS.items() if number == macros["IN"])
        left.add(
            blocks.Shape(1, 1, names["TILE"], 1, names["TILE"]).shared(dtype.itemsize) - bytes_
        )
    assert min(left) == 0


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("tiles", few.TILES)
def test_chunks_of_few_rows_lie_in_different_banks(tiles: int, bits: int) -> None:
    """As above, for eight chunks in a row of A; of one bit a step has but four."""
    step, asked = 4 * few._parts(bits), {("BITS", bits), ("NT", tiles)}
    text = next(text for v, text in _of("few.cu") if asked <= {*v.macros})
    own = [_returned("place_of", text, lane=lane) for lane in range(32)]
    at_once, chunks, seen = min(8, step), 96, []
    for row in range(8 * tiles):
        made = [
            _returned("place", text, row=row, group=q // 32, of_lane=own[q % 32])
            for q in range(chunks)
        ]
        seen += made
        for first in range(0, chunks, at_once):
            assert len({at % 8 for at in made[first : first + at_once]}) == at_once, first
    assert sorted(seen) == [*range(8 * tiles * chunks)]  # each has its own, and none is left
    # A group is whole steps, and a step's chunks lie together: where the products look.
    assert 32 % step == 0
    assert {at // (8 * tiles * step) for at in own[:step]} == {0}


def _returned(name: str, text: Text, **world: int) -> int:
    """What a function gives for these arguments, which it calls by the same names."""
    (function,) = text.functions[name]
    ((line, around),) = (s for s in statements(function.body) if s[0].startswith("return "))
    (found,) = worlds(around, {**text.names, **world})
    made: int = value(line.removeprefix("return "), found)
    return made


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
    have begun before one writes to another, and none ends before they have; or one thread of each
    waits for what others write there (see the next).
    """
    for variant, text in _of(source):
        if variant.cluster == 1:  # a block alone has nobody to wait for
            continue
        (kernel,) = (f for fs in text.functions.values() for f in fs if "__global__" in f.before)
        met = _meetings(kernel.body, text, {})
        barriers = [each for each in met if each != "remote"]
        assert barriers == ["arrive", "wait"] * max(len(barriers) // 2, 1), (variant, met)
        ends = [] if source in WAITS_AT_THE_END else met[-2:]
        assert "remote" not in (*met[: met.index("wait")], *ends), (variant, met)


@pytest.mark.parametrize("source", ["blocks.cu", "rows.cu"])
def test_what_codes_become_is_what_operands_say(source: str) -> None:
    """By hand as well: 4 bits are 16 codes from 0, less 120; of sums as of entries."""
    seen = {}
    for levels in (*range(2, 129), 256):
        points = tuple(float(2 * i - (levels - 1)) for i in range(levels))
        grid = Grid(f"of{levels}", points, 2.0, 1.0)
        for kind in operands.KINDS if levels in (2, 256) else ("integers",):
            if (kind == "codes") != (levels == 256):
                continue
            if source == "rows.cu":
                how = forms.OPERANDS[kind]
                macros = rows.macros(torch.float32, levels, False, *how, rows.shape(128), False, 0)
            else:
                macros = blocks.macros(torch.float32, levels, False, *forms.OPERANDS[kind])
            names = read(source, tuple(macros.items())).names
            form = operands.form(grid, kind)
            step = form.spread * (1 if levels % 2 else 2)
            top = round(grid.outer / form.unit)
            assert (names["STRIDE"], names["TOP"]) == (step, top), (levels, kind)
            seen[levels, kind] = step, top
    assert seen[16, "integers"] == (16, 120)
    assert seen[3, "integers"] == seen[2, "integers"][1:] * 2 == (64, 64)
    assert seen[2, "bits"] == (2, 1)
    assert seen[256, "codes"] == (2, 255)


WAITS_AT_THE_END = ("product.cu",)


@pytest.mark.parametrize("source", WAITS_AT_THE_END)
def test_a_block_ends_when_its_last_stages_are_given_back(source: str) -> None:
    """By both blocks: the producer waits for the phase of each one's last use, behind its loop."""
    for variant, text in _of(source):
        (kernel,) = text.functions[source.partition(".")[0]]
        stages, empty = text.names["STAGES"], text.names["EMPTY_AT"]
        waits = [
            (line, around)
            for line, around in statements(kernel.body)
            if line.startswith("barrier_wait(base + EMPTY_AT")
        ]
        line, around = waits[-1]  # the others are in the loop of turns
        told = [each for each in around if each[0] != "let"]
        assert [kind for kind, _ in told] == ["if", "if", "for"], told
        assert told[:2] == [each for each in waits[0][1] if each[0] == "if"][:2]
        for at in range(3 * stages + 2):
            seen = []
            for world in worlds(around[-2:], {**text.names, "at": at}):
                bar, parity = split(line[len("barrier_wait(") : -1])
                seen.append((value(bar, {**world, "base": 0}) - empty, value(parity, world)))
            uses = range(max(0, at - stages), at)
            assert seen == [(8 * (k % stages), k // stages % 2) for k in uses], (variant, at)


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
                place = split(line[call.end() : closing(line, call.end() - 1)])[0]
                for world in worlds(around, text.names):
                    (base,) = {*re.findall(WORD, place)} - {*world}  # where shared memory begins
                    at.append(value(place, {**world, base: 0}))
        assert bool(at) == bool(variant.consumers)
        assert len({*at}) == len(at), (variant, sorted(at))
        assert all(a % 8 == 0 <= a <= variant.shared - 8 for a in at), (variant, sorted(at))


def test_which_rows_are_wide() -> None:
    """To the quantizer of few rows and to their product, which the one lets start."""
    of_rows, of_few = (next(text for _, text in _of(name)) for name in ("rows.cu", "few.cu"))
    assert of_few.names["WIDE"] == 128 * of_rows.names["WIDE"] == 8192


REGISTERS = re.compile(r'setmaxnreg\.(dec|inc)\.\w+\.\w+\.u32 (\d+|%0) "(?: *:+ *"n"\((.*?)\)\);)?')


@pytest.mark.parametrize("source", ["product.cu", "sparse.cu"])
def test_warpgroups_have_the_registers_that_they_ask_for(source: str) -> None:
    """PTX ISA, setmaxnreg: 24 to 256, a multiple of 8; who asks for more waits until the block has
    given back as many. It has 65536, and as many a thread as its bounds let the compiler take.
    """
    for variant, text in _of(source):
        found = REGISTERS.findall(text.code)
        asked = {way: value(given or number, text.names) for way, number, given in found}
        assert len(found) == 2, found
        threads = variant.consumers + 128
        assert all(24 <= n <= 256 and n % 8 == 0 for n in asked.values())
        held = 128 * asked["dec"] + variant.consumers * asked["inc"]
        assert held <= threads * (65536 // threads // 8 * 8), (variant, asked)


def test_tokens_are_counted_in_64_bits() -> None:
    """Of y, by the features of each. product.cu is run so: test_elements_that_ints_do_not_count."""
    for _, text in _of("sparse.cu"):
        found = re.findall(r"(\(long long\))?(\w+) \* g\.features\b", text.code)
        assert found == [("(long long)", "token")]


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
                    end = closing(line, at)
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

"""Which tiles the blocks of product.cu take, by its text: each once, in numbers of 32 bits.

And which of them are written 16 bytes at a time.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator

import pytest
import torch

from property_tests.cuda_reader import (
    Around,
    Names,
    Text,
    read,
    split,
    statements,
    value,
    worlds,
)
from quest.kernels import cuda, hopper, product

pytestmark = pytest.mark.whole

MOST = 2**31 - 1
KINDS = [(tiles, gate) for tiles in product.KINDS.values() for gate in (0, 1)]
each_kind = pytest.mark.parametrize(("tiles", "gate"), KINDS)


class Int(int):
    """An int of C: what leaves 32 bits is an OverflowError, where C++ says nothing of it."""

    def __add__(self, other: int) -> Int:
        return self._fits(int(self) + int(other))

    def __sub__(self, other: int) -> Int:
        return self._fits(int(self) - int(other))

    def __mul__(self, other: int) -> Int:
        return self._fits(int(self) * int(other))

    __radd__, __rmul__ = __add__, __mul__

    @staticmethod
    def _fits(n: int) -> Int:
        if not -MOST - 1 <= n <= MOST:
            raise OverflowError(n)
        return Int(n)


def compiled(
    tiles: product.Shape, gate: int = 0, out: torch.dtype = torch.bfloat16, residual: int = 0
) -> Text:
    macros = {
        "BINARY": 0, "EPILOGUE": hopper.PLAIN, "OUT": hopper.OUT[out], "BIAS": 0, "GATE": gate,
        "RESIDUAL": residual, "ROTARY": 0,
        "TILE_N": tiles.columns, "TILE_K": product.TILE_K, "CLUSTER": product.CLUSTER,
        "CONSUMERS": product.CONSUMERS, "TEAM": tiles.team, "STAGES": tiles.stages,
    }  # fmt: skip
    return read("product.cu", tuple(macros.items()))


def turns(tiles: product.Shape, gate: int, given: Names) -> Iterator[Names]:
    """What is known where a tile is placed, in every turn; given: `g.rows` as g_rows, ..."""
    text = compiled(tiles, gate)
    (kernel,) = text.functions["product"]
    for line, around in statements(kernel.body):
        if "row = first_row<TILE_M>(" in line:
            yield from worlds(_flat(around), {**text.names, **given})


def _flat(around: Around) -> Around:
    """With the names of members as one word each."""
    return tuple((kind, re.sub(r"\b([A-Za-z]\w*)\.(\w+)", r"\1_\2", told)) for kind, told in around)


def told(tiles: product.Shape, rows: int, features: int) -> Names:
    """`Turns` of product.cu, as words."""
    names = ("count", "pairs", "across")
    values = struct.unpack("3i", product.turns(*tiles.grid(rows, features))[:12])
    return {f"turns_{name}": Int(n) for name, n in zip(names, values, strict=True)}


def taken(tiles: product.Shape, gate: int, given: Names) -> tuple[list[int], Names]:
    """The turns that a thread takes, and what it knows."""
    found = list(turns(tiles, gate, given))
    return [world["turn"] for world in found], found[0] if found else {}


@each_kind
def test_each_tile_is_taken_once(tiles: product.Shape, gate: int) -> None:
    """By both blocks of one cluster, and in each by the producer and by one team."""
    cluster, groups = product.CLUSTER, product.CONSUMERS
    producer = 128 * groups
    for most, pairs, across in itertools.product((1, 2, 3, 5), (1, 3), (1, 2, 4)):
        clusters = min(most, pairs * across)
        rows, columns = pairs * cluster * tiles.rows - 1, (across - 1) * tiles.columns + 1 + gate
        given = {
            "g_rows": rows, "g_bytes": 128, "g_columns": columns // (1 + gate),
            "gridDim_x": cluster * clusters, **told(tiles, rows, columns),
        }  # fmt: skip
        assert [*given.values()][-3:] == [pairs * across, pairs, across]
        loaded: list[int] = []
        for block in range(cluster * clusters):
            mine, _ = taken(tiles, gate, {**given, "blockIdx_x": block, "threadIdx_x": producer})
            assert mine
            by = [
                taken(tiles, gate, {**given, "blockIdx_x": block, "threadIdx_x": 128 * group + 5})[
                    0
                ]
                for group in range(groups)
            ]
            assert sorted(itertools.chain(*by[:: tiles.team])) == mine
            assert tiles.team == 1 or by[0] == by[1]
            loaded += mine
        assert sorted(loaded) == sorted([*range(pairs * across)] * cluster)


@each_kind
def test_a_tile_is_that_of_its_turn(tiles: product.Shape, gate: int) -> None:
    """In the producer; and in consumers, which of one team find the next one a turn before."""
    text = compiled(tiles, gate)
    (kernel,) = text.functions["product"]
    found: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for line, around in statements(kernel.body):
        if not line.startswith("place("):
            continue
        when = [c for kind, c in around if kind in ("if", "else") and "BEHIND" in c]
        if all(value(c.partition(" && ")[0], text.names) for c in when):
            turn, *rest = split(line[len("place(") : -1])
            assert rest == ["turns", "pair", "column"]
            found[("if", "group == CONSUMERS") in around].append((turn, *when))
            # The first is found before any group goes its way.
            assert turn != "turn" or when or around[-1] == ("if", "turn != first")
    assert found[True] == [("turn",)]
    behind = [
        ("turn + stride", "BEHIND"),  # of a block without rows
        ("turn + stride", "BEHIND && k == 0"),
    ]
    assert found[False] == [("first",), *(behind if tiles.team > 1 else [("turn", "!BEHIND")])]


def test_a_weight_that_passes_once_leaves_the_cache_first() -> None:
    """It does where all pairs of row tiles are one group; no number depends on it."""
    told = cuda._text("product.cu")
    made = re.findall(r'createpolicy\.fractional\.L2::(\w+)\.b64 %0, 1\.0;" : "=l"\((\w+)\)', told)
    (chosen,) = re.findall(r"return once \? (\w+) : (\w+);", told)
    kinds = {name: kind for kind, name in made}
    assert [kinds[name] for name in chosen] == ["evict_first", "evict_normal"]
    assert told.count("cache_policy(turns.pairs <= GROUP)") == 1


@each_kind
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (MOST - 255, 1), (MOST, 1), (1, MOST - 255), (1, MOST)]
)
def test_as_many_tiles_as_ints_count(
    rows: int, columns: int, tiles: product.Shape, gate: int
) -> None:
    """Up to 2^31 - 1 rows, or columns: nothing leaves 32 bits on the way, nor a tile's column."""
    pairs, tile = -(-rows // (product.CLUSTER * tiles.rows)), tiles.columns // (1 + gate)
    last = product.CLUSTER * (pairs * -(-columns // tile) - 1)  # the block with the last tile
    given = {
        "g_rows": Int(rows), "g_columns": Int(columns), "g_bytes": Int(16),
        "gridDim_x": last + product.CLUSTER, "blockIdx_x": last, "threadIdx_x": 0,
        **told(tiles, rows, columns * (1 + gate)),
    }  # fmt: skip
    assert taken(tiles, gate, given)[0]
    pairs, across = int(given["turns_pairs"]), int(given["turns_across"])
    assert pairs * product.CLUSTER * tiles.rows >= rows
    assert columns <= across * tile
    assert (across - 1) * tile <= MOST
    assert product.GROUP * across <= MOST


@pytest.mark.parametrize("rare", [0, 1])
@pytest.mark.parametrize(
    ("out", "gate", "residual"),
    [
        (torch.bfloat16, 0, 0), (torch.bfloat16, 0, 1), (torch.bfloat16, 1, 0),
        (torch.float32, 0, 0), (torch.float32, 0, 1),
    ],
)  # fmt: skip
def test_vectors_begin_where_they_may(
    out: torch.dtype, gate: int, residual: int, rare: int
) -> None:
    """PTX ISA, ld and st: 16 bytes at a multiple of 16, in every row; of a residual likewise."""
    text = compiled(product.NARROW, gate, out, residual)
    (write,) = (f for f in text.functions["write"] if "vectors" in f.body)
    lines = list(statements(write.body, write.arrays))
    told = [a for line, a in lines if "*(int4 *)(to " in line]
    assert told
    asked = [a for line, a in lines if line.startswith("ask_residual(")]
    (ask,) = text.functions["ask_residual"]
    assert "*(const int4 *)(from " in ask.body
    assert len(asked) == 1
    told += asked if residual else []
    names = {**text.names, "RARE": rare}
    assert residual or not list(worlds(_flat(asked[0]), {**names, "g_columns": 64}))
    rule = _rare(text)
    for columns, around in itertools.product((*range(1, 70), MOST - 15, MOST), told):
        known = list(worlds(_flat(around), {**names, "g_columns": columns}))
        # What is not `rare` is written by `write<false>` alone.
        met = rare or not value(rule, {**names, "g_columns": columns})
        assert not known or not met or columns * out.itemsize % 16 == 0, columns
        assert known or columns % 64


def _rare(text: Text) -> str:
    """What makes a warp's rows rare, whatever they are; rows that are, `write<true>` writes."""
    (kernel,) = text.functions["product"]
    lines = list(statements(kernel.body))
    (rule,) = (line for line, _ in lines if re.match(r"(bool )?rare = ", line))
    assert all(re.match(r"bool rare = |rare \|= |__any_sync", a) for a, _ in lines if "rare" in a)
    calls = [(line[:11], a[-1]) for line, a in lines if line.startswith("write<")]
    vote = "__any_sync(0xFFFFFFFF, rare)"
    assert calls == [("write<true>", ("if", vote)), ("write<false", ("else", vote))]
    ((_, flat),) = _flat((("if", rule.partition(" = ")[2]),))
    return flat

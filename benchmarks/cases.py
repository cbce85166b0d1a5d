"""What is timed: the one list of shapes, grids, sparsity patterns and recipes, for each device.

The CPU runs the same kinds of cases on smaller shapes. Every grid and pattern is timed at one
width, the other widths with one grid: each combination is a Triton kernel to compile.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quest
from quest import Quantizer, grids, sparsity
from quest.models import SIZES, LlamaConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
BLOCK = 128

ROWS = 16384 if CUDA else 256
WIDTH = 4096 if CUDA else 1024
# Llama widths, and 13696 = 107 * 128, which no power of two divides into equal tiles.
OTHER_WIDTHS = (2048, 14336, 13696) if CUDA else (4096, 1664)
# Further ones of the transform alone, and of grids beside uniform4.
TRANSFORMED = (1024, 8192, 16384) if CUDA else ()
OTHER_GRIDS, AT_WIDTHS = ("uniform1", "uniform2", "uniform8"), ((2048, 14336) if CUDA else ())
# Orders other than 128: smaller, larger, and 28 * 64, whose matrix is not symmetric.
ORDERS = ((WIDTH, 32), (WIDTH, 1024), (14336 if CUDA else 3584, 1792))
GRIDS = ("uniform1", "uniform2", "uniform4", "uniform8", "ternary", "e2m1", "lloyd_max4")
PATTERNS = ("2:4", "pairs4:8")
TINY = LlamaConfig(256, 2, 256, 4)
WEIGHTS = ((4096, 4096), (14336, 4096)) if CUDA else ((512, 1024),)

RECIPES = ("w1a1", "w2a2", "w4a4", "w8a8", "fp4", "w4a4-2:4", "w4a4-4:8", "w4a16")
# (tokens, in_features, out_features): the first with every recipe.
LAYER = (16384, 4096, 4096) if CUDA else (256, 1024, 1024)
LARGE_LAYER = (16384, 4096, 14336) if CUDA else (256, 1024, 2816)
FEW_TOKENS = (4096, 4096, 4096) if CUDA else (64, 1024, 1024)
OTHER_RECIPES = ("w1a1", "w4a4", "w8a8")


def _size(*shape: int) -> str:
    return "x".join(map(str, shape))


def transforms() -> list[Any]:
    """(width, order) of the Hadamard transform, on ROWS rows."""
    pairs = [(w, BLOCK) for w in (WIDTH, *OTHER_WIDTHS, *TRANSFORMED)] + list(ORDERS)
    return [pytest.param(w, order, id=f"{_size(ROWS, w)}-order{order}") for w, order in pairs]


def quantizers() -> list[Any]:
    """(rows, width, grid, pattern): grids at one width, some at others, weights."""
    made = [(ROWS, WIDTH, grid, "dense") for grid in GRIDS]
    made += [(ROWS, width, "uniform4", "dense") for width in OTHER_WIDTHS]
    made += [(ROWS, width, grid, "dense") for width in AT_WIDTHS for grid in OTHER_GRIDS]
    made += [(*shape, "uniform4", pattern) for shape in WEIGHTS for pattern in PATTERNS]
    made += [(*shape, grid, "dense") for shape in WEIGHTS for grid in ("uniform1", "uniform4")]
    return [
        pytest.param(*case, id="-".join((_size(*case[:2]), *(p for p in case[2:] if p != "dense"))))
        for case in made
    ]


def layers() -> list[Any]:
    """(tokens, in_features, out_features, recipe)."""
    made = [(*LAYER, recipe) for recipe in RECIPES]
    made += [(*layer, recipe) for layer in (LARGE_LAYER, FEW_TOKENS) for recipe in OTHER_RECIPES]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made]


def live() -> list[Any]:
    """The same, of few tokens: there the weight takes longer to quantize than to multiply."""
    made = [
        (tokens, *LAYER[1:], recipe)
        for tokens in ((1, 64, 512, 2048) if CUDA else (8,))
        for recipe in ("w1a1", "w4a4")
    ]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made]


def packed_operands() -> list[Any]:
    """(rows, width, grid) of an operand that is packed: every grid, and other widths with one."""
    made = [(ROWS, WIDTH, grid) for grid in ("ternary", "uniform2", "uniform4")]
    made += [(ROWS, width, "uniform4") for width in OTHER_WIDTHS]
    return [pytest.param(*case, id=f"{_size(*case[:2])}-{case[2]}") for case in made]


def decoded_operands() -> list[Any]:
    """(rows, width, grid, kind) of an operand that is decoded, packed and in bytes."""
    kinds = (
        ("uniform1", "bits"), ("uniform2", "packed2"), ("uniform4", "packed4"),
        ("uniform4", "integers"), ("uniform8", "codes"),
    )  # fmt: skip
    return [
        pytest.param(ROWS, WIDTH, *each, id=f"{_size(ROWS, WIDTH)}-{each[0]}-{each[1]}")
        for each in kinds
    ]


# (out_features, in_features) of a 7B Llama; the numbers of tokens that a frozen layer is timed at.
FROZEN = ((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008)) if CUDA else ((256, 512),)
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384) if CUDA else (1, 64)
# Larger ones, with few tokens; and a small one: of the 1.6B-class model's attention.
WIDER = ((14336, 4096), (4096, 14336)) if CUDA else ()
SMALL = ((2048, 2048),) if CUDA else ()
PRODUCTS = ((8192, 8192, 8192), LAYER, LARGE_LAYER, (16384, 14336, 4096))


def products() -> list[Any]:
    """(rows, width, columns, recipe) of the product of two operands; Hopper's alone."""
    recipes = ("w1a1", "w4a4", "w8a8", "w4a4-2:4")
    made = [(*shape, recipe) for shape in PRODUCTS for recipe in recipes]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made if CUDA]


def gated_products() -> list[Any]:
    """(rows, width, columns of y, recipe) of two products and their gate; Hopper's alone."""
    shapes = [(n, 2048, 5632) for n in (512, 1024, 2048, 4096)] + [(16384, 4096, 11008)]
    made = [(*shape, recipe) for shape in shapes for recipe in ("w1a1", "w4a4")]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made if CUDA]


def added_products() -> list[Any]:
    """(rows, width, columns, recipe) of products that add a residual; Hopper's alone."""
    made = [(4096, n, 2048, recipe) for n in (2048, 5632) for recipe in ("w1a1", "w4a4")]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made if CUDA]


def rotated_products() -> list[Any]:
    """(rows, width, columns, recipe) of q, k and v, of which two are turned; Hopper's alone."""
    made = [(n, 2048, 3 * 2048, recipe) for n in (512, 4096) for recipe in ("w1a1", "w4a4")]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made if CUDA]


def frozen() -> list[Any]:
    """(tokens, in_features, out_features, recipe) of a layer whose weight is frozen."""
    made = [
        (tokens, inside, outside, recipe)
        for shapes, counts in (
            (FROZEN, TOKENS),
            (WIDER, (1, 4, 16)),
            (FROZEN[:1], (4, 32, 128, 512, 2048) if CUDA else ()),
            (SMALL, (1, 16, 32, 64, 256, 1024, 4096)),
        )
        for outside, inside in shapes
        for recipe in ("w1a1", "w4a4")
        for tokens in counts
    ]
    if CUDA:
        others = [("w2a2", tokens) for tokens in (1, 16, 64)]
        others += [("w4a4-2:4", tokens) for tokens in (512, 4096, 16384)]
        made += [(tokens, *LAYER[1:], recipe) for recipe, tokens in others]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made]


EAGER_CALLS = 64  # in a row


def eager() -> list[Any]:
    """(tokens, in_features, out_features, recipe, bias) of a frozen layer with the host's time."""
    sizes = [(tokens, FROZEN[0], False) for tokens in ((1, 16, 64, 256, 1024) if CUDA else (1,))]
    sizes += [(64, shape, False) for shape in FROZEN[1:]]
    # With a bias: one kernel, two with packed codes, two with the operand.
    sizes += [(tokens, FROZEN[0], True) for tokens in ((1, 16, 64, 1024) if CUDA else (1,))]
    made = [
        (tokens, inside, outside, recipe, bias)
        for tokens, (outside, inside), bias in sizes
        for recipe in ("w1a1", "w4a4")
    ]
    return [
        pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}{'-bias' * case[4]}") for case in made
    ]


def graphs() -> list[Any]:
    """(tokens, in_features, out_features, recipe) of frozen layers in a CUDA graph."""
    made = [
        (tokens, inside, outside, recipe)
        for outside, inside in (FROZEN[0], *WIDER, *SMALL)
        for recipe in ("w1a1", "w2a2", "w4a4")
        for tokens in (1, 16, 64)
        if CUDA
    ]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made]


def around() -> list[Any]:
    """(tokens, recipe) of frozen layers with something around them, in eager mode."""
    made = [(t, r) for t in ((1, 16, 64, 1024) if CUDA else (4,)) for r in ("w1a1", "w4a4")]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in made]


def peers() -> list[Any]:
    """(tokens, in_features, out_features) of an int8 layer."""
    made = [
        (tokens, inside, outside)
        for outside, inside in (FROZEN[0], FROZEN[-2 if CUDA else 0])
        for tokens in ((64, 1024, 16384) if CUDA else (64,))
    ]
    return [pytest.param(*case, id=_size(*case)) for case in dict.fromkeys(made)]


def packed_peers() -> list[Any]:
    """(tokens, in_features, out_features, recipe) of a layer whose weights are packed."""
    counts = {"w4a4": (1, 4, 16, 64), "w1a1": (1, 16)} if CUDA else {"w4a4": (1,)}
    shapes = {"w4a4": (FROZEN[0], *WIDER), "w1a1": FROZEN[:1]}
    made = [
        (tokens, inside, outside, recipe)
        for recipe, every in counts.items()
        for outside, inside in shapes[recipe]
        for tokens in every
    ]
    return [pytest.param(*case, id=f"{_size(*case[:3])}-{case[3]}") for case in made]


def rotated_peers() -> list[Any]:
    """(width, order) of a Hadamard transform of powers of two, on ROWS rows."""
    pairs = [(w, BLOCK) for w in (WIDTH, *OTHER_WIDTHS[:2])] + list(ORDERS[:2])
    return [pytest.param(w, order, id=f"{_size(ROWS, w)}-order{order}") for w, order in pairs]


# Sequences of so many tokens: the step of training, and each prefill.
TRAINED = (SIZES["800M"].architecture(32000), 16, 512) if CUDA else (TINY, 2, 64)
PREFILLED = (LlamaConfig(32000, 24, 2048, 16), 512) if CUDA else (TINY, 64)
SEQUENCES = (1, 2, 4, 8) if CUDA else (1,)


def again(blocks: bool | int) -> list[str]:
    """What names and keys say of how many blocks make wide activations again: all, none or some."""
    return [f"recompute{'' if blocks is True else blocks}"] if blocks else []


def trained() -> list[Any]:
    """(architecture, sequences, tokens of each, recipe, as a graph, recompute) of a step."""
    config, sequences, length = TRAINED
    made: list[tuple[str, bool, bool | int]] = [
        (recipe, graph, False)
        for recipe in (OTHER_RECIPES if CUDA else ("w4a4",))
        for graph in ((False, True) if CUDA else (False,))
    ]
    if CUDA:
        # W4A4 with 14 of 16 blocks held 0.794 of bf16's memory; 13 would hold 0.80 (reckoned), as
        # 9 of W1A1.
        ways: tuple[tuple[str, bool | int], ...] = (
            ("w1a1", True), ("w4a4", True), ("w1a1", 10), ("w4a4", 14)
        )  # fmt: skip
        made += [(recipe, graph, blocks) for recipe, blocks in ways for graph in (False, True)]
    return [
        pytest.param(
            config, sequences, length, recipe, graph, blocks,
            id="-".join((_size(sequences, length), recipe, *["graph"] * graph, *again(blocks))),
        )
        for recipe, graph, blocks in made
    ]  # fmt: skip


def prefilled() -> list[Any]:
    """(architecture, sequences, tokens of each, recipe) of a prefill."""
    config, length = PREFILLED
    return [
        pytest.param(config, sequences, length, recipe, id=f"{_size(sequences, length)}-{recipe}")
        for recipe in ("w1a1", "w4a4")
        for sequences in SEQUENCES
    ]


# (rows, width) of an MLP's middle: that of the 1.6B-class model at 8 x 512 tokens, and wider ones.
GATES = ((4096, 5632), (16384, 5632), (4096, 14336)) if CUDA else ((256, 768),)


def gates() -> list[Any]:
    """(rows, width, recipe) of a gate before a quantizer."""
    return [
        pytest.param(*shape, recipe, id=f"{_size(*shape)}-{recipe}")
        for recipe in ("w1a1", "w4a4")
        for shape in GATES
    ]


def quantizer(grid: str, pattern: str) -> Quantizer:
    """The quantizer of a case; 1 bit clips at 1.30, all others trust (method, section 4)."""
    estimator = quest.Clip(1.30) if grid == "uniform1" else quest.Trust()
    rotation = quest.Hadamard(BLOCK)
    return Quantizer(grids.parse(grid), rotation, estimator, sparsity.parse(pattern))

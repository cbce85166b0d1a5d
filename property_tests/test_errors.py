"""Wrong input raises at the boundary, before any kernel runs, with a message that says why."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import quest
from quest import packing, scalars
from quest.conformance import inputs
from quest.quantizer import parse
from quest.recipes import Recipe

pytestmark = pytest.mark.whole

Q = quest.Quantizer
U4 = quest.grids.uniform(4)
X = torch.zeros(3, 128)


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation fails loudly: an error must come before it."""

    def ran(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a kernel ran")

    for name in ("hadamard", "masked_transpose", "quantize", "_rotate"):
        monkeypatch.setattr(f"quest.eager.{name}", ran)
    for name in ("hadamard", "fake_quantize", "quantize"):
        monkeypatch.setattr(f"quest.ops.{name}", ran)


CALLS: dict[str, Callable[[Q, torch.Tensor], Any]] = {
    "call": lambda q, x: q(x),
    "quantize": lambda q, x: q.quantize(x),
    "pack": lambda q, x: q.pack(x),
}


def test_the_fixture_bites() -> None:
    for call in CALLS.values():
        with pytest.raises(RuntimeError, match="a kernel ran"):
            call(Q(U4), X)


@pytest.mark.parametrize(
    "name",
    ["w9a9", "w0a4", "w4a9", "w4", "a4", "w4a4-1:4", "w4a4-", "bf16-2:4", "fp8", "W4A4", "",
     "w16a16", "w16a4", "w1.5a1.5", "w4a4 ", "w-4a4", "w10a10"],
)  # fmt: skip
def test_unknown_recipe(name: str) -> None:
    for make in (
        lambda: quest.recipe(name),
        lambda: quest.Linear(128, 8, recipe=name),
        lambda: quest.quantize_(torch.nn.Sequential(torch.nn.Linear(128, 8)), name),
    ):
        with pytest.raises(ValueError, match=r"recipe must be bf16, fp4, or w<bits>.*got '"):
            make()


@pytest.mark.parametrize("name", [None, 4, 4.0, b"w4a4", ("w4a4",)])
def test_recipe_of_a_wrong_type(name: Any) -> None:
    with pytest.raises(TypeError, match="recipe must be a name or a Recipe, got"):
        quest.recipe(name)
    with pytest.raises(TypeError, match="recipe must be a name or a Recipe, got"):
        quest.Linear(128, 8, recipe=name)


@pytest.mark.parametrize("bits", [0, 9, -1, 16, 4.0, True, "4", None])
@pytest.mark.parametrize("make", [quest.grids.uniform, quest.grids.lloyd_max])
def test_unknown_bits(make: Callable[[Any], Any], bits: Any) -> None:
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got"):
        make(bits)


def _named(value: Any) -> str:
    """The ID of a case: Python refuses to print a long int."""
    return f"int of {value.bit_length()} bits" if type(value) is int else str(value)


@pytest.mark.parametrize(
    "alpha",
    [
        0,
        -1.0,
        math.nan,
        math.inf,
        1.7e308,
        2.0**8 * (1 + 2.0**-52),
        2**8 + 1,
        2.0**-8 * (1 - 2.0**-53),
        10**400,
        10**5000,
        True,
        "1",
    ],
    ids=_named,
)
def test_bad_alpha(alpha: Any) -> None:
    for make in (lambda: quest.grids.uniform(4, alpha), lambda: quest.grids.ternary(alpha),
                 lambda: quest.grids.e2m1(alpha)):  # fmt: skip
        with pytest.raises(ValueError, match=r"alpha must be a number from 2\^-8 to 2\^8, got"):
            make()


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ((1.0,), "a grid has 2 to 256 points, got 1"),
        (tuple(range(257)), "a grid has 2 to 256 points, got 257"),
        ((0.0, 0.0), "ascend strictly"),
        ((1.0, 0.0), "ascend strictly"),
        ((0.0, math.nan), "ascend strictly"),
        ((0.0, math.inf), "finite"),
    ],
)
def test_bad_points(points: tuple[float, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        quest.grids.Grid("custom", points, None, 1.0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("width", [100, 64, 127, 129, 1])
def test_width_not_divisible_by_the_block(call: Callable[..., Any], width: int) -> None:
    told = f"width {width} is not divisible by the Hadamard block 128"
    with pytest.raises(ValueError, match=told):
        call(Q(U4, quest.Hadamard(128)), torch.zeros(2, width))


def test_width_not_divisible_by_the_block_elsewhere() -> None:
    told = "width 100 is not divisible by the Hadamard block 128"
    made = quest.recipe("w4a4", transform=quest.Hadamard(128))
    with pytest.raises(ValueError, match=told):
        quest.Hadamard(128).apply(torch.zeros(2, 100))
    with pytest.raises(ValueError, match=told):
        quest.Hadamard(128).transpose(torch.zeros(2, 100))
    for recipe in (made, quest.recipe("w4a16", transform=quest.Hadamard(128))):
        with pytest.raises(ValueError, match=told):
            quest.Linear(100, 8, recipe=recipe)
        with pytest.raises(ValueError, match=f"body.0: {told}"):
            quest.quantize_(nested(100), recipe)
    layer = quest.Linear(100, 8, recipe="w4a4")
    with pytest.raises(ValueError, match=told):
        layer.set_recipe(made)
    assert layer.recipe == quest.recipe("w4a4")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("sparsity", "width"),
    [(quest.NM(2, 4), 6), (quest.NM(2, 4), 3), (quest.Pairwise(4, 8), 12), (quest.NM(1, 3), 8)],
)
def test_width_not_divisible_by_the_group(
    call: Callable[..., Any], sparsity: Any, width: int
) -> None:
    told = f"width {width} is not divisible by the group of {sparsity.m} of sparsity {sparsity}"
    with pytest.raises(ValueError, match=told):
        call(Q(U4, quest.Hadamard(), quest.Trust(), sparsity), torch.zeros(2, width))


def test_width_not_divisible_by_the_group_elsewhere() -> None:
    told = "width 12 is not divisible by the group of 8"
    with pytest.raises(ValueError, match=told):
        quest.Linear(12, 8, recipe="w4a4-4:8")
    with pytest.raises(ValueError, match=f"body.0: {told}"):
        quest.quantize_(nested(12), "w4a4-4:8")


def test_operands_rotated_differently() -> None:
    told = "weight and activation must use the same transform, got hadamard128 and identity"
    w, a = Q(U4, quest.Hadamard(128)), Q(U4, quest.Identity())
    with pytest.raises(ValueError, match=told):
        Recipe("mine", w, a)
    with pytest.raises(ValueError, match="must use the same transform, got hadamard and identity"):
        quest.recipe("w4a4", activation=a)
    with pytest.raises(ValueError, match="must use the same transform, got hadamard64 and had"):
        quest.recipe("w4a4", weight=Q(U4, quest.Hadamard(64)))
    # The default block of a width may be the same; said differently it is still refused.
    with pytest.raises(ValueError, match="same transform"):
        quest.recipe("w4a4", weight=Q(U4, quest.Hadamard(128)))


def test_recipe_s_other_parts() -> None:
    sparse = Q(U4, quest.Hadamard(), quest.Trust(), quest.NM(2, 4))
    with pytest.raises(ValueError, match="activation must be dense, got sparsity 2:4"):
        quest.recipe("w4a4", activation=sparse)
    with pytest.raises(TypeError, match="weight must be a Quantizer, got 'w4'"):
        Recipe("mine", "w4", sparse)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="activation must be a Quantizer, got"):
        quest.recipe("w4a4", activation="a4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsity needs a grid, got grid=None"):
        quest.recipe("bf16", sparsity=quest.NM(2, 4))


@pytest.mark.parametrize("value", [False, 0, "", ()])
@pytest.mark.parametrize("part", ["transform", "estimator", "sparsity", "weight", "activation"])
def test_a_keyword_that_counts_as_false_is_refused_as_any_other(part: str, value: Any) -> None:
    """Only None means that a keyword was left out: sparsity=False is not a way to say dense."""
    keywords: dict[str, Any] = {part: value}
    with pytest.raises(TypeError, match=f"{part} must be .*, got {re.escape(repr(value))}"):
        quest.recipe("w4a4-2:4", **keywords)
    if part in ("transform", "estimator", "sparsity"):
        with pytest.raises(ValueError, match="weight and activation replace whole quantizers"):
            quest.recipe("w4a4", weight=Q(U4), **keywords)


@pytest.mark.parametrize("replaced", ["weight", "activation"])
@pytest.mark.parametrize(
    ("part", "value"),
    [("transform", quest.Hadamard()), ("estimator", quest.STE()), ("sparsity", quest.NM(2, 4))],
)
def test_a_part_beside_a_whole_quantizer(replaced: str, part: str, value: Any) -> None:
    """Which of the two is meant is not guessed."""
    keywords: dict[str, Any] = {replaced: Q(U4), part: value}
    with pytest.raises(ValueError, match="weight and activation replace whole quantizers: set the"):
        quest.recipe("w4a4", **keywords)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64,
     torch.complex128, torch.float64, torch.float8_e4m3fn],
)  # fmt: skip
def test_dtype(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 128, dtype=dtype)
    told = f"x must be float32, bfloat16 or float16, got {dtype}"
    for call in CALLS.values():
        with pytest.raises(TypeError, match=told):
            call(Q(U4), x)
        with pytest.raises(TypeError, match=told):
            call(Q(U4, quest.Identity()), x)
    with pytest.raises(TypeError, match=told):
        quest.Hadamard().apply(x)
    with pytest.raises(TypeError, match=told):
        Q(None, quest.Hadamard())(x)
    with pytest.raises(TypeError, match=f"x must have the weight's dtype torch.float32.*{dtype}"):
        quest.Linear(128, 8)(x)


@pytest.mark.parametrize("x", [None, 1.0, [[1.0, 2.0]], "x"])
def test_not_a_tensor(x: Any) -> None:
    for call in CALLS.values():
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got"):
            call(Q(U4, quest.Identity()), x)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got"):
        quest.Linear(2, 2)(x)


def test_scalars() -> None:
    for call in CALLS.values():
        with pytest.raises(ValueError, match="x must have at least one axis, got a scalar"):
            call(Q(U4), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x must have 2 columns \(in_features\), got shape \(\)"):
        quest.Linear(2, 2)(torch.tensor(1.0))


def test_rows_that_are_too_long() -> None:
    Q(U4).check(torch.zeros(0, 2**30))
    told = r"x must have rows of at most 2\^30 entries, got"
    for call in CALLS.values():
        with pytest.raises(ValueError, match=f"{told} 1073741825"):
            call(Q(U4), torch.zeros(0, 2**30 + 1))
    with pytest.raises(ValueError, match=f"{told} 2147483648"):
        quest.Hadamard().apply(torch.zeros(0, 2**31))


@pytest.mark.parametrize("shape", [(3, 64), (128, 3), (0, 64), (64,), (2, 3, 127)])
def test_shapes(shape: tuple[int, ...]) -> None:
    told = r"x must have 128 columns \(in_features\), got shape \(" + str(shape[0])
    for recipe in ("w4a4", "bf16", "w4a16"):
        with pytest.raises(ValueError, match=told):
            quest.Linear(128, 8, recipe=recipe)(torch.zeros(shape))


@pytest.mark.parametrize("recipe", ["w4a4", "bf16", "w1a16"])
def test_devices(recipe: str) -> None:
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        quest.Linear(128, 8, recipe=recipe)(X.to("meta"))
    with pytest.raises(ValueError, match="x is on cpu, the weight on meta"):
        quest.Linear(128, 8, recipe=recipe, device="meta")(X)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="x is on cuda:0, the weight on cpu"):
            quest.Linear(128, 8, recipe=recipe)(X.cuda())


@pytest.mark.parametrize("recipe", ["w4a4", "bf16", "w1a16"])
def test_dtypes_mixed_outside_autocast(recipe: str) -> None:
    told = "x must have the weight's dtype torch.float32 outside autocast, got torch.bfloat16"
    with pytest.raises(TypeError, match=told):
        quest.Linear(128, 8, recipe=recipe)(X.bfloat16())
    with pytest.raises(TypeError, match=told):
        quest.Linear(128, 8, recipe=recipe, device="meta")(X.bfloat16().to("meta"))
    with pytest.raises(TypeError, match=r"weight's dtype torch.bfloat16 .*, got torch.float32"):
        quest.Linear(128, 8, recipe=recipe, dtype=torch.bfloat16)(X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_weights_of_a_wrong_dtype(dtype: torch.dtype) -> None:
    told = f"x must be float32, bfloat16 or float16, got {dtype}"
    with pytest.raises(TypeError, match=told):
        quest.Linear(128, 8, dtype=dtype)
    if dtype.is_complex:
        return
    model = nested(128).to(dtype)
    with pytest.raises(TypeError, match=f"body.0: {told}"):
        quest.quantize_(model, "w4a4")


def test_no_grid_no_codes() -> None:
    q = Q(None, quest.Hadamard())
    for call in (q.quantize, q.pack):
        with pytest.raises(ValueError, match="this quantizer has grid=None"):
            call(X)
    with pytest.raises(ValueError, match="sparsity needs a grid, got grid=None"):
        Q(None, quest.Hadamard(), quest.STE(), quest.NM(2, 4))


@pytest.mark.parametrize(
    "scale",
    [0, -1.0, math.nan, math.inf, -math.inf, 10**400, 10**5000, -(10**5000), "1", None, True, 1j],
    ids=_named,
)
@pytest.mark.parametrize("kind", [quest.Clip, quest.Trust])
def test_bad_scales(kind: Any, scale: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} scale must be (a finite|positive)"):
        kind(scale)


def test_the_largest_scale() -> None:
    for kind in (quest.Clip, quest.Trust):
        assert kind(sys.float_info.max).scale == sys.float_info.max


def test_how_numbers_are_shown() -> None:
    """A long int by its length: Python prints none of more than 4300 digits."""
    for value in (0, -7, True, 1.5, math.nan, "1", None, 2**128 - 1, 1 - 2**128):
        assert scalars.shown(value) == repr(value)
    assert scalars.shown(2**128) == "an int of 129 bits"
    assert scalars.shown(-(10**5000)) == "an int of 16610 bits"


@pytest.mark.parametrize(
    ("n", "m", "told"),
    [(4, 4, "n must be less than m, got 4:4"), (4, 2, "n must be less than m, got 4:2"),
     (0, 4, "n must be a positive integer, got 0"), (-1, 4, "n must be a positive integer"),
     (2, 0, "m must be a positive integer"), (2.0, 4, "n must be a positive integer"),
     (2, "4", "m must be a positive integer, got '4'"), (True, 4, "n must be a positive integer")],
)  # fmt: skip
def test_bad_patterns(n: Any, m: Any, told: str) -> None:
    for kind in (quest.NM, quest.Pairwise):
        with pytest.raises(ValueError, match=told if kind is quest.NM else r"^[nm] "):
            kind(n, m)


@pytest.mark.parametrize(("n", "m", "which"), [(1, 4, "n"), (3, 8, "n"), (2, 5, "m")])
def test_odd_pairs(n: int, m: int, which: str) -> None:
    with pytest.raises(ValueError, match=f"{which} counts entries of whole pairs and must be even"):
        quest.Pairwise(n, m)


@pytest.mark.parametrize("block", [3, 6, 36, 100, 7, 14, 10, 44, 52, 60, 4 * 9])
def test_illegal_orders(block: int) -> None:
    told = f"Hadamard order must be 2\\*\\*k or 12, 20, 28 or 40 times 2\\*\\*k, got {block}"
    with pytest.raises(ValueError, match=told):
        quest.Hadamard(block)


@pytest.mark.parametrize("block", [0, -8, 8.0, "8", True])
def test_orders_of_a_wrong_kind(block: Any) -> None:
    with pytest.raises(ValueError, match="Hadamard order must be a positive integer, got"):
        quest.Hadamard(block)


def test_orders_beyond_the_kernels() -> None:
    for order, told in (
        (2**21, "Hadamard order 2097152 is too large: 128 x 16384 exceeds 64"),
        (2**30, "is too large"),
        (12 * 2**20, "is too large"),
    ):
        with pytest.raises(ValueError, match=told):
            quest.Hadamard(order)
    assert quest.Hadamard(2**20).order(2**20) == 2**20  # the largest


@pytest.mark.parametrize(
    ("part", "value"),
    [("grid", 4), ("grid", "uniform4"), ("transform", None), ("transform", 128),
     ("transform", quest.Hadamard), ("estimator", "trust"), ("estimator", quest.Trust),
     ("sparsity", (2, 4)), ("sparsity", "2:4")],
)  # fmt: skip
def test_parts_of_a_wrong_type(part: str, value: Any) -> None:
    parts = {"grid": U4, part: value}
    allowed = {
        "grid": "Grid, None",
        "transform": "Identity, Hadamard",
        "estimator": "STE, Clip, Trust",
        "sparsity": "NM, Pairwise, None",
    }
    told = re.escape(f"{part} must be one of {allowed[part]}, got {value!r}")
    with pytest.raises(TypeError, match=told):
        Q(**parts)


def test_a_grid_under_another_s_name() -> None:
    """A name is all that operators get: they would round to the points of that name."""
    mine = quest.grids.uniform(4, alpha=2.0)
    for name in ("uniform4", "uniform4:2.5", "uniform3:2.0", "e2m1"):
        told = f"grid '{name}' does not have the points of that name: make grids with quest.grids"
        with pytest.raises(ValueError, match=told):
            Q(replace(mine, name=name))
    with pytest.raises(ValueError, match=r"grid must be uniform1\.\.8.*, got 'mine'"):
        Q(replace(mine, name="mine"))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "spec must be grid/transform/estimator/sparsity, got ''"),
        ("uniform4", "spec must be grid/transform/estimator/sparsity"),
        ("uniform4/hadamard/trust1.0/dense/more", "spec must be"),
        ("uniform9/hadamard/trust1.0/dense", "bits must be an integer from 1 to 8"),
        ("uniform/hadamard/trust1.0/dense", "grid must be uniform1..8"),
        ("uniform4:x/hadamard/trust1.0/dense", "grid 'uniform4:x'"),
        ("uniform4:-1/hadamard/trust1.0/dense", r"alpha must be a number from 2\^-8 to 2\^8"),
        ("lloyd_max4:1.0/hadamard/trust1.0/dense", "grid must be uniform1..8"),
        ("nf4/hadamard/trust1.0/dense", "grid must be uniform1..8"),
        ("uniform4/walsh/trust1.0/dense", "transform must be identity or hadamard"),
        ("uniform4/hadamard3/trust1.0/dense", "Hadamard order must be"),
        ("uniform4/hadamard/trust/dense", "estimator 'trust'"),
        ("uniform4/hadamard/trust0/dense", "estimator 'trust0': Trust scale must be positive"),
        ("uniform4/hadamard/clipnan/dense", "Clip scale must be a finite number"),
        ("uniform4/hadamard/lsq/dense", "estimator must be ste, clip<scale> or trust<scale>"),
        ("uniform4/hadamard/ste/2-4", "sparsity must be dense, N:M or pairsN:M"),
        *(
            (f"uniform4/hadamard/ste/{name}", "sparsity must be dense, N:M or pairsN:M, got")
            for name in ("2:x", "x:4", "2:", ":4", "2", "pairs", "pairs4", "2:4:8", "-2:4")
        ),
        ("uniform4/hadamard/ste/4:2", "n must be less than m"),
        ("uniform4/hadamard/ste/pairs3:8", "whole pairs"),
        ("none/hadamard/ste/2:4", "sparsity needs a grid"),
    ],
)
def test_bad_specs(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse(spec)


def nested(width: int) -> torch.nn.Module:
    """A body whose second layer fits everything and whose first has rows of `width`."""
    model = torch.nn.Module()
    model.body = torch.nn.Sequential(torch.nn.Linear(width, 128), torch.nn.Linear(128, 128))
    return model


@pytest.mark.parametrize(
    ("width", "recipe"),
    [(12, "w4a4-4:8"), (100, quest.recipe("w4a4", transform=quest.Hadamard(128))), (64, "w9a9")],
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_failing_quantize_leaves_the_model_unchanged(width: int, recipe: Any, flip: bool) -> None:
    model = nested(width)
    if flip:  # a good module before the bad one
        model.body = torch.nn.Sequential(torch.nn.Linear(128, width), *model.body)
    modules = list(model.modules())
    tensors = {k: (v, v.clone()) for k, v in model.named_parameters()}
    with pytest.raises(ValueError):
        quest.quantize_(model, recipe)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    for name, parameter in model.named_parameters():
        assert parameter is tensors[name][0]
        assert torch.equal(parameter, tensors[name][1])


def test_quantize_of_nothing() -> None:
    told = "model has no torch.nn.Linear that filter_fn selects"
    with pytest.raises(ValueError, match=told):
        quest.quantize_(torch.nn.Sequential(torch.nn.ReLU()), "w4a4")
    with pytest.raises(ValueError, match=told):
        quest.quantize_(nested(128), "w4a4", filter_fn=lambda module, name: False)
    with pytest.raises(TypeError, match="model is itself a torch"):
        # A module can't replace itself.
        quest.quantize_(torch.nn.Linear(8, 8), "w4a4")
    for model in (None, "model", torch.zeros(3)):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
            quest.quantize_(model, "w4a4")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [0, 3, 5, 16])
def test_packing_of_other_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 1, 2, 4 or 8, got {bits}"):
        packing.pack(torch.zeros(3, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits must be 1, 2, 4 or 8, got {bits}"):
        packing.unpack(torch.zeros(3, dtype=torch.uint8), bits, 3)


def test_packing_of_wrong_tensors() -> None:
    for dtype in (torch.float32, torch.complex64):
        with pytest.raises(TypeError, match=f"unsigned must hold integers, got {dtype}"):
            packing.pack(torch.zeros(3, dtype=dtype), 4)
    with pytest.raises(TypeError, match=r"packed must be uint8, got torch\.int8"):
        packing.unpack(torch.zeros(3, dtype=torch.int8), 4, 6)
    with pytest.raises(ValueError, match="packed has 3 bytes a row; width 7 at 4 bits takes 4"):
        packing.unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, 7)


def test_inputs_of_other_names() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        inputs.lay_out(torch.zeros(2, 2), "sideways")
    with pytest.raises(ValueError, match=r"dtype must have 16 bits, got torch\.float32"):
        inputs.all_patterns(torch.float32, 64)


def test_a_toolchain_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from quest.kernels import cuda

    monkeypatch.setitem(sys.modules, "cuda.core.utils", None)
    told = cuda._toolchain()
    assert told is not None
    assert "is not installed, or too old: pip install 'quest-lowbit[hopper]'" in told

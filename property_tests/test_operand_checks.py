"""What operators on operands refuse before anything runs, on any device, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import quest
from quest import grids, lowbit, packed
from quest.lowbit_linear import low_bit_linear

pytestmark = pytest.mark.whole

FOUR = quest.Quantizer(grids.uniform(4))
ROWS = torch.zeros(3, 128)
OPERAND = torch.full((3, 128), 8, dtype=torch.int8)  # of 4 bits: the code 0
SCALE = torch.ones(3, 1)


@pytest.mark.parametrize(
    "made",
    [
        lambda x, q: lowbit.encode(x, q.spec, "integers"),
        lambda x, q: lowbit.operand(x, q.spec, "integers"),
        lambda x, q: lowbit.launch_encode(x, q, "integers"),
        lambda x, q: lowbit.launch_encode_saved(x, q, "integers"),
        lambda x, q: lowbit.launch_operand(x, q, "integers"),
    ],
)
def test_what_no_quantizer_takes_is_refused_without_any_rows_too(
    made: Callable[[Tensor, quest.Quantizer], Any],
) -> None:
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got"):
        made(torch.zeros(0, 128, dtype=torch.int32), FOUR)
    pruned = quest.Quantizer(grids.uniform(4), quest.Identity(), sparsity=quest.NM(2, 4))
    with pytest.raises(ValueError, match="width 6 is not divisible by the group of 4"):
        made(torch.zeros(0, 6), pruned)
    with pytest.raises(ValueError, match="x must have at least one axis, got a scalar"):
        made(torch.tensor(1.0), FOUR)


@pytest.mark.parametrize(
    ("operand", "kind"),
    [
        (OPERAND.to(torch.uint8), "integers"),
        (OPERAND[:, :16], "bits"),
        (OPERAND[0, 0], "integers"),
    ],
)
def test_operands_of_another_form(operand: Tensor, kind: str) -> None:
    scale, width = (SCALE, 128) if operand.ndim else (SCALE[0], 1)
    expected = "uint8 with 16" if kind == "bits" else f"int8 with {width}"
    told = f"operand must be torch.{expected} columns for {kind} of width {width}, got"
    for decode in (
        lambda: lowbit.decode(operand, scale, FOUR.spec, kind, width, torch.float32),
        lambda: lowbit.launch_decode(operand, scale, FOUR, kind, width, torch.float32),
    ):
        with pytest.raises(ValueError, match=told):
            decode()


def test_one_row_alone_is_decoded_and_packed() -> None:
    middle = FOUR.require_grid().points[8]  # of the code 0
    row = lowbit.decode(OPERAND[0], SCALE[0], FOUR.spec, "integers", 128, torch.float32)
    assert torch.equal(row, torch.full((128,), middle))
    assert lowbit.pack_operand(OPERAND[0], FOUR.spec).shape == (64,)
    with pytest.raises(ValueError, match="operand must have at least one axis, got a scalar"):
        lowbit.pack_operand(OPERAND[0, 0], FOUR.spec)
    with pytest.raises(ValueError, match=r"the integers of quantizer .* have no packed form"):
        lowbit.pack_operand(OPERAND, quest.Quantizer(grids.e2m1()).spec)


@pytest.mark.parametrize("name", ["ternary", "uniform2", "uniform3", "uniform4"])
def test_the_fake_of_a_packed_operand(name: str) -> None:
    spec, operand = quest.Quantizer(grids.parse(name)).spec, torch.ones(2, 3, 7, dtype=torch.int8)
    made = lowbit.pack_operand(operand, spec)
    with FakeTensorMode() as mode:
        fake = lowbit.pack_operand(mode.from_tensor(operand), spec)
    assert (fake.shape, fake.dtype) == (made.shape, made.dtype)


def test_a_scale_that_decode_does_not_take() -> None:
    for decode in (
        lambda: lowbit.decode(OPERAND, SCALE[:2], FOUR.spec, "integers", 128, torch.float32),
        lambda: lowbit.launch_decode(OPERAND, SCALE[:2], FOUR, "integers", 128, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"scale must be torch.float32 of shape \(3, 1\)"):
            decode()


def _product(**changed: Any) -> dict[str, Any]:
    sums = torch.zeros(3, 1, dtype=torch.int32)
    return {
        "a": OPERAND, "b": OPERAND, "a_scale": SCALE, "b_scale": SCALE, "a_sums": sums,
        "b_sums": sums, "bias": None, "grid_names": "uniform4,uniform4",
        "kinds": "integers,integers", "width": 128, "dtype": torch.float32,
    } | changed  # fmt: skip


BITS = torch.zeros(3, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"b": OPERAND[0]}, "b must be int8, or uint8 for bits, of two axes"),
        ({"a": OPERAND[None]}, "a must be int8, or uint8 for bits, of two axes"),
        ({"b": OPERAND.to("meta")}, "a and b must have the same dtype, columns and device"),
        ({"a_sums": SCALE}, "a_sums must be torch.int32"),
        (
            {"grid_names": "uniform4,uniform8", "kinds": "integers,codes", "width": 127},
            "a must be torch.int8 with 127 columns for integers of width 127",
        ),
        (
            {"grid_names": "uniform1,uniform1", "kinds": "bits,integers", "a": BITS, "b": BITS},
            "b must be torch.int8 with 128 columns for integers of width 128",
        ),
        ({"grid_names": "uniform4,uniform4,uniform4"}, "must name two of each"),
        ({"kinds": "integers,integers,integers"}, "must name two of each"),
    ],
)
def test_arguments_that_a_product_does_not_take(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lowbit.eager_product(**_product(**changed))


CODES = torch.zeros(24, 64, dtype=torch.uint8)
WHOLE = torch.zeros(24, 1, dtype=torch.int32)


def _packed(**changed: Any) -> None:
    """The check of a packed product, which every device makes: a meta tensor has its fake."""
    arguments: dict[str, Any] = {
        "a": OPERAND, "w": CODES, "a_scale": SCALE, "w_scale": torch.ones(24, 1),
        "a_sums": torch.zeros(3, 1, dtype=torch.int32), "w_sums": WHOLE, "bias": None,
        "grid_names": "uniform4,uniform4", "kinds": "integers,integers", "width": 128,
        "dtype": torch.float32,
    }  # fmt: skip
    packed.launch_packed(**arguments | changed)


SHARED = [
    ("w", CODES[0], "w must be uint8 of shape"),
    ("w", CODES[:, None], "w must be uint8 of shape"),
    ("w", CODES.to(torch.int8), "w must be uint8 of shape"),
    ("w", CODES[:, 1:], "w must be uint8 of shape"),
    ("w_scale", SCALE, "w_scale must be torch.float32 of shape"),
    ("w_scale", torch.ones(24, 1, device="meta"), "w_scale must be .* on cpu, got .* on meta"),
    ("w_sums", WHOLE[1:], "w_sums must be torch.int32 of shape"),
    ("w_sums", WHOLE.to("meta"), "w_sums must be .* on cpu, got .* on meta"),
    ("bias", torch.ones(23), "bias must be torch.float32 of shape"),
    ("bias", torch.ones(24, device="meta"), "bias must be .* on cpu, got .* on meta"),
    ("bias", torch.ones(24).int(), "must be float32, bfloat16 or float16, got torch.int32"),
    ("dtype", torch.int32, "dtype must be float32, bfloat16 or float16, got torch.int32"),
]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        *SHARED,
        ("a", OPERAND[0], "a must have two axes and lie where w lies, cpu"),
        ("a", OPERAND.to("meta"), "a must have two axes and lie where w lies, cpu; got .* on meta"),
        ("a", OPERAND.to(torch.uint8), "a must be torch.int8 with 128 columns for integers"),
        ("a_sums", WHOLE, "a_sums must be torch.int32 of shape"),
        ("a_sums", WHOLE[:3].to("meta"), "a_sums must be .* on cpu, got .* on meta"),
        ("kinds", "integers,bits", "packed weights have 1 bit on both sides, or"),
        ("kinds", "codes,codes", "packed weights have 1 bit on both sides, or"),
        ("grid_names", "uniform8,uniform4", "packed weights have 1 bit on both sides, or"),
        ("grid_names", "uniform4,uniform8", "packed weights have 1 bit on both sides, or"),
        ("grid_names", "uniform3,uniform3", "packed weights have 1 bit on both sides, or"),
        ("grid_names", "uniform5,uniform4", "packed weights have 1 bit on both sides, or"),
        ("grid_names", "uniform4,ternary", "packed weights have 1 bit on both sides, or"),
        ("grid_names", "uniform4,e2m1", "packed weights have 1 bit on both sides, or"),
        ("grid_names", "lloyd_max4,lloyd_max4", "packed weights have 1 bit on both sides, or"),
    ],
)
def test_arguments_that_a_packed_product_does_not_take(name: str, value: Any, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        _packed(**{name: value})


def test_sums_are_one_a_row() -> None:
    with pytest.raises(ValueError, match=r"a_sums must be torch.int32 of shape \(3, 1\)"):
        _packed(a_sums=torch.zeros(128, 1, dtype=torch.int32))


def test_weights_that_a_layer_does_not_take() -> None:
    x, w = ROWS, torch.zeros(4, 128)

    def layer(*weights: Tensor, q: quest.Quantizer = FOUR) -> list[Tensor]:
        made: list[Tensor] = low_bit_linear(
            x, list(weights), [], FOUR.spec, q.spec, torch.float32, False
        )
        return made

    with pytest.raises(TypeError, match="a weight must be float32, bfloat16 or float16, got"):
        layer(w.int())
    with pytest.raises(TypeError, match="a weight must be float32, bfloat16 or float16, got"):
        layer(w, w.int())  # what is allowed, before how they differ
    with pytest.raises(ValueError, match="weights must hold at least one weight, got none"):
        layer()
    for weights in ((w, w.bfloat16(), w), (w, w, w.bfloat16())):
        with pytest.raises(TypeError, match=r"got torch\.float32 and torch\.bfloat16"):
            layer(*weights)
    pruned = quest.Quantizer(grids.uniform(4), sparsity=quest.NM(2, 4))
    with pytest.raises(ValueError, match="not divisible by the group of 4"):
        low_bit_linear(ROWS[:, :6], [w[:, :6]], [], FOUR.spec, pruned.spec, torch.float32, False)

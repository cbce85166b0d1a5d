"""The operator that multiplies few rows with a packed weight."""

from __future__ import annotations

import pytest
import torch

import quest
from quest import lowbit, operands
from quest.kernels.hopper import unavailable
from quest.packed import packed_product

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
RECIPES = ["w1a1", "w2a2", "w4a4", "w4a2"]


def _arguments(recipe: str, device: str, bias: bool = True) -> tuple[object, ...]:
    if device == "cuda" and unavailable(torch.device("cuda")) is not None:
        pytest.skip(str(unavailable(torch.device("cuda"))))
    made = quest.recipe(recipe)
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair) or ("", "")
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 256, generator=g).to(device) for n in (5, 24))
    a, a_scale, _, a_sums = lowbit.encode(x, pair[0].spec, kinds[0])
    b, b_scale, _, b_sums = lowbit.encode(w, pair[1].spec, kinds[1])
    codes = pair[1].pack(w).codes
    names = ",".join(q.require_grid().name for q in pair)
    rest = (a_scale, b_scale, a_sums, b_sums, torch.randn(24, device=device) if bias else None,
            names, ",".join(kinds), 256, torch.float32)  # fmt: skip
    return a, b, codes, rest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_the_product_of_the_unpacked_weight(recipe: str, device: str) -> None:
    for bias in (False, True):
        a, b, codes, rest = _arguments(recipe, device, bias)
        assert torch.equal(packed_product(a, codes, *rest), lowbit.product(a, b, *rest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_opcheck(recipe: str, device: str) -> None:
    a, _, codes, rest = _arguments(recipe, device)
    for settled in ((), (False,), (True,)):
        torch.library.opcheck(torch.ops.quest.packed_product, (a, codes, *rest, *settled))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("position", "value", "error", "told"),
    [
        (0, torch.zeros(5, 128, dtype=torch.int8), ValueError, "a must be torch.int8 with 256"),
        (0, torch.zeros(256, dtype=torch.int8), ValueError, "a must have two axes"),
        (1, torch.zeros(24, 127, dtype=torch.uint8), ValueError, r"w must be uint8 of shape \(out"),
        (1, torch.zeros(24, 128, dtype=torch.int8), ValueError, "w must be uint8 of shape"),
        (2, torch.ones(4, 1), ValueError, "a_scale must be torch.float32 of shape"),
        (3, torch.ones(24, 2), ValueError, "w_scale must be torch.float32 of shape"),
        (3, torch.ones(24, 1).double(), ValueError, "w_scale must be torch.float32 of shape"),
        (4, torch.ones(5, 1), ValueError, "a_sums must be torch.int32 of shape"),
        (5, torch.ones(24, 1), ValueError, "w_sums must be torch.int32 of shape"),
        (6, torch.ones(23), ValueError, "bias must be torch.float32 of shape"),
        (6, torch.ones(24).double(), TypeError, "^bias must be float32, bfloat16 or float16"),
        (7, "uniform4,uniform8", ValueError, "packed weights have 1 bit on both sides, or uniform"),
        (7, "uniform4", ValueError, "packed weights have 1 bit on both sides"),
        (8, "codes,integers", ValueError, "packed weights have 1 bit on both sides"),
        (10, torch.int32, TypeError, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_errors(
    position: int, value: object, error: type[Exception], told: str, device: str
) -> None:
    a, _, codes, rest = _arguments("w4a4", device)
    arguments = [a, codes, *rest]
    arguments[position] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(error, match=told):
        packed_product(*arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_vectors(device: str) -> None:
    a, _, codes, rest = _arguments("w4a4", device)
    strided = [torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in rest]
    assert not strided[4].is_contiguous()
    assert torch.equal(packed_product(a, codes, *strided), packed_product(a, codes, *rest))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_rows_than_the_kernel_has() -> None:
    a, _, codes, rest = _arguments("w4a4", "cuda")
    many = (
        a.repeat(13, 1),
        codes,
        rest[0].repeat(13, 1),
        rest[1],
        rest[2].repeat(13, 1),
        *rest[3:],
    )
    with pytest.raises(ValueError, match="with up to 64 rows of a multiple of 128 entries, got 65"):
        packed_product(*many)

"""What the integer product refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

import quest
from quest import lowbit, operands
from quest.kernels import hopper, product
from quest.lowbit_linear import low_bit_linear

pytestmark = pytest.mark.whole


def _require_compiler() -> None:
    pytest.importorskip(
        "cuda.core", reason="cuda-core is not installed: pip install 'quest-lowbit[hopper]'"
    )


def test_a_source_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    _require_compiler()
    monkeypatch.setattr(product, "ARCHITECTURE", "sm_80")  # has no clusters
    with pytest.raises(RuntimeError, match="not supported for this GPU architecture"):
        product.compile_(True, hopper.RAW, torch.int32, 0, product.NARROW, cached=False)


def test_a_device_without_the_product() -> None:
    assert "is not a CUDA device" in str(hopper.unavailable(torch.device("cpu")))


def _operands(kind: str = "int8", rows: int = 3, width: int = 16) -> torch.Tensor:
    return torch.zeros(rows, width, dtype=getattr(torch, kind))


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (_operands("int16"), _operands(), "a must be int8, or uint8 for bits, of two axes"),
        (_operands(), _operands()[0], "b must be int8, or uint8 for bits, of two axes"),
        (_operands(), _operands("uint8"), "must have the same dtype, columns and device"),
        (_operands(width=8), _operands(), "must have the same dtype, columns and device"),
        (_operands(), _operands(width=17), "must have the same dtype, columns and device"),
        (_operands(width=2**16 + 1), _operands(width=2**16 + 1), "65536 fit an int32 accumulator"),
        (_operands("uint8", width=2**13 + 1), _operands("uint8", width=2**13 + 1), "65536 fit"),
    ],
)
def test_accumulate_s_errors(a: torch.Tensor, b: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lowbit.accumulate(a, b)


def _arguments(**changed: object) -> dict[str, object]:
    x = torch.ones(3, 16)
    spec = quest.recipe("w4a4").weight.spec
    a, scale, _, sums = lowbit.encode(x, spec, "integers")
    return {
        "a": a, "b": a, "a_scale": scale, "b_scale": scale, "a_sums": sums, "b_sums": sums,
        "bias": None, "grid_names": "uniform4,uniform4", "kinds": "integers,integers", "width": 16,
        "dtype": torch.float32,
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"kinds": "bits,integers"}, ValueError, "grid 'uniform4' has no operand of kind 'bits'"),
        ({"kinds": "integers,floats"}, ValueError, "kind must be one of bits, integers, codes"),
        ({"grid_names": "uniform4,lloyd_max4"}, ValueError, "has no operand of kind"),
        ({"width": 15}, ValueError, "a must be torch.int8 with 15 columns"),
        ({"a_scale": torch.ones(2, 1)}, ValueError, "a_scale must be torch.float32 of shape"),
        ({"b_scale": torch.ones(3, 1).double()}, ValueError, "b_scale must be torch.float32"),
        ({"b_sums": torch.ones(3, 1)}, ValueError, "b_sums must be torch.int32 of shape"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be torch.float32 of shape \(3,\)"),
        ({"bias": torch.ones(3, dtype=torch.complex64)}, TypeError, "^bias must be .*complex64"),
        ({"kinds": "integers"}, ValueError, "must name two of each"),
        ({"grid_names": "uniform4"}, ValueError, "must name two of each"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_product_s_errors(changed: dict[str, object], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        lowbit.product(**_arguments(**changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a_scale", "b_scale", "a_sums", "b_sums", "bias"])
def test_vectors_on_another_device(name: str) -> None:
    # A dispatcher that sees a meta tensor takes the fake: ask what every device asks.
    arguments = _arguments(bias=torch.ones(3))
    arguments[name] = arguments[name].to("meta")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"{name} must be .* on cpu, got .* on meta"):
        lowbit.eager_product(**arguments)  # type: ignore[arg-type]


def test_operands_that_do_not_pair() -> None:
    x, w = torch.ones(3, 128), torch.ones(4, 128)
    one, four = quest.recipe("w1a1").weight, quest.recipe("w4a4").weight
    plain = quest.recipe("w4a4", transform=quest.Identity()).weight
    for a, b, into, told in (
        (four, plain, w, "must use the same transform"),
        (one, one, torch.ones(4, 120), r"must be \(out, 128\) on cpu, got shape \(4, 120\)"),
        (four, four, w[0], r"a weight must be \(out, 128\)"),
        (four, four, w.to("meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=told):
            low_bit_linear(x, [into], [], a.spec, b.spec, torch.float32, True)
    with pytest.raises(TypeError, match="x must be float32"):
        low_bit_linear(x.int(), [w], [], four.spec, four.spec, torch.float32, True)
    with pytest.raises(TypeError, match="weights must have one dtype, got"):
        low_bit_linear(x, [w, w.bfloat16()], [], four.spec, four.spec, torch.float32, True)
    with pytest.raises(ValueError, match="none or one for each of 2 weights, got 1"):
        low_bit_linear(x, [w, w], [x[0, :4]], four.spec, four.spec, torch.float32, True)
    with pytest.raises(ValueError, match="pruned entries, sparsity 2:4, have no place in 'bits'"):
        lowbit.encode(x, quest.recipe("w1a1-2:4").weight.spec, "bits")


def test_quantizers_without_an_integer_product() -> None:
    free = quest.recipe("w4a16")
    assert operands.kinds(free.activation, free.weight) is None
    assert operands.kinds(*[quest.Quantizer(quest.grids.lloyd_max(4))] * 2) is None
    x = torch.ones(3, 128)
    with pytest.raises(ValueError, match="there is no integer product for"):
        low_bit_linear(x, [x], [], free.activation.spec, free.weight.spec, torch.float32, True)

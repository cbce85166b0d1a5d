"""Layers whose weight is quantized at each call, where no gradient is asked for.

Kernels make no masks then, and few rows are multiplied with codes of 2 or 4 bits that stay packed.
What comes out is what comes out where a backward reads the operands, bit for bit, which others
judge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import quest
from property_tests import places
from property_tests.calls import counted
from property_tests.places import Place
from property_tests.prologues import on_hopper
from quest import eager, lowbit_linear, ops, packed, paths
from quest.conformance import examine, inputs
from quest.conformance.lanes import Lane
from quest.kernels import blocks, forms, hopper, rows
from quest.mlp import low_bit_swiglu
from quest.quantizer import parse

BF16 = torch.bfloat16
RECIPES = ("w1a1", "w2a2", "w4a4", "w3a3", "w8a8")
# The bits of the codes with which few rows are multiplied, and of how many rows.
STAYS = {"w1a1": (0, 0), "w2a2": (2, 32), "w4a4": (4, 32), "w3a3": (0, 0), "w8a8": (0, 0)}


def _specs(name: str) -> tuple[str, str]:
    made = quest.recipe(name)
    return made.activation.spec, made.weight.spec


def _drawn(place: Place, *shapes: tuple[int, int]) -> list[Tensor]:
    kinds = ("heavy", "gaussian", "heavy", "gaussian")
    made = [inputs.draw(kinds[i % 4], shape, BF16, i) for i, shape in enumerate(shapes)]
    return [t.to(place.device) for t in made]


@pytest.fixture
def launched(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place whose layers launch kernels, in the emulator, too."""
    if place is places.GPU and (reason := hopper.unavailable(torch.device("cuda", 0))):
        pytest.skip(reason)
    monkeypatch.setattr(lowbit_linear, "parts", lambda x: lowbit_linear._CUDA)
    return place


@pytest.mark.parametrize("count", [1, 16, 17, 33])
@pytest.mark.parametrize("name", RECIPES)
def test_what_comes_out(
    name: str, count: int, launched: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several weights with biases; and by which kernels it is made."""
    x, v, w, b, c = _drawn(launched, (count, 256), (40, 256), (24, 256), (1, 40), (1, 24))
    rest = (x, [v, w], [b[0], c[0]], *_specs(name), BF16)
    expected = lowbit_linear.low_bit_linear(*rest, True)[:2]
    asked: list[dict[str, Any]] = []
    real = blocks.quantize

    def quantize(t: Tensor, *rest: Any, **how: Any) -> Any:
        asked.append(how)
        return real(t, *rest, **how)

    monkeypatch.setattr(blocks, "quantize", quantize)
    few: list[int] = []
    product = lowbit_linear._CUDA.packed
    monkeypatch.setattr(
        lowbit_linear, "_CUDA",
        lowbit_linear._CUDA._replace(
            packed=lambda *given: few.append(given[1].shape[1]) or product(*given)
        ),
    )  # fmt: skip
    made = lowbit_linear.low_bit_linear(*rest, False)
    assert len(made) == 2
    for y, other in zip(made, expected, strict=True):
        assert torch.equal(y.view(torch.uint8), other.view(torch.uint8))
    bits, most = STAYS[name]
    stays = count <= most
    assert few == (2 * [256 * bits // 8] if stays else [])
    assert [how["masked"] for how in asked] == 3 * [False]
    kind = lowbit_linear.pair(*_specs(name)).kinds[1]
    as_codes = (forms.PACKED, bits) if stays else forms.OPERANDS[kind]
    assert [(how["form"], how["bits"]) for how in asked] == [
        forms.OPERANDS[kind], *(2 * [as_codes]),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["w1a1", "w4a4"])
def test_behind_a_gate(name: str, launched: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel makes the rows and quantizes them, with a mask where it is read."""
    gate, up, w = _drawn(launched, (5, 256), (5, 256), (24, 256))
    rest = ([w], [], *_specs(name), BF16)
    masked: list[bool] = []
    real = blocks.gated

    def gated(*given: Any, **how: Any) -> Any:
        masked.append(how.get("masked", False))
        return real(*given, **how)

    monkeypatch.setattr(blocks, "gated", gated)
    expected = lowbit_linear.low_bit_linear(up, *rest, True, gate)[0]
    made = lowbit_linear.low_bit_linear(up, *rest, False, gate)
    assert masked == [True, False]
    assert len(made) == 1
    assert torch.equal(made[0], expected)


def test_a_whole_mlp(launched: Place) -> None:
    x, gate, up, down = _drawn(launched, (5, 128), (256, 128), (256, 128), (24, 256))
    rest = (x, [gate, up], [], down, None, *_specs("w4a4"), *_specs("w4a4"))
    made = low_bit_swiglu(*rest, False)
    assert len(made) == 1
    assert torch.equal(made[0], low_bit_swiglu(*rest, True)[0])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (BF16, 128), (BF16, 384), (BF16, 2048), (BF16, 8320), (torch.float32, 1152),
        (torch.float16, 17408),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_row", [True, False])
def test_codes(by_row: bool, dtype: torch.dtype, width: int, bits: int, launched: Place) -> None:
    """Those of the quantizer with a mask, and its scale, by either kernel."""
    w = inputs.draw("heavy", (3, width), dtype, width).to(launched.device)
    q = parse(f"uniform{bits}/hadamard128/trust1.0/dense")
    with rows.only(by_row):
        codes, scale, sums = packed.launch_codes(w, q, bits)
        _, *expected = ops.launch_quantize(w, q, values=False, codes=True, packed=True)
    assert (codes.shape, codes.dtype) == ((3, width * bits // 8), torch.uint8)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    assert (sums.shape, sums.dtype) == ((3, 1), torch.int32)


def test_codes_that_no_kernel_for_blocks_of_128_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever quantizes such rows; and what is no weight of floats."""
    w, q = torch.randn(5, 192), parse("uniform4/hadamard64/trust1.0/dense")
    monkeypatch.setattr(ops, "launch_quantize", eager.quantize)
    made = packed.launch_codes(w, q, 4)
    for t, other in zip(made[:2], packed.eager_codes(w, q, 4)[:2], strict=True):
        assert torch.equal(t, other)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        packed.launch_codes(w.long(), q, 4)


def test_codes_are_made_where_the_weight_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    w, q = torch.randn(5, 256), parse("uniform4/hadamard128/trust1.0/dense")
    inside: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(t: Tensor) -> Iterator[None]:
        inside.append(t)
        yield
        inside.pop()

    def quantize(t: Tensor, _: Any, **how: Any) -> tuple[Tensor, ...]:
        assert inside == [t]
        assert how == {"form": forms.PACKED, "bits": 4, "masked": False}
        return eager.quantize(t, q, values=False, codes=True, packed=True)[1:]

    monkeypatch.setattr(ops, "device_of", device_of)
    monkeypatch.setattr(blocks, "supports", lambda *_: True)
    monkeypatch.setattr(blocks, "quantize", quantize)
    assert torch.equal(packed.launch_codes(w, q, 4)[0], packed.eager_codes(w, q, 4)[0])


@pytest.mark.parametrize("name", ["w1a1", "w2a2", "w4a4", "w3a3", "w8a8", "w4a4-2:4", "fp4"])
@pytest.mark.parametrize("count", [1, 33])
def test_on_a_cpu(name: str, count: int) -> None:
    """In plain PyTorch, the same; what has no codes that stay packed, too."""
    made = quest.recipe(name)
    x, w = torch.randn(count, 256), torch.randn(40, 256)
    rest = (x, [w], [], made.activation.spec, made.weight.spec, torch.float32)
    ys = [lowbit_linear.low_bit_linear(*rest, saves)[0] for saves in (True, False)]
    assert torch.equal(*ys)
    packs = name in ("w2a2", "w4a4")
    assert bool(lowbit_linear.pair(*rest[3:5]).packed) is packs


def test_where_codes_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer on a CPU that is told so, with few rows and no gradient."""
    layer = quest.Linear(256, 40, recipe="w4a4")
    seen = counted(monkeypatch, lowbit_linear, "codes")
    with paths.only("integers"):
        for count, grad, expected in ((1, False, 1), (32, False, 1), (33, False, 0), (1, True, 0)):
            seen.clear()
            with torch.set_grad_enabled(grad):
                layer(torch.randn(count, 256))
            assert len(seen) == expected


@pytest.mark.parametrize(("count", "part"), [(3, "codes"), (33, "operand")])
def test_the_court_hears_of_it(count: int, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what inference alone gets wrong, and of nothing else."""
    real = getattr(lowbit_linear._CPU, part)

    def wrong(*given: Any) -> tuple[Tensor, ...]:
        operand, scale, sums = real(*given)
        return operand, scale * (1 + 2**-12), sums

    monkeypatch.setattr(lowbit_linear, "_CPU", lowbit_linear._CPU._replace(**{part: wrong}))
    x, w = inputs.draw("gaussian", (count, 256), torch.float32, 0), torch.randn(24, 256)
    made, lane = quest.recipe("w4a4"), Lane("torch-cpu", "cpu", "dispatch")
    found = examine.layer(lane, x, w, torch.randn(count, 24), None, made, "integers")
    assert {v.stage for v in found if v.failure} == {"layer y, inference"}


@on_hopper
@pytest.mark.parametrize("name", ["w1a1", "w2a2", "w4a4", "w8a8", "w4a4-2:4", "fp4"])
@pytest.mark.parametrize("count", [1, 40, 600])
def test_a_layer_is_its_frozen_self(name: str, count: int) -> None:
    torch.manual_seed(0)
    layer = quest.Linear(1024, 384, True, name, "cuda", BF16).eval()
    x = torch.randn(count, 1024, device="cuda", dtype=BF16)
    with torch.no_grad():
        live = layer(x)
        assert torch.equal(layer.freeze()(x), live)


def _alone(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    whole = run(x)
    for part in (slice(0, 1), slice(3, 19), slice(0, 40)):
        assert torch.equal(run(x[part]), whole[part])


@on_hopper
@pytest.mark.parametrize("name", ["w1a1", "w2a2", "w4a4", "w8a8"])
def test_what_comes_out_of_a_row_does_not_depend_on_how_many_there_are(name: str) -> None:
    """Whichever kernels multiply them; with and without a gradient, frozen and not."""
    torch.manual_seed(0)
    layer = quest.Linear(1024, 384, True, name, "cuda", BF16)
    x = torch.randn(600, 1024, device="cuda", dtype=BF16)
    _alone(layer, x)
    with torch.no_grad():
        _alone(layer, x)
        _alone(layer.eval().freeze(), x)


@on_hopper
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "fp4"])
def test_no_rows(name: str) -> None:
    layer = quest.Linear(256, 40, True, name, "cuda", BF16)
    x = torch.empty(0, 256, device="cuda", dtype=BF16, requires_grad=True)
    with torch.no_grad():
        assert layer(x).shape == (0, 40)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 40)
    for t in (x, layer.weight, layer.bias):
        assert t.grad is not None
        assert not t.grad.any()

"""Operands of 2 and 4 bits an entry, as the layer keeps them: bit for bit, in every lane."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quest
from benchmarks import baselines
from property_tests.lane_marks import every_lane, fewer
from property_tests.ledger import LEDGER
from quest import eager, grids, lowbit, lowbit_linear, operands, ops, paths
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.strategies import DTYPES, SEEDS
from quest.kernels import blocks
from quest.kernels import pack as pack_kernel
from quest.kernels import quantize as kernel

GRIDS = ("ternary", "uniform2", "uniform3", "uniform4")
PLAIN = {name: quest.Quantizer(grids.parse(name), quest.Identity()) for name in GRIDS}


def _codes(q: quest.Quantizer, shape: tuple[int, ...], seed: int) -> Tensor:
    levels = q.require_grid().levels
    drawn = np.random.default_rng(seed).integers(0, levels, shape) - levels // 2
    return torch.from_numpy(drawn.astype(np.int8))


def _integers(q: quest.Quantizer, codes: Tensor) -> Tensor:
    odds = codes if q.require_grid().levels % 2 else 2 * codes + 1
    return operands.form(q.require_grid(), "integers").spread * odds


def _judge(lane: Lane, q: quest.Quantizer, codes: Tensor, operand: Tensor, **how: Any) -> None:
    scale = torch.rand(*codes.shape[:-1], 1, generator=torch.Generator().manual_seed(1)) + 0.5
    static = {"q": q, "kind": "integers", "width": codes.shape[-1], "dtype": how["dtype"]}
    values = lane.call("decode", operand, scale, **static)["values"]
    found = examine.packed_operand(lane, q, codes, operand, scale, values)
    LEDGER.judge(lane, found, f"{q.spec}, {tuple(codes.shape)}, {how}")


@every_lane
@pytest.mark.parametrize("name", GRIDS)
@fewer
@given(
    lead=st.sampled_from(((3,), (1,), (2, 5), (0,), (), (70,))),
    width=st.sampled_from((64, 1, 2, 3, 5, 7, 9, 130, 2047, 2048, 2049, 4100, 0)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", "transposed", "odd")),
    seed=SEEDS,
)
def test_packed(
    lane: Lane, name: str, lead: tuple[int, ...], width: int, dtype: torch.dtype, layout: str,
    seed: int,
) -> None:  # fmt: skip
    q = PLAIN[name]
    codes = _codes(q, (*lead, width), seed)
    operand = _integers(q, codes)
    if layout == "transposed" and operand.ndim == 2:
        operand = operand.t().contiguous().t()
    elif layout == "odd":  # where no entry begins a word
        first = torch.full((1,), 7, dtype=torch.int8)
        operand = torch.cat([first, operand.flatten()])[1:].view(operand.shape)
    _judge(lane, q, codes, operand, dtype=dtype, layout=layout, seed=seed)


@every_lane
@pytest.mark.parametrize("name", GRIDS)
def test_every_code_beside_every_other(lane: Lane, name: str) -> None:
    q = PLAIN[name]
    levels = q.require_grid().levels
    half = torch.arange(levels, dtype=torch.int8) - levels // 2
    codes = torch.cartesian_prod(half, half).flatten()[None]
    # In the last place of a byte, and in the first.
    for start in (0, 1):
        _judge(
            lane, q, codes[:, start:], _integers(q, codes[:, start:]).contiguous(),
            dtype=torch.float32,
        )  # fmt: skip


def test_the_form_by_hand() -> None:
    four, two, three = PLAIN["uniform4"], PLAIN["uniform2"], PLAIN["ternary"]
    operand = torch.tensor([[-15, 15, 1]], dtype=torch.int8)
    assert lowbit.pack_operand(8 * operand, four.spec).tolist() == [[0xF0, 0x08]]
    assert lowbit.pack_operand(32 * operand.clamp(-3, 3), two.spec).tolist() == [[0b101100]]
    assert lowbit.pack_operand(64 * operand.clamp(-1, 1), three.spec).tolist() == [[0b101000]]
    packed, scale = torch.tensor([[0xF0, 0x08]], dtype=torch.uint8), torch.tensor([[2.0]])
    step = torch.tensor(four.require_grid().step, dtype=torch.float32)
    values = lowbit.decode(packed, scale, four.spec, "packed4", 3, torch.float32)
    torch.testing.assert_close(values, torch.tensor([[-15.0, 15.0, 1.0]]) * step)


@pytest.mark.parametrize("name", GRIDS)
def test_what_benchmarks_time_beside_it_does_the_same(name: str) -> None:
    """Torch's own packing and decoding, which no gate judges."""
    q, form = PLAIN[name], operands.saved(PLAIN[name], "integers")
    levels = q.require_grid().levels
    codes = torch.arange(4 * levels, dtype=torch.int16).view(4, levels) % levels - levels // 2
    codes = codes.to(torch.int8).repeat(1, 8)
    operand, scale = _integers(q, codes), torch.tensor([[0.5], [1.0], [3.0], [0.75]])
    packed = baselines.pack_operand(operand, form)
    assert torch.equal(packed, lowbit.pack_operand(operand, q.spec))
    for stored, kind in ((packed, form), (operand, operands.form(q.require_grid(), "integers"))):
        values = baselines.decode(stored, scale, kind, codes.shape[1])
        asked = (q.spec, kind.kind, codes.shape[1], values.dtype)
        assert torch.equal(values, lowbit.decode(stored, scale, *asked))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("w1a1", ("bits", "bits")),
        ("w1a8", ("codes", "integers")),
        ("w1.58a1.58", ("packed2", "packed2")),
        ("w2a2", ("packed2", "packed2")),
        ("w3a3", ("packed4", "packed4")),
        ("w4a4", ("packed4", "packed4")),
        ("w2a4", ("packed4", "packed2")),
        ("w5a5", ("integers", "integers")),
        ("w4a8", ("codes", "packed4")),
        ("w8a8", ("codes", "codes")),
        ("fp4", ("integers", "integers")),
        ("w4a4-2:4", ("packed4", "integers")),
        ("w4a4-4:8", ("packed4", "integers")),
    ],
)
def test_what_is_packed(name: str, kinds: tuple[str, str]) -> None:
    """Of activation and weight: what is dense and of 2 to 4 bits, in as many bytes as it says."""
    made = quest.recipe(name)
    pair = (made.activation, made.weight)
    found = [
        operands.saved(q, kind).kind
        for q, kind in zip(pair, operands.kinds(*pair) or (), strict=True)
    ]
    assert tuple(found) == kinds
    x, w = torch.randn(3, 72), torch.randn(5, 72)
    read = lowbit_linear.low_bit_linear(
        x, [w], [], pair[0].spec, pair[1].spec, torch.float32, True
    )[1:]
    widths = {"bits": 9, "packed2": 18, "packed4": 36, "integers": 72, "codes": 72}
    assert [tuple(t.shape) for t in read[::3]] == [(3, widths[kinds[0]]), (5, widths[kinds[1]])]


@pytest.mark.parametrize("name", ["w1.58a1.58", "w2a2", "w3a3", "w4a4", "w2a4", "w4a4-2:4"])
@pytest.mark.parametrize("width", [72, 20, 12])
def test_gradients_are_those_of_operands_in_bytes(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quest.recipe(name)
    specs = (made.activation.spec, made.weight.spec)
    g = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn(n, width, generator=g, requires_grad=True) for n in (7, 5, 4))
    real = lowbit_linear.pair

    def grads() -> list[Tensor]:
        y = lowbit_linear.low_bit_linear(x, [v, w], [], *specs, torch.float32, True)
        loss = y[0].square().sum() + y[1].square().sum()
        return [y[0], y[1], *torch.autograd.grad(loss, (x, v, w))]

    packed = grads()
    monkeypatch.setattr(
        lowbit_linear, "pair", lambda *names: real(*names)._replace(saved=real(*names).kinds)
    )
    in_bytes = lowbit_linear._CPU._replace(
        encode_saved=lambda *rest: (*(made := eager.encode(*rest)), made[0])
    )
    monkeypatch.setattr(lowbit_linear, "_CPU", in_bytes)
    assert all(map(torch.equal, packed, grads()))


def test_nothing_is_saved_where_no_gradient_is_asked_for() -> None:
    """By layers, alone and together; the operator refuses a gradient then."""
    layers = [quest.Linear(72, n, recipe="w4a4", bias=False) for n in (5, 4)]
    specs = (layers[0].recipe.activation.spec, layers[0].recipe.weight.spec)
    weights = [layer.weight for layer in layers]
    x = torch.randn(3, 72)
    assert len(lowbit_linear.low_bit_linear(x, weights, [], *specs, torch.float32, True)) == 11
    seen: list[int] = []
    real = lowbit_linear._CPU.encode_saved
    for asked in (True, False):
        counted = lowbit_linear._CPU._replace(encode_saved=lambda *a: seen.append(1) or real(*a))
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(asked):
            patch.setattr(lowbit_linear, "_CPU", counted)
            with paths.only("integers"):
                made = [layers[0](x), *quest.together(x, layers)]
                assert len(seen) == 5  # x and the weights, when asked for
                for layer in layers:
                    layer.requires_grad_(False)
                layers[0](x), quest.together(x, layers)
                for layer in layers:
                    layer.requires_grad_(True)
        assert [y.requires_grad for y in made] == [asked] * 3
        assert len(seen) == 5
    with torch.no_grad():
        ys = lowbit_linear.low_bit_linear(x, weights, [], *specs, torch.float32, False)
    assert all(map(torch.equal, ys, made[1:]))
    with pytest.raises(RuntimeError, match="told to save nothing, and a gradient is asked for"):
        lowbit_linear.low_bit_linear(x, weights, [], *specs, torch.float32, False)


SAVED = ["w1a1", "w1.58a1.58", "w2a2", "w3a3", "w4a4", "w5a5", "w8a8", "w4a4-2:4", "fp4"]


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_beside_an_operand(name: str) -> None:
    """By `encode_saved`: the packed codes of the quantizer itself, or the operand as it is."""
    made = quest.recipe(name)
    kind = (operands.kinds(made.activation, made.weight) or ("", ""))[1]
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    *rest, saved = eager.encode_saved(x, made.weight, kind)
    for t, expected in zip(rest, eager.encode(x, made.weight, kind), strict=True):
        assert torch.equal(t, expected)
    packs = operands.saved(made.weight, kind).kind in operands.PACKED
    assert packs == (name in SAVED[1:5])
    expected = ops.quantize(x, made.weight.spec, True)[0] if packs else rest[0]
    assert torch.equal(saved, expected)


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize(("name", "bits"), [("w2a2", 2), ("w4a4", 4), ("w1a1", 0), ("w8a8", 0)])
def test_one_pass_is_asked_for(
    name: str, bits: int, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the quantizer in CUDA C++, wherever it has the rows; elsewhere packing follows."""
    made = quest.recipe(name)
    kind = (operands.kinds(made.activation, made.weight) or ("",))[0]
    x = torch.randn(3, 256)
    asked: list[tuple[str, int]] = []

    def quantize(x: Tensor, *_: Any, saved: int = 0, **how: Any) -> tuple[Tensor, ...]:
        asked.append(("blocks", saved))
        return (*eager.encode(x, made.activation, kind), x.new_full((0,), saved))

    def encode(x: Tensor, *_: Any, **how: Any) -> tuple[Tensor, ...]:
        asked.append(("encode", 0))
        return eager.encode(x, made.activation, kind)

    def pack(operand: Tensor, bits: int, *_: int) -> Tensor:
        asked.append(("pack", bits))
        return operand

    monkeypatch.setattr(blocks, "supports", lambda *_: has_kernel)
    monkeypatch.setattr(blocks, "quantize", quantize)
    monkeypatch.setattr(kernel, "encode", encode)
    monkeypatch.setattr(pack_kernel, "pack", pack)
    found = lowbit.launch_encode_saved(x, made.activation, kind)
    assert len(found) == 5
    apart = [("encode", 0), ("pack", bits)][: 2 if bits else 1]
    assert asked == ([("blocks", bits)] if has_kernel else apart)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        lowbit.launch_encode_saved(x.int(), made.activation, kind)


@pytest.mark.parametrize(
    ("operand", "name", "error", "told"),
    [
        (torch.ones(2, 8), "w4a4", TypeError, "operand must be torch.int8, got torch.float32"),
        (torch.ones((), dtype=torch.int8), "w4a4", ValueError, "at least one axis, got a scalar"),
        (torch.ones(2, 8, dtype=torch.int8), "w8a8", ValueError, "no operand of kind 'integers'"),
        (torch.ones(2, 8, dtype=torch.int8), "fp4", ValueError, "have no packed form"),
        (torch.ones(2, 8, dtype=torch.int8), "w5a5", ValueError, "have no packed form"),
        (torch.ones(2, 8, dtype=torch.int8), "w4a4-2:4", ValueError, "have no packed form"),
    ],
)
def test_errors(operand: Tensor, name: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        lowbit.pack_operand(operand, quest.recipe(name).weight.spec)


def test_errors_of_what_decodes() -> None:
    four, scale = PLAIN["uniform4"].spec, torch.ones(2, 1)
    packed = torch.zeros(2, 4, dtype=torch.uint8)
    for kind, width, told in (
        ("packed4", 9, "operand must be torch.uint8 with 5 columns for packed4 of width 9"),
        ("packed2", 16, "has no operand of kind 'packed2'"),
        ("integers", 4, "operand must be torch.int8 with 4 columns for integers"),
    ):
        with pytest.raises(ValueError, match=told):
            lowbit.decode(packed, scale, four, kind, width, torch.float32)
    for kind in operands.PACKED:
        with pytest.raises(ValueError, match="kind must be one of bits, integers, codes"):
            lowbit.encode(torch.ones(2, 8), four, kind)

"""A product whose heads the rotary embedding turns: judged, against two operations; its kernel."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quest
from property_tests import emulated, far_scales
from property_tests.lane_marks import every_lane, fewer
from property_tests.ledger import LEDGER
from property_tests.places import CPU, Place
from property_tests.products import COMPILED, kinds_of, operands_of
from quest import lowbit, rotated_product
from quest.conformance import examine, inputs, judges
from quest.conformance.lanes import Lane, no_product
from quest.conformance.strategies import SEEDS
from quest.kernels import cuda, hopper, outputs, product

HALVES = (torch.bfloat16, torch.float16)
each_head = pytest.mark.parametrize("head", product.HEADS)


def angles(positions: int, head: int) -> tuple[Tensor, Tensor]:
    """cos, sin (T, d_head / 2) float32, of any angles; some keep or swap what they turn."""
    g = torch.Generator().manual_seed(positions + head)
    angle = torch.randn(positions, head // 2, generator=g) * 10
    cos, sin = angle.cos(), angle.sin()
    cos[:, ::7], sin[:, ::7] = 1.0, 0.0
    cos[:, 3::7], sin[:, 3::7] = 0.0, -1.0
    return cos, sin


def same(t: Tensor, other: Tensor) -> bool:
    """Bit for bit; one NaN is as good as another."""
    assert (t.shape, t.dtype, t.device) == (other.shape, other.dtype, other.device)
    equal = t.contiguous().view(torch.int16) == other.contiguous().view(torch.int16)
    return bool((equal | (t.isnan() & other.isnan())).all())


def turned_by(y: Tensor, cos: Tensor, sin: Tensor, columns: int) -> Tensor:
    """y (M, N), its first columns turned in PyTorch, by the formula with one dtype conversion."""
    head, made = 2 * cos.shape[1], y.clone()
    if columns:
        first = y[:, :columns].reshape(-1, len(cos), columns // head, head)
        low, high = first.chunk(2, dim=-1)
        c, s = (t.repeat(1, 2)[:, None] for t in (cos, sin))
        h = (first * c + torch.cat((-high, low), dim=-1) * s).to(y.dtype)
        made[:, :columns] = h.reshape(len(y), columns)
    return made


@every_lane
@pytest.mark.parametrize("name", ["w1a1", "w2a2", "w4a4", "w8a8", "w4a8", "fp4"])
@fewer
@given(data=st.data())
def test_it_is_judged(lane: Lane, name: str, data: st.DataObject) -> None:
    """Around tiles of 128 rows and columns; several sequences; columns that are not turned."""
    if (reason := no_product(lane)) is not None:
        pytest.skip(reason)
    positions = data.draw(st.sampled_from((5, 1, 63, 130)), label="positions")
    rows = positions * data.draw(st.integers(1, 3), label="sequences")
    head = data.draw(st.sampled_from(product.HEADS), label="head")
    heads = data.draw(st.integers(1, 5), label="heads")
    columns = head * heads + data.draw(st.sampled_from((0, 7, 8)), label="further columns")
    turned = head * data.draw(st.integers(0, heads), label="turned heads")
    width = data.draw(st.sampled_from((64, 8, 136, 1024)), label="in_features")
    dtype = data.draw(st.sampled_from(HALVES), label="dtype")
    seed = data.draw(SEEDS, label="seed")
    x = inputs.draw("gaussian", (rows, width), dtype, seed)
    w = inputs.draw("gaussian", (columns, width), dtype, seed + 1) / width**0.5
    bias = inputs.draw("gaussian", (columns,), dtype, seed + 2) if seed % 2 else None
    told = f"{(rows, width)}, {positions} positions, {columns} columns, {head}, {dtype}, {seed}"
    rotary = (*angles(positions, head), turned)
    found = examine.product(lane, x, w, bias, quest.recipe(name), dtype, rotary=rotary)
    assert [v.stage for v in found] == [
        "accumulators", "product", "turned", "accumulators", "product", "turned"
    ]  # fmt: skip
    LEDGER.judge(lane, found, told)


def test_what_its_judge_sees() -> None:
    """Another position, sign, half, head or rounding, and columns more or fewer."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(6, 128, generator=g).bfloat16()
    cos, sin = angles(3, 32)
    good = turned_by(y, cos, sin, 64)
    assert judges.turned_heads(y, cos, sin, 64, good).failure is None
    exact = turned_by(y.float(), cos, sin, 64)
    nudged = good.clone()
    nudged[5, 63] = exact[5, 63].nextafter(torch.tensor(100.0)).bfloat16() * (1 + 2**-7)
    for wrong in (
        y, turned_by(y, cos, sin, 32), turned_by(y, cos, sin, 96), turned_by(y, cos, -sin, 64),
        turned_by(y, sin, cos, 64), turned_by(y, cos.roll(1, 0), sin.roll(1, 0), 64),
        turned_by(y, cos.bfloat16().float(), sin.bfloat16().float(), 64), good.roll(1, 1), nudged,
        turned_by(y.view(3, 256), *(t.repeat(1, 1) for t in (cos, sin)), 64).view(6, 128),
    ):  # fmt: skip
        assert judges.turned_heads(y, cos, sin, 64, wrong).failure is not None
    nothing = torch.empty(0, 3).bfloat16()
    assert judges.turned_heads(nothing, cos[:0], sin[:0], 0, nothing).failure is None


@pytest.mark.whole
@each_head
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_it_is_the_product_and_a_rotation(dtype: torch.dtype, head: int) -> None:
    """Bit for bit, also of infinities and NaN; laid out as any result; nothing is changed."""
    for name, further in (("w1a1", 24), ("w4a4", 13), ("w8a8", 0)):
        sizes = (14, 2 * head + further)
        x, w = (inputs.draw("gaussian", (n, 128), torch.float32, n) for n in sizes)
        made = operands_of(name, x, w * 2.0**100, w[:, 0].to(dtype), dtype)  # float16: infinite
        made[2][::2] *= 2.0**-100
        made[2][5] = float("nan")
        y = lowbit.product(*made)
        for cos, sin in (angles(7, head), angles(14, head), angles(1, head)):
            before = cos.clone()
            for turned in (0, head, 2 * head):
                expected = turned_by(y, cos, sin, turned)
                for function in (
                    rotated_product.rotated_product, rotated_product.eager_rotated_product
                ):  # fmt: skip
                    h = function(*made, cos, sin, turned)
                    assert same(h, expected)
                    assert h.is_contiguous()
            assert torch.equal(cos, before)


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit, "require_product", lambda _: None)
    made = operands_of("w4a4", torch.randn(6, 128), torch.randn(100, 128), None, torch.bfloat16)
    cos, sin = angles(3, 32)
    fakes = [torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t for t in made]
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((cos[None], sin, 32), r"cos must be \(T, d_head / 2\) for heads of 32, 64, 128 columns"),
        ((cos[..., None], sin[..., None], 32), r"got shape \(3, 16, 1\)"),
        ((cos[:, :8], sin[:, :8], 16), r"got shape \(3, 8\)"),
        ((cos.repeat(1, 8), sin.repeat(1, 8), 0), r"got shape \(3, 128\)"),
        ((cos.double(), sin, 32), r"cos must be torch.float32 of shape \(3, 16\)"),
        ((cos, sin.bfloat16(), 32), r"sin must be torch.float32 of shape \(3, 16\)"),
        ((cos, sin[:2], 32), r"sin must be torch.float32 of shape \(3, 16\) on \w+, got"),
        ((cos, sin.T, 32), "sin must be torch.float32"),
        ((cos[:0], sin[:0], 32), "a must have whole sequences of 0 rows, got 6"),
        ((cos.repeat(2, 1)[:4], sin.repeat(2, 1)[:4], 32), "whole sequences of 4 rows, got 6"),
        ((cos.repeat(4, 1), sin.repeat(4, 1), 32), "whole sequences of 12 rows, got 6"),
        ((cos, sin, 16), "turned must be a multiple of 32 up to 100, as b has rows, got 16"),
        ((cos, sin, 128), "got 128"),
        ((cos, sin, -32), "got -32"),
    ]
    for given_, told in wrong:
        for function in (
            rotated_product.rotated_product, rotated_product.eager_rotated_product,
            rotated_product.launch_rotated_product,
        ):  # fmt: skip
            with pytest.raises(ValueError, match=told):
                function(*made, *given_)
        meta = [t.to("meta") if isinstance(t, Tensor) else t for t in given_]
        with pytest.raises(ValueError, match=told):
            torch.ops.quest.rotated_product(*fakes, *meta)
    for i, name in enumerate("ab"):
        bare = [*made]
        bare[i] = bare[i][0, 0]
        with pytest.raises(ValueError, match=rf"{name} must be .* of two axes, got .* shape \(\)"):
            rotated_product.launch_rotated_product(*bare, cos, sin, 32)
    with pytest.raises(ValueError, match=r"sin must be .* on meta"):
        rotated_product.eager_rotated_product(*made, cos, sin.to("meta"), 32)
    made[-1] = torch.float32
    with pytest.raises(TypeError, match=r"dtype must be bfloat16 or float16, got torch\.float32"):
        rotated_product.rotated_product(*made, cos, sin, 32)


@pytest.mark.parametrize("positions", [0, 3])
def test_no_rows(positions: int) -> None:
    """Any tables are whole sequences of none, those of no positions, too."""
    made = operands_of("w4a4", torch.randn(0, 128), torch.randn(100, 128), None, torch.bfloat16)
    cos, sin = (t[:positions] for t in angles(3, 32))
    y = rotated_product.rotated_product(*made, cos, sin, 32)
    assert (y.shape, y.dtype) == ((0, 100), torch.bfloat16)


def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def kernel(a: Tensor, b: Tensor, out: torch.dtype, **how: Any) -> Tensor:
        told.append(how)
        return a.new_empty((a.shape[0], b.shape[0]), dtype=out)

    monkeypatch.setattr(product, "product", kernel)
    monkeypatch.setattr(lowbit, "require_product", lambda _: None)
    made = operands_of("w4a4", torch.randn(6, 128), torch.randn(96, 128), None, torch.bfloat16)
    cos, sin = angles(3, 32)
    rotated_product.launch_rotated_product(*made, cos, sin, 64)
    how = told.pop()
    assert how["rotary"][0] is cos
    assert how["rotary"][1] is sin
    assert how["rotary"][2] == 64
    assert (how["gate"], how["residual"]) == (False, None)
    lowbit.launch_product(*made)
    assert told.pop()["rotary"] is None


@pytest.mark.whole
@pytest.mark.parametrize("shape", [(6, 96), (0, 96), (6, 0)], ids=str)
def test_opcheck(shape: tuple[int, int]) -> None:
    x, w = torch.randn(shape[0], 128), torch.randn(shape[1], 128)
    made = operands_of("w4a4", x, w, None, torch.float16)
    cos, sin = angles(3, 32)
    for lying in (cos, cos.T.contiguous().T):
        turned = min(64, shape[1])
        torch.library.opcheck(torch.ops.quest.rotated_product.default, (*made, lying, sin, turned))
        assert rotated_product.rotated_product(*made, lying, sin, turned).shape == shape


# --- the kernel -------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("head", [32, 128])
@pytest.mark.parametrize(("binary", "tiles"), COMPILED)
def test_nothing_is_spilled(
    binary: bool, tiles: str, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ptxas says of registers: angles take some, beside 128 accumulators a thread."""
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    asked: list[dict[str, int]] = []
    monkeypatch.setattr(cuda, "compile_", lambda *told, cached: asked.append(told[2]))
    for epilogue, out, bias in (
        (hopper.CORRECTED, torch.bfloat16, 0), (hopper.CORRECTED, torch.float16, 2),
        (hopper.PLAIN, torch.bfloat16, 1),
    ):  # fmt: skip
        if binary and epilogue == hopper.PLAIN:
            continue
        product.compile_(binary, epilogue, out, bias, product.KINDS[tiles], rotary=head // 2)
        options = core.ProgramOptions(
            std="c++17", arch=hopper.ARCHITECTURE, ptxas_options="-v",
            define_macro=[(name, str(value)) for name, value in asked[-1].items()],
        )  # fmt: skip
        told = io.StringIO()
        core.Program(cuda._text("product.cu"), "c++", options).compile("cubin", logs=told)
        assert re.findall(r"(\d+) bytes (?:stack|spill)", told.getvalue()) == ["0"] * 3


@pytest.fixture
def on_hopper(place: Place) -> Place:
    if reason := hopper.unavailable(torch.device(place.device)):
        pytest.skip(reason)
    return place


# Sequences, positions, heads that are turned, and columns behind them.
SHAPES = {
    "wide": ((3, 47, 3, 70), (1, 257, 2, 128)),
    "tall": ((1, 1, 1, 0), (2, 65, 4, 1), (1, 257, 2, 128)),
    "narrow": ((1, 70, 0, 40), (5, 27, 5, 24)),
}


@pytest.mark.whole
@each_head
@pytest.mark.parametrize(("name", "tiles"), kinds_of("w1a1", "w4a4"))
def test_the_kernel_s_bits(
    name: str, tiles: str, head: int, on_hopper: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one cluster's many tiles: the product's, turned; rows near and far, biases and none."""
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    device = on_hopper.device
    for i, (sequences, positions, heads, behind) in enumerate(SHAPES[tiles]):
        rows, turned = sequences * positions, heads * head
        columns = turned + behind
        g = torch.Generator().manual_seed(rows)
        # Of fewer stages than the ring has, and of more.
        width = (200, 9300 if name == "w1a1" else 1300)[i % 2]
        x, w = (torch.randn(n, width, generator=g) for n in (rows, columns))
        x *= torch.tensor([1.0, 1e32, 1e-32])[torch.arange(rows) // 16 % 3, None]
        w *= torch.tensor([1.0, 1e-32, 1e32, 4.0])[torch.arange(columns) % 4, None]
        dtype = HALVES[(i + head // 64) % 2]
        bias = (None, torch.randn(columns, generator=g))[(i + head // 32) % 2]
        made = operands_of(name, x, w, bias, dtype)
        made = [t.to(device) if isinstance(t, Tensor) else t for t in made]
        cos, sin = (t.to(device) for t in angles(positions, head))
        with product.only(product.KINDS[tiles]), outputs.poisoned(0x55):
            y = on_hopper.operators.product(*made)
            h = on_hopper.operators.rotated_product(*made, cos, sin, turned)
        assert same(h.cpu(), turned_by(y.cpu(), cos.cpu(), sin.cpu(), turned))


@pytest.mark.whole
@pytest.mark.parametrize("head", [32, 128])
def test_rows_that_are_far(head: int, on_hopper: Place) -> None:
    """In a warp with others, and in one of none but such."""
    device, columns = on_hopper.device, 2 * head + 8
    a, b = (inputs.integers("random", n, 256, n).to(device) for n in (64, columns))
    row, column = far_scales.rows(1.0).to(device), far_scales.columns(columns).to(device)
    cos, sin = (t.to(device) for t in angles(32, head))
    made: list[Tensor] = []
    for rotary in (None, product.Turned(cos, sin, 2 * head)):
        with outputs.poisoned(0xFF), product.only(product.NARROW):
            made.append(
                product.product(
                    a, b, torch.bfloat16, epilogue=hopper.PLAIN, row_scale=row,
                    column_scale=column, rotary=rotary,
                ).cpu()
            )  # fmt: skip
    assert same(made[1], turned_by(made[0], cos.cpu(), sin.cpu(), 2 * head))
    assert made[0].isfinite().any(1)[:60].all()


@pytest.mark.whole
@pytest.mark.parametrize("front", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("head", product.HEADS)
def test_nothing_is_read_beside_its_angles(head: int, front: bool, on_hopper: Place) -> None:
    """Of rows that fill a part of a tile, whose others have no position."""
    for rows, positions in ((40, 20), (1, 1), (65, 65)):
        x, w = torch.randn(rows, 128), torch.randn(2 * head, 128)
        made = operands_of("w4a4", x, w, None, torch.bfloat16)
        made = [t.to(on_hopper.device) if isinstance(t, Tensor) else t for t in made]
        cos, sin = angles(positions, head)
        with (
            on_hopper.walled(cos, front) as c, on_hopper.walled(sin, front) as s,
            product.only(product.NARROW),
        ):  # fmt: skip
            y = on_hopper.operators.product(*made).cpu()
            h = on_hopper.operators.rotated_product(*made, c, s, 2 * head).cpu()
        assert same(h, turned_by(y, cos, sin, 2 * head))


BROKEN = {
    "a position": ("(row + 8 * h) % g.positions", "(row + 8 * h + 1) % g.positions"),
    "a sequence": ("(row + 8 * h) % g.positions", "min(row + 8 * h, g.positions - 1)"),
    "a sign": ("__fsub_rn(__fmul_rn(b, cosine.y)", "__fadd_rn(__fmul_rn(b, cosine.y)"),
    "a column of a pair": ("__fmul_rn(a, sine.x)", "__fmul_rn(b, sine.x)"),
    "angles ahead": ("angles.ask(j + 1);", "angles.ask(j);"),
    "heads that are not turned": ("if (turned) turn(", "if (angles.some) turn("),
    "the last head": ("* head < g.turned", "* (head + 1) < g.turned"),
}


@pytest.mark.parametrize(("name", "tiles"), kinds_of("w1a1", "w4a4"))
def test_each_kind_of_tile_emulated(name: str, tiles: str, emulator: emulated.Emulator) -> None:
    """Of two sequences and more of K than a stage: the product's bits, turned."""
    x, w = torch.randn(134, 1400), torch.randn(300, 1400)
    made = operands_of(name, x, w, torch.randn(300), HALVES[1])
    cos, sin = angles(67, 128)
    with product.only(product.KINDS[tiles]):
        y = CPU.operators.product(*made)
        h = CPU.operators.rotated_product(*made, cos, sin, 256)
    assert same(h, turned_by(y, cos, sin, 256))
    assert not same(h, y)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name: str, emulator: emulated.Emulator) -> None:
    old, new = BROKEN[name]
    text = cuda._text("product.cu")
    assert text.count(old) == 1
    made = operands_of("w4a4", torch.randn(90, 128), torch.randn(200, 128), None, HALVES[0])
    cos, sin = angles(45, 64)
    operators = CPU.operators
    with product.only(product.NARROW):
        y = operators.product(*made)
        assert same(operators.rotated_product(*made, cos, sin, 64), turned_by(y, cos, sin, 64))
        product._kernel.cache_clear()
        emulator.text["product.cu"] = text.replace(old, new)
        h = operators.rotated_product(*made, cos, sin, 64)
    assert not same(h, turned_by(y, cos, sin, 64))

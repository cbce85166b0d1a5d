"""Operands of the integer product, and the product: T0 and T6 in every lane that has one."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import quest
from property_tests.lane_marks import every_lane, fewer
from property_tests.ledger import LEDGER
from property_tests.products import COMPILED, kinds_of
from quest import lowbit, operands, packing
from quest.conformance import examine, inputs, judges, oracle
from quest.conformance.lanes import Lane, no_product
from quest.conformance.strategies import SEEDS
from quest.kernels import cuda, hopper, product
from quest.lowbit_linear import low_bit_linear
from quest.reference import packing as reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECIPES = (
    "w1a1", "w2a2", "w3a3", "w4a4", "w5a5", "w6a6", "w7a7", "w8a8", "w1.58a1.58", "fp4", "w1a4",
    "w1a8", "w4a8", "w8a1.58", "w1a1-2:4", "w4a4-2:4", "w4a4-4:8", "fp4-2:4",
)  # fmt: skip


def _require_product(lane: Lane) -> None:
    reason = no_product(lane)
    if reason is not None:
        pytest.skip(reason)


@every_lane
def test_one_of_each(lane: Lane) -> None:
    """In one test, since the quick profile takes one in 16 parameters."""
    # The interpreter takes rows of up to 8192 at a time: sums of the last go over two turns.
    for seed, (name, width) in enumerate((
        ("w1a1", 40), ("w2a4", 72), ("w8a8", 1032), ("w1a8", 40), ("w8a1.58", 72), ("fp4", 1032),
        ("w4a4-4:8", 40), ("w2a2", 8320),
    )):  # fmt: skip
        made = quest.recipe(name)
        pair = (made.activation, made.weight)
        x, w = (inputs.draw("outlier", (n, width), torch.float32, seed) for n in (5, 3))
        for q, kind, t in zip(pair, operands.kinds(*pair) or (), (x, w), strict=True):
            LEDGER.judge(lane, examine.encoded(lane, t, q, kind), f"{name}, {width}, {kind}")
            LEDGER.judge(lane, examine.operand(lane, t, q, kind), f"{name}, {width}, {kind}")
        if no_product(lane) is None:
            bias = inputs.draw("gaussian", (3,), torch.float32, seed)
            found = examine.product(lane, x, w, bias, made, torch.float32)
            LEDGER.judge(lane, found, f"{name}, {width}")


@every_lane
def test_zeros_of_either_sign(lane: Lane) -> None:
    """A negative zero, of the input or of its transform, is no negative number."""
    for seed, (name, width) in enumerate((("w1a1", 384), ("w4a4", 384), ("w1.58a1.58", 384))):
        q = quest.recipe(name).activation
        kind = (operands.kinds(q, q) or ("",))[0]
        x = inputs.draw("negative_zeros", (5, width), torch.float32, seed)
        LEDGER.judge(lane, examine.encoded(lane, x, q, kind), f"{name}, {width}")
        LEDGER.judge(lane, examine.operand(lane, x, q, kind), f"{name}, {width}")


@every_lane
def test_coherent_products(lane: Lane) -> None:
    """Sums as large as they get: rows of the weight are those of the input, and their negatives."""
    _require_product(lane)
    for seed, (name, width) in enumerate((("w1a1", 4096), ("w4a4", 4096), ("w7a7", 1032))):
        x = inputs.draw("gaussian", (5, width), torch.float32, seed)
        w = torch.cat((x, -x))
        LEDGER.judge(
            lane, examine.product(lane, x, w, None, quest.recipe(name), torch.float32), name
        )


@every_lane
@pytest.mark.parametrize("name", RECIPES)
@fewer
@given(data=st.data())
def test_encode(lane: Lane, name: str, data: st.DataObject) -> None:
    """An operand is the quantization of `quantize`, in the product's form."""
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    made = quest.recipe(name)
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    which = data.draw(st.sampled_from((0, 1)), label="activation, weight")
    q = (made.activation, made.weight)[which]
    group = 1 if q.sparsity is None else q.sparsity.m
    shapes = ((3, 64), (1, 8), (2, 3, 40), (3, 12), (5, 2000), (0, 16))
    shape = data.draw(st.sampled_from([s for s in shapes if s[-1] % group == 0]), label="shape")
    kind = data.draw(
        st.sampled_from(("gaussian", "outlier", "mixed_rows", "non_finite")), label="distribution"
    )
    seed = data.draw(SEEDS, label="seed")
    x = inputs.draw(kind, shape, dtype, seed)
    told = f"{kind}, {shape}, {dtype}, seed {seed}, {q.spec} as {kinds[which]}"
    LEDGER.judge(lane, examine.encoded(lane, x, q, kinds[which]), told)
    LEDGER.judge(lane, examine.operand(lane, x, q, kinds[which]), told)


@every_lane
@pytest.mark.parametrize("name", RECIPES)
@fewer
@given(data=st.data())
def test_product(lane: Lane, name: str, data: st.DataObject) -> None:
    _require_product(lane)
    # Rectangular on purpose, around the tiles of 128 x 256 and 128 bytes of K.
    rows = data.draw(st.sampled_from((5, 1, 130, 257)), label="rows")
    outs = data.draw(st.sampled_from((7, 1, 48, 256, 300)), label="out_features")
    widths = (64, 8, 136, 1024, 1152, *(() if "4:8" in name else (12, 20)))
    width = data.draw(st.sampled_from(widths), label="in_features")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    kind = data.draw(
        st.sampled_from(("gaussian", "outlier", "equal", "zeros")), label="distribution"
    )
    seed = data.draw(SEEDS, label="seed")
    x = inputs.draw(kind, (rows, width), dtype, seed)
    w = inputs.draw("gaussian", (outs, width), dtype, seed + 1) / width**0.5
    bias = inputs.draw("gaussian", (outs,), dtype, seed + 2) if seed % 2 else None
    told = f"{kind}, x {(rows, width)}, w {(outs, width)}, {dtype}, seed {seed}, {name}"
    LEDGER.judge(lane, examine.product(lane, x, w, bias, quest.recipe(name), dtype), told)


def _bytes(
    kind: str, rows: int, width: int, dtype: torch.dtype, g: torch.Generator
) -> torch.Tensor:
    if kind == "random":
        x = torch.randint(0, 256, (rows, width), generator=g)
    elif kind == "one_hot":
        x = torch.zeros(rows, width, dtype=torch.int64)
        x[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = 255
    elif kind == "coherent":  # unlike terms: floats add equal ones exactly
        x = torch.randint(64, 128, (rows, width), generator=g)
    else:
        x = torch.full((rows, width), {"low": 128, "high": 127, "ones": 255}[kind])
    return x.to(torch.uint8).view(dtype)


@every_lane
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
def test_scales_at_the_ends_of_the_range(lane: Lane, name: str, dtype: torch.dtype) -> None:
    """Rows whose product leaves float32 until the column's scale brings it back, and others."""
    _require_product(lane)
    x, w = (inputs.draw("gaussian", (n, 1024), torch.float32, n) for n in (40, 24))
    x *= torch.tensor([1e37, 1e20, 1.0, 1e-20]).repeat(10)[:, None]
    w *= torch.tensor([1e-37, 1.0, 1e-18]).repeat(8)[:, None]
    found = examine.product(lane, x.to(dtype), w.to(dtype), None, quest.recipe(name), dtype)
    LEDGER.judge(lane, found, f"{name}, {dtype}")


@every_lane
@pytest.mark.parametrize("kind", ["random", "one_hot", "low", "high", "ones", "coherent"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 7, 16), (129, 257, 130), (31, 300, 4096), (2, 3, 8192)], ids=str
)
def test_accumulate(lane: Lane, kind: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """T0: coherent, extreme, one-hot and random operands; odd, tiny and long shapes."""
    _require_product(lane)
    m, n, k = shape
    g = torch.Generator().manual_seed(m + n)
    a, b = (
        _bytes(kind, m, k, dtype, g),
        _bytes("random" if kind == "one_hot" else kind, n, k, dtype, g),
    )
    acc = lane.call("accumulate", a, b)["accumulators"]
    LEDGER.judge(lane, [judges.accumulated(a, b, acc)], f"{kind}, {shape}, {dtype}")


@every_lane
def test_the_widest_accumulators(lane: Lane) -> None:
    """Coherent operands of the width that is the limit: (-128)^2 a product, or every bit; and of
    unlike terms.
    """
    _require_product(lane)
    for dtype, kind in (
        (torch.int8, "low"), (torch.uint8, "ones"), (torch.int8, "coherent")
    ):  # fmt: skip
        width = operands.MAX_WIDTH // (1 if dtype == torch.int8 else 8)
        a = _bytes(kind, 2, width, dtype, torch.Generator())
        acc = lane.call("accumulate", a, a)["accumulators"]
        LEDGER.judge(lane, [judges.accumulated(a, a, acc)], f"{width}, {dtype}")


def _whole(saved: torch.Tensor, q: quest.Quantizer, kind: str, width: int) -> NDArray[np.int64]:
    """The integers of an operand that a layer keeps; packed ones by the oracle's unpacking."""
    form = operands.saved(q, kind)
    if form.kind == kind:
        return judges.whole(saved, kind, width)
    index = reference.unpack(saved.numpy(), form.bits, width)
    codes = reference.from_unsigned(index, oracle.grid(q.require_grid()))
    odds = codes if q.require_grid().levels % 2 else 2 * codes + 1
    return operands.form_of(q, kind).spread * odds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_of_the_integer_path(name: str, dtype: torch.dtype, device: str) -> None:
    """y by the product's judge, gradients by the layer's; most are the float path's bit for bit."""
    if device == "cuda" and hopper.unavailable(torch.device("cuda")) is not None:
        pytest.skip(str(hopper.unavailable(torch.device("cuda"))))
    made = quest.recipe(name)
    layer = quest.Linear(72, 24, bias=True, recipe=made, dtype=dtype, device=device)
    x = inputs.draw("gaussian", (2, 5, 72), dtype, 0).to(device).requires_grad_()
    grad = inputs.draw("gaussian", (2, 5, 24), dtype, 1).to(device)
    pair = (made.activation, made.weight)
    y, a, a_scale, a_mask, b, b_scale, b_mask = low_bit_linear(
        x, [layer.weight], [layer.bias], pair[0].spec, pair[1].spec, dtype, True
    )
    assert y.shape == (2, 5, 24)
    assert y.dtype == dtype
    kinds = operands.kinds(*pair)
    assert kinds is not None
    forms = [operands.form_of(q, kind) for q, kind in zip(pair, kinds, strict=True)]
    judges.multiplied(
        (_whole(a.cpu(), pair[0], kinds[0], 72), _whole(b.cpu(), pair[1], kinds[1], 72)),
        (forms[0].unit, forms[1].unit),
        (a_scale.cpu(), b_scale.cpu()),
        layer.bias.detach().cpu(),
        y.detach().cpu().reshape(10, 24),
    ).require()
    integer_path = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    float_path = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)
    for p, q in zip(integer_path, float_path, strict=True):
        assert p.shape == q.shape
        assert p.dtype == q.dtype
        # On a GPU cuBLAS may sum in another order where an operand lies transposed; the points of
        # fp4's table and integers times the unit differ in the last bit.
        if device == "cpu" and "fp4" not in name:
            assert torch.equal(p, q)
    # The bound counts the backward's roundings from the operands that it reads: the product over
    # 24 or 10 terms, its storing, the rotation and the storing of the gradient.
    decoded = (
        lowbit.decode(t, scale, q.spec, operands.saved(q, kind).kind, 72, dtype).cpu()
        for t, scale, q, kind in zip((a, b), (a_scale, b_scale), pair, kinds, strict=True)
    )
    masks = (packing.unpack(a_mask.cpu(), 1, 72).bool(), packing.unpack(b_mask.cpu(), 1, 72).bool())
    out = dict(zip(("x_hat", "w_hat"), decoded, strict=True)) | {
        "y": y.detach().cpu().reshape(10, 24),
        "dx": integer_path[0].cpu().reshape(10, 72),
        "dw": integer_path[1].cpu(),
        "db": integer_path[2].cpu(),
    }
    found = judges.layer(
        x.detach().cpu().reshape(10, 72),
        layer.weight.detach().cpu(),
        grad.cpu().reshape(10, 24),
        layer.bias.detach().cpu(),
        made,
        out,
        masks,
        examine.accumulation(Lane("any", device, "dispatch")),
    )
    assert [v.stage for v in found] == ["layer y", "layer dx", "layer dw", "layer db"]
    # y is judged above: it is made of the integers, and not of values rounded to the dtype.
    for verdict in found[1:]:
        verdict.require()


@pytest.mark.parametrize(("rows", "d", "outs"), [(3, 0, 4), (0, 8, 4), (3, 8, 0)])
def test_layer_with_an_empty_axis(rows: int, d: int, outs: int) -> None:
    x, w = torch.ones(rows, d, requires_grad=True), torch.ones(outs, d, requires_grad=True)
    made = quest.recipe("w4a4", transform=quest.Identity())
    specs = (made.activation.spec, made.weight.spec)
    y = low_bit_linear(x, [w], [], *specs, torch.float32, True)[0]
    assert torch.equal(y, torch.zeros(rows, outs))
    for grad, t in zip(torch.autograd.grad(y.sum(), (x, w)), (x, w), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


def test_the_judges_of_the_product_bite() -> None:
    """A wrong byte, bit of padding, sum, count, scale, bias or tile of K is seen."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 20, generator=g), torch.randn(6, 20, generator=g)
    for name in ("w1a1", "w4a4", "w8a8"):
        q = quest.recipe(name, transform=quest.Identity()).weight
        kind = (operands.kinds(q, q) or ("", ""))[0]
        codes = q.quantize(x).codes
        a, a_scale, _, a_sums = lowbit.encode(x, q.spec, kind)
        b, b_scale, _, _ = lowbit.encode(w, q.spec, kind)
        for verdict in judges.encoded(q, kind, codes, None, a, a_sums):
            verdict.require()
        wrong = a.clone()
        wrong[-1, -1] ^= 0x80 if kind == "bits" else 2  # a bit of padding, or of an integer
        verdicts = judges.encoded(q, kind, codes, None, wrong, a_sums)
        assert any(v.failure for v in verdicts), name
        assert any(v.failure for v in judges.encoded(q, kind, codes, None, a, a_sums + 1)), name
        acc = lowbit.accumulate(a, b)
        judges.accumulated(a, b, acc).require()
        acc[2, 3] += 1
        assert judges.accumulated(a, b, acc).failure, name
        integers = (judges.whole(a, kind, 20), judges.whole(b, kind, 20))
        unit = operands.form_of(q, kind).unit
        bias = torch.randn(6, generator=g)
        exact = torch.from_numpy(integers[0] @ integers[1].T).double() * unit**2
        good = exact * a_scale * b_scale.T + bias
        tail = torch.from_numpy(integers[0][:, :16] @ integers[1][:, :16].T).double() * unit**2
        for y, right in (
            (good, True),
            (exact * b_scale * a_scale.T + bias, False),
            (exact * a_scale * b_scale.T, False),
            (tail * a_scale * b_scale.T + bias, False),
            (good * (1 + 2.0**-20), False),
        ):
            verdict = judges.multiplied(integers, (unit, unit), (a_scale, b_scale), bias, y.float())
            assert (verdict.failure is None) == right, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["random", "low", "ones"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (257, 511, 400), (700, 1100, 1168), (2048, 900, 640)]
)
@pytest.mark.parametrize("processors", [2, 6, 132])
@pytest.mark.parametrize(("binary", "tiles"), COMPILED)
def test_every_kind_of_tile(
    binary: bool, tiles: str, processors: int, shape: tuple[int, int, int], kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On few processors a cluster has many tiles: both teams, every lap of the ring, all groups."""
    if hopper.unavailable(torch.device("cuda", torch.cuda.current_device())) is not None:
        pytest.skip(str(hopper.unavailable(torch.device("cuda", torch.cuda.current_device()))))
    monkeypatch.setattr(cuda, "processors", lambda _: processors)
    g = torch.Generator().manual_seed(0)
    dtype = torch.uint8 if binary else torch.int8
    a, b = (_bytes(kind, n, shape[2], dtype, g) for n in shape[:2])
    with product.only(product.KINDS[tiles]):
        acc = lowbit.accumulate(a.cuda(), b.cuda()).cpu()
    judges.accumulated(a, b, acc).require()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.whole
@pytest.mark.parametrize(("name", "tiles"), kinds_of("w1a1", "w4a4", "w8a8"))
@pytest.mark.parametrize(
    ("shape", "dtype", "added"),
    [((600, 1100, 136), torch.bfloat16, torch.float16),
     ((330, 1031, 72), torch.float32, torch.float32)],
    ids=["bf16", "fp32"],
)  # fmt: skip
def test_many_tiles_of_a_cluster(
    shape: tuple[int, int, int], dtype: torch.dtype, added: torch.dtype, tiles: str, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Scales, sums and biases are those of each tile, at the edges of either matrix too."""
    if hopper.unavailable(torch.device("cuda", torch.cuda.current_device())) is not None:
        pytest.skip(str(hopper.unavailable(torch.device("cuda", torch.cuda.current_device()))))
    monkeypatch.setattr(cuda, "processors", lambda _: 4)
    lane, made = Lane("triton-cuda", "cuda", "dispatch"), quest.recipe(name)
    rows, outs, width = shape
    x, w = (inputs.draw("mixed_rows", (n, width), dtype, n) for n in (rows, outs))
    bias = inputs.draw("gaussian", (outs,), added, 0)
    with product.only(product.KINDS[tiles]):
        found = examine.product(lane, x, w, bias, made, dtype)
    LEDGER.judge(lane, found, f"{tiles}, {name}, {shape}, {dtype}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "tiles"), kinds_of("w1a1", "w4a4", "w8a8"))
def test_a_far_scale_leaves_other_rows_alone(tiles: str, name: str) -> None:
    """Those of its warp, and those that the last tile, which begins early, has once more."""
    if hopper.unavailable(torch.device("cuda", torch.cuda.current_device())) is not None:
        pytest.skip(str(hopper.unavailable(torch.device("cuda", torch.cuda.current_device()))))
    made = quest.recipe(name)
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair) or ("", "")
    x, w = (inputs.draw("gaussian", (n, 512), torch.float32, n).cuda() for n in (70, 300))
    bias = inputs.draw("gaussian", (300,), torch.float32, 0).cuda()
    a, a_scale, _, a_sums = lowbit.encode(x, pair[0].spec, kinds[0])
    b, b_scale, _, b_sums = lowbit.encode(w, pair[1].spec, kinds[1])
    names = ",".join(q.require_grid().name for q in pair)
    large = a_scale.clone()
    large[3] = 1e32  # far, with any factor
    with product.only(product.KINDS[tiles]):
        y, plain = (
            lowbit.product(
                a, b, scale, b_scale, a_sums, b_sums, bias, names, ",".join(kinds), 512,
                torch.float32,
            )
            for scale in (large, a_scale)
        )  # fmt: skip
    assert y[3].isfinite().all()
    assert not torch.equal(y[3], plain[3])
    y[3] = plain[3]
    assert torch.equal(y, plain)


def _require_compiler() -> None:
    pytest.importorskip(
        "cuda.core", reason="cuda-core is not installed: pip install 'quest-lowbit[hopper]'"
    )


# RAW writes int32, and nothing else does. A bias is of any dtype beside any output.
VARIANTS = [
    (hopper.RAW, torch.int32, None),
    *(
        (epilogue, out, None)
        for epilogue in (hopper.PLAIN, hopper.CORRECTED)
        for out in (torch.float32, torch.bfloat16, torch.float16)
    ),
    (hopper.PLAIN, torch.bfloat16, torch.float32),
    (hopper.PLAIN, torch.float32, torch.float16),
    (hopper.CORRECTED, torch.bfloat16, torch.bfloat16),
]
# Of tiles but the widest what differs by more than a type: outputs and biases of 16 bits do not.
_UNLIKE = [VARIANTS[0], VARIANTS[2], VARIANTS[4], VARIANTS[9]]
EACH = [
    (binary, tiles, *variant)
    for binary, tiles in COMPILED
    for variant in (VARIANTS if tiles == "wide" else _UNLIKE)
]


@pytest.mark.parametrize(("binary", "tiles", "epilogue", "out", "bias"), EACH)
def test_every_variant_compiles_without_a_gpu(
    binary: bool, tiles: str, epilogue: int, out: torch.dtype, bias: torch.dtype | None
) -> None:
    _require_compiler()
    shape = product.KINDS[tiles]
    kind = hopper.bias_type(None if bias is None else torch.empty(0, dtype=bias))
    gates = (False, True) if epilogue != hopper.RAW and out.itemsize == 2 else (False,)
    more = [(gate, False) for gate in gates]
    more += [(False, True)] if epilogue != hopper.RAW else []
    # Heads of any width are turned alike, but for how many lie in a tile.
    heads = (product.HEADS[0], product.HEADS[-1]) if tiles == "wide" else product.HEADS[-1:]
    turns = heads if epilogue != hopper.RAW and out == torch.bfloat16 and bias is None else ()
    for told in [*more, *((False, False, head // 2) for head in turns)]:
        made = product.compile_(binary, epilogue, out, kind, shape, *told, cached=False)
        assert b"product" in made.code
        assert made.code[:4] == b"\x7fELF"
    assert shape.shared <= 227 * 1024


MEASURED = Path(__file__).parents[1] / "benchmarks" / "records" / "nvidia-h200" / "tiles.csv"


def _loss(case: dict[str, str]) -> float:
    """By how much the kind of tile that a measured case takes is longer than the best."""
    rows, width, columns = (int(case[name]) for name in ("rows", "in", "out"))
    binary = case["recipe"] == "w1a1"
    took = {kind: float(case[name]) for name, kind in product.KINDS.items() if case[name]}
    assert set(took) == set(product.COSTS[binary])
    bytes_ = width // 8 if binary else width
    taken = product.shape(binary, rows, columns, bytes_, 132, case["then"] == "turned")
    return took[taken] / min(took.values())


def test_the_choice_of_tiles() -> None:
    """Of 208 measured cases six take longer than they could, by 11 percent in all."""
    with MEASURED.open(newline="", encoding="utf-8") as file:
        losses = sorted(map(_loss, csv.DictReader(file)))
    assert len(losses) == 208
    assert losses[-1] <= 1.049
    assert losses[-2] <= 1.03
    assert sum(losses) <= 208 + 0.107


def test_the_tiles_of_a_product_smaller_than_a_cluster() -> None:
    for binary in (False, True):
        assert product.shape(binary, 1, 1, 16, 132, False) == product.NARROW
        assert product.shape(binary, 64, 64, 16, 1, False) == product.NARROW


def test_the_tiles_follow_what_a_turn_has_to_do() -> None:
    """With heads to turn smaller tiles, with more of K the team's, of int8."""
    wide, tall, narrow = product.WIDE, product.TALL, product.NARROW
    assert product.shape(False, 512, 3072, 2048, 132, False) == tall
    assert product.shape(False, 512, 3072, 2048, 132, True) == narrow
    assert product.shape(False, 1024, 11264, 2048, 132, False) == tall
    assert product.shape(False, 128, 12288, 4096, 132, False) == tall  # one turn, of 128 rows
    assert product.shape(False, 1024, 11264, 4096, 132, False) == wide


@pytest.mark.parametrize("binary", [False, True])
def test_the_tiles_where_one_cluster_runs_at_a_time(binary: bool) -> None:
    """Of one multiprocessor, which has none, as of two and three; of four two run."""
    case = (binary, 256, 256, 256)
    one, few, odd, more = (product.shape(*case, n, False) for n in (1, 2, 3, 4))
    assert one == few == odd != more

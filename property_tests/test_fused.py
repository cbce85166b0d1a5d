"""The operator that quantizes few rows and multiplies them with a packed weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from property_tests.lane_marks import fewer
from quest import fused, lowbit, operands, packing
from quest.conformance import inputs, judges
from quest.conformance.strategies import SEEDS
from quest.fused import few_linear, few_linear_shown
from quest.kernels import few, outputs
from quest.kernels.hopper import unavailable
from quest.packed import packed_product

HOPPER = torch.cuda.is_available() and unavailable(torch.device("cuda")) is None
DEVICES = ["cpu", *["cuda"] * HOPPER]
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and cuda-core")
RECIPES = ["w1a1", "w2a2", "w4a4", "w4a2", "w2a4"]


def _weight(recipe: str, columns: int, width: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(codes from 0 packed, scale, sums, integers) of a weight on the CPU."""
    bits = quest.recipe(recipe).weight.require_grid().storage_bits
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (columns, width), generator=g)
    whole = 2 * codes - (2**bits - 1)
    scale = torch.rand(columns, 1, generator=g) + 0.5
    return packing.pack(codes, bits), scale, whole.sum(1, keepdim=True).int(), whole


def _names(recipe: str) -> tuple[str, str]:
    made = quest.recipe(recipe)
    return made.activation.spec, made.weight.require_grid().name


def _judged(
    recipe: str, x: torch.Tensor, columns: int, bias: torch.Tensor | None, dtype: torch.dtype,
    device: str, settled: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    """T2, T3, T0 and T6 of what the operator shows; and it writes every byte, twice the same."""
    made, width = quest.recipe(recipe), x.shape[-1]
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    *weight, whole = _weight(recipe, columns, width, seed)
    arguments = (
        x.to(device) if x.is_contiguous() else x, *(t.to(device) for t in weight),
        None if bias is None else bias.to(device), *_names(recipe), dtype, settled,
    )  # fmt: skip
    seen = []
    for byte in (0xFF, 0x55):
        with outputs.poisoned(byte):
            seen.append([t.cpu() for t in few_linear_shown(*arguments)])
            seen[-1].append(few_linear(*arguments).cpu())
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    y, a, scale, sums, alone = seen[0]
    assert torch.equal(alone.view(torch.uint8), y.view(torch.uint8))
    rows = lowbit.as_rows(x).cpu()
    a, scale, y = lowbit.as_rows(a), lowbit.as_rows(scale), lowbit.as_rows(y)
    integers = judges.whole(a, kinds[0], width)
    forms = [
        operands.form(q.require_grid(), kind)
        for q, kind in zip((made.activation, made.weight), kinds, strict=True)
    ]
    codes = torch.from_numpy((integers // forms[0].spread - 1) // 2).to(torch.int8)
    for verdict in (
        judges.scaled(rows, scale, 128),
        judges.coded(rows, made.activation, codes, scale, conclusive=False),
        judges.exact("sums", lowbit.as_rows(sums).numpy(), integers.sum(-1, keepdims=True)),
        judges.multiplied(
            (integers, forms[1].spread * whole.numpy()),
            (forms[0].unit, forms[1].unit),
            (scale, weight[1]),
            bias,
            y,
        ),
    ):
        verdict.require()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_the_quantizer_and_the_product(recipe: str) -> None:
    """On a CPU, bit for bit; any leading axes."""
    made, x = quest.recipe(recipe), torch.randn(2, 3, 256)
    packed, scale, sums, _ = _weight(recipe, 24, 256)
    kind = (operands.kinds(made.activation, made.weight) or ("",))[0]
    a, a_scale, _, a_sums = lowbit.encode(x, made.activation.spec, kind)
    rows = [lowbit.as_rows(t) for t in (a, a_scale, a_sums)]
    names = f"{made.activation.require_grid().name},{made.weight.require_grid().name}"
    for bias in (None, torch.randn(24)):
        expected = packed_product(
            rows[0], packed, rows[1], scale, rows[2], sums, bias, names, f"{kind},{kind}", 256,
            torch.bfloat16,
        )  # fmt: skip
        given_ = (x, packed, scale, sums, bias, *_names(recipe), torch.bfloat16)
        y, *shown = few_linear_shown(*given_)
        assert torch.equal(y, expected.view(2, 3, 24))
        assert torch.equal(few_linear(*given_), y)
        for t, other in zip(shown, (a, a_scale, a_sums), strict=True):
            assert torch.equal(t, other)


# Around tiles of 16 columns and 8 rows, groups of 8 blocks that share rows, and every cluster.
SHAPES = [
    (1, 16, 128), (2, 7, 256), (3, 130, 1152), (8, 257, 4096), (9, 40, 2176), (16, 300, 4096),
    (17, 1, 1024), (33, 131, 896), (64, 48, 4096), (64, 40, 14336), (1, 1031, 11008),
]  # fmt: skip


@on_hopper
@pytest.mark.parametrize("settled", [False, True], ids=["alone", "overlapping"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_shapes(recipe: str, shape: tuple[int, int, int], settled: bool) -> None:
    rows, columns, width = shape
    x = inputs.draw("gaussian", (rows, width), torch.bfloat16, rows)
    _judged(recipe, x, columns, None, torch.float32, "cuda", settled)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", inputs.DISTRIBUTIONS)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_every_kind(dtype: torch.dtype, recipe: str, name: str, device: str) -> None:
    """Zeros, rows that are not finite, and rows and blocks at the ends of the range."""
    _judged(recipe, inputs.draw(name, (16, 640), dtype, 0), 24, None, torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_blocks_far_apart_in_a_row(recipe: str, device: str) -> None:
    """A block at one end of the range beside one at the other: each has a power of its own."""
    x = inputs.draw("gaussian", (6, 384), torch.bfloat16, 0)
    x[0, :128] *= 2.0**-100
    x[1, :128] *= 2.0**120
    x[2, :128] *= 2.0**-120
    x[2, 128:] *= 2.0**60
    x[3, 128:] = 0
    x[4, :256] = 0
    x[4, 300] = 2.0**-130
    x[5] *= 2.0**-120
    _judged(recipe, x, 24, None, torch.float32, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
@fewer
@given(data=st.data())
def test_any(recipe: str, device: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, few.LIMIT), label="rows")
    columns = data.draw(st.integers(1, 300), label="columns")
    width = 128 * data.draw(st.integers(1, 12), label="blocks")
    dtype = data.draw(st.sampled_from((torch.bfloat16, torch.float16)), label="dtype")
    out = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), label="out")
    seed = data.draw(SEEDS, label="seed")
    name = data.draw(st.sampled_from(sorted(inputs.DISTRIBUTIONS)), label="distribution")
    kind = data.draw(st.sampled_from((None, dtype, torch.float32)), label="bias")
    bias = None if kind is None else inputs.draw("gaussian", (columns,), kind, seed)
    x = inputs.draw(name, (rows, width), dtype, seed)
    _judged(recipe, x, columns, bias, out, device, data.draw(st.booleans(), label="settled"), seed)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_rows(device: str) -> None:
    """Rows beside NaN; rows and addresses that are no multiples of 16 bytes; a column of rows."""
    x = inputs.draw("gaussian", (5, 256), torch.bfloat16, 0).to(device)
    *weight, _ = _weight("w4a4", 24, 256)
    rest = (*(t.to(device) for t in weight), None, *_names("w4a4"), torch.bfloat16)
    expected = few_linear(x, *rest)
    for gap, offset in ((8, 0), (8, 8), (1, 0), (7, 1)):
        around = x.new_full((5, 256 + gap), torch.nan)
        view = around.view(-1)[offset:].as_strided((5, 256), (256 + gap, 1))[:4]
        view.copy_(x[:4])
        assert torch.equal(few_linear(view, *rest), expected[:4])
    columns = x.t().contiguous().t()
    assert torch.equal(few_linear(columns, *rest), expected)
    assert torch.equal(few_linear(x[:1].expand(3, 256), *rest), expected[:1].expand(3, 24))
    assert torch.equal(few_linear(x.view(5, 1, 256), *rest), expected.view(5, 1, 24))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 24), (5, 0)])
def test_an_empty_axis(shape: tuple[int, int], device: str) -> None:
    x = torch.randn(shape[0], 256, dtype=torch.bfloat16, device=device)
    *weight, _ = _weight("w4a4", shape[1], 256)
    y = few_linear(x, *(t.to(device) for t in weight), None, *_names("w4a4"), torch.bfloat16)
    assert y.shape == shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_opcheck(recipe: str, device: str) -> None:
    *weight, _ = _weight(recipe, 24, 256)
    x, bias = torch.randn(3, 256, dtype=torch.bfloat16), torch.randn(24)
    tensors = [t.to(device) for t in (x, *weight, bias)]
    for name in ("few_linear", "few_linear_shown"):
        operator = getattr(torch.ops.quest, name).default
        torch.library.opcheck(operator, (*tensors, *_names(recipe), torch.bfloat16, False))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str) -> None:
    *weight, _ = _weight("w4a4", 24, 256)
    x = torch.randn(3, 256, dtype=torch.bfloat16, device=device)
    rest = (*(t.to(device) for t in weight), None, *_names("w4a4"), torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: few_linear(x + 1, *rest), fullgraph=True)
    assert torch.equal(compiled(x), few_linear(x + 1, *rest))
    torch.compiler.reset()


@on_hopper
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_a_chain_that_overlaps(recipe: str, rows: int) -> None:
    """Each launch reads what the one before has just written, eagerly and under a graph."""
    packed, scale, sums, _ = (t.cuda() for t in _weight(recipe, 1024, 1024))
    scale *= 0.01
    start = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)

    def chain(settled: bool) -> torch.Tensor:
        x = start
        for _ in range(30):
            x = few_linear(x, packed, scale, sums, None, *_names(recipe), torch.bfloat16, settled)
            if not settled:
                torch.cuda.synchronize()
        return x

    expected = chain(False)
    for _ in range(5):
        assert torch.equal(chain(True), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(5):
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("position", "value", "error", "told"),
    [
        (0, torch.zeros(3, 192, dtype=torch.bfloat16), ValueError, "a multiple of 128 entries, g"),
        (0, torch.zeros(3, 256, dtype=torch.int8), TypeError, "x must be float32, bfloat16 or fl"),
        (0, torch.zeros(()), ValueError, "x must have at least one axis"),
        (1, torch.zeros(24, 127, dtype=torch.uint8), ValueError, r"w must be uint8 of shape \(out"),
        (1, torch.zeros(24, 128, dtype=torch.int8), ValueError, "w must be uint8 of shape"),
        (1, torch.zeros(128, dtype=torch.uint8), ValueError, "w must be uint8 of shape"),
        (2, torch.ones(24), ValueError, "w_scale must be torch.float32 of shape"),
        (3, torch.ones(24, 1), ValueError, "w_sums must be torch.int32 of shape"),
        (4, torch.ones(23), ValueError, "bias must be torch.float32 of shape"),
        (4, torch.ones(24).double(), TypeError, "^bias must be float32, bfloat16 or float16"),
        (5, "uniform8/hadamard128/trust1.0/dense", ValueError, "one kernel quantizes and multip"),
        (5, "uniform4/hadamard64/trust1.0/dense", ValueError, "one kernel quantizes and multip"),
        (5, "uniform4/identity/trust1.0/dense", ValueError, "one kernel quantizes and multiplies"),
        (5, "uniform4:7.5/hadamard128/ste/dense", ValueError, r"a step from 2\^-6 and below 1, "),
        (5, "uniform4:0.117/hadamard128/ste/dense", ValueError, "one kernel quantizes and mult"),
        (5, "uniform2:1.5/hadamard128/ste/dense", ValueError, "one kernel quantizes and multipl"),
        (6, "uniform1", ValueError, "with 1 bit on both sides or uniform grids of 2 and 4 bits"),
        (6, "ternary", ValueError, "one kernel quantizes and multiplies"),
        (7, torch.float64, TypeError, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_errors(
    position: int, value: object, error: type[Exception], told: str, device: str
) -> None:
    *weight, _ = _weight("w4a4", 24, 256)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    arguments = [x, *weight, None, *_names("w4a4"), torch.bfloat16]
    arguments[position] = value
    moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]
    with pytest.raises(error, match=told):
        few_linear(*moved)


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ("uniform4:0.1171875", "integers"), ("uniform4:0.1171874", None), ("uniform4:7.5", None),
        ("uniform4:7.499", "integers"), ("uniform2:1.499", "integers"), ("uniform2:1.5", None),
        ("uniform1:256.0", "bits"), ("uniform1:0.00390625", "bits"), ("ternary:0.5", None),
    ],
)  # fmt: skip
def test_steps_of_the_kernel(grid: str, kind: str | None) -> None:
    """From 2^-6 and below 1; of single bits any, since their signs alone count."""
    q = quest.quantizer.parse(f"{grid}/hadamard128/ste/dense")
    weight = "uniform1" if kind == "bits" else "uniform4"
    assert fused.pairs(q, quest.grids.parse(weight)) == kind
    if kind == "bits":
        parts = fused._parts(q.spec, weight)
        assert parts[3].step == 0.5
        unit = quest.grids.parse(weight).points[1]
        assert parts[2] == q.require_grid().points[1] * unit


@on_hopper
@pytest.mark.parametrize(("rows", "dtype"), [(65, torch.bfloat16), (3, torch.float32)])
def test_what_the_kernel_does_not_take(rows: int, dtype: torch.dtype) -> None:
    *weight, _ = (t.cuda() for t in _weight("w4a4", 24, 256))
    x = torch.randn(rows, 256, device="cuda", dtype=dtype)
    with pytest.raises(ValueError, match=f"up to 64 rows of bfloat16 or float16.*, got {rows}"):
        few_linear(x, *weight, None, *_names("w4a4"), torch.bfloat16)

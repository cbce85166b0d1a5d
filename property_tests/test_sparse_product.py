"""The product with a compressed 2:4 sparse weight: T0 and T6 in every lane that has one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from property_tests.lane_marks import every_lane, fewer
from property_tests.ledger import LEDGER
from quest import compression, frozen, lowbit, operands, paths
from quest.conformance import examine, inputs, judges
from quest.conformance.lanes import Lane, no_product
from quest.conformance.strategies import SEEDS
from quest.kernels import cuda, hopper, sparse
from quest.sparse_product import eager_sparse_product, sparse_product

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECIPES = ("w4a4-2:4", "w4a8-2:4", "fp4-2:4", "w1a1-2:4")
TILES = {"wide": sparse.WIDE, "narrow": sparse.NARROW}


def _require_product(device: str) -> None:
    if device == "cuda" and hopper.unavailable(torch.device("cuda")) is not None:
        pytest.skip(str(hopper.unavailable(torch.device("cuda"))))


@every_lane
@pytest.mark.parametrize("name", RECIPES)
@fewer
@given(data=st.data())
def test_sparse_product(lane: Lane, name: str, data: st.DataObject) -> None:
    if no_product(lane) is not None:
        pytest.skip(str(no_product(lane)))
    # Rectangular on purpose, around the tiles of 128 x 256 and 256 entries of K.
    rows = data.draw(st.sampled_from((5, 1, 130, 257)), label="rows")
    outs = data.draw(st.sampled_from((7, 1, 48, 256, 300)), label="out_features")
    width = data.draw(st.sampled_from((64, 8, 136, 1024, 1152, 12, 20)), label="in_features")
    tiles = data.draw(st.sampled_from(tuple(TILES)), label="tiles")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    kind = data.draw(
        st.sampled_from(("gaussian", "outlier", "equal", "zeros")), label="distribution"
    )
    seed = data.draw(SEEDS, label="seed")
    x = inputs.draw(kind, (rows, width), dtype, seed)
    w = inputs.draw("gaussian", (outs, width), dtype, seed + 1) / width**0.5
    bias = inputs.draw("gaussian", (outs,), dtype, seed + 2) if seed % 2 else None
    told = f"{kind}, x {(rows, width)}, w {(outs, width)}, {dtype}, seed {seed}, {name}, {tiles}"
    with sparse.only(TILES[tiles]):
        found = examine.product(lane, x, w, bias, quest.recipe(name), dtype, compressed=True)
    LEDGER.judge(lane, found, told)


@every_lane
@pytest.mark.parametrize("name", ["w4a4-2:4", "w4a8-2:4"])
def test_scales_at_the_ends_of_the_range(lane: Lane, name: str) -> None:
    """Rows whose product leaves float32 until the column's scale brings it back, and others."""
    if no_product(lane) is not None:
        pytest.skip(str(no_product(lane)))
    x, w = (inputs.draw("gaussian", (n, 1024), torch.float32, n) for n in (40, 24))
    x *= torch.tensor([1e37, 1e20, 1.0, 1e-20]).repeat(10)[:, None]
    w *= torch.tensor([1e-37, 1.0, 1e-18]).repeat(8)[:, None]
    made = quest.recipe(name)
    found = examine.product(lane, x, w, None, made, torch.float32, compressed=True)
    LEDGER.judge(lane, found, name)


@every_lane
def test_coherent_products(lane: Lane) -> None:
    """Sums as large as they get: rows of the weight are those of the input, and their negatives."""
    if no_product(lane) is not None:
        pytest.skip(str(no_product(lane)))
    x = inputs.draw("gaussian", (5, 8192), torch.float32, 0)
    w = torch.cat((x, -x))
    made = quest.recipe("w4a4-2:4")
    found = examine.product(lane, x, w, None, made, torch.float32, compressed=True)
    LEDGER.judge(lane, found, "w4a4-2:4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.whole
@pytest.mark.parametrize("name", ["w4a4-2:4", "w4a8-2:4"])
@pytest.mark.parametrize("tiles", list(TILES))
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
    _require_product("cuda")
    monkeypatch.setattr(cuda, "processors", lambda _: 4)
    lane, made = Lane("triton-cuda", "cuda", "dispatch"), quest.recipe(name)
    rows, outs, width = shape
    x, w = (inputs.draw("mixed_rows", (n, width), dtype, n) for n in (rows, outs))
    bias = inputs.draw("gaussian", (outs,), added, 0)
    with sparse.only(TILES[tiles]):
        found = examine.product(lane, x, w, bias, made, dtype, compressed=True)
    LEDGER.judge(lane, found, f"{tiles}, {name}, {shape}, {dtype}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["w4a4-2:4", "w4a8-2:4"])
@pytest.mark.parametrize("tiles", list(TILES))
def test_a_far_scale_leaves_other_rows_alone(tiles: str, name: str) -> None:
    """Those of its tile, and those that the last tile, which begins early, has once more."""
    _require_product("cuda")
    made = quest.recipe(name)
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair) or ("", "")
    for rows in (70, 300):
        x, w = (inputs.draw("gaussian", (n, 512), torch.float32, n).cuda() for n in (rows, 130))
        bias = inputs.draw("gaussian", (130,), torch.float32, 0).cuda()
        a, a_scale, _, a_sums = lowbit.encode(x, pair[0].spec, kinds[0])
        b, b_scale, _, b_sums = lowbit.encode(w, pair[1].spec, kinds[1])
        names = ",".join(q.require_grid().name for q in pair)
        large = a_scale.clone()
        large[3] = 1e32  # far, with any factor
        with sparse.only(TILES[tiles]):
            y, plain = (
                sparse_product(
                    a, *compression.compress(b), scale, b_scale, a_sums, b_sums, bias, names,
                    ",".join(kinds), 512, torch.float32,
                )
                for scale in (large, a_scale)
            )  # fmt: skip
        assert y[3].isfinite().all()
        assert not torch.equal(y[3], plain[3])
        y[3] = plain[3]
        assert torch.equal(y, plain)


def _operand(kind: str, rows: int, width: int, g: torch.Generator) -> torch.Tensor:
    if kind == "low":
        return torch.full((rows, width), -128, dtype=torch.int8)
    return torch.randint(-128, 128, (rows, width), generator=g).to(torch.int8)


def _pruned(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    places = torch.rand((x.shape[0], x.shape[1] // 4, 4), generator=g).argsort(-1).argsort(-1)
    return x * (places < 2).reshape(x.shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["random", "low"])
@pytest.mark.parametrize("tiles", list(TILES))
@pytest.mark.parametrize("processors", [132, 8])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 4), (3, 7, 16), (129, 257, 132), (300, 520, 260), (31, 1030, 4096), (2, 2, 65536)],
    ids=str,
)
def test_accumulators(
    shape: tuple[int, int, int], processors: int, tiles: str, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """T0. On few processors a cluster has many tiles: every lap of the ring, all groups."""
    _require_product("cuda")
    monkeypatch.setattr(cuda, "processors", lambda _: processors)
    rows, outs, width = shape
    g = torch.Generator().manual_seed(0)
    a = _operand(kind, rows, width, g)
    w = _pruned(_operand(kind, outs, width, g), g)
    values, metadata = (t.cuda() for t in compression.compress(w))
    with sparse.only(TILES[tiles]):
        made = sparse.product(values, metadata, a.cuda(), torch.int32, epilogue=hopper.RAW)
    judges.accumulated(a, w, made.cpu()).require()


# RAW writes int32, and nothing else does.
VARIANTS = [(hopper.RAW, torch.int32)] + [
    (epilogue, out) for epilogue in (hopper.PLAIN, hopper.CORRECTED) for out in DTYPES
]


@pytest.mark.parametrize(("epilogue", "out"), VARIANTS)
@pytest.mark.parametrize("tiles", list(TILES))
def test_every_variant_compiles_without_a_gpu(tiles: str, epilogue: int, out: torch.dtype) -> None:
    pytest.importorskip(
        "cuda.core", reason="cuda-core is not installed: pip install 'quest-lowbit[hopper]'"
    )
    made = sparse.compile_(epilogue, out, TILES[tiles], cached=False)
    assert made.code[:4] == b"\x7fELF"
    assert b"sparse" in made.code
    assert TILES[tiles].shared <= 227 * 1024


def test_the_choice_of_tiles() -> None:
    assert sparse.shape(4096, 16384, 132) == sparse.WIDE
    assert sparse.shape(4096, 1, 132) == sparse.NARROW
    features = sparse.WIDE.rows * 2 * 66  # one cluster for each pair of processors
    assert sparse.shape(features * 3 // 4, 1, 132) == sparse.WIDE  # 49.5 clusters: 50
    assert sparse.shape(features * 49 // 66, 1, 132) == sparse.NARROW


def _arguments(recipe: str, device: str, bias: bool = True) -> tuple[torch.Tensor, list[object]]:
    """The weight's operand, and the arguments of `sparse_product`."""
    _require_product(device)
    made = quest.recipe(recipe)
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair) or ("", "")
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 256, generator=g).to(device) for n in (5, 24))
    a, a_scale, _, a_sums = lowbit.encode(x, pair[0].spec, kinds[0])
    b, b_scale, _, b_sums = lowbit.encode(w, pair[1].spec, kinds[1])
    names = ",".join(q.require_grid().name for q in pair)
    added = torch.randn(24, device=device) if bias else None
    rest = [a_scale, b_scale, a_sums, b_sums, added, names, ",".join(kinds), 256, torch.float32]
    return b, [a, *compression.compress(b), *rest]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_the_product_of_the_operand(recipe: str, device: str) -> None:
    for bias in (False, True):
        b, arguments = _arguments(recipe, device, bias)
        dense = lowbit.product(arguments[0], b, *arguments[3:])
        assert torch.equal(sparse_product(*arguments), dense)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    torch.library.opcheck(torch.ops.quest.sparse_product, _arguments("w4a8-2:4", device)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_tensors(device: str) -> None:
    _, arguments = _arguments("w4a8-2:4", device)
    strided = [
        torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in arguments
    ]
    assert torch.equal(sparse_product(*strided), sparse_product(*arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 24, 256), (5, 0, 256), (5, 24, 0)], ids=str)
def test_empty(shape: tuple[int, int, int], device: str) -> None:
    _require_product(device)
    rows, outs, width = shape
    a, w = (torch.zeros(n, width, dtype=torch.int8, device=device) for n in (rows, outs))
    scales = (torch.ones(n, 1, device=device) for n in (rows, outs))
    sums = (torch.zeros(n, 1, dtype=torch.int32, device=device) for n in (rows, outs))
    bias = torch.arange(outs, device=device).float()
    y = sparse_product(
        a, *compression.compress(w), *scales, *sums, bias, "uniform4,uniform4",
        "integers,integers", width, torch.float32,
    )  # fmt: skip
    assert torch.equal(y, bias.expand(rows, outs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("position", "value", "error", "told"),
    [
        (0, torch.zeros(5, 128, dtype=torch.int8), ValueError, "a and b must have the same"),
        (1, torch.zeros(24, 127, dtype=torch.int8), ValueError, r"values must be torch.int8 of sh"),
        (1, torch.zeros(24, 128).int(), ValueError, "values must be torch.int8 of shape"),
        (2, torch.zeros(24, 16).int(), ValueError, r"metadata must be torch.int32 of shape \(24, "),
        (2, torch.zeros(24, 8), ValueError, "metadata must be torch.int32 of shape"),
        (3, torch.ones(4, 1), ValueError, "a_scale must be torch.float32 of shape"),
        (4, torch.ones(24, 2), ValueError, "w_scale must be torch.float32 of shape"),
        (5, torch.ones(5, 1), ValueError, "a_sums must be torch.int32 of shape"),
        (6, torch.ones(24, 1), ValueError, "w_sums must be torch.int32 of shape"),
        (7, torch.ones(23), ValueError, "bias must be torch.float32 of shape"),
        (8, "uniform4", ValueError, "grid_names and kinds must name two of each"),
        (9, "integers,codes", ValueError, "kinds must be integers or codes, and integers, got"),
        (10, 252, ValueError, r"values must be .* of shape \(24, 126\) .* a width of 252"),
        (11, torch.int32, TypeError, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_errors(
    position: int, value: object, error: type[Exception], told: str, device: str
) -> None:
    _, arguments = _arguments("w4a4-2:4", device)
    arguments[position] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(error, match=told):
        sparse_product(*arguments)


def test_a_width_that_is_no_multiple_of_four() -> None:
    _, arguments = _arguments("w4a4-2:4", "cpu")
    for position, width in ((0, 254), (1, 127)):
        arguments[position] = arguments[position][:, :width]  # type: ignore[index]
    arguments[10] = 254
    with pytest.raises(ValueError, match="for a width of 254, a multiple of 4"):
        sparse_product(*arguments)


def test_tensors_on_another_device() -> None:
    # A dispatcher that sees a meta tensor takes the fake: ask what every device asks.
    for position in range(1, 8):
        _, arguments = _arguments("w4a4-2:4", "cpu")
        arguments[position] = arguments[position].to("meta")  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"must be .* on cpu.*, got .* on meta"):
            eager_sparse_product(*arguments)  # type: ignore[arg-type]


def test_the_rows_that_take_it() -> None:
    assert not paths.reads_compressed(paths.SPARSE_ROWS - 1)
    assert paths.reads_compressed(paths.SPARSE_ROWS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["w4a4-2:4", "w4a8-2:4", "fp4-2:4"])
def test_a_frozen_layer_gives_the_same_numbers_with_it(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, and as rows of a stack of several."""
    _require_product(device)
    if device == "cpu":  # which multiplies values by itself
        monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    torch.manual_seed(0)
    layers = [quest.Linear(512, n, True, name, device=device).eval() for n in (48, 130)]
    x = torch.randn(2, 5, 512, device=device)
    made = layers[0].recipe
    parts = [frozen.freeze(layer.weight, made) for layer in layers]
    stacked = frozen.stack(parts)
    called = []

    def multiply(*arguments: object) -> torch.Tensor:
        called.append(arguments)
        y: torch.Tensor = sparse_product(*arguments)
        return y

    for way in ("sparse_product", "launch_sparse_product"):
        monkeypatch.setattr(frozen, way, multiply)
    for layer, part, row in zip(layers, parts, stacked, strict=True):
        expected = frozen.linear(x, part, layer.bias, made)
        assert not called
        with monkeypatch.context() as changed:
            changed.setattr(paths, "SPARSE_ROWS", 10)
            for each in (part, row):
                y = frozen.linear(x, each, layer.bias, made)
                assert torch.equal(y, expected)
                assert called.pop()[1] is each.kept
    monkeypatch.setattr(paths, "SPARSE_ROWS", 10)
    whole = frozen.stacked(stacked)
    assert whole is not None
    both = [frozen.linear(x, part, None, made) for part in parts]
    assert torch.equal(frozen.linear(x, whole, None, made), torch.cat(both, -1))
    assert sum(t.numel() for t in parts[0].read()) == 48 * (256 + 16 + 1)


@pytest.mark.parametrize("name", ["w4a4", "w4a4-4:8", "w4a16"])
def test_other_weights_are_not_compressed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    weight = torch.randn(8, 512)
    made = frozen.freeze(weight, quest.recipe(name))
    assert made.kept is None
    assert made.metadata is None

"""The public contract, name for name: what users and checks rely on."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from quest.conformance import inputs, oracle
from quest.quantizer import parse
from quest.reference import grids as reference_grids
from quest.reference import hadamard as reference_hadamard

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [
    *(quest.grids.uniform(b) for b in range(1, 9)),
    quest.grids.ternary(),
    quest.grids.e2m1(),
    *(quest.grids.lloyd_max(b) for b in range(1, 9)),
    quest.grids.uniform(4, alpha=7.5),
    quest.grids.uniform(3, alpha=2.0 + 2.0**-52),
    quest.grids.e2m1(0.5),
]
SPARSITIES = [None, quest.NM(2, 4), quest.Pairwise(4, 8), quest.NM(1, 3), quest.NM(8, 16)]
SEEDS = st.integers(0, 2**32 - 1)


def test_names() -> None:
    assert set(quest.__all__) >= {
        "Quantizer", "Linear", "quantize_", "recipe", "grids", "Hadamard", "Identity", "Trust",
        "Clip", "STE", "NM", "Pairwise",
    }  # fmt: skip
    for name in quest.__all__:
        assert hasattr(quest, name), name


@pytest.mark.parametrize("order", ["import quest, torch", "import torch, quest"])
def test_names_and_operators_in_a_fresh_process(order: str) -> None:
    """Names are imported lazily where PyTorch is not there yet; `quest.ops` brings operators."""
    code = f"""{order}
for name in ("Linaer", "__wrapped__", "cli"):
    assert not hasattr(quest, name), name
assert set(quest.__all__) <= set(dir(quest))
with quest.paths.only("values"):
    pass
assert quest.packing and quest.compression and quest.sparse_product and quest.lowbit_linear
assert quest.ops and quest.lowbit and quest.transforms and quest.linear
torch.ops.quest.hadamard(torch.ones(2), 2, False)
from quest import *
assert all(globals()[name] is getattr(quest, name) for name in quest.__all__)
assert NM is quest.sparsity.NM and grids is quest.linear.recipe.__globals__["grids"]
Linear(2, 2)(torch.ones(1, 2))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("order", ["quest.operators, torch", "torch, quest"])
def test_all_operators_in_a_fresh_process(order: str, tmp_path: Path) -> None:
    """As a saved program needs them, which names nothing else."""
    files = Path(quest.__file__).parent.rglob("*.py")
    told = {n for f in files for n in re.findall(r'op\("quest::(\w+)"', f.read_text("utf-8"))}
    names = (*sorted(told), "gated_encode", "normed_encode_shown")
    assert len(names) > 16
    layer, file = quest.Linear(16, 4), tmp_path / "layer.pt2"
    with quest.paths.only("integers"):
        program = torch.export.export(layer, (torch.ones(2, 16),))
        expected = layer(torch.ones(2, 16)).tolist()
    torch.export.save(program, file)
    code = f"""import {order}
assert not [name for name in {names!r} if not hasattr(torch.ops.quest, name)]
assert torch.export.load({str(file)!r}).module()(torch.ones(2, 16)).tolist() == {expected!r}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_version() -> None:
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == quest.__version__


def test_signatures() -> None:
    def parameters(function: Any) -> dict[str, Any]:
        return {n: p.default for n, p in inspect.signature(function).parameters.items()}

    empty = inspect.Parameter.empty
    assert list(parameters(quest.Quantizer)) == ["grid", "transform", "estimator", "sparsity"]
    assert parameters(quest.Quantizer)["sparsity"] is None
    assert parameters(quest.Trust) == {"scale": 1.0}
    assert parameters(quest.Clip) == {"scale": 1.0}
    assert parameters(quest.STE) == {}
    assert next(iter(parameters(quest.grids.uniform))) == "bits"
    assert parameters(quest.quantize_)["filter_fn"] is None
    linear = parameters(quest.Linear)
    assert list(linear)[:4] == ["in_features", "out_features", "bias", "recipe"]
    assert (linear["in_features"], linear["out_features"]) == (empty, empty)
    assert (linear["bias"], linear["recipe"]) == (False, "w4a4")


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 16, 100, 256])
def test_reference_uniform(levels: int) -> None:
    g = reference_grids.uniform(levels)
    assert g.points.shape == (levels,)
    assert g.points.dtype == np.float64
    assert g.points[-1] == pytest.approx(g.alpha, rel=1e-15)
    assert g.step == 2 * g.alpha / (levels - 1)
    assert g.half_gap == g.alpha / (levels - 1)
    assert 0 < g.mse < 0.37


def test_reference_published_errors() -> None:
    published = {2: 0.36338, 3: 0.19017, 4: 0.11885, 8: 0.037440, 16: 0.011543, 256: 8.78e-5}
    for levels, mse in published.items():
        digits = 3 if levels == 256 else len(str(mse).rstrip("0")) - 2 - (mse < 0.1)
        assert reference_grids.uniform(levels).mse == pytest.approx(
            mse, rel=0.6 * 10.0 ** (1 - digits)
        )
    assert reference_grids.e2m1().mse == pytest.approx(0.012685, rel=5e-5)
    assert reference_grids.lloyd_max(16).mse < reference_grids.uniform(16).mse


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grids_are_the_oracle_s(grid: Any) -> None:
    """Far below what float32 keeps of them; the last digits depend on the machine's exp."""
    expected = oracle.grid(grid)
    np.testing.assert_allclose(grid.points, expected.points, rtol=2**-36, atol=2**-50)
    assert grid.levels == expected.levels
    assert grid.outer == pytest.approx(expected.outer, rel=2**-36)
    assert grid.half_gap == pytest.approx(expected.half_gap, rel=2**-30)
    if math.isnan(expected.step):
        assert grid.step is None
    else:
        assert grid.step == pytest.approx(expected.step, rel=2**-36)


def test_grids_by_name() -> None:
    assert quest.grids.uniform(bits=4).levels == 16
    assert quest.grids.ternary().points == (-quest.grids.ternary().outer, 0.0,
                                            quest.grids.ternary().outer)  # fmt: skip
    half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * quest.grids.e2m1().outer / 6
    np.testing.assert_allclose(quest.grids.e2m1().points[7:], half, rtol=1e-15)
    assert quest.grids.lloyd_max(bits=3).levels == 8
    assert quest.grids.uniform(4, alpha=7.5).points == tuple(np.arange(-7.5, 8))
    assert quest.grids.uniform(1).outer == pytest.approx(math.sqrt(2 / math.pi), rel=1e-15)


def test_quantizer_fields_and_defaults() -> None:
    q = quest.Quantizer(
        grid=quest.grids.uniform(bits=4),
        transform=quest.Hadamard(128),
        estimator=quest.Trust(),
        sparsity=None,
    )
    assert (q.transform, q.estimator, q.sparsity) == (quest.Hadamard(128), quest.Trust(1.0), None)
    assert q == quest.Quantizer(quest.grids.uniform(4), quest.Hadamard(128))
    assert hash(q) == hash(quest.Quantizer(quest.grids.uniform(4), quest.Hadamard(128)))
    with pytest.raises(AttributeError):
        q.sparsity = quest.NM(2, 4)  # type: ignore[misc]
    assert repr(q) == (
        f"Quantizer(grid={q.grid!r}, transform=Hadamard(block=128), estimator=Trust(scale=1.0), "
        "sparsity=None)"
    )
    assert quest.Quantizer(None).code_dtype == torch.int8


@pytest.mark.parametrize("kind", [quest.Clip, quest.Trust])
@pytest.mark.whole
def test_a_whole_number_is_a_scale(kind: Any) -> None:
    assert kind(2) == kind(2.0)
    assert str(kind(2)) == str(kind(2.0))
    whole, real = (quest.Quantizer(quest.grids.uniform(4), estimator=kind(s)) for s in (2, 2.0))
    assert whole == real == parse(whole.spec)
    assert whole.thresholds() == real.thresholds()


def test_codes_ask_for_no_gradient() -> None:
    """Not even in part: the scale is a float, and nothing flows through it."""
    x = inputs.draw("gaussian", (2, 16), torch.float32, 0).requires_grad_()
    for sparsity in (None, quest.NM(2, 4)):
        q = quest.Quantizer(quest.grids.uniform(4), sparsity=sparsity)
        assert q(x).requires_grad
        for made in (q.quantize(x), q.pack(x), q.pack(x).unpack()):
            for part in ("codes", "scale", "mask", "keep"):
                tensor = getattr(made, part)
                assert tensor is None or not tensor.requires_grad, part
        assert not q.quantize(x).dequantize().requires_grad


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, signs of zeros included; a NaN is a NaN."""
    a, b = (t.masked_fill(t.isnan(), math.nan).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    grid=st.sampled_from(GRIDS),
    transform=st.sampled_from([quest.Identity(), quest.Hadamard(), quest.Hadamard(12)]),
    estimator=st.sampled_from([quest.Trust(), quest.Trust(0.5), quest.Clip(1.3), quest.STE()]),
    sparsity=st.sampled_from(SPARSITIES),
    lead=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
    name=st.sampled_from(["gaussian", "mixed_rows", "integers", "zeros", "non_finite"]),
    seed=SEEDS,
)
def test_quantizer_s_four_faces_agree(
    device: str, dtype: torch.dtype, grid: Any, transform: Any, estimator: Any, sparsity: Any,
    lead: tuple[int, ...], name: str, seed: int,
) -> None:  # fmt: skip
    """q(x), quantize, pack and their dequantization are one thing, bit for bit."""
    width = 48
    q = quest.Quantizer(grid, transform, estimator, sparsity)
    x = inputs.draw(name, (*lead, width), dtype, seed).to(device)
    values, t, p = q(x), q.quantize(x), q.pack(x)
    back = p.unpack()
    assert values.shape == x.shape
    assert values.dtype == dtype
    assert values.device == x.device
    for made in (t, back):
        assert same(made.dequantize(), values)
        assert made.codes.dtype == (torch.uint8 if grid.name == "lloyd_max8" else torch.int8)
        assert (made.scale.dtype, made.scale.shape) == (torch.float32, (*lead, 1))
        assert (made.mask.dtype, made.mask.shape) == (torch.bool, x.shape)
        assert (made.keep is None) == (sparsity is None)
        assert made.codes.shape == x.shape
    for part in ("codes", "mask", "keep"):
        a, b = getattr(t, part), getattr(back, part)
        assert a is b is None or torch.equal(a, b), part
    assert same(t.scale, back.scale)
    assert p.codes.dtype == p.mask.dtype == torch.uint8
    assert p.codes.shape == (*lead, -(-width * grid.storage_bits // 8))
    assert p.mask.shape == (*lead, -(-width // 8))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 9, 33])
@pytest.mark.parametrize("grid", [*GRIDS[:4], quest.grids.ternary(), quest.grids.e2m1()], ids=str)
def test_odd_widths_pack_whole(grid: Any, width: int) -> None:
    q = quest.Quantizer(grid, quest.Identity())
    x = inputs.draw("gaussian", (3, width), torch.float32, width)
    assert torch.equal(q.pack(x).unpack().codes, q.quantize(x).codes)
    assert torch.equal(q.pack(x).unpack().dequantize(), q(x))


@pytest.mark.parametrize("bits_", range(1, 9))
def test_codes_of_even_levels(bits_: int) -> None:
    """In [-L/2, L/2 - 1], the point (code + 1/2) step."""
    grid, half = quest.grids.uniform(bits_), 2 ** (bits_ - 1)
    t = quest.Quantizer(grid, quest.Identity()).quantize(
        torch.linspace(-3, 3, 4001).reshape(1, -1) ** 9
    )
    assert (t.codes.min(), t.codes.max()) == (-half, half - 1)
    points = (np.arange(-half, half) + 0.5) * grid.step
    np.testing.assert_allclose(points, grid.points, rtol=1e-14)
    got = t.dequantize().double() / t.scale.double()
    expected = (t.codes.double() + 0.5) * float(grid.step)
    # The constant, the product with the half integer, and with sigma: three roundings.
    assert (got - expected).abs().le(3.1 * 2.0**-24 * expected.abs()).all()


def test_codes_of_odd_levels() -> None:
    grid = quest.grids.ternary()
    t = quest.Quantizer(grid, quest.Identity()).quantize(torch.tensor([[-3.0, -0.1, 0, 0.1, 3.0]]))
    assert t.codes.tolist() == [[-1, 0, 0, 0, 1]]
    assert t.dequantize()[0, 1:4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("grid", [quest.grids.e2m1(), quest.grids.lloyd_max(3)], ids=str)
def test_codes_of_tables_count_from_zero(grid: Any) -> None:
    n = grid.levels
    x = torch.tensor([grid.points])
    # Scaled so that the row's RMS is 1 and the entries are the points themselves.
    x = torch.cat([x, torch.full((1, 64), 0.0)], 1)
    rest = math.sqrt((x.shape[1] - float(x.square().sum())) / 64)
    x[0, n:] = rest
    t = quest.Quantizer(grid, quest.Identity()).quantize(x)
    assert t.codes[0, :n].tolist() == list(range(n))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_by_hand(device: str) -> None:
    """Step 1 and RMS 1: a code is the floor of its entry, a midpoint goes up, ends are clamped."""
    row = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 0.25, -0.25, 9.0, -9.0, 3.75, -3.75]
    rest = 256 - sum(v * v for v in row)
    fill = [1.0] * int(rest) + [0.5] * int(4 * (rest % 1))
    x = torch.tensor([row + fill + [0.0] * (256 - len(row) - len(fill))], device=device)
    assert float(x.square().mean()) == 1
    q = quest.Quantizer(quest.grids.uniform(4, alpha=7.5), quest.Identity())
    t = q.quantize(x)
    assert t.scale.item() == 1
    assert t.codes[0, :12].tolist() == [0, 0, 0, -1, 1, -1, 0, -1, 7, -8, 3, -4]
    assert q(x)[0, :12].tolist() == [
        0.5, 0.5, 0.5, -0.5, 1.5, -0.5, 0.5, -0.5, 7.5, -7.5, 3.5, -3.5,
    ]  # fmt: skip
    # Trust: 1 inside 7.5 + 0.5.
    assert t.mask[0, :12].tolist() == [True] * 8 + [False] * 2 + [True] * 2
    three = quest.Quantizer(quest.grids.ternary(1.0), quest.Identity()).quantize(x)
    assert three.codes[0, :12].tolist() == [0, 0, 1, 0, 1, -1, 0, 0, 1, -1, 1, -1]
    fp4 = quest.Quantizer(quest.grids.e2m1(1.0), quest.Identity()).quantize(x)
    # Sorted points; 0.25 and -0.25 are midpoints.
    assert fp4.codes[0, :12].tolist() == [7, 7, 8, 6, 9, 5, 8, 7, 14, 0, 13, 1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_and_pruned_entries_have_the_code_of_zero(grid: Any) -> None:
    """The upper of two neighbours of 0; a pruned entry carries it, and its value is 0."""
    expected = int(np.searchsorted(np.array(grid.midpoints), 0.0, side="right"))
    code = expected - (0 if grid.step is None else grid.levels // 2)
    x = inputs.draw("gaussian", (4, 64), torch.float32, 0)
    x[:, 0] = 0.0
    t = quest.Quantizer(grid, quest.Identity()).quantize(x)
    assert t.codes[:, 0].tolist() == [code] * 4
    q = quest.Quantizer(grid, quest.Hadamard(16), quest.Trust(), quest.NM(1, 4))
    sparse = q.quantize(x)
    assert sparse.keep is not None
    assert (sparse.keep.sum(-1) == 16).all()
    assert (sparse.codes[~sparse.keep] == code).all()
    assert (q(x)[~sparse.keep] == 0).all()
    assert torch.equal(sparse.dequantize(), q(x))


def test_index_to_255_is_unsigned() -> None:
    """256 free levels count to 255, which int8 does not hold."""
    q = quest.Quantizer(quest.grids.lloyd_max(8), quest.Identity())
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3
    codes = q.quantize(x).codes
    assert codes.dtype == torch.uint8
    assert (codes.min(), codes.max()) == (0, 255)
    assert quest.Quantizer(quest.grids.lloyd_max(7)).quantize(x).codes.dtype == torch.int8


@pytest.mark.parametrize("device", DEVICES)
def test_zero_rounds_up_and_rows_follow_their_rules(device: str) -> None:
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0], [0, 0, 0, 0], [math.nan, 1, 2, 3],
                      [1, 2, math.inf, 3], [1, 1, 1, 1]], device=device)  # fmt: skip
    one_bit = quest.Quantizer(quest.grids.uniform(1), quest.Identity(), quest.Clip(1.3))
    for q in (one_bit, quest.Quantizer(quest.grids.uniform(4), quest.Identity())):
        t, values = q.quantize(x), q(x)
        assert t.codes[0, :2].tolist() == [0, 0]
        assert (values[0, :2] > 0).all()
        assert values[1].tolist() == [0] * 4
        assert t.scale[1] == 0
        assert t.mask[1].all()
        assert values[2:4].isnan().all()
        assert t.scale[2:4].isnan().all()
        assert values[4].isfinite().all()
        assert torch.equal(values[4], q(x[4]))


def test_dequantize_of_a_batch_is_that_of_its_rows() -> None:
    q = quest.Quantizer(quest.grids.uniform(3), quest.Hadamard(16), quest.Trust(), quest.NM(2, 4))
    x = inputs.draw("heavy", (4, 5, 32), torch.float32, 0)
    whole = q(x)
    for i in range(4):
        for j in range(5):
            assert torch.equal(whole[i, j], q(x[i, j]))


@pytest.mark.parametrize("block", [1, 2, 16, 128, 12, 40, 256])
def test_hadamard_is_orthonormal_and_transpose_inverts(block: int) -> None:
    h = quest.Hadamard(block)
    x = inputs.draw("integers", (3, 2 * block), torch.float32, block)
    y = h.apply(x)
    assert y.dtype == x.dtype
    back = h.transpose(y)
    # Two transforms of at most 30 roundings each of sums of |x| <= 3.
    assert (back - x).abs().max() <= 2 * 40 * 2.0**-24 * 3 * block
    assert quest.Identity().apply(x) is x
    assert quest.Identity().transpose(x) is x


def test_apply_multiplies_by_h_and_transpose_by_h_transposed() -> None:
    for block in (1, 2, 12, 28, 40):
        h = torch.from_numpy(reference_hadamard.matrix(block)).float()
        eye, rotation = torch.eye(block), quest.Hadamard(block)
        assert torch.equal(rotation.apply(eye).sign(), h)
        assert torch.equal(rotation.transpose(eye).sign(), h.T)
        assert torch.equal(h, h.T) == (block <= 2)


def test_default_block_is_the_largest_power_of_two_up_to_128() -> None:
    order = quest.Hadamard().order
    assert [order(n) for n in (1, 3, 6, 64, 96, 128, 384, 1024, 0)] == [
        1, 1, 2, 64, 32, 128, 128, 128, 1,
    ]  # fmt: skip


RECIPES = [
    *(f"w{b}a{b}" for b in range(1, 9)),
    *(f"w{w}a{a}" for w, a in ((4, 8), (1, 8), (2, 4), (8, 1), (3, 7))),
    "w1.58a1.58", "w1.58a8", "w2a1.58",
    *(f"w{b}a16" for b in range(1, 9)), "w1.58a16",
    "fp4", "bf16", "w4a4-2:4", "w4a4-4:8", "w8a8-2:4", "fp4-2:4", "fp4-4:8", "w4a16-2:4",
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    r = quest.recipe(name)
    assert str(r) == r.name == name
    assert quest.recipe(r) is r
    assert quest.recipe(name) == r
    assert r.weight.transform == r.activation.transform
    stem, _, pattern = name.partition("-")
    assert (
        r.weight.sparsity == {"": None, "2:4": quest.NM(2, 4), "4:8": quest.Pairwise(4, 8)}[pattern]
    )
    assert r.activation.sparsity is None
    if stem == "bf16":
        assert r.weight.grid is r.activation.grid is None
        assert r.weight.transform == quest.Identity()
        return
    assert isinstance(r.weight.transform, quest.Hadamard)
    if stem == "fp4":
        assert r.weight.grid == r.activation.grid == quest.grids.e2m1()
    else:
        for q, label in zip((r.weight, r.activation), stem[1:].split("a"), strict=True):
            if label == "16":
                assert q.grid is None
                continue
            expected = quest.grids.ternary() if label == "1.58" else quest.grids.uniform(int(label))
            assert q.grid == expected
            # 1 bit uses Clip(1.30), all other widths Trust(1).
            assert q.estimator == (quest.Clip(1.30) if label == "1" else quest.Trust(1.0))


def test_recipe_overrides() -> None:
    r = quest.recipe("w4a4", estimator=quest.STE())
    assert r.weight.estimator == r.activation.estimator == quest.STE()
    assert r.weight.grid == quest.grids.uniform(4)
    r = quest.recipe("w4a4", transform=quest.Identity())
    assert r.weight.transform == r.activation.transform == quest.Identity()
    r = quest.recipe("w4a4", sparsity=quest.NM(1, 4))
    assert (r.weight.sparsity, r.activation.sparsity) == (quest.NM(1, 4), None)
    q = quest.Quantizer(quest.grids.lloyd_max(2))
    assert quest.recipe("w4a4", weight=q).weight is q
    assert quest.recipe("w4a4", activation=q).activation is q
    assert quest.recipe("w4a4", estimator=quest.Trust()) == quest.recipe("w4a4")
    # Without the transform the published threshold at 1 bit is 1.25.
    assert quest.recipe("w1a1", transform=quest.Identity()).weight.estimator == quest.Clip(1.25)
    assert "changed" in quest.recipe("w4a4", estimator=quest.STE()).name
    base = quest.recipe("w2a2")
    assert quest.recipe(base, estimator=quest.STE()).weight.estimator == quest.STE()


@pytest.mark.parametrize("name", ["w1a1", "w1a4", "w4a1", "w1a16", "w4a4", "fp4", "w1a1-2:4"])
@pytest.mark.parametrize("transform", [quest.Identity(), quest.Hadamard(), quest.Hadamard(12)])
def test_a_default_estimator_follows_the_transform(name: str, transform: Any) -> None:
    by_name = quest.recipe(name, transform=transform)
    assert quest.recipe(quest.recipe(name), transform=transform) == by_name
    # And back: the default of the transform that it had.
    assert quest.recipe(by_name, transform=quest.Hadamard()).spec == quest.recipe(name).spec


def test_a_chosen_estimator_stays_with_another_transform() -> None:
    plain = quest.Identity()
    for chosen in (quest.Clip(1.2), quest.STE(), quest.Trust(0.5)):
        made = quest.recipe("w1a1", estimator=chosen)
        moved = quest.recipe(made, transform=plain)
        assert moved.weight.estimator == moved.activation.estimator == chosen
        assert quest.recipe("w1a1", transform=plain, estimator=chosen).spec == moved.spec
        base = quest.recipe("w1a1")
        assert quest.recipe(base, transform=plain, estimator=chosen).spec == moved.spec
    # The two operands are told apart.
    grid = quest.grids.uniform(1)
    made = quest.Recipe("mine", quest.Quantizer(grid, quest.Hadamard(), quest.Clip(1.2)),
                        quest.Quantizer(grid, quest.Hadamard(), quest.Clip(1.3)))  # fmt: skip
    moved = quest.recipe(made, transform=plain)
    assert (moved.weight.estimator, moved.activation.estimator) == (
        quest.Clip(1.2), quest.Clip(1.25)
    )  # fmt: skip


def test_specs_tell_recipes_apart() -> None:
    specs = {quest.recipe(name).spec for name in RECIPES}
    assert len(specs) == len(RECIPES)
    assert quest.recipe("w4a4").spec != quest.recipe("w4a4", transform=quest.Hadamard(64)).spec


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grid_names_round_trip(grid: Any) -> None:
    """To the last bit of alpha."""
    assert quest.grids.parse(str(grid)) == grid


@given(
    grid=st.sampled_from([None, *GRIDS]),
    transform=st.sampled_from([quest.Identity(), quest.Hadamard(), quest.Hadamard(40)]),
    estimator=st.one_of(
        st.just(quest.STE()),
        st.floats(1e-3, 1e3).map(quest.Trust),
        st.floats(1e-3, 1e3).map(quest.Clip),
    ),
    sparsity=st.sampled_from(SPARSITIES),
)
def test_spec_round_trips(grid: Any, transform: Any, estimator: Any, sparsity: Any) -> None:
    q = quest.Quantizer(grid, transform, estimator, None if grid is None else sparsity)
    assert parse(q.spec) == q
    assert parse(q.spec).spec == q.spec


def test_linear_contract() -> None:
    layer = quest.Linear(64, 32, bias=True, recipe="w2a2")
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert layer.recipe == quest.recipe("w2a2")
    assert layer.weight.shape == (32, 64)
    assert layer.bias is not None
    assert quest.Linear(64, 32).bias is None
    assert quest.Linear(64, 32).recipe == quest.recipe("w4a4")
    assert "recipe=w2a2" in repr(layer)
    assert "in_features=64" in repr(layer)
    assert layer(torch.zeros(3, 64)).shape == (3, 32)


def test_quantize_returns_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert quest.quantize_(model, "w4a4") is model
    assert isinstance(model[0], quest.Linear)

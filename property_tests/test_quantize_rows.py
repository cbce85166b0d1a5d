"""Rows of which each output is known exactly: ties, rows in several turns, ends of the range."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import quest
from property_tests.lane_marks import every_lane
from quest.conformance import oracle
from quest.conformance.lanes import Lane
from quest.quantizer import parse
from quest.reference import quantize

pytestmark = pytest.mark.whole

# In the interpreter a program holds 8192 entries at a time, compiled 1024.
WIDE = 12288
LARGEST = torch.finfo(torch.float32).max
TINY = 2.0**-149


def expected(x: Tensor, q: quest.Quantizer) -> quantize.Quantized:
    """What the oracle makes of x."""
    return quantize.quantize(oracle.lift(x), **oracle.arguments(q, x.shape[-1]))


def quantized(lane: Lane, x: Tensor, q: quest.Quantizer) -> quantize.Quantized:
    """What the oracle makes of x; the lane's scale, codes, mask and selection must be the same."""
    out, exact = lane.call("quantize", x, q=q), expected(x, q)
    for name in ("scale", "codes", "mask") + (("keep",) if q.sparsity else ()):
        np.testing.assert_array_equal(oracle.lift(out[name]), getattr(exact, name), name)
    return exact


def bits(packed: Tensor, width: int) -> npt.NDArray[np.bool_]:
    """Bits, the lowest of a byte first."""
    return np.unpackbits(packed.numpy(), axis=-1, bitorder="little")[..., :width].astype(bool)


def turns() -> Tensor:
    """(3, WIDE) with an RMS of 8 halves of a step of sigma / 4, by powers of two.

    The first 8192 entries are some 8 times smaller or larger than the others, so that what was
    summed is rescaled between two turns: 2 * 21 + 150 = 2 * 85.5 + 21 = 3 * 8^2.
    """
    rng = np.random.default_rng(0)
    quiet, loud, louder = (1, 3, 5, 7), (18, 4, 1, 1), (24, 4, 2, 2)
    made = []
    for early, late in ((quiet, louder), (loud, quiet), (quiet, louder)):
        parts = np.tile(early, 2048), np.tile(late, 1024)
        for part in parts:
            rng.shuffle(part)
        made.append(np.concatenate(parts) * rng.choice((-1.0, 1.0), WIDE))
    rows = np.stack(made)
    assert ((rows**2).mean(-1) == 64).all()
    return torch.from_numpy(rows / 8 * 2.0 ** np.array([[-20], [3], [40]])).float()


@every_lane
def test_of_equal_magnitudes_the_first_are_kept(lane: Lane) -> None:
    """Every group of four that there is; of pairs, too, which tie the other way round."""
    fours = np.array(list(itertools.product((0, 1, 2), repeat=4)), dtype=np.float64)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), fours.shape)
    pairs = np.stack([fours, 0 * fours], -1)
    pairs[:, ::2] = pairs[:, ::2, ::-1]
    # Fused, a sum of two squares depends on which of them is rounded by itself: here 18 do.
    turned = np.random.default_rng(1).standard_normal((81, 2))
    turned = np.stack([turned, turned[:, ::-1], turned[:, ::-1], turned], 1).reshape(81, 8)
    for sparsity, groups in (
        (quest.NM(1, 2), fours * signs),
        (quest.NM(1, 4), fours * signs),
        (quest.NM(2, 4), fours * signs),
        (quest.NM(3, 4), fours * signs),
        (quest.Pairwise(2, 4), pairs.reshape(81, 8)),
        (quest.Pairwise(4, 8), pairs.reshape(81, 8)),
        (quest.Pairwise(6, 8), pairs.reshape(81, 8)),
        (quest.Pairwise(2, 4), turned),
        (quest.Pairwise(4, 8), turned),
        (quest.Pairwise(6, 8), turned),
    ):
        q = quest.Quantizer(quest.grids.ternary(), quest.Identity(), quest.Trust(), sparsity)
        x = torch.from_numpy(groups).float().reshape(3, -1)
        keep = oracle.lift(lane.call("quantize", x, q=q)["keep"])
        np.testing.assert_array_equal(keep, expected(x, q).keep, str(sparsity))


@every_lane
@pytest.mark.parametrize(
    "spec",
    [
        "uniform4:1.875/hadamard1/clip1.0/2:4",
        "e2m1:0.5/hadamard1/trust0.5/dense",
        "ternary:0.25/hadamard1/trust1.0/1:4",
    ],
)
def test_rows_that_take_several_turns(lane: Lane, spec: str) -> None:
    """Scale, codes, mask, selection and values: all is exact here."""
    q, x = parse(spec), turns()
    exact = quantized(lane, x, q)
    out = lane.call("fake_quantize", x, q=q)
    np.testing.assert_array_equal(oracle.lift(out["values"]), exact.values)
    np.testing.assert_array_equal(bits(out["mask"], WIDE), exact.mask)


@every_lane
@pytest.mark.parametrize(
    ("spec", "kind", "unit"),
    [
        ("uniform1:0.125/hadamard1/trust1.0/dense", "bits", 0.125),
        ("uniform4:1.875/hadamard1/clip1.0/2:4", "integers", 0.125 / 8),
        ("ternary:0.25/hadamard1/trust1.0/dense", "integers", 0.25 / 64),
        ("e2m1:0.5/hadamard1/trust0.5/dense", "integers", 0.25 / 8),
    ],
)
def test_operands_of_rows_that_take_several_turns(
    lane: Lane, spec: str, kind: str, unit: float
) -> None:
    """The integers are the values in units, and their sums take all turns."""
    q, x = parse(spec), turns()
    exact = expected(x, q)
    integers = exact.values / exact.scale / unit
    out = lane.call("encode", x, q=q, kind=kind)
    if kind == "bits":
        stored = np.where(bits(out["operand"], WIDE), 1, -1)
    else:
        stored = oracle.lift(out["operand"])
    np.testing.assert_array_equal(stored, integers)
    np.testing.assert_array_equal(oracle.lift(out["sums"]), integers.sum(-1, keepdims=True))
    np.testing.assert_array_equal(oracle.lift(out["scale"]), exact.scale)
    np.testing.assert_array_equal(bits(out["mask"], WIDE), exact.mask)


@every_lane
@pytest.mark.parametrize("width", [64, 640, 4096, 11008, 16512])
def test_scales_of_rows_of_one_magnitude(lane: Lane, width: int) -> None:
    """Known to a few roundings at any width, where the bound of a scale grows with it.

    So a mean of d - 1, one entry that does not count, or a mean that is subtracted is seen.
    """
    g = torch.Generator().manual_seed(width)
    signs = torch.ones(4, width)
    signs[1, ::2] = -1.0
    signs[2] = 2.0 * torch.randint(2, (width,), generator=g) - 1.0
    signs[3] = -1.0
    powers = 2.0 ** torch.tensor([0, -3, 7, 20])[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        x = (signs * powers).to(dtype)
        for spec, kind in (("uniform4/hadamard/ste/dense", "integers"),
                           ("uniform1/hadamard/ste/dense", "bits")):  # fmt: skip
            scale = lane.call("encode", x, q=parse(spec), kind=kind)["scale"]
            # Sums are exact. The mean rounds twice, halved by the root, which is off by 2^-23 at
            # most where it is approximate: three.
            assert ((scale.double() / powers.double() - 1).abs() <= 4 * 2.0**-24).all()


@every_lane
@pytest.mark.parametrize("width", [64, WIDE])
def test_a_row_that_is_not_finite_is_a_row_of_zeros_without_scale(lane: Lane, width: int) -> None:
    """Wherever it is not: in any turn, and where nothing is NaN."""
    x = torch.ones(5, width)
    for row, (place, value) in enumerate(
        ((0, math.inf), (0, math.nan), (-1, -math.inf), (-1, math.nan))
    ):
        x[row, place] = value
    q = parse("ternary/hadamard1/trust0.5/dense")
    out = lane.call("quantize", x, q=q)
    assert out["scale"].isnan().flatten().tolist() == [True] * 4 + [False]
    assert not out["codes"][:4].any()
    assert not out["mask"][:4].any()
    assert out["codes"][4].all()
    values = lane.call("fake_quantize", x, q=q)["values"]
    assert values[:4].isnan().all()
    assert values[4].isfinite().all()


@every_lane
@pytest.mark.parametrize("width", [64, WIDE])
def test_rows_at_the_ends_of_the_range(lane: Lane, width: int) -> None:
    """The largest floats have their scale; a row whose scale rounds to 0 is a row of zeros."""
    x = torch.ones(4, width)
    x[0] = LARGEST
    x[1] = -TINY
    x[2:] = 0
    x[2, 0] = -TINY
    for spec in (
        "uniform4/hadamard1/trust1.0/dense",
        "uniform4/hadamard1/trust0.5/dense",  # 0 is no point: half a step away
        "ternary/hadamard1/trust0.5/dense",
    ):
        q = parse(spec)
        out = lane.call("quantize", x, q=q)
        scale = oracle.lift(out["scale"]).flatten()
        assert abs(scale[0] / LARGEST - 1) < 1e-6
        assert scale[1:].tolist() == [TINY, 0, 0]
        codes, exact = oracle.lift(out["codes"]), expected(x, q)
        np.testing.assert_array_equal(codes[:2], exact.codes[:2])
        np.testing.assert_array_equal(oracle.lift(out["mask"])[:2], exact.mask[:2])
        assert out["mask"][2:].all()
        assert not codes[2:].any()


@every_lane
def test_sums_are_of_whole_numbers(lane: Lane) -> None:
    """Points times their factor may fall short of an integer: 0.3 * 1.5 / 1.8 does, in float32."""
    q = parse("e2m1:0.3/hadamard1/trust1.0/dense")
    x = torch.linspace(-2.5, 2.5, 75).reshape(3, 25)
    codes = lane.call("quantize", x, q=q)["codes"].long()
    assert set(codes.flatten().tolist()) == set(range(15))
    integers = torch.tensor((-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12))[codes]
    integers *= 8  # what int8 has room for
    out = lane.call("encode", x, q=q, kind="integers")
    assert torch.equal(out["operand"].long(), integers)
    assert torch.equal(out["sums"].long(), integers.sum(-1, keepdim=True))


@every_lane
@pytest.mark.parametrize("order", [12, 20, 24])
def test_bases_take_rows_of_any_magnitude(lane: Lane, order: int) -> None:
    """A constant row of +1 times a power of two: the scale is that power, exactly or nearly."""
    x = torch.full((4, 2 * order), 1.0) * 2.0 ** torch.tensor([[-100.0], [-3.0], [0.0], [100.0]])
    q = quest.Quantizer(
        quest.grids.uniform(4), quest.Hadamard(order), quest.Trust(), quest.NM(2, 4)
    )
    exact = expected(x, q)
    scale = oracle.lift(lane.call("quantize", x, q=q)["scale"])
    np.testing.assert_allclose(scale, exact.scale, rtol=1e-5)


@every_lane
def test_more_rows_than_a_program_has(lane: Lane) -> None:
    """Each row once, whichever program has it."""
    x = torch.cat([turns()[:, -4096:]] * 2)[:5] * 2.0 ** torch.arange(5)[:, None]
    q = parse("uniform4:1.875/hadamard1/clip1.0/2:4")
    exact, out = expected(x, q), lane.call("quantize", x, q=q)
    np.testing.assert_allclose(oracle.lift(out["scale"]), exact.scale, rtol=1e-5)
    for name in ("codes", "mask", "keep"):
        np.testing.assert_array_equal(oracle.lift(out[name]), getattr(exact, name), name)


@every_lane
@pytest.mark.parametrize("estimator", ["clip1.0", "trust1.0", "ste"])
def test_bits_beyond_a_row_are_zero(lane: Lane, estimator: str) -> None:
    """Of 12 entries: there the last group of four, of zeros, would keep two."""
    q = parse(f"ternary/hadamard1/{estimator}/2:4")
    x = torch.linspace(-1, 1, 36).reshape(3, 12)
    whole = lane.call("quantize", x, q=q)
    packed = lane.call("quantize", x, q=q, packed=True)
    for name in ("mask", "keep"):
        np.testing.assert_array_equal(bits(packed[name], 16)[:, :12], oracle.lift(whole[name]))
        assert not bits(packed[name], 16)[:, 12:].any()


@every_lane
def test_twice_a_row_has_the_same_codes(lane: Lane) -> None:
    """At the upper end of the range, too, with entries that are nothing beside the largest."""
    row = torch.tensor([1.5 * 2.0**125, *(s * 2.0**-e for e in range(23, 30) for s in (1, -1))])
    x = torch.stack([row, 2 * row])
    out = lane.call("quantize", x, q=parse("uniform4/hadamard1/trust1.0/dense"))
    assert torch.equal(out["scale"][1], 2 * out["scale"][0])
    assert torch.equal(out["codes"][1], out["codes"][0])
    assert torch.equal(out["mask"][1], out["mask"][0])

"""What few products show of their kernel: edges of tiles, of memory and of launches that overlap.

Operands are made on the CPU wherever that does: a test then compiles one variant of product.cu.
On a GPU, and, what is not too large, in the emulator.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor

import quest
from property_tests import far_scales, overlapped
from property_tests.places import Place, on_a_gpu
from quest import lowbit, operands
from quest.conformance import inputs, judges
from quest.kernels import cuda, hopper, outputs, product
from quest.quantizer import Quantizer

pytestmark = pytest.mark.whole


@pytest.fixture(autouse=True)
def _on_hopper(place: Place) -> None:
    if reason := hopper.unavailable(torch.device(place.device)):
        pytest.skip(reason)


def _sides(name: str) -> tuple[tuple[Quantizer, str], tuple[Quantizer, str]]:
    """The quantizers of a recipe's activation and weight, and the kinds of their operands."""
    made = quest.recipe(name)
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    return (made.activation, kinds[0]), (made.weight, kinds[1])


def _names(name: str) -> tuple[str, str]:
    sides = _sides(name)
    return ",".join(q.require_grid().name for q, _ in sides), ",".join(kind for _, kind in sides)


def _operands(name: str, x: Tensor, w: Tensor) -> list[Tensor]:
    """a, b, their scales and their sums, on the CPU."""
    made = [
        lowbit.encode(t, q.spec, kind) for t, (q, kind) in zip((x, w), _sides(name), strict=True)
    ]
    return [side[part] for part in (0, 1, 3) for side in made]


def _judged(place: Place, name: str, made: list[Tensor], bias: Tensor | None, width: int) -> Tensor:
    """The product in float32, by its judge; 0xFF: NaN wherever nothing is written."""
    added = None if bias is None else bias.to(place.device)
    with outputs.poisoned(0xFF):
        y: Tensor = place.operators.product(
            *(t.to(place.device) for t in made), added, *_names(name), width, torch.float32
        ).cpu()  # fmt: skip
    sides = _sides(name)
    whole = [judges.whole(t, kind, width) for t, (_, kind) in zip(made[:2], sides, strict=True)]
    units = [operands.form_of(q, kind).unit for q, kind in sides]
    judges.multiplied(
        (whole[0], whole[1]), (units[0], units[1]), (made[2], made[3]), bias, y
    ).require()  # fmt: skip
    return y


def _accumulated(place: Place, a: Tensor, b: Tensor) -> None:
    """The exact product, by its judge; of numbers that no byte of 0x55 is left of."""
    with outputs.poisoned(0x55):
        acc = place.operators.accumulate(a.to(place.device), b.to(place.device))
    judges.accumulated(a, b, acc.cpu()).require()


def test_a_last_group_of_tiles_and_rows_at_odd_addresses(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster for all tiles: nine pairs of rows of tiles, of which eight are a group."""
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    for seed, (rows, columns, width) in enumerate(((1025, 300, 144), (70, 129, 400), (3, 257, 16))):
        a, b = (inputs.integers("random", n, width, seed) for n in (rows, columns))
        with product.only(product.NARROW):
            _accumulated(place, a, b)


def test_tiles_of_as_many_steps_as_there_are_stages(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While consumers write a tile, the next one fills the ring: what is asked for too early takes
    the place of what they have yet to read. Rows of odd lengths take them longest to write.
    """
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    for seed, tiles in enumerate((product.WIDE, product.TALL, product.NARROW)):
        sizes = (2 * tiles.rows, 5 * tiles.columns + 13)
        a, b = (inputs.integers("random", n, product.TILE_K * tiles.stages, seed) for n in sizes)
        with product.only(tiles):
            _accumulated(place, a, b)


@on_a_gpu
def test_no_stage_is_read_before_it_has_come(place: Place) -> None:
    """All multiprocessors multiply faster than the L2 cache brings what they ask for at once."""
    rows, columns, width = 1408, 768, 8192  # 66 pairs of tiles
    g = torch.Generator(device="cuda").manual_seed(0)
    b = torch.randint(-128, 128, (columns, width), generator=g, device="cuda", dtype=torch.int8)
    one = torch.randint(width, (rows,), generator=g, device="cuda")
    a = torch.zeros(rows, width, dtype=torch.int8, device="cuda")
    a[torch.arange(rows, device="cuda"), one] = 1
    with outputs.poisoned(0x55), product.only(product.NARROW):
        acc = lowbit.accumulate(a, b)
    assert torch.equal(acc, b[:, one].T.int())


@on_a_gpu
def test_the_tiles_of_very_many_columns(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """32767 of one cluster, of one step each: 128 times as many leave int32, or take minutes."""
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    g = torch.Generator(device="cuda").manual_seed(0)
    b = torch.randint(-128, 128, (32767 * 128, 16), generator=g, device="cuda", dtype=torch.int8)
    a = torch.zeros(2, 16, dtype=torch.int8, device="cuda")
    a[0, 3], a[1, 5] = 1, -1
    with outputs.poisoned(0x55), product.only(product.NARROW):
        acc = lowbit.accumulate(a, b)
    assert torch.equal(acc, torch.stack((b[:, 3].int(), -b[:, 5].int())))


def test_nothing_is_written_beside_the_rows(place: Place) -> None:
    """Rows that fill a part of a tile, of whole vectors and not: others' memory lies around."""
    other = 0x5A5A5A5A  # more than any sum
    for columns in (16, 13):
        b = inputs.integers("random", columns, 32, 0)
        on_device = b.to(place.device)
        for rows in range(1, 66):
            a = inputs.integers("random", rows, 32, rows)
            held = a.to(place.device)
            around = torch.full((rows + 32, columns), other).int().to(place.device)
            with product.only(product.NARROW):
                product.launch(
                    around[16:].data_ptr(), held.data_ptr(), on_device.data_ptr(), rows, columns,
                    32, held.device.index, torch.int32, False, hopper.RAW, 0, 1.0, 0, 0, 0, 0, 0,
                    False, 0,
                )  # fmt: skip
            made = around.cpu()
            judges.accumulated(a, b, made[16:-16]).require()
            assert (made[:16] == other).all()
            assert (made[-16:] == other).all()


@pytest.mark.parametrize("name", ["w8a8", "w4a4"])
def test_one_half_of_a_team_has_less_to_write(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ahead by what the other writes; each has the same columns' scales and sums.

    61 entries: where it is odd, the sum of codes and halves ends in a quarter.
    """
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    x, w = (inputs.draw("gaussian", (n, 61), torch.float32, n) for n in (60, 1537))
    w *= 2.0 ** (torch.arange(1537) % 9)[:, None]  # scales of neighbours, and of tiles, differ
    with product.only(product.WIDE):
        _judged(place, name, _operands(name, x, w), None, 61)


def test_each_column_of_a_word_has_a_gate_of_its_own(place: Place) -> None:
    """Of the product that writes both, by the gate's judge."""
    g = torch.Generator().manual_seed(0)
    made = _operands("w4a4", torch.randn(33, 128, generator=g), torch.randn(64, 128, generator=g))
    given = (*(t.to(place.device) for t in made), None, *_names("w4a4"), 128, torch.bfloat16)
    made_by = place.operators
    with product.only(product.NARROW), outputs.poisoned(0xFF):
        y, found = made_by.product(*given), made_by.gated_product(*given)
    gate, value = y.cpu().chunk(2, -1)
    assert y.isfinite().all()  # it was written
    judges.gated(gate, value, found.cpu()).require()


def test_sums_of_one_side_alone(place: Place) -> None:
    """Codes beside integers: what the other side's sums would correct is not there."""
    for seed, (name, width) in enumerate((("w8a1.58", 72), ("w1a8", 72), ("w8a8", 13))):
        x, w = (inputs.draw("gaussian", (n, width), torch.float32, seed) for n in (5, 24))
        with product.only(product.NARROW):
            _judged(place, name, _operands(name, x, w), None, width)


@pytest.mark.parametrize("factor", [1.0, far_scales.FACTOR])
def test_scales_near_and_far(place: Place, factor: float) -> None:
    """Each row is rounded as it would be by itself, in one warp with others."""
    a, b = (inputs.integers("random", n, 256, n) for n in (64, 300))
    row, column = far_scales.rows(factor), far_scales.columns(300)
    with outputs.poisoned(0xFF), product.only(product.NARROW):
        y = product.product(
            a.to(place.device), b.to(place.device), torch.float32, epilogue=hopper.PLAIN,
            factor=factor, row_scale=row.to(place.device), column_scale=column.to(place.device),
        )  # fmt: skip
    p = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    assert torch.equal(y.cpu(), far_scales.dequantized(p, factor, row, column))


def _ends(n: int, width: int, low: int, high: int) -> Tensor:
    """int8 rows of their ends: all of one, of the other, in turn, and by chance."""
    g = torch.Generator().manual_seed(width)
    made = torch.where(torch.rand(n, width, generator=g) < 0.5, low, high)
    made[0], made[1] = low, high
    made[2, ::2], made[2, 1::2] = low, high
    return made.to(torch.int8)


@pytest.mark.parametrize(
    ("tiles", "width"),
    [*(("narrow", width) for width in (32768, 33040, 65536)), ("tall", 33040), ("wide", 33040)],
)
@pytest.mark.parametrize("other", ["codes", "integers"])
def test_codes_at_their_ends_in_long_rows(place: Place, width: int, other: str, tiles: str) -> None:
    """Of code + 1/2 four products fit int32 up to 32768 of them, and beyond are made in double:
    rounded once, either way, beside a row that is far, too. Rows of y are whole vectors: others
    are all made in double.
    """
    a, low = _ends(5, width, -128, 127), -128 if other == "codes" else -127
    b = _ends(72, width, low, 127)
    twice = 2 * b.long() + 1 if other == "codes" else 2 * b.long()
    exact = ((2 * a.long() + 1) @ twice.T).double() / 4
    sums = {
        "row_sum": (2 * a.long() + 1).sum(1) * (other == "codes"),
        "column_sum": twice.sum(1), "length": width * (other == "codes"),
    }  # fmt: skip
    scale = torch.ones(5)
    for far in (1.0, 2.0**-110):
        scale[3] = far
        with outputs.poisoned(0xFF), product.only(product.KINDS[tiles]):
            y = product.product(
                a.to(place.device), b.to(place.device), torch.float32,
                epilogue=hopper.CORRECTED, factor=1.0, length=int(sums["length"]),
                row_scale=scale.to(place.device), column_scale=torch.ones(72, device=place.device),
                row_sum=sums["row_sum"].int().to(place.device),
                column_sum=sums["column_sum"].int().to(place.device),
            ).cpu()  # fmt: skip
        assert torch.equal(y, (exact.float().double() * scale[:, None].double()).float())


@pytest.mark.parametrize("scales", ["far", "mixed"])
def test_far_rows_with_a_bias(place: Place, scales: str) -> None:
    """They, and near ones that are as large as can be, are rounded as few.cu does it.

    Its factor is eight times as large, for the weight's codes are odd integers as they are: rows
    of scales from 2^98 to 2^101 are far there, and near here.
    """
    q = _sides("w4a4")[1][0]
    x, w = (inputs.draw("gaussian", (n, 256), torch.float32, n) for n in (5, 24))
    made = _operands("w4a4", x, w)
    far = 2.0**104
    values = [far] * 5 if scales == "far" else [far, 1.3 * far, 1.3 * 2.0**97, 1e36, 1.7 * 2.0**97]
    made[2] = torch.tensor(values)[:, None]
    made[3] = made[3] * 2.0**-100
    bias = 30 * inputs.draw("gaussian", (24,), torch.float32, 0)
    with product.only(product.NARROW):
        y = _judged(place, "w4a4", made, bias, 256)
    codes = q.pack(w).codes
    given = [t.to(place.device) for t in (made[0], codes, *made[2:], bias)]
    few = place.packed_product(*given, *_names("w4a4"), 256, torch.float32)
    assert torch.equal(y, few.cpu())


@on_a_gpu
@pytest.mark.parametrize("late", ["a", "b"])
def test_what_the_kernel_before_makes_is_waited_for(place: Place, late: str) -> None:
    (q, kind), _ = _sides("w4a4")
    few = inputs.draw("gaussian", (256, 1024), torch.bfloat16, 0)
    small = tuple(t.to(place.device) for t in lowbit.operand(few, q.spec, kind))

    def multiply(large: tuple[Tensor, ...]) -> Tensor:
        pair = (large, small) if late == "a" else (small, large)
        parts = [side[part] for part in range(3) for side in pair]
        with product.only(product.NARROW):
            y: Tensor = lowbit.product(*parts, None, *_names("w4a4"), 1024, torch.float32)
        return y

    for large in overlapped.operands(q.spec, kind):
        y = multiply(large)
        torch.cuda.synchronize()
        assert torch.equal(y, multiply(large))
        del large, y


def test_a_settled_weight_is_asked_for_at_once(place: Place) -> None:
    """Again and again: before the other block of a cluster has its barriers, nothing may come."""
    a, b = (inputs.integers("random", n, 1040, n) for n in (130, 300))
    pair = (a.to(place.device), b.to(place.device))
    place.settle(pair[1])
    if place.device == "cuda":
        torch.cuda.synchronize()
    with product.only(product.NARROW):
        made = [
            product.product(*pair, torch.int32, epilogue=hopper.RAW, settled=True)
            for _ in range(100 if place.device == "cuda" else 2)
        ]
    judges.accumulated(a, b, made[0].cpu()).require()
    assert all(torch.equal(each, made[0]) for each in made)


@pytest.mark.parametrize("front", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("rows", [40, 1])
def test_nothing_is_read_beside_scales_and_sums(place: Place, rows: int, front: bool) -> None:
    """Nor beside a bias. Rows and columns fill a part of a tile; a block may have no rows."""
    g = torch.Generator().manual_seed(rows)
    a, b = (torch.randint(-128, 128, (n, 32), generator=g, dtype=torch.int8) for n in (rows, 100))
    scales = [torch.rand(n, generator=g) + 0.5 for n in (rows, 100)]
    sums = [(2 * t.int() + 1).sum(-1).int() for t in (a, b)]
    bias = 1000 * torch.randn(100, generator=g)
    pair = (a.to(place.device), b.to(place.device))
    y = torch.empty(rows, 100, device=place.device)
    with ExitStack() as memory, product.only(product.NARROW):
        edged = [memory.enter_context(place.walled(t, front)) for t in (*scales, bias, *sums)]
        at = [t.data_ptr() for t in edged]
        product.launch(
            y.data_ptr(), pair[0].data_ptr(), pair[1].data_ptr(), rows, 100, 32,
            y.device.index, torch.float32, False, hopper.CORRECTED, 32, 1.0,
            at[0], at[1], at[2], at[3], at[4], False, hopper.bias_type(bias),
        )  # fmt: skip
        y = y.cpu()
    whole = (judges.whole(a, "codes", 32), judges.whole(b, "codes", 32))
    column = (scales[0][:, None], scales[1][:, None])
    judges.multiplied(whole, (0.5, 0.5), column, bias, y).require()

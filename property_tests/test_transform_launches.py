"""What the kernels of the transform are launched with, seen by one that only notes it; no GPU.

What is launched for a GPU is seen here as well: on a CPU tensor, which nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quest import transforms
from quest.kernels import hadamard

pytestmark = pytest.mark.whole

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launches:
    """The arguments of each launch, by their names, and its `grid`."""

    def __init__(self) -> None:
        self.seen: list[SimpleNamespace] = []

    def of(self, kernel: Any) -> Any:
        """In place of `kernel`."""
        names = kernel.arg_names
        owner = self

        class Noted:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*arguments: Any, **hints: int) -> None:
                    told = dict(zip(names, arguments, strict=True)) | hints
                    owner.seen.append(SimpleNamespace(grid=grid, **told))

                return launch

        return Noted()

    def one(self) -> SimpleNamespace:
        """The only one since the last call."""
        assert len(self.seen) == 1
        return self.seen.pop()


@pytest.fixture(params=[False, True], ids=["compiled", "interpreted"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(hadamard, "INTERPRETED", request.param)
    monkeypatch.setattr(hadamard, "_transform", made.of(hadamard._transform))
    monkeypatch.setattr(hadamard, "_base_product", made.of(hadamard._base_product))
    return made


def run(x: torch.Tensor, order: int, transpose: bool = False, **more: Any) -> torch.Tensor:
    """The transform of some order, as operators call it."""
    base = transforms.base(transforms.split(order)[0], CPU)
    return hadamard.hadamard(x, order, base, transpose, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((5, 256), 128), ((2, 3, 2064), 16), ((3, 24), 8), ((1, 1), 1), ((1100, 4), 2),
        ((3, 1100), 4), ((3, 8192), 4096), ((2, 16384), 16384),
    ],
)  # fmt: skip
def test_one_launch_covers_the_matrix(
    shape: tuple[int, ...], order: int, dtype: torch.dtype, launches: Launches
) -> None:
    """Of blocks as rows where they can be read by vectors."""
    y = run(torch.zeros(shape, dtype=dtype), order)
    assert (y.shape, y.dtype) == (shape, dtype)
    it, width = launches.one(), order if order >= 16 else shape[-1]
    rows = math.prod(shape) // width
    assert (it.rows, it.width) == (rows, width)
    assert hadamard.tile(rows, width, order) == (it.ROWS, it.WIDTH)
    assert it.grid == (math.ceil(rows / it.ROWS), math.ceil(width / it.WIDTH))
    assert it.num_warps == hadamard.warps(it.ROWS * it.WIDTH)
    assert (order, False) == (2**it.LOG, it.MASKED)
    assert it.before * it.after == order**-0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_reads_and_writes_the_dtypes_themselves_if_compiled(
    dtype: torch.dtype, launches: Launches
) -> None:
    """Contiguous memory, whatever the layout of the tensor."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    for asked in (None, *DTYPES):
        y = run(x, 4, dtype=asked)
        it, final = launches.one(), asked or dtype
        assert y.dtype == final
        assert it.x_ptr.is_contiguous()
        assert torch.equal(it.x_ptr.to(dtype), x)
        memory = (torch.float32,) * 2 if hadamard.INTERPRETED else (dtype, final)
        assert (it.x_ptr.dtype, it.y_ptr.dtype) == memory


@pytest.mark.parametrize(
    ("order", "dtype", "rescued"),
    [
        (1, torch.float32, False), (2, torch.float32, True), (128, torch.float32, True),
        (2, torch.bfloat16, False), (128, torch.float16, False), (12288, torch.float32, False),
        (12288, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_sums_out_of_range_are_looked_for_where_they_may_be(
    order: int, dtype: torch.dtype, rescued: bool, launches: Launches
) -> None:
    """Not of one entry; nor of shares of 16 bits, of which the kernel sums a mean; nor near 1."""
    run(torch.zeros((3, 2 * order), dtype=dtype), order)
    it = launches.seen[0]  # the base's follows
    assert rescued == it.RESCUE
    shares = order > 1 and dtype != torch.float32
    assert it.before == (0.5**it.LOG if shares else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 4, 12, 12288])
def test_a_mask_is_read_once(order: int, dtype: torch.dtype, launches: Launches) -> None:
    """With the entries; its bytes lie row after row, whatever their layout was."""
    g = torch.Generator().manual_seed(order)
    width = max(72, order)
    mask = torch.randint(256, (2, 5, width // 4), generator=g).to(torch.uint8)[..., ::2]
    run(torch.zeros(2, 5, width, dtype=dtype), order, mask=mask)
    first, *rest = launches.seen
    based = order % 3 == 0
    assert (first.MASKED, first.mask_width, 2**first.LOG) == (
        True, width // 8, 1 if based else order,
    )  # fmt: skip
    assert first.mask_ptr.is_contiguous()
    assert torch.equal(first.mask_ptr, mask)
    assert (first.RESCUE, [getattr(it, "MASKED", False) for it in rest]) == (
        order == 4 and dtype == torch.float32,
        [False] * (2 if order == 12288 else int(based)),
    )
    # What is masked is written as it was, for the base's kernel to read.
    assert not based or first.y_ptr.dtype == first.x_ptr.dtype
    assert first.before * first.after == (1.0 if based else order**-0.5)
    run(torch.zeros(2, 68), 1, mask=mask[0, :2, :9])
    assert launches.seen[-1].mask_width == 9  # half a byte of it is of no entry


def test_bits_of_blocks_lie_as_blocks_do(launches: Launches) -> None:
    """Of a row as long as two blocks, the mask's bytes are two rows."""
    run(torch.zeros(3, 64), 32, mask=torch.zeros(3, 8, dtype=torch.uint8))
    it = launches.one()
    assert (it.rows, it.width, it.mask_width) == (6, 32, 4)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("order", "m"), [(12, 12), (160, 20), (56, 28), (7168, 28), (12 * 512, 12), (28 * 512, 28),
                     (12288, 12), (32768, 2), (65536, 4), (12 * 16384, 12), (64 * 16384, 64)]
)  # fmt: skip
def test_the_base_s_launch_covers_the_vectors(
    order: int, m: int, dtype: torch.dtype, transpose: bool, launches: Launches
) -> None:
    """The butterfly is in it, where a program holds the sums; else it comes before."""
    y = run(torch.zeros(3, 2 * order, dtype=dtype), order, transpose)
    assert y.shape == (3, 2 * order)
    *before, it = launches.seen
    power = order // m
    assert (it.M, it.columns, it.vectors) == (m, power, 6 * power)
    fused = order <= 28 * 256
    assert (2**it.LOG, [2**tile.LOG for tile in before]) == ((power, []) if fused else (1, [power]))
    # Of 16 bits, shares; of others blocks near 1. The last launch normalises.
    shares = dtype != torch.float32 and order <= 2**16
    share = 0.5 ** math.ceil(math.log2(order)) if shares else 1.0
    for tile in before:
        assert (tile.before * tile.after, tile.RESCUE) == (share, False)
        assert tile.before == (1 / power if shares else 1.0)
    assert it.norm * share == order**-0.5
    base = transforms.base(m, CPU)
    assert base is not None
    assert torch.equal(it.base_ptr, (base.t() if transpose else base) * (share if fused else 1))
    assert it.base_ptr.is_contiguous()
    assert shares != it.SCALED
    assert shares or it.power_ptr.numel() == 6
    assert it.PADDED // 2 < m <= it.PADDED
    assert it.WIDTH & (it.WIDTH - 1) == 0
    assert it.WIDTH >= 2**it.LOG
    assert (it.grid[0] - 1) * it.WIDTH < it.vectors <= it.grid[0] * it.WIDTH
    # 64 sums a thread; the interpreter has none.
    assert max(4096 if hadamard.INTERPRETED else 2048 // it.PADDED, 2**it.LOG) == it.WIDTH
    assert 64 * 32 * it.num_warps == it.PADDED * it.WIDTH


def test_what_launchers_are_not_told(launches: Launches) -> None:
    """Values may be of 32 bits; there is no mask, no power, and nothing behind the base."""
    hadamard.launch_tile(torch.zeros(2, 32), 16, 1.0, torch.float32)
    it = launches.one()
    assert (it.before, it.after, it.MASKED, it.RESCUE) == (1.0, 1.0, False, True)
    base = transforms.base(12, CPU)
    assert base is not None
    hadamard.launch_base(torch.zeros(2, 48), base, 4, 1.0, torch.float32)
    it = launches.one()
    assert (it.columns, it.norm, it.LOG, it.SCALED) == (4, 1.0, 0, False)


def test_no_value_of_sixteen_bits_loses_by_becoming_a_share() -> None:
    """The smallest of bfloat16, over the largest order of which shares are taken."""
    least = torch.tensor(
        torch.finfo(torch.bfloat16).smallest_normal * 2.0**-7, dtype=torch.bfloat16
    )
    share = least.float() / hadamard.LOSSLESS
    assert share > 0
    assert share * hadamard.LOSSLESS == least.float()
    assert least.float() / (2 * hadamard.LOSSLESS) * (2 * hadamard.LOSSLESS) != least.float()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (2, 0, 16), (0, 0)])
def test_nothing_is_launched_for_nothing(shape: tuple[int, ...], launches: Launches) -> None:
    for order in (16, 20):
        y = run(torch.zeros(shape), order, dtype=torch.bfloat16)
        assert (y.shape, y.dtype) == (shape, torch.bfloat16)
    assert not launches.seen
    assert run(torch.zeros(1, 1), 1).shape == (1, 1)
    launches.one()


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_bring_a_row_near_one(dtype: torch.dtype) -> None:
    """To [1, 2), but where a power or its inverse would not be normal."""
    info = torch.finfo(dtype)
    first, last = (math.frexp(v)[1] - 1 for v in (info.smallest_normal, info.max))
    tops = [2.0**e for e in (first, first + 1, -3, 0, 5, last - 1, last)]
    rows = [[t, -t * (2 - info.eps), 0.0] for t in tops]
    least = info.smallest_normal * info.eps
    x = torch.tensor([*rows, [least, 0.0, -3 * least], [0.0, 0.0, 0.0]], dtype=dtype)
    near, back = hadamard.prescale(x)
    assert (near.dtype, back.dtype, back.shape) == (torch.float32, torch.float32, (len(x), 1))
    assert torch.equal(near * back, x.float())
    assert (back.frexp()[0] == 0.5).all()
    for before, after in zip(x.float().abs().amax(-1), near.abs().amax(-1), strict=True):
        if before < 2.0**-126:
            assert after < 1
        else:
            assert after.frexp()[1] - 1 == (1 if before >= 2.0**127 else 0)

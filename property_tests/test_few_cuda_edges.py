"""few.cu at its edges: blocks without work, long lists of tiles, memory of another launch.

How work is split changes no bit of a sum. Here one cluster runs at a time, or a cluster has a given
size: small shapes then have many tiles of a cluster, and need no variant of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

import quest
from property_tests import far_scales
from property_tests.places import Place, on_a_gpu
from quest import operands, packing
from quest.conformance import inputs
from quest.kernels import cuda, few, hopper, outputs

pytestmark = pytest.mark.whole
MARGIN = 4096


@pytest.fixture(autouse=True)
def _on_hopper(place: Place) -> None:
    if reason := hopper.unavailable(torch.device(place.device)):
        pytest.skip(reason)


@contextmanager
def _split(
    shares: tuple[int, ...] = few.SHARES, clusters: tuple[int, ...] = few.CLUSTERS, groups: int = 1
) -> Iterator[None]:
    """Warps that may share a tile, blocks that a cluster may have, clusters that run at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "SHARES", shares)
        patch.setattr(few, "CLUSTERS", clusters)
        if groups:  # 0: as many as there are
            patch.setattr(cuda, "clusters", lambda kernel, size: groups)
        few._ready.cache_clear()
        try:
            yield
        finally:
            few._ready.cache_clear()


def _width(bits: int, steps: int) -> int:
    """Entries of so many steps: 64 bytes of a row of W each."""
    return steps * 512 // bits


def _between(place: Place, t: Tensor) -> Tensor:
    """A vector on the device, between values that are none of its own."""
    edge = t.new_full((MARGIN,), 77)
    return torch.cat((edge, t, edge)).to(place.device)[MARGIN:-MARGIN]


def _operands(
    place: Place, bits: int, rows: int, columns: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, w, integers of a, integers of w); the first two on the device."""
    g = torch.Generator().manual_seed(rows + columns + width)
    codes = torch.randint(0, 2**bits, (columns, width), generator=g)
    half = 2 ** (3 if bits > 1 else 0)  # odd integers from -15 to 15, or signs
    integers = 2 * torch.randint(-half, half, (rows, width), generator=g) + 1
    a = packing.pack(integers > 0, 1) if bits == 1 else integers.to(torch.int8)
    a, w = (t.to(place.device) for t in (a, packing.pack(codes, bits)))
    return a, w, integers, 2 * codes - (2**bits - 1)


def _exact(
    place: Place,
    bits: int,
    shape: tuple[int, int, int],
    out: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    edged: bool = False,
    settled: bool = False,
) -> None:
    """Sums, plus a bias, that `out` holds exactly or rounds once; scales are powers of two.

    edged: behind a and w no memory is mapped. settled: w is there before, as a and vectors are not.
    """
    rows, columns, width = shape
    a, w, *integers = _operands(place, bits, *shape)
    a_scale, w_scale = scales or (torch.ones(rows), torch.ones(columns))
    vectors = [_between(place, t) for t in (a_scale, w_scale, *(i.sum(1).int() for i in integers))]
    with ExitStack() as memory, outputs.poisoned(0xFF):  # NaN
        if edged:
            a, w = (memory.enter_context(place.walled(t)) for t in (a, w))
        if settled:
            place.settle(w)
        y = few.product(
            a, w, bits, out,
            factor=1.0, length=width, a_scale=vectors[0], w_scale=vectors[1], a_sum=vectors[2],
            w_sum=vectors[3], bias=None if bias is None else _between(place, bias),
            settled=settled,
        )  # fmt: skip
    # Sums of integers below 2^53 are exact in float64.
    expected = integers[0].double() @ integers[1].double().T
    expected *= a_scale[:, None].double() * w_scale.double()
    if bias is not None:
        expected += bias.double()
    assert torch.equal(y.cpu(), expected.to(out)), f"{shape}, {bits} bits, {out}"


@pytest.mark.parametrize("steps", [1, 3])
def test_a_block_that_waits_for_another(place: Place, steps: int) -> None:
    """The second block has no step of K, or fewer: its columns' sums are the first one's."""
    for share in (16, 1):
        with _split((share,), (2,)):
            _exact(place, 4, (5, 2000, _width(4, steps)))
            _exact(place, 4, (8, 40, _width(4, steps)))
            _exact(place, 4, (1, 16000, _width(4, steps)))  # it has long to wait


@pytest.mark.parametrize("cluster", [4, 8])
def test_clusters_whose_last_blocks_have_no_step(place: Place, cluster: int) -> None:
    """Nor a tile to write out; of every number of tiles of rows that is compiled."""
    with _split(clusters=(cluster,)):
        for bits, rows in ((1, 24), (2, 64), (4, 10), (4, 3)):
            _exact(place, bits, (rows, 40, _width(bits, cluster + 1)))


@pytest.mark.parametrize("bits", [1, 4])
def test_more_columns_than_threads(place: Place, bits: int) -> None:
    """Scales, sums and biases of any dtype are those of their columns, also of a block whose first
    column is not the product's."""
    g = torch.Generator().manual_seed(bits)
    # One block; a second one behind it; two of a cluster.
    for columns, groups, cluster in ((1100, 1, 1), (2200, 2, 1), (2200, 1, 2)):
        bias = torch.randint(-128, 128, (columns,), generator=g)  # exact in 16 bits, and in the sum
        with _split(clusters=(cluster,), groups=groups):
            for dtype in (torch.bfloat16, torch.float32, torch.float16)[: 4 - groups * cluster]:
                _exact(place, bits, (3, columns, 512), bias=bias.to(dtype))
            w_scale = torch.tensor([2.0 ** (i % 5) for i in range(columns)])
            _exact(place, bits, (3, columns, 512), scales=(torch.ones(3), w_scale))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_wide_rows(place: Place, bits: int) -> None:
    """Of more than 8192 entries weights are asked for before A's addresses, not behind them."""
    for width in (8192, 8192 + 128):
        _exact(place, bits, (3, 40, width))


@pytest.mark.parametrize("bits", [1, 4])
def test_a_settled_weight_is_asked_for_at_once(place: Place, bits: int) -> None:
    """And nothing else is read before what the kernel before has written can be seen."""
    bias = torch.arange(40.0)
    for width in (640, 8192 + 128):
        for cluster in (1, 2):
            with _split(clusters=(cluster,)):
                _exact(place, bits, (3, 40, width), bias=bias, settled=True)


@pytest.mark.parametrize(("bits", "width"), [(1, 640), (4, 384)])
def test_operands_that_end_where_memory_does(place: Place, bits: int, width: int) -> None:
    """Nothing is read behind the last rows, or where a row's last step has no more chunks."""
    # A warp has all steps of a tile. Of the last, with 1 bit, a lane in four has a chunk: zeros of
    # A would hide what the others read. W ends in the lower half of a tile, and in the upper.
    with _split((1,)):
        _exact(place, bits, (5, 130, width), edged=True)
        _exact(place, bits, (5, 140, width), edged=True)


def test_a_warp_with_many_tiles(place: Place) -> None:
    """Its list of units goes on from one tile to the next at any place of the ring."""
    # Warps of a tile, tiles, steps: of two tiles a warp at first, then of more.
    cases = [(1, 32, 3), (16, 2, 48), (2, 16, 6), (16, 3, 20), (4, 19, 9), (1, 75, 4), (2, 70, 2),
             (1, 120, 1)]  # fmt: skip
    for share, tiles, steps in cases:
        with _split((share,)):
            _exact(place, 4, (5, 16 * tiles, _width(4, steps)))
            _exact(place, 4, (5, 16 * tiles - 7, _width(4, steps)))


@pytest.mark.parametrize("factor", [1.0, far_scales.FACTOR])
def test_scales_near_and_far(place: Place, factor: float) -> None:
    rows, columns, width = 8, 200, 256
    a, w, *integers = _operands(place, 4, rows, columns, width)
    p = (integers[0] @ integers[1].T).numpy()
    a_sum, w_sum = (i.sum(1).int().to(place.device) for i in integers)
    column = far_scales.columns(columns)
    for row in far_scales.rows(factor).split(rows):
        n = len(row)
        with outputs.poisoned(0xFF):
            y = few.product(
                a[:n], w, 4, torch.float32, factor=factor, length=width,
                a_scale=row.to(place.device), w_scale=column.to(place.device),
                a_sum=a_sum[:n], w_sum=w_sum,
            )  # fmt: skip
        assert torch.equal(y.cpu(), far_scales.dequantized(p[:n], factor, row, column))


def test_far_rows_round_as_in_the_product(place: Place) -> None:
    """Beside a bias, near ones among them: bit for bit what the other kernel makes of them.

    Whose factor is an eighth, for its weight's integers are spread: rows of scales from 2^98 to
    2^101 are far here, and near there.
    """
    made, rows, columns, width = quest.recipe("w4a4"), 8, 200, 256
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair) or ("", "")
    x, w = (inputs.draw("gaussian", (n, width), torch.float32, n) for n in (rows, columns))
    a, _, _, a_sums = place.operators.encode(x.to(place.device), pair[0], kinds[0])
    b, b_scale, _, b_sums = place.operators.encode(w.to(place.device), pair[1], kinds[1])
    near = torch.tensor([1.3, 1.7, 1.9]) * 2.0**97  # as large as can be
    far = torch.tensor([1 + 2.0**-23, 1.7, 5.3, 15.9, 77.0]) * 2.0**104
    scale = torch.cat((near, far))
    bias = 30 * inputs.draw("gaussian", (columns,), torch.float32, 0).to(place.device)
    rest = (
        scale[:, None].to(place.device), b_scale * 2.0**-100, a_sums, b_sums, bias,
        ",".join(q.require_grid().name for q in pair), ",".join(kinds), width, torch.float32,
    )  # fmt: skip
    packed = packing.pack((b.cpu().long() + 120) // 16, 4).to(place.device)  # b: 8 (2 code - 15)
    y = place.packed_product(a, packed, *rest)
    assert y.isfinite().all()
    assert torch.equal(y, place.operators.product(a, b, *rest))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_largest_sums(place: Place, bits: int) -> None:
    """Of the widest row, of what int8 has at either end, where one warp has all that a block of
    threads has of it: int32 holds them, 2^BITS as large, too.
    """
    width, columns = 2**16, 16
    ends = torch.tensor([[-128], [127]])
    a = ends.expand(2, width).to(torch.int8).contiguous()
    codes = torch.full((columns, width), 2**bits - 1)
    with outputs.poisoned(0xFF), _split((1,)):
        y = few.product(
            a.to(place.device), packing.pack(codes, bits).to(place.device), bits, torch.float32,
            factor=2.0**-10, length=width, a_scale=torch.ones(2, device=place.device),
            w_scale=torch.ones(columns, device=place.device),
            a_sum=(ends[:, 0] * width).int().to(place.device), w_sum=None,
        )  # fmt: skip
    expected = ends.float() * (2.0**-10 * width * (2**bits - 1))  # of odd integers 2^BITS - 1
    assert torch.equal(y.cpu(), expected.expand(2, columns))


def test_scales_that_are_powers_of_two(place: Place) -> None:
    """Nothing is rounded, however large or small they are."""
    a_scale = torch.tensor([2.0**n for n in (-130, -20, 0, 20, 64, 90, 91, 126)])
    w_scale = torch.tensor([2.0 ** (i % 7) for i in range(300)])
    with _split(groups=0):
        for power in (-60, 60):  # infinite in places
            _exact(place, 4, (8, 300, 512), scales=(a_scale, w_scale * 2.0**power))


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_of_16_bits(place: Place, out: torch.dtype) -> None:
    """Sums of up to 17 bits are rounded to the nearest."""
    with _split(groups=0):
        _exact(place, 4, (8, 300, 512), out)
        _exact(place, 4, (3, 130, 128), out, torch.arange(130).to(out))


def test_rows_that_another_launch_had(place: Place) -> None:
    """Shared memory still holds them: they are no part of what fewer rows give."""
    columns, width = 4224, 640
    a, w, *integers = _operands(place, 4, 32, columns, width)
    ones = torch.ones(columns, device=place.device)
    a_sum, w_sum = (i.sum(1).int().to(place.device) for i in integers)
    expected = integers[0].double() @ integers[1].double().T
    made = []
    with _split(groups=0):
        # One launch right after another: all rows, and some of them.
        for rows in (32, 25, 32, 17, 32, 31):
            y = few.product(
                a[:rows], w, 4, torch.float32, factor=1.0, length=width, a_scale=ones[:rows],
                w_scale=ones, a_sum=a_sum[:rows], w_sum=w_sum,
            )  # fmt: skip
            made.append(y)
    for y in made:
        assert torch.equal(y.cpu().double(), expected[: y.shape[0]])


def test_nothing_is_written_beside_an_output(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies between bytes that are none of its own."""
    around = []

    def between(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        held = torch.full((MARGIN + size + MARGIN,), 77, dtype=torch.uint8, device=device)
        around.append((held, size))
        return held[MARGIN : MARGIN + size].view(dtype).view(tuple(shape))

    monkeypatch.setattr(outputs, "empty", between)
    for dtype in (torch.float32, torch.bfloat16):
        _exact(place, 4, (5, 20, 256), dtype)
        held, size = around.pop()
        beside = torch.cat((held[:MARGIN], held[MARGIN + size :]))
        assert (beside == 77).all()
        assert not around


@on_a_gpu
def test_more_columns_than_fit_16_times(place: Place) -> None:
    """16 times their number leaves int32, and nothing is counted so."""
    columns, width = 2**27 + 24, 128
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free memory")
    w = torch.full((columns, width // 8), 0xFF, dtype=torch.uint8, device="cuda")
    sums = torch.full((columns,), width, dtype=torch.int32, device="cuda")
    scale = torch.ones(columns, device="cuda")
    with outputs.poisoned(0xFF), _split(groups=0):
        y = few.product(
            w[:1], w, 1, torch.bfloat16,
            factor=1.0, length=width, a_scale=scale[:1], w_scale=scale, a_sum=sums[:1], w_sum=sums,
        )  # fmt: skip
    found = (y.amin().item(), y.amax().item())  # NaN is propagated
    del w, sums, scale, y
    torch.cuda.empty_cache()
    assert found == (width, width)

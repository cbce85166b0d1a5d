"""product.cu in the emulator, broken on purpose, which is seen; whole in `test_product_judged`."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from property_tests import emulated, places
from quest.conformance import inputs
from quest.kernels import cuda, hopper, product

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
NARROW, WIDE = product.NARROW, product.WIDE


def _multiply(
    tiles: product.Shape, rows: int, columns: int, width: int, settled: bool = False
) -> None:
    a, b = (inputs.integers("random", n, width, n) for n in (rows, columns))
    if settled:
        emulated.settle(b)
    scales = [torch.ones(n) for n in (rows, columns)]
    with product.only(tiles):
        y = product.product(
            a, b, torch.float32, epilogue=hopper.PLAIN, row_scale=scales[0],
            column_scale=scales[1], settled=settled,
        )  # fmt: skip
    assert torch.equal(y.double(), a.double() @ b.double().T), "other numbers"


def test_blocks_that_begin_in_the_second_group(emulator: emulated.Emulator) -> None:
    """With multiprocessors for all nine pairs of row tiles, of which eight are one group."""
    emulator.multiprocessors = 20
    _multiply(NARROW, 1030, 5, 128)


FIRST, SECOND = 1, 2
TURNS = (NARROW, 130, 300, 1552)  # each team has several tiles, and stages several tiles of K
ONE = (WIDE, 70, 301, 400)  # as many tiles as there are blocks
LAST = " barrier_arrive(base + EMPTY_AT + 8 * last, lane);"
UNDER_WAY = "global memory before the kernel before it has ended"
CLUSTERED = "barrier.cluster.wait.acquire.aligned;"
# What is multiplied; what is lost, the how manieth, what stands there instead, and how it shows.
BROKEN = {
    "a wait for a stage": (
        ONE, "barrier_wait(base + FULL_AT + 8 * stage, (at / STAGES) & 1);", SECOND, "",
        "a wgmma reads .* which a bulk copy writes",
    ),
    "a stage that is given back": (
        ONE, f"if (lane < CLUSTER){LAST}", FIRST, "", "waits for ever",
    ),
    "a stage that is given back too early": (
        TURNS, f"if (k > 0 && lane < CLUSTER){LAST}", FIRST,
        f"if (k + 1 < steps && lane < CLUSTER){LAST.replace('last', 'stage')}",
        "a bulk copy writes .* which a wgmma reads",
    ),
    "a block that is not asked": (
        TURNS, "CLUSTER * TEAM * 4", FIRST, "CLUSTER * TEAM * 4 - 1", "a bulk copy writes|ends",
    ),
    "a parity": (ONE, "((at / STAGES) & 1) ^ 1", FIRST, "(at / STAGES) & 1", "waits for ever"),
    "bytes": (ONE, "B_BYTES + (there", FIRST, "HALF_B + (there", "bulk copy writes|for ever"),
    "more bytes": (ONE, "B_BYTES + (there", FIRST, "B_BYTES + 16 + (there", "waits for ever"),
    "a wait for products": (
        TURNS, "wgmma.wait_group.sync.aligned 0;", FIRST, "wgmma.wait_group.sync.aligned 1;",
        "which a wgmma reads",
    ),
    "rows that are no whole vectors": (
        ONE, "bool rare = APART && g.columns % (16 / OUT_SIZE) != 0;", FIRST, "bool rare = false;",
        "no multiple",
    ),
    "a fence of what a thread writes, in the last row of B": (
        ONE, "const u64 b = descriptor(", FIRST,
        "if (k == 0 && threadIdx.x == 0) *(int *)(raw + B_AT + (stage + 1) * B_BYTES - 4) = 0;\n"
        "const u64 b = descriptor(", "a wgmma reads what thread 0 of block 0 has written",
    ),
    "a fence of accumulators": (
        ONE, 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', FIRST, "", "wgmma.fence",
    ),
    "a fence of barriers": (
        ONE, 'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");', FIRST, "",
        "a race: thread",
    ),
    "a barrier of the cluster": (
        ONE, f'asm volatile("{CLUSTERED}" ::: "memory");', FIRST, "__syncthreads();",
        "may not have begun",
    ),
    "a wait for the other block": (
        ONE, "k < at; k++) barrier_wait", FIRST, "k + 1 < at; k++) barrier_wait", "ends|ended",
    ),
    "a team's turn": (
        TURNS, "if (TEAMS > 1) barrier_wait(", FIRST, "if (TEAMS > 2) barrier_wait(", "a race",
    ),
    "columns that are still read": (
        ONE, "meet(group);", FIRST, "", "a race: thread",
    ),
    "half of a tile": (
        ONE, "stage * B_BYTES + rank * HALF_B", FIRST, "stage * B_BYTES", "other numbers",
    ),
    "a policy of the cache": (
        ONE, "const u64 policy = cache_policy(turns.pairs <= GROUP);", FIRST,
        "const u64 policy = turns.pairs;", "a cache policy that nobody made",
    ),
    "a wait for what made A": (
        ONE, "wait_for_previous();  // which", FIRST, ";  // which", f"reads {UNDER_WAY}",
    ),
    "a wait for what made scales": (
        TURNS, "    wait_for_previous();\n", FIRST, "", f"reads {UNDER_WAY}",
    ),
    "a wait for scales, where the weight is settled": (
        (*ONE, True), "    wait_for_previous();\n", FIRST, "", f"reads {UNDER_WAY}",
    ),
    "a weight that is asked for at once": (
        ONE, "settled && first", FIRST, "first", f"reads {UNDER_WAY}",
    ),
    "lanes that stay together": (
        (NARROW, 64, 300, 256), "          __syncwarp();", FIRST, "", "waits for ever",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name: str, emulator: emulated.Emulator) -> None:
    given, lost, number, instead, told = BROKEN[name]
    _multiply(*given)
    places._forget()
    emulator.plant("product.cu", lost, instead, number)
    emulator.runs = 8
    with pytest.raises(AssertionError, match=told):
        _multiply(*given)


@pytest.mark.parametrize("tiles", product.KINDS.values(), ids=product.KINDS)
def test_a_settled_weight_is_asked_for_at_once(
    tiles: product.Shape, emulator: emulated.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So where it is not, that is a fault."""
    _multiply(tiles, 70, 301, 400, settled=True)
    monkeypatch.setattr(emulated, "settle", lambda _: None)
    monkeypatch.setattr(emulated, "_settled", [])
    with pytest.raises(emulated.Fault, match=f"reads {UNDER_WAY}"):
        _multiply(tiles, 70, 301, 400, settled=True)


# What product.cu makes of turns, which `place` is given.
PLACES = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
constexpr int GROUP = NUMBER;
PLACE
extern "C" __global__ void places(Turns turns, const int *turn, int *pair, int *column, int count) {
  for (int i = threadIdx.x; i < count; i += 32) place(turn[i], turns, pair[i], column[i]);
}
"""


def test_where_tiles_lie(emulator: emulated.Emulator) -> None:
    """In groups of eight pairs of row tiles, one group behind the other; up to 2^31 - 1 of them."""
    text = cuda._text("product.cu")
    told = text[text.index("struct Divisor") : text.index("// The first row of a tile")]
    emulator.text["places"] = PLACES.replace("NUMBER", str(product.GROUP)).replace("PLACE", told)
    kernel = emulator.load(
        emulator.compile_("places", "", {}), "places", None, threads=32, shared=0, layout="28s3Pi"
    )
    most, g = 2**31 - 1, torch.Generator().manual_seed(0)
    cases = [(p, a) for p in (1, 7, 8, 9, 15, 16, 27) for a in (1, 2, 3, 44)]
    cases += [(most, 1), (1, most // 8), (most // 8, 8), (8, most // 8), (12345, most // 12345)]
    for pairs, across in cases:
        all_ = pairs * across
        drawn = torch.randint(all_, (300,), generator=g).tolist()
        turn = torch.tensor([*range(min(all_, 2000)), all_ - 2, all_ - 1, *drawn]).clamp(0).int()
        found = torch.zeros(2, len(turn), dtype=torch.int32)
        at = [t.data_ptr() for t in (turn, *found)]
        kernel.launch(1, product.turns(pairs, across), *at, len(turn))
        wanted = []
        for t in turn.tolist():
            group, rest = divmod(t, 8 * across)
            column, pair = divmod(rest, min(8, pairs - 8 * group))
            wanted.append((8 * group + pair, column))
        assert found.T.tolist() == [list(each) for each in wanted], (pairs, across)
        assert len({*wanted}) >= min(all_, 2000)


# A tile of a matrix, as it lies in shared memory.
TILE = r"""
#include "hopper.cuh"
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) tile(const __grid_constant__ TensorMap map, int k, int row, char *out) {
  extern __shared__ __align__(1024) char raw[];
  const u32 base = (u32)__cvta_generic_to_shared(raw), bar = base + BYTES;
  if (threadIdx.x == 0) {
    barrier_init(bar, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    barrier_expect(bar, BYTES);
    if (blockIdx.x == 0) load_to_all(base, &map, k, row, bar);
  }
  barrier_wait(bar, 0);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int i = threadIdx.x; i < BYTES; i += 32) out[BYTES * blockIdx.x + i] = raw[i];
  cluster_sync();
}
"""  # noqa: E501


@pytest.mark.parametrize("bytes_", [64, 128])
def test_a_tile_is_copied(
    bytes_: int, emulator: emulated.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To both blocks; zeros where there is no matrix. Bits 4 to 6 of an address are changed by bits
    7 to 9, or two of them by two.
    """
    rows, width, box = 21, 160, 16
    x = inputs.integers("random", rows, width, 0)
    code = emulator.compile_("tile", "", {"CLUSTER": 2, "BYTES": box * bytes_})
    emulator.text["tile"] = TILE.replace('#include "hopper.cuh"', cuda._text("hopper.cuh"))
    kernel = emulator.load(
        code, "tile", None, threads=32, shared=box * bytes_ + 8, layout="128s2iP"
    )
    for k, row in ((0, 0), (0, 2), (bytes_, 10), (-16, -3)):
        out = torch.zeros(2, box * bytes_, dtype=torch.int8)
        made = hopper.tensor_map(x.data_ptr(), rows, width, box, bytes_)
        # Of what may be under way yet it may read what it does, and no row less.
        first, last = max(row, 0), min(row + box, rows)
        monkeypatch.setattr(emulated, "_settled", [x[first:last]])
        kernel.launch(2, made, k, row, out.data_ptr(), overlap=True)
        for less in (x[first + 1 : last], x[first : last - 1]):
            monkeypatch.setattr(emulated, "_settled", [less])
            with pytest.raises(emulated.Fault, match=f"reads {UNDER_WAY}"):
                kernel.launch(2, made, k, row, 0, overlap=True)
        around = torch.nn.functional.pad(x, (128, 128, 32, 32))
        tile = around[32 + row : 32 + row + box, 128 + k : 128 + k + bytes_].flatten()
        at = torch.arange(box * bytes_)
        lies = at ^ (at // 128 % (bytes_ // 16) * 16)
        assert torch.equal(out[0, lies], tile)
        assert torch.equal(out[1, lies], tile)


@pytest.mark.parametrize("bytes_", [64, 128])
def test_a_tile_that_ends_beyond_shared_memory(bytes_: int, emulator: emulated.Emulator) -> None:
    """Behind what a block has, by as little as a copy can; its barrier lies before it."""
    box, rows = 16, 21
    size = box * bytes_
    x = inputs.integers("random", rows, bytes_, 0)
    text = TILE.replace("bar = base + BYTES;", "bar = base;").replace(
        "all(base,", "all(base + 1024,"
    )
    emulator.text["tile"] = text.replace('#include "hopper.cuh"', cuda._text("hopper.cuh"))
    code = emulator.compile_("tile", "", {"CLUSTER": 2, "BYTES": size})
    made = hopper.tensor_map(x.data_ptr(), rows, bytes_, box, bytes_)
    out = torch.zeros(2, size, dtype=torch.int8)
    for less in (0, 16):
        shared = 1024 + size - less
        kernel = emulator.load(code, "tile", None, threads=32, shared=shared, layout="128s2iP")
        with (
            pytest.raises(emulated.Fault, match="not the thread block's") if less else nullcontext()
        ):
            kernel.launch(2, made, 0, 0, out.data_ptr())

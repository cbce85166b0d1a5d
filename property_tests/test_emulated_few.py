"""few.cu broken on purpose, which the emulator sees; and mma.sync as the PTX ISA has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from property_tests import emulated, places
from quest import packing
from quest.kernels import cuda, few

FIRST, SECOND = 1, 2


def _product(
    cluster: int, patch: pytest.MonkeyPatch, settles: bool = True, width: int = 384
) -> None:
    """With biases, by clusters of so many blocks, of a settled weight, if it is (`settles`)."""
    patch.setattr(few, "CLUSTERS", (cluster,))
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (600, width), generator=g)
    a = 2 * torch.randint(-8, 8, (5, width), generator=g) + 1
    bias = torch.randint(-100, 100, (600,), generator=g)
    w, packed = 2 * codes - 15, packing.pack(codes, 4)
    if settles:
        emulated.settle(packed)
    y = few.product(
        a.to(torch.int8), packed, 4, torch.float32, factor=1.0, length=width, settled=True,
        a_scale=torch.ones(5), w_scale=torch.ones(600), a_sum=a.sum(1).int(), w_sum=None,
        bias=bias.to(torch.bfloat16),
    )  # fmt: skip
    assert torch.equal(y.double(), (a.double() @ w.double().T) + bias), "other numbers"


# With clusters of so many blocks: what is lost, the how manieth, what stands there
# instead, and how it shows.
BROKEN = {
    "a barrier of a block": (1, "__syncthreads();", FIRST, "", "a race"),
    "a barrier before the output": (1, "__syncthreads();", SECOND, "", "a race"),
    "a barrier of a cluster": (2, "cluster_wait();", FIRST, ";", "begun|no wait before"),
    "a barrier of a cluster before the output": (
        2, "cluster_wait();", SECOND, ";", "ended|no wait before|a race",
    ),
    "an arrival that orders nothing": (
        2, " cluster_arrive();", SECOND,
        ' asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");', "a race",
    ),
    "another block's sums": (2, "remote(base, owner)", FIRST, "base", "other numbers"),
    "a bias": (1, "bias_at(bias, column0 + t", FIRST, "bias_at(bias, t", "other numbers"),
    "a wait for what made A": (
        1, "  wait_for_previous();\n", FIRST, "", "reads global memory before the kernel before",
    ),
    "a wait that is late": (
        2, "  wait_for_previous();\n", FIRST, "  bring();\n  wait_for_previous();\n",
        "reads global memory before the kernel before",
    ),
    "words of a fragment": (1, "high[0], low[1],", FIRST, "low[1], high[0],", "other numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(
    name: str, emulator: emulated.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, lost, number, instead, told = BROKEN[name]
    _product(cluster, monkeypatch)
    places._forget()
    emulator.plant("few.cu", lost, instead, number)
    with pytest.raises(AssertionError, match=told):
        _product(cluster, monkeypatch)


@pytest.mark.parametrize("width", [384, 8192 + 128])
def test_a_weight_that_is_not_settled(
    width: int, emulator: emulated.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its caller says of it is not so, and it is asked for at once."""
    with pytest.raises(emulated.Fault, match="reads global memory before the kernel before"):
        _product(1, monkeypatch, settles=False, width=width)


def test_what_32_bits_do_not_count(
    emulator: emulated.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of W before the last tile, and elements of y before its last row: of all blocks only
    the last one runs, and no more of the memory is there than it touches.
    """
    rows, last, width = 9, 2**24, 128
    columns, ready = 16 * last + 16, few._ready
    emulator.plant("few.cu", "cluster = blockIdx.x / CLUSTER;", f"cluster = {last};")
    g = torch.Generator().manual_seed(0)
    signs = [2 * torch.randint(0, 2, (n, width), generator=g) - 1 for n in (rows, 16)]
    w = torch.empty(columns, width // 8, dtype=torch.uint8)
    w_scale, w_sum = torch.empty(columns), torch.empty(columns, dtype=torch.int32)
    w[-16:], w_scale[-16:], w_sum[-16:] = packing.pack(signs[1] > 0, 1), 1.0, signs[1].sum(1).int()
    with monkeypatch.context() as patch:
        patch.setattr(few, "_ready", lambda rows, columns, *of: ready(rows, 16, *of))
        y = few.product(
            packing.pack(signs[0] > 0, 1), w, 1, torch.bfloat16, factor=1.0, length=width,
            a_scale=torch.ones(rows), w_scale=w_scale, a_sum=signs[0].sum(1).int(), w_sum=w_sum,
        )  # fmt: skip
    assert torch.equal(y[:, -16:].double(), signs[0].double() @ signs[1].double().T)


# A warp's fragments as they are, and what comes of them.
MMA = r"""
extern "C" __global__ void one(const unsigned *a, const unsigned *b, VALUE *out) {
  const unsigned *x = a + 4 * threadIdx.x, *y = b + 2 * threadIdx.x;
  VALUE d[4] = {};
  asm volatile("mma.sync.aligned.KIND {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, ADDED;"
               : CONSTRAINTS
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]) ZERO);
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = d[i];
}
"""


def _lanes() -> tuple[Tensor, Tensor]:
    """(groupID, threadID_in_group)."""
    lane = torch.arange(32)
    return lane // 4, lane % 4


def _fragments(a: Tensor, b: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """Of a (16, K) and b (K, 8), `each` elements a register; PTX ISA, Matrix Fragments for mma."""
    group, thread = (t[:, None, None] for t in _lanes())
    i = torch.arange(each)
    r = torch.arange(4)[:, None]
    of_a = a[group + 8 * (r % 2), thread * each + i + 4 * each * (r // 2)]
    r = torch.arange(2)[:, None]
    return of_a, b[thread * each + i + 4 * each * r, group]


@pytest.mark.parametrize("kind", ["f16", "bf16", "u8.s8"])
def test_a_product_of_a_warp(kind: str, emulator: emulated.Emulator) -> None:
    g = torch.Generator().manual_seed(0)
    floats, each = kind != "u8.s8", 2 if kind != "u8.s8" else 4
    k = 8 * each
    a = torch.randint(0, 100, (16, k), generator=g)
    b = torch.randint(-100, 100, (k, 8), generator=g)
    dtypes = {"f16": 2 * (torch.float16,), "bf16": 2 * (torch.bfloat16,)}.get(
        kind, (torch.uint8, torch.int8)
    )
    shape = f"m16n8k{k}.row.col." + (f"f32.{kind}.{kind}.f32" if floats else f"s32.{kind}.s32")
    said = {
        "VALUE": "float" if floats else "int",
        "KIND": shape,
        "ADDED": "{%10, %10, %10, %10}" if floats else "{%0, %1, %2, %3}",
        "CONSTRAINTS": ", ".join(f'"{"=f" if floats else "+r"}"(d[{i}])' for i in range(4)),
        "ZERO": ', "f"(0.0f)' if floats else "",
    }
    text = MMA
    for name, instead in said.items():
        text = text.replace(name, instead)
    emulator.text["one"] = text
    parts = _fragments(a.to(dtypes[0]), b.to(dtypes[1]), each)
    out = torch.zeros(32, 4, dtype=torch.float32 if floats else torch.int32)
    kernel = emulator.load(
        emulator.compile_("one", "", {}), "one", None, threads=32, shared=0, layout="3P"
    )
    kernel.launch(1, *(cuda.pointer(t.contiguous()) for t in (*parts, out)))
    group, thread = (t[:, None] for t in _lanes())
    i = torch.arange(4)
    assert torch.equal(out.long(), (a @ b)[group + 8 * (i // 2), 2 * thread + i % 2])


# The same of half of K: two registers of a and one of b, onto what is there.
SHORT = r"""
extern "C" __global__ void one(const unsigned *a, const unsigned *b, float *out) {
  const unsigned *x = a + 2 * threadIdx.x, *y = b + threadIdx.x;
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = out[4 * threadIdx.x + i];
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.KIND.KIND.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(x[0]), "r"(x[1]), "r"(y[0]));
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = d[i];
}
"""  # noqa: E501


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_short_product_of_a_warp(
    kind: str, dtype: torch.dtype, emulator: emulated.Emulator
) -> None:
    """PTX ISA, Matrix Fragments for mma.m16n8k8: of row groupID, and of the row 8 further, columns
    2 threadID_in_group and the next; of b these rows, and column groupID.
    """
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-100, 100, shape, generator=g) for shape in ((16, 8), (8, 8), (16, 8)))
    group, thread = _lanes()
    pair = 2 * thread[:, None] + torch.arange(2)
    of_a = torch.stack([a[group[:, None] + more, pair] for more in (0, 8)], 1).to(dtype)
    of_b = b[pair, group[:, None]].to(dtype)
    i = torch.arange(4)
    at = group[:, None] + 8 * (i // 2), 2 * thread[:, None] + i % 2
    out = c[at].float().contiguous()
    emulator.text["one"] = SHORT.replace("KIND", kind)
    kernel = emulator.load(
        emulator.compile_("one", "", {}), "one", None, threads=32, shared=0, layout="3P"
    )
    emulator.runs = 1  # it adds to its output
    kernel.launch(1, *(cuda.pointer(t.contiguous()) for t in (of_a, of_b, out)))
    assert torch.equal(out.long(), (c + a @ b)[at])

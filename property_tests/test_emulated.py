"""The emulator of CUDA C++: its numbers, and that it sees what a GPU would not forgive."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests import emulated
from property_tests.emulated.translate import translated
from property_tests.places import CPU
from property_tests.walled import mapped
from quest import ops, prologue
from quest.conformance import backends
from quest.kernels import blocks, cuda, forms
from quest.kernels import rows as rows_cu
from quest.quantizer import parse

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler"),
]


def _run(
    text: str, *arrays: Any, threads: int = 32, shared: int = 0, seed: int = 0,
    overlap: bool = False,
) -> None:  # fmt: skip
    """One block of the kernel `f`, of this body, which is given pointers p0, p1, ..."""
    pointers = ", ".join(f"u32 *p{i}" for i in range(len(arrays)))
    whole = f'typedef unsigned int u32;\nextern "C" __global__ void f({pointers}) {{\n{text}\n}}'
    emulator = emulated.Emulator()
    emulator.text["f.cu"] = whole
    code = emulator.compile_("f.cu", "sm_90a", {})
    layout = f"{len(arrays)}P"
    kernel = emulator.load(code, "f", None, threads=threads, shared=shared, layout=layout)
    emulator.seeds = itertools.count(seed)
    kernel.launch(1, *(a.ctypes.data for a in arrays), overlap=overlap)


WORDS = st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32)


def _map(expression: str, *inputs: Any) -> np.ndarray[Any, Any]:
    """An expression of words a, b and c, for 32 threads."""
    arrays = [
        t.view(np.uint32) if isinstance(t, np.ndarray) else np.array(t, np.uint32) for t in inputs
    ]
    out = np.zeros(32, np.uint32)
    names = ", ".join(f"{name} = p{i}[t]" for i, name in enumerate("abc"[: len(arrays)]))
    last = f"p{len(arrays)}"
    _run(f"const int t = threadIdx.x; const u32 {names}; {last}[t] = {expression};", *arrays, out)
    return out


def _bytes(words: list[int]) -> np.ndarray[Any, Any]:
    return np.array(words, np.uint32).view(np.uint8).reshape(-1, 4).astype(np.int64)


@given(WORDS, WORDS, WORDS)
def test_words(a: list[int], b: list[int], c: list[int]) -> None:
    """Intrinsics by what the CUDA Math API says of them."""
    x, y = _bytes(a), _bytes(b)
    expected: dict[str, Any] = {
        "__dp4a(a, b, c)": ((x * y).sum(1) + c) % 2**32,
        "__funnelshift_l(a, b, c)": [
            ((high << 32 | low) << (by % 32) >> 32) % 2**32
            for low, high, by in zip(a, b, c, strict=True)
        ],
        "__popc(a)": [word.bit_count() for word in a],
        "__ffs(a)": [(word & -word).bit_length() for word in a],
    }
    both, picks = np.concatenate([x, y], 1), [[n >> 4 * i & 15 for i in range(4)] for n in c]
    picked = np.take_along_axis(both, np.array(picks) % 8, 1)
    picked = np.where(np.array(picks) < 8, picked, picked // 128 * 255)
    expected["__byte_perm(a, b, c)"] = (picked << [0, 8, 16, 24]).sum(1)
    signed = [np.array(v, np.uint32).view(np.int32).astype(np.int64) for v in (a, b, c)]
    total = (signed[0] + signed[1] + 2**31) % 2**32 - 2**31
    expected["__viaddmin_s32_relu(a, b, c)"] = np.maximum(np.minimum(total, signed[2]), 0)
    halves = [np.array(v, np.uint32).view(np.int16).reshape(-1, 2).astype(np.int64) for v in (a, b)]
    expected["__vimin_s16x2_relu(a, b)"] = (np.maximum(np.minimum(*halves), 0) << [0, 16]).sum(1)
    for expression, numbers in expected.items():
        made = _map(expression, a, b, c)
        assert made.tolist() == np.array(numbers, np.int64).tolist(), expression


@given(st.integers(0, 2**32 - 1))
def test_floats(seed: int) -> None:
    """Conversions are PyTorch's; what rounds down is the largest float that is not above."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.integers(0, 2**32, (3, 32), np.uint32).view(np.float32)
    for t in (a, b, c):
        t[~np.isfinite(t)] = 0.0
    a[8:20] = rng.normal(size=12)
    b[8:20] = rng.normal(size=12) * 2.0 ** rng.integers(-30, 30, 12)
    c[12:20] = -a[12:20].astype(np.float64) * b[12:20]  # what nearly cancels
    for dtype, ptx in (
        (torch.bfloat16, "cvt.rn.bf16x2.f32"), (torch.float16, "cvt.rn.f16x2.f32"),
    ):  # fmt: skip
        code = (
            f'0; asm("{ptx} %0, %1, %2;" : "=r"(p2[t]) : '
            '"f"(__uint_as_float(b)), "f"(__uint_as_float(a)))'
        )
        pairs = _map(code, a, b).view(np.int16).reshape(-1, 2)
        made = torch.from_numpy(np.stack([a, b], 1)).to(dtype).view(torch.int16)
        assert pairs.tolist() == made.tolist()
    x, y, z = ([Fraction(float(v)) for v in t] for t in (a, b, c))
    words = [f"__uint_as_float({name})" for name in "abc"]
    for call, exact in (
        ("__fadd_rd({}, {})", [u + v for u, v in zip(x, y, strict=True)]),
        ("__fmaf_rd({}, {}, {})", [u * v + w for u, v, w in zip(x, y, z, strict=True)]),
    ):
        made_ = _map(f"__float_as_uint({call.format(*words)})", a, b, c).view(np.float32)
        for number, got in zip(exact, made_, strict=True):
            if abs(number) < Fraction(2.0**127):
                above = np.nextafter(got, np.float32(np.inf))
                assert Fraction(float(got)) <= number < Fraction(float(above))


INIT = "__shared__ unsigned long long bar; const u32 at = __cvta_generic_to_shared(&bar);\n"
MADE = (
    'if (t == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(COUNT));\n'
    "__syncthreads();\n"
)
ARRIVE = 'asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(at));\n'
WAIT = (
    'asm volatile("{.reg .pred done;\\nagain:\\n mbarrier.test_wait.parity.shared.b64 done, [%0], '
    '%1;\\n @!done bra again;\\n}" ::"r"(at), "r"(0));\n'
)
COPY = (
    'asm volatile("{.reg .pred p;\\n setp.ne.u32 p, %2, 0;\\n @p cp.async.cg.shared.global '
    '[%0], [%1 + %3], 16;\\n}" ::"r"(to), "l"(p0 + 4 * t), "r"(1), "n"(0));\n'
    'asm volatile("cp.async.commit_group;");\n'
)
SET = "const int t = threadIdx.x; __shared__ u32 s[64];\n"
AHEAD = 'asm volatile("prefetch.global.L2 [%0];" ::"l"({}));\n'
# What a thread writes and its neighbour reads, with this between.
PASSED = SET + "s[t] = t; {} p0[t] = s[t ^ 1];"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (PASSED.format(""), "a race"),
        # Neither a shuffle nor a vote is a barrier of memory.
        (PASSED.format("p1[t] = __shfl_xor_sync(~0u, t, 1);"), "a race"),
        (PASSED.format("p1[t] = __any_sync(~0u, t);"), "a race"),
        (SET + "s[t] = t; __syncwarp(); p0[t] = s[t ^ 32];", "a race"),
        (SET + "s[t / 2] = t; __syncthreads(); p0[t] = s[0];", "a race: .* writes shared"),
        (SET + "p0[t] = s[t ^ 1]; s[t] = t;", "a race"),
        (SET + "if (t < 31) __syncwarp();", "waits for ever: __syncwarp"),
        (SET + "if (t < 31) __syncwarp();\nelse p0[t] = __shfl_sync(~0u, t, 0);", "others wait in"),
        (SET + "__shfl_sync(1u, t, 0);", "of only some lanes"),
        (SET + INIT + ARRIVE, "that was not initialized"),
        (
            SET + INIT + MADE.replace("__syncthreads();", "").replace("COUNT", "64") + ARRIVE,
            "a race|not init",
        ),
        (SET + INIT + MADE.replace("COUNT", "65") + ARRIVE + WAIT, "waits for ever: a barrier"),
        (SET + "__cvta_generic_to_shared(p0);", "is no address of the thread"),
        (SET + "const u32 to = (1u << 20) + 16 * t;" + COPY, "which are not the thread block's"),
        (SET + "const u32 to = __cvta_generic_to_shared(s + t);" + COPY, "16 bytes at shared addr"),
        ("extern __shared__ u32 d[]; p0[threadIdx.x] = d[threadIdx.x];", "beyond shared memory"),
        ("extern __shared__ u32 d[]; p0[threadIdx.x] = d[-1];", "beyond shared memory"),
        (SET + "p0[t] = ((uint4 *)(p1 + 1))->x;", "no multiple of its size"),
        (SET + "p0[t] = ((uint2 *)(s + 1))->x;", "no multiple of its size"),
        (SET + "p0[t] = *(u32 *)(16 + 4 * t);", "which is not mapped"),
        # Registers: what lies beside them on a CPU's stack is no matter on a GPU.
        (SET + "u32 a[4]; for (u32 i = 0; i < 5; i++) a[i] = t; p0[t] = a[t % 4];", "index 4, wh"),
        (SET + "u32 a[4] = {}; p0[t] = a[(int)t - 1 & 7];", "line .*: index [4-7], which the arr"),
        (SET + "u32 a[2][4] = {}; p0[t] = a[1][t % 5];", "index 4, which the array does not have"),
        # Lines asked for ahead, in vain.
        (SET + "if (t == 0)" + AHEAD.format("p0") + "p1[t] = t;", "read by nobody behind that"),
        (SET + "p1[t] = p0[t];" + AHEAD.format("p0 + 32 * t"), "read by nobody behind that"),
        (SET + AHEAD.format("p0") + "__syncthreads(); p1[t] = p0[t];", "asks again for a line"),
        (SET + AHEAD.format("s + t"), "which is shared memory"),
    ],
)
def test_what_no_gpu_would_forgive(text: str, told: str) -> None:
    for seed in range(4):
        out = np.zeros((2, 256), np.uint32)
        with pytest.raises(emulated.Fault, match=told):
            _run(text, *out, threads=64, seed=seed)


ADDED = 'asm volatile("red.relaxed.cta.shared::cta.add.u32 [%0], %1;" ::"r"(to), "r"(1));'
EXPECT = (
    'asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(16));\n'
)
READS, WRITES, ADDS = "p0[t] = s[0];", "s[0] = t;", ADDED
# In this order: a shuffle brings threads together, and orders no memory.
FIRST = SET + "const u32 to = __cvta_generic_to_shared(s); if (t == 0) {{ {} }}\n"
THEN = "p1[t] = __shfl_sync(~0u, t, 0);\nif (t == 1) {{ {} }}"
ONE_INIT = INIT + MADE.replace("__syncthreads();\n", "").replace("COUNT", "32")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (READS, WRITES), (WRITES, READS), (WRITES, WRITES), (READS, ADDS), (WRITES, ADDS),
        (ADDS, READS), (ADDS, WRITES),
        # Some of the bytes, and those of one word of several.
        ("((unsigned char *)s)[3] = t;", READS), ("((unsigned char *)s)[2] = t;", READS),
        ("((uint4 *)s)[0] = uint4{};", "p0[t] = s[1];"),
        ("((uint4 *)s)[0] = uint4{};", "p0[t] = s[3];"),
        ("p0[t] = ((uint2 *)s)[0].x + ((uint2 *)s)[0].y;", "s[1] = t;"),
        # As a whole, of more bytes than a word of any kind has.
        ("struct many { u32 of[9]; }; *(many *)s = many{};", "p0[t] = s[8];"),
        ("struct many { u32 of[9]; }; *(many *)p0 = *(many *)s;", "s[8] = t;"),
    ],
)  # fmt: skip
def test_a_race_that_its_order_hides(first: str, then: str) -> None:
    """Each order of two accesses by itself; the numbers are right."""
    out = np.zeros((2, 256), np.uint32)
    with pytest.raises(emulated.Fault, match="a race"):
        _run(FIRST.format(first) + THEN.format(then), *out)
    # The same by one thread is none, and behind a barrier neither.
    _run(FIRST.format(first + then), *out)
    _run(FIRST.format(first) + "__syncwarp();" + THEN.format(then), *out)


@pytest.mark.parametrize(
    "met",
    ["__syncwarp();", "__syncthreads();", 'asm volatile("bar.sync %0, 128;" ::"r"(1));',
     INIT + MADE.replace("COUNT", "128") + ARRIVE + WAIT],
    ids=["warp", "block", "named", "mbarrier"],
)  # fmt: skip
def test_a_barrier_orders_nothing_that_follows_it(met: str) -> None:
    out = np.zeros((2, 256), np.uint32)
    for first, then in ((WRITES, READS), (READS, WRITES)):
        text = FIRST.format(first).replace("if (t == 0)", met + "\nif (t == 0)", 1)
        with pytest.raises(emulated.Fault, match="a race"):
            _run(text + THEN.format(then), *out, threads=128)


def test_what_is_no_race() -> None:
    """Reads, additions, and writes of bytes that lie side by side."""
    out = np.zeros((2, 256), np.uint32)
    for first, then in (
        (READS, READS), (ADDS, ADDS),
        ("((unsigned char *)s)[0] = t;", "((unsigned char *)s)[1] = t;"),
        ("((unsigned short *)s)[1] = t;", "((unsigned char *)s)[1] = t;"),
    ):  # fmt: skip
        _run(FIRST.format(first) + THEN.format(then), *out)


@pytest.mark.parametrize("seed", range(4))
def test_a_read_does_not_stand_for_a_write_that_others_race_with(seed: int) -> None:
    """It comes behind the write by a barrier of its warp, of which another warp, which comes late,
    knows nothing.
    """
    text = SET + "if (t == 0) s[0] = 1; for (int i = 0; i < (t < 32 ? 1 : 60); i++) __syncwarp();"
    text += "if (t == 1 || t == 63) {}"
    out = np.zeros((2, 256), np.uint32)
    with pytest.raises(emulated.Fault, match="a race"):
        _run(text.format(READS), *out, threads=64, seed=seed)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # It is made while others may already be at it, whoever comes first.
        (SET + ONE_INIT + "p1[t] = __shfl_sync(~0u, t, 0);\n" + ARRIVE, "a race"),
        (SET + ONE_INIT + "p1[t] = __shfl_sync(~0u, t, 0);\n" + WAIT, "a race"),
        (
            SET + INIT + MADE.replace("COUNT", "1") + "if (t == 0) {" + EXPECT + ARRIVE + "}",
            "more arrivals at a barrier than it counts",
        ),
    ],
)
def test_what_a_barrier_does_not_forgive(text: str, told: str) -> None:
    out = np.zeros((2, 256), np.uint32)
    with pytest.raises(emulated.Fault, match=told):
        _run(text, *out)


@pytest.mark.parametrize("seed", range(4))
def test_a_wait_orders_nothing_of_the_next_phase(seed: int) -> None:
    """A thread that is late to wait knows what the other did before the phase's end, and not what
    this one wrote before it arrived for the next.
    """
    out = np.zeros((2, 256), np.uint32)
    text = SET + INIT + MADE.replace("COUNT", "2") + "if (t % 32 == 0) {" + ARRIVE + "}"
    text += "for (int i = 0; i < (t < 32 ? 60 : 1); i++) __syncwarp();" + WAIT
    for then, told in (("s[0] = 1;" + ARRIVE, pytest.raises(emulated.Fault, match="a race")),
                       (ARRIVE, nullcontext())):  # fmt: skip
        with told:
            _run(text + "if (t == 32) {" + then + "}\nif (t == 0) {" + READS + "}", *out,
                 threads=64, seed=seed)  # fmt: skip


def test_what_is_asked_for_ahead() -> None:
    """By one thread, and read by others behind that; a line that has been read is forgotten."""
    out = np.arange(512, dtype=np.uint32).reshape(2, 256)
    ahead = SET + "if (t == 0)" + AHEAD.format("p0") + "__syncthreads(); p1[t] = p0[t];"
    _run(ahead + "__syncthreads(); if (t == 0)" + AHEAD.format("p0") + "p1[t] += p0[t];",
         *out, threads=32)  # fmt: skip
    assert out[1, :32].tolist() == [2 * t for t in range(32)]


ENDED = 'asm volatile("griddepcontrol.wait;" ::: "memory");\n'
FENCE = 'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");\n'
GATHER = (
    'asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");\n'
    'asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");\n'
)
COPIED = (
    "const int t = threadIdx.x; __shared__ uint4 s[64];\n"
    "const u32 to = __cvta_generic_to_shared(s + t);\n" + COPY
)
BEFORE = "global memory before the kernel before it has ended"
NEIGHBOUR = SET + "if (t % 2) {} {} p0[t] = p1[t];"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SET + "const u32 v = p1[t];" + ENDED + "p0[t] = v;", f"it reads {BEFORE}"),
        (SET + "p0[t] = t;" + ENDED, f"it writes {BEFORE}"),
        (COPIED + ENDED, f"it reads {BEFORE}"),
        # What another thread has waited for is known behind a barrier alone.
        (NEIGHBOUR.format(ENDED, ""), f"it reads {BEFORE}"),
        (NEIGHBOUR.format(ENDED, "p0[t] = __any_sync(~0u, t);"), f"it (reads|writes) {BEFORE}"),
        (SET + "if (t < 32)" + ENDED + "__syncwarp(); p0[t] = p1[t];", f"it reads {BEFORE}"),
        # A fence of barriers' initialization says nothing of it, nor does what follows.
        (SET + "if (t == 0) {\n" + ENDED + FENCE + "}\n" + GATHER + "p0[t] = p1[t];", BEFORE),
        (SET + "s[t] = t;", "its block ends, and has not waited for the kernel before it"),
        # What is settled may be read: no more, and no other.
        (SET + "p2[t] = t;" + ENDED, f"it writes {BEFORE}"),
        (SET + "const u32 v = p2[t + 1];" + ENDED + "p0[t] = v;", f"it reads {BEFORE}"),
        (SET + "const u32 v = p2[t - 1];" + ENDED + "p0[t] = v;", f"it reads {BEFORE}"),
    ],
)
def test_what_may_be_under_way_yet(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a launch that overlaps with the kernel before it, and of no other."""
    arrays = [np.zeros(256, np.uint32) for _ in range(3)]
    monkeypatch.setattr(emulated, "_settled", [torch.from_numpy(arrays[2])[:64]])
    arrays[2] = arrays[2][:64]
    with pytest.raises(emulated.Fault, match=told):
        _run(text, *arrays, threads=64, overlap=True)
    _run(text, *arrays, threads=64)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_in_order(seed: int) -> None:
    """By a barrier of the warp, of all, in shared memory; by a copy that was waited for."""
    for between in ("__syncwarp();", "__syncthreads();"):
        out = np.zeros((2, 256), np.uint32)
        _run(PASSED.format(between), *out, threads=64, seed=seed)
        assert out[0, :64].tolist() == [t ^ 1 for t in range(64)]
        out = np.arange(512, dtype=np.uint32).reshape(2, 256)
        whole = NEIGHBOUR.format(ENDED, between)
        _run(whole, *out, threads=64, seed=seed, overlap=True)
        assert out[0, :64].tolist() == [*range(256, 320)]
    out = np.zeros((2, 256), np.uint32)
    body = SET + INIT + MADE.replace("COUNT", "64") + "s[t] = t;\n" + ARRIVE + WAIT
    _run(body + "p0[t] = s[63 - t];", *out, threads=64, seed=seed)
    assert out[0, :64].tolist() == list(range(63, -1, -1))
    source, out = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    body = COPIED + 'asm volatile("cp.async.wait_group 0;" ::: "memory");\n'
    body += "__syncwarp(); p1[t] = s[t ^ 1].y;"
    _run(body, source, out, threads=64, seed=seed)
    assert out[:64].tolist() == [4 * (t ^ 1) + 1 for t in range(64)]


def test_copies_come_late_and_shared_memory_starts_as_nan() -> None:
    """What is read before a copy was waited for is a race; what was there first, NaNs."""
    source = np.arange(256, dtype=np.uint32)
    body = COPIED + "p1[t] = s[t].x;"
    with pytest.raises(emulated.Fault, match="a copy write that was not waited for"):
        _run(body, source, source.copy(), threads=64)
    # One group may be left then; and sixteen bytes begin at a multiple of sixteen.
    for fault, told in (
        (COPIED + 'asm volatile("cp.async.wait_group 1;");\np1[t] = s[t].x;', "not waited for"),
        (COPIED.replace("p0 + 4 * t", "p0 + 4 * t + 1"), "16 bytes at .*, no multiple of them"),
    ):
        with pytest.raises(emulated.Fault, match=told):
            _run(fault, source, source.copy(), threads=64)
    out = np.zeros(256, np.uint32)
    _run(SET + "p0[t] = s[t];", out, threads=64)
    assert out[:64].tolist() == [2**32 - 1] * 64


def test_dynamic_shared_memory() -> None:
    """Starts as NaNs, too; and what is static is part of what there is room for."""
    out = np.zeros(256, np.uint32)
    _run("extern __shared__ u32 d[]; p0[threadIdx.x] = d[threadIdx.x];", out, shared=128)
    assert out[:32].tolist() == [2**32 - 1] * 32
    _run(SET + "p0[t] = s[t];", out, shared=emulated.SHARED - 1024)
    with pytest.raises(emulated.Fault, match="more shared memory than a thread block may have"):
        _run(SET + "p0[t] = s[t];", out, shared=emulated.SHARED - 128)


def test_every_run_has_an_order_of_its_own() -> None:
    """Of threads and of what goes on behind a barrier; the seed says which."""
    seen = set()
    for seed in (0, 1, 2, 3, 0):
        out = np.zeros((3, 256), np.uint32)
        text = SET + "p1[t] = p0[0]++; __syncthreads(); p2[t] = p0[0]++;"
        _run(text, *out, threads=64, seed=seed)
        assert sorted(out[1:, :64].flatten().tolist()) == [*range(128)]
        seen.add((*out[1, :64].tolist(), *out[2, :64].tolist()))
    assert len(seen) == 4


@pytest.mark.parametrize("front", [False, True])
def test_what_lies_beside_an_array_is_not_mapped(front: bool) -> None:
    """Neither for reads nor for writes, from its last byte on, or before its first."""
    words = torch.arange(40, dtype=torch.int32)
    with mapped(words, front) as t:
        held, out = t.numpy().view(np.uint32), np.zeros(256, np.uint32)
        _run(SET + "p1[t] = p0[t + 8];", held, out)
        assert out[:32].tolist() == [*range(8, 40)]
        at = -1 if front else 40
        for text in (f"p1[t] = p0[{at}];", f"if (t == 0) p0[{at}] = 1;"):
            with pytest.raises(emulated.Fault, match="which is not mapped"):
                _run(SET + text, held, out)


def test_ptx_that_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"the emulator has no such PTX: frob\.u32 %0,%1;"):
        translated('asm volatile("frob.u32 %0, %1;" : "=r"(a) : "r"(b));')
    with pytest.raises(ValueError, match="does not see what memcpy reads and writes"):
        translated("memcpy(to, from, 64);")
    with pytest.raises(RuntimeError, match=r"f\.cu: (?s:.*)error: "):
        _run("this is not C++")


def test_what_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a header has changed, what reads it and nothing else: kernels take minutes in all."""
    shutil.copytree(emulated.HERE, tmp_path / "copy")
    monkeypatch.setattr(emulated, "HERE", tmp_path / "copy")
    monkeypatch.setattr(emulated, "_folder", lambda: tmp_path)
    monkeypatch.setattr(emulated, "_said", lambda *_: "said")  # what it compiles is not there
    monkeypatch.setattr(Path, "replace", lambda *_: None)

    def libraries() -> list[Path]:
        runtime = (emulated.HERE / "runtime.cpp").read_text()
        return [
            emulated._library("f.cu", f'#include "device.h"\n{text}', ("-O1",)) for text in "ab"
        ] + [emulated._library("runtime.cpp", runtime, ("-O3",))]

    before = libraries()
    assert len({*before}) == 3
    for header in sorted(emulated.HERE.glob("*.h")):
        header.write_text(header.read_text() + "// changed\n")
        made = libraries()
        same = [new == old for new, old in zip(made, before, strict=True)]
        assert same == ([False, False, True] if header.name == "device.h" else [True, True, False])
        before = made


def test_what_is_settled(emulator: emulated.Emulator) -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        emulated.settle(torch.zeros(4, 4).T)
    emulated.settle(torch.zeros(4, 4))


def test_that_nothing_is_settled_where_nothing_is_emulated() -> None:
    with pytest.raises(RuntimeError, match="belongs into a test"):
        emulated.settle(torch.zeros(4))


def test_an_operator_that_launches_no_kernel(
    emulator: emulated.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be plain PyTorch that is judged."""
    spec, made = "uniform4/hadamard128/ste/dense", CPU.operators
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    made.gated_encode(x, x, spec, "integers")
    assert emulator.launches == 1
    monkeypatch.setattr(prologue, "has_kernel", lambda *_: False)
    monkeypatch.setattr(blocks, "launch", lambda *_: None)
    with pytest.raises(emulated.Fault, match=r"gated_encode of \(2, 256\) launches no kernel"):
        made.gated_encode(x, x, spec, "integers")
    with pytest.raises(ValueError, match="there is no backend 'emulate'"):
        backends.operators("emulate")


def test_where_lanes_are_judged_a_launch_has_its_copies_soon_and_late(
    emulator: emulated.Emulator,
) -> None:
    """As the parity of a run's number says: what does not wait for them fails in one of both."""
    text = "typedef unsigned int u32;\n"
    text += 'extern "C" __global__ void f(u32 *p) {\np[threadIdx.x] += 1;\n}'
    emulator.text["f.cu"] = text
    code = emulator.compile_("f.cu", "sm_90a", {})
    kernel = emulator.load(code, "f", None, threads=32, shared=0, layout="P")
    counts = np.zeros(32, np.uint32)
    for launches in (1, 2, 3):
        first, second = itertools.tee(emulator.seeds)
        emulator.seeds = second
        kernel.launch(1, counts.ctypes.data)
        assert (counts == 2 * launches).all()
        assert {n % 2 for n in itertools.islice(first, 2)} == {0, 1}


BLOCKS = cuda._text("blocks.cu")
# What is lost of blocks.cu, or another than it was.
BROKEN: dict[str, Callable[[str], str]] = {
    "float32 changes places while it is read": lambda s: s.replace(
        "  __syncwarp();\n#pragma unroll\n  for (int i = 0; i < 8; i++) {\n    const float4 v",
        "#pragma unroll\n  for (int i = 0; i < 8; i++) {\n    const float4 v",
    ),
    "float32 is fetched where others read theirs": lambda s: s.replace(
        "  __syncwarp();\n  stage<8>(y), stage<16>(y);\n", "  stage<8>(y), stage<16>(y);\n"
    ),
    "copies are not waited for": lambda s: s.replace(
        '"cp.async.wait_group 0;"', '"cp.async.wait_group 1;"'
    ),
    "copies of other threads are not waited for": lambda s: s.replace(
        "    if (WIDE) __syncwarp();  // others copied, too\n", ""
    ),
    "the next is asked for where there still are words": lambda s: s.replace(
        "        if (!WIDE) ask_ahead();\n", ""
    ).replace(
        "        };\n        if (rescaled) {\n",
        "        };\n        if (!WIDE) ask_ahead();\n        words_of(w, g);\n"
        "        if (rescaled) {\n",
    ),
    "float32 is asked for before it has changed places": lambda s: s.replace(
        "if (!WIDE) ask_ahead();", "ask_ahead();"
    ).replace("        if (WIDE) ask_ahead();\n", ""),
    "a mask is read while others gather it": lambda s: s.replace(
        "    if (EDGE || NARROW) __syncwarp();  // it is gathered\n", ""
    ),
    "a mask is gathered while others read it": lambda s: s.replace(
        "    if (EDGE || NARROW) __syncwarp();  // and has been read\n", ""
    ),
    "a number is left before all have fetched": lambda s: s.replace(
        "      arrive();  // each lane for itself", "      if (threadIdx.x % 32 == 0) arrive();  //"
    ).replace('"r"(ROWS > 1 ? 32 * warps : warps)', '"r"(warps)'),
    "one set of slots": lambda s: s.replace("slots[turn & 1]", "slots[0]"),
    "the other parity": lambda s: s.replace('"r"(turn & 1)', '"r"(~turn & 1)'),
    "barriers are used while they are made": lambda s: s.replace(
        "    __syncthreads();\n  }\n  int turn", "  }\n  int turn"
    ),
    "a barrier counts one more": lambda s: s.replace(
        "first[threadIdx.x].init(warps), second", "first[threadIdx.x].init(warps + 1), second"
    ),
}


@pytest.mark.parametrize("name", [None, *BROKEN])
def test_a_kernel_that_is_broken(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor: every tile is used again."""
    emulator = emulated.instead(monkeypatch, emulated.Emulator(multiprocessors=1))
    text = BLOCKS if name is None else BROKEN[name](BLOCKS)
    assert (text == BLOCKS) == (name is None)
    monkeypatch.setattr(rows_cu, "takes", lambda *_: False)
    emulator.text["blocks.cu"] = text
    q, seen = parse("uniform4/hadamard128/trust1.0/dense"), []
    shapes = ((900, 128), (200, 640), (100, 1536), (60, 2048), (60, 5632), (20, 11008))
    for (rows, width), dtype in itertools.product(shapes, (torch.bfloat16, torch.float32)):
        blocks._kernel.cache_clear()
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        try:
            blocks.quantize(x, ops.program(q, x), form=forms.INTEGERS, sums=True)
        except emulated.Fault as fault:
            seen.append(str(fault))
            break
    blocks._kernel.cache_clear()
    assert bool(seen) == (name is not None), seen


def test_no_row_is_computed_again_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the time, and the same bits: a kernel that says so by scales tells where it happens.
    Of teams of three and five rows lanes find sums of rows that there are not.
    """
    monkeypatch.setattr(rows_cu, "takes", lambda *_: False)
    emulator = emulated.instead(monkeypatch, emulated.Emulator(multiprocessors=1))
    once, again = "inner = sigma * down;", "inner = sigma * down, sigma = -1.0f;"
    assert BLOCKS.count(once) == 1
    emulator.text["blocks.cu"] = BLOCKS.replace(once, again)
    q = parse("uniform4/hadamard128/trust1.0/dense")
    for width in (128, 640, 768, 1536, 2048, 3072, 2560, 3200, 5632, 4096):
        rows = 13
        for dtype in (torch.bfloat16, torch.float32):
            blocks._kernel.cache_clear()
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
            program = ops.program(q, x)
            assert (blocks.quantize(x, program, form=forms.INTEGERS)[1] > 0).all(), width
            x[7] *= 2.0**-60
            found = blocks.quantize(x, program, form=forms.INTEGERS)[1].flatten()
            assert found[7] < 0
    blocks._kernel.cache_clear()

"""sparse.cu in the emulator, broken on purpose, which is seen; whole in `test_sparse_judged`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from property_tests import emulated
from quest import compression
from quest.conformance import inputs
from quest.kernels import hopper, sparse

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
NARROW, WIDE = sparse.NARROW, sparse.WIDE


def _multiply(
    tiles: sparse.Shape, tokens: int, features: int, width: int, out: torch.dtype
) -> None:
    x, w = (inputs.integers("random", n, width, n) for n in (tokens, features))
    g = torch.Generator().manual_seed(0)
    kept = torch.rand((features, width // 4, 4), generator=g).argsort(-1).argsort(-1) < 2
    w *= kept.reshape(w.shape)
    values, metadata = compression.compress(w)
    with sparse.only(tiles):
        y = sparse.product(
            values, metadata, x, out,
            epilogue=hopper.RAW if out == torch.int32 else hopper.PLAIN,
            feature_scale=torch.ones(features), token_scale=torch.ones(tokens),
        )  # fmt: skip
    assert torch.equal(y, (x.double() @ w.double().T).to(out)), "other numbers"


TURNS = (NARROW, 130, 600, 1280, torch.bfloat16)  # stages have several tiles of K
SHORT = (NARROW, 5, 600, 256, torch.int32)  # one span of tokens a tile
ONE = (NARROW, 70, 129, 640, torch.float32)  # one tile, of an odd count of blocks of metadata
FULL = "barrier_wait(ring.base + FULL_AT + 8 * stage, (ring.at / STAGES) & 1);"
BACK = "if (!first && lane < CLUSTER) barrier_arrive(ring.base + EMPTY_AT + 8 * ring.last, lane);"
WAIT = 'asm volatile("wgmma.wait_group.sync.aligned %s;" ::: "memory");'
FENCE = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");'
READS = "a wgmma reads .* which a bulk copy writes"
WRITES = "a bulk copy writes .* which a wgmma reads"
# What is multiplied; what is lost, what stands there instead, and how it shows.
BROKEN = {
    "a wait for a stage": (ONE, FULL, "", READS),
    "a consumer's parity": (ONE, FULL, FULL.replace("& 1", "& 1 ^ 1"), f"{READS}|for ever"),
    "a producer's parity": (ONE, "((at / STAGES) & 1) ^ 1", "(at / STAGES) & 1", "waits for ever"),
    "bytes of a part": (
        ONE, "barrier_expect(full, A_BYTES + B_BYTES)", "barrier_expect(full, A_BYTES + PART_B)",
        "bulk copy writes|for ever",
    ),
    "more bytes": (
        ONE, "barrier_expect(full, A_BYTES + B_BYTES)",
        "barrier_expect(full, A_BYTES + B_BYTES + 16)", "waits for ever",
    ),
    "a warp that is not asked": (
        TURNS, "CLUSTER * CONSUMERS * 4", "CLUSTER * CONSUMERS * 4 - 1",
        "a bulk copy writes|more arrivals",
    ),
    "stages that are given back": (TURNS, BACK, "", "waits for ever"),
    "a wait for the tile before": (TURNS, WAIT % 1, "", WRITES),
    "a wait for the last tile": (ONE, WAIT % 0, "", "other numbers|its block ends"),
    "a wait for the last tile's stage": (TURNS, WAIT % 0, WAIT % 1, WRITES),
    "a fence of accumulators": (ONE, FENCE, "", "wgmma.fence"),
    "a wait for what made x": (
        ONE, "wait_for_previous();  // which", ";  // which",
        "reads global memory before the kernel before it has ended",
    ),
    "a barrier of the cluster": (
        ONE, "cluster_sync();\n  wait_for", "__syncthreads();\n  wait_for", "may not have begun",
    ),
    "a wait for the other block": (
        TURNS, "cluster_sync();  // no block leaves", "// no block leaves", "ends|ended",
    ),
    "spans that are still read": (SHORT, "meet(group);  // all", "// all", "a race: thread"),
    "scales that are not there": (ONE, "meet(group);  // the", "// the", "a race: thread"),
    "a span that is not there": (ONE, "    meet(group);\n    const", "    const", "a race: thread"),
    "two spans": (ONE, "staging + c % 2 * SPAN", "staging + c % 1 * SPAN", "a race: thread"),
    "rows of a lane's metadata": (
        ONE, "8 * (lane % 2) + lane / 4,", "8 * (lane / 2 % 2) + lane / 4,", "other numbers",
    ),
    "halves of a lane's metadata": (
        ONE, "g.blocks + lane / 2 % 2", "g.blocks + lane % 2", "other numbers",
    ),
    "words of a tile": (ONE, "even.z, even.w", "even.x, even.y", "other numbers"),
    "metadata of a block": (ONE, "odd = words[2 * (k + 1)]", "odd = words[2 * k]", "other numbers"),
    "a selector": (ONE, "%64, %65, %66, 0, p", "%64, %65, %66, 1, p", "no such PTX"),
    "a swizzle": (ONE, "(2ull << 62)", "(1ull << 62)", "which a bulk copy writes"),
    "rows of a stage": (ONE, "+ rank * PART_B", "", "other numbers"),
    "transposed matrices": (
        TURNS, "lane / 8 % 2 * 8", "lane / 16 * 8", "a race: thread|other numbers",
    ),
    "registers": (ONE, "CONSUMERS == 3 ? 160 : 232", "260", "setmaxnreg"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name: str, emulator: emulated.Emulator) -> None:
    given, lost, instead, told = BROKEN[name]
    emulator.plant("sparse.cu", lost, instead)
    emulator.runs = 8
    with pytest.raises((AssertionError, ValueError, RuntimeError), match=told):
        _multiply(*given)


@pytest.mark.parametrize("given", [ONE, TURNS, SHORT], ids=["one", "turns", "short"])
def test_what_is_whole(given: Any, emulator: emulated.Emulator) -> None:
    """In as many orders as what is broken is given."""
    emulator.runs = 8
    _multiply(*given)


def test_an_entry_that_is_named_twice(emulator: emulated.Emulator) -> None:
    values, metadata = compression.compress(torch.zeros(8, 64, dtype=torch.int8))
    metadata[3, 1] ^= 4 << 8  # indices 0 and 0
    x = torch.ones(1, 64, dtype=torch.int8)
    with sparse.only(NARROW), pytest.raises(emulated.Fault, match="metadata 44444044"):
        sparse.product(values, metadata, x, torch.int32, epilogue=hopper.RAW)

"""The compressed form of a 2:4 sparse operand: two of every four entries, and their places.

Of each group of four adjacent int8 entries the nonzero ones are kept, and zeros of the lowest
indices beside them where they are fewer than two; both in the order of their indices. Metadata: 4
bits a group (lower index + 4 * higher), eight groups in an int32 word, the first in its lowest
bits; eight words for each 256 entries, word 4 h + i for entries 64 i + 32 h to 64 i + 32 h + 31, as
the lanes of `wgmma.mma_async.sp` load them. Groups past the row's end hold the indices 0 and 1.

Reads each entry once, writes half of them and an eighth of their number in metadata. Source: PTX
ISA, `wgmma.mma_async.sp`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import outputs
from .whole import quotient

BLOCK = 256  # entries of eight words
ROWS = 8  # of a program, which takes one block of each: 512 groups, four a thread


@triton.jit
def _compress(
    x_ptr, values_ptr, metadata_ptr, crowded_ptr, rows, groups, blocks, ROWS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    r = first + tl.arange(0, ROWS)[:, None, None]
    word = tl.arange(0, 8)[None, :, None]
    nibble = tl.arange(0, 8)[None, None, :]
    # Four bytes, a group, are one int32.
    g = tl.program_id(1) * 64 + 16 * (word % 4) + 8 * (word // 4) + nibble
    inside = (r < rows) & (g < groups)
    x = tl.load(x_ptr + r * groups + g, mask=inside, other=0)
    there1, there2, there3 = (x & 0xFF00) != 0, (x & 0xFF0000) != 0, (x >> 24) != 0
    # The higher kept index is that of the last nonzero, but 1 at the least; the lower one that of
    # the nonzero before it, or 0.
    high = tl.where(there3, 3, tl.where(there2, 2, 1))
    low = tl.where(there2 & there3, 2, tl.where(there1 & (there2 | there3), 1, 0))
    pair = ((x >> (8 * low)) & 0xFF) | (((x >> (8 * high)) & 0xFF) << 8)
    tl.store(values_ptr + r * groups + g, pair.to(tl.int16), mask=inside)
    words = tl.sum((low | (high << 2)) << (4 * nibble), axis=2)
    r2 = first + tl.arange(0, ROWS)[:, None]
    at = metadata_ptr + r2 * (8 * blocks) + tl.program_id(1) * 8 + tl.arange(0, 8)[None, :]
    tl.store(at, words, mask=r2 < rows)
    there = ((x & 0xFF) != 0).to(tl.int32) + there1.to(tl.int32)
    there += there2.to(tl.int32) + there3.to(tl.int32)
    over = tl.sum(tl.sum(tl.sum((there > 2).to(tl.int32), axis=2), axis=1), axis=0)
    tl.store(crowded_ptr + tl.program_id(0) * blocks + tl.program_id(1), over)


def compress(operand: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """operand (rows, d) int8, d a multiple of 4: (values, metadata, crowded).

    values (rows, d / 2) int8; metadata (rows, 8 ceil(d / 256)) int32; crowded: int32, for each
    program of the kernel its groups with more than two nonzeros, whose third is lost.
    """
    rows, d = operand.shape
    blocks = -(-d // BLOCK)
    values = outputs.empty((rows, d // 2), torch.int8, operand.device)
    metadata = outputs.empty((rows, 8 * blocks), torch.int32, operand.device)
    grid = (quotient(rows, ROWS), blocks)
    crowded = outputs.empty((grid[0] * blocks,), torch.int32, operand.device)
    if operand.numel():
        x = operand.contiguous()
        if x.data_ptr() % 4:  # a slice's storage may begin anywhere
            x = x.clone()
        _compress[grid](
            x.view(torch.int32), values.view(torch.int16), metadata, crowded, rows, d // 4, blocks,
            ROWS, num_warps=4,
        )  # fmt: skip
    return values, metadata, crowded

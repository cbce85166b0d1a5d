"""The compressed form of a 2:4 sparse operand, as an operator.

quest::compress(operand) -> (values, metadata)

The form and its one choice are `quest.kernels.compress`'s. CPU: plain PyTorch; CUDA: the kernel.
Weights are compressed once, when they are frozen: the check that no group has a third nonzero waits
for the device, so this has no place in a step that must not wait, nor in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops

BLOCK = 256  # entries of eight words of metadata


def _check(operand: Tensor) -> None:
    if operand.ndim != 2 or operand.dtype != torch.int8 or operand.shape[1] % 4:
        raise ValueError(
            "operand must be int8 of shape (rows, a multiple of 4), got "
            f"{operand.dtype} of shape {tuple(operand.shape)}"
        )


def _require_room(crowded: Tensor) -> None:
    """ValueError where a group has a third nonzero; waits for the device."""
    count = int(crowded.sum())
    if count:
        raise ValueError(
            f"operand must have two nonzeros at the most in every four entries, got {count} groups "
            "with more"
        )


@torch.library.custom_op("quest::compress", mutates_args=(), device_types="cpu")
def compress(operand: Tensor) -> tuple[Tensor, Tensor]:
    """(values, metadata) of an operand (rows, d) int8, d a multiple of 4; waits for the device.

    values (rows, d / 2) int8; metadata (rows, 8 ceil(d / 256)) int32. Raises ValueError for another
    width, and for a group of four with more than two nonzeros.
    """
    return eager_compress(operand)


def eager_compress(operand: Tensor) -> tuple[Tensor, Tensor]:
    """`compress` in plain PyTorch, on any device."""
    _check(operand)
    rows, d = operand.shape
    groups = operand.reshape(rows, d // 4, 4)
    there = groups != 0
    _require_room(there.sum(-1) > 2)
    # Nonzeros first, each kind in its order; of those the first two, in theirs.
    order = torch.argsort(there.logical_not().byte(), dim=-1, stable=True)
    kept = order[..., :2].sort(-1).values
    values = groups.gather(-1, kept).reshape(rows, d // 2)
    blocks = -(-d // BLOCK)
    nibbles = kept[..., 0] + 4 * kept[..., 1]
    nibbles = torch.nn.functional.pad(nibbles, (0, 64 * blocks - d // 4), value=4)
    eight = nibbles.reshape(rows, blocks, 4, 2, 8) << (4 * torch.arange(8, device=operand.device))
    words = eight.sum(-1).transpose(2, 3).reshape(rows, 8 * blocks)
    return values, words.to(torch.int32)


def launch_compress(operand: Tensor) -> tuple[Tensor, Tensor]:
    """`compress` by the kernel."""
    from .kernels import compress as kernel

    _check(operand)
    with ops.device_of(operand):
        values, metadata, crowded = kernel.compress(operand)
        _require_room(crowded)
    return values, metadata


def decompress(values: Tensor, metadata: Tensor) -> Tensor:
    """The operand (rows, d) int8 that `compress` made these of."""
    rows, half = values.shape
    blocks = metadata.shape[1] // 8
    words = metadata.reshape(rows, blocks, 2, 4, 1).transpose(2, 3)
    nibbles = (words >> (4 * torch.arange(8, device=metadata.device))) & 15
    nibbles = nibbles.reshape(rows, 64 * blocks)[:, : half // 2].long()
    groups = values.new_zeros((rows, half // 2, 4))
    at = torch.stack((nibbles & 3, nibbles >> 2), -1)
    return groups.scatter_(-1, at, values.reshape(rows, half // 2, 2)).reshape(rows, 2 * half)


@compress.register_kernel("cuda")
def _(operand: Tensor) -> tuple[Tensor, Tensor]:
    return launch_compress(operand)


@compress.register_fake
def _(operand: Tensor) -> tuple[Tensor, Tensor]:
    rows, d = operand.shape
    return (
        operand.new_empty((rows, d // 2)),
        operand.new_empty((rows, 8 * -(-d // BLOCK)), dtype=torch.int32),
    )

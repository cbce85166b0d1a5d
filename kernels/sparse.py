"""y = x w^T with a 2:4 sparse weight on Hopper's sparse tensor cores, compiled from sparse.cu.

The weight is given as `compress.py` makes it: half of its entries, and metadata. Int8 operands
accumulate exactly in int32; the epilogue is that of `product.py`, in the same roundings. The sparse
operand is the first of `wgmma`, so that a tile computes y transposed and is written by columns.

Source: PTX ISA, `wgmma.mma_async.sp`; QuEST (arXiv 2502.05003), section 4.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import cuda, layout, outputs
from .hopper import ARCHITECTURE, OUT, aligned, bias_type, tensor_map

if TYPE_CHECKING:
    from cuda.core import ObjectCode

# The numbers of sparse.cu.
TILE_K = 128
BLOCK = 256  # entries of eight words of metadata


@dataclass(frozen=True)
class Shape:
    """A tile: 64 features for each consumer, and `columns` tokens, 128 or 256.

    stages: tiles of K in flight. cluster: blocks that share their tokens.
    """

    consumers: int
    columns: int
    stages: int
    cluster: int

    @property
    def rows(self) -> int:
        """Features of a tile."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.consumers + 1)

    @property
    def shared(self) -> int:
        """Bytes of shared memory at the most, as sparse.cu lays them out."""
        flight = self.stages * (self.rows * TILE_K // 2 + self.columns * TILE_K)
        staged = self.consumers * 2 * 32 * 144  # of 16 bits; 32 bits take less, 2 * 16 * 272
        return flight + staged + self.consumers * 8 * self.columns + 16 * self.stages

    def clusters(self, features: int, tokens: int) -> int:
        """Clusters of tiles of a product."""
        return -(-features // (self.cluster * self.rows)) * -(-tokens // self.columns)


WIDE = Shape(2, 256, 5, 2)
NARROW = Shape(2, 128, 8, 2)

_forced: Shape | None = None


@contextmanager
def only(tiles: Shape | None) -> Iterator[None]:
    """Products inside the block use these tiles, whatever their size; None: their own."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


def shape(features: int, tokens: int, processors: int) -> Shape:
    """The tiles of a product: small ones where large ones leave a quarter of the GPU idle."""
    if _forced is not None:
        return _forced
    busy = WIDE.cluster * WIDE.clusters(features, tokens)
    return WIDE if 4 * busy >= 3 * processors else NARROW


def compile_(epilogue: int, out: torch.dtype, tiles: Shape, *, cached: bool = True) -> ObjectCode:
    """The binary of a variant for sm_90a; see `cuda.compile_`."""
    macros = {
        "EPILOGUE": epilogue, "OUT": OUT[out], "TILE_N": tiles.columns, "STAGES": tiles.stages,
        "CLUSTER": tiles.cluster, "CONSUMERS": tiles.consumers,
    }  # fmt: skip
    return cuda.compile_("sparse.cu", ARCHITECTURE, macros, cached=cached)


@functools.cache
def _kernel(epilogue: int, out: torch.dtype, tiles: Shape, device: int) -> cuda.Kernel:
    """The variant, loaded on the current device."""
    return cuda.load(
        compile_(epilogue, out, tiles), "sparse", device,
        threads=tiles.threads, shared=tiles.shared, layout="128s128s6P3ifi",
    )  # fmt: skip


def product(
    values: torch.Tensor,
    metadata: torch.Tensor,
    x: torch.Tensor,
    out: torch.dtype,
    *,
    epilogue: int,
    factor: float = 1.0,
    feature_scale: torch.Tensor | None = None,
    token_scale: torch.Tensor | None = None,
    feature_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (M, K) int8 and the compressed form of w (N, K): y (M, N) of `out`.

    epilogue, of hopper.py: RAW writes the int32 accumulators; else y = p factor token_scale
    feature_scale + bias with p the accumulator (PLAIN), or p = acc + feature_sum / 4 (CORRECTED):
    for x of codes, each 1/2 less than what it stands for, feature_sum is twice the sum of w's row.
    feature_scale (N,), token_scale (M,) float32; feature_sum (N,) int32; bias (N,) float32,
    bfloat16 or float16.
    """
    tokens, features = x.shape[0], values.shape[0]
    y = outputs.empty((tokens, features), out, x.device)
    if y.numel() == 0:
        return y
    device = x.device.index
    processors = cuda.processors(device)
    tiles = shape(features, tokens, processors)
    if metadata.shape[1] == 0:  # no entries: a block of zeros, with indices 0 and 1
        metadata = metadata.new_full((features, 8), 0x44444444)
    values, x, metadata = aligned(values), aligned(x), layout.aligned(metadata)
    at = cuda.pointer
    _kernel(epilogue, out, tiles, device).launch(
        tiles.cluster * min(tiles.clusters(features, tokens), processors // tiles.cluster),
        tensor_map(values.data_ptr(), features, values.shape[1], tiles.rows, TILE_K // 2),
        tensor_map(x.data_ptr(), tokens, x.shape[1], tiles.columns // tiles.cluster, TILE_K),
        metadata.data_ptr(), y.data_ptr(), at(feature_scale), at(token_scale), at(bias),
        at(feature_sum), features, tokens, metadata.shape[1] // 8, factor, bias_type(bias),
        overlap=True,
    )  # fmt: skip
    return y

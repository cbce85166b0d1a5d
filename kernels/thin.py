"""y = A B^T of low-bit operands for few rows of A, compiled from thin.cu: see `product`.

The tiles of `product` are too few then, and most of the GPU would wait. Here a cluster of blocks
has a tile of 64 x 128, and each of its blocks a share of K.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import cuda
from .hopper import ARCHITECTURE, OUT

if TYPE_CHECKING:
    from cuda.core import ObjectCode

# The numbers of thin.cu.
ROWS, COLUMNS, TILE_K, THREADS = 64, 128, 128, 160
CLUSTERS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Shape:
    """cluster: blocks that share the K of a tile, one of CLUSTERS."""

    cluster: int

    rows = ROWS
    columns = COLUMNS

    @property
    def stages(self) -> int:
        """Tiles of K in flight: as many as leave room for two blocks on a multiprocessor."""
        return 4 if self.cluster == 1 else 3

    @property
    def shared(self) -> int:
        """Bytes of shared memory, as thin.cu lays them out."""
        flight = self.stages * (ROWS + COLUMNS) * TILE_K
        sums = 4 * ROWS * COLUMNS if self.cluster > 1 else 0
        return flight + sums + 3 * 4 * COLUMNS // self.cluster + 16 * self.stages + 8

    def tiles(self, rows: int, columns: int) -> int:
        """Clusters of a product."""
        return -(-rows // ROWS) * -(-columns // COLUMNS)


def compile_(
    binary: bool, epilogue: int, out: torch.dtype, tiles: Shape, *, cached: bool = True
) -> ObjectCode:
    """The binary of a variant for sm_90a; see `cuda.compile_`."""
    macros = {
        "BINARY": int(binary), "EPILOGUE": epilogue, "OUT": OUT[out],
        "CLUSTER": tiles.cluster, "STAGES": tiles.stages,
    }  # fmt: skip
    return cuda.compile_("thin.cu", ARCHITECTURE, macros, cached=cached)


@functools.cache
def _kernel(
    binary: bool, epilogue: int, out: torch.dtype, tiles: Shape, device: int
) -> cuda.Kernel:
    return cuda.load(
        compile_(binary, epilogue, out, tiles), "thin", device,
        threads=THREADS, shared=tiles.shared, layout="128s128s6P4ifi",
    )  # fmt: skip


def launch(
    binary: bool, epilogue: int, out: torch.dtype, tiles: Shape, device: int, rows: int,
    columns: int, *values: Any, settled: bool,
) -> None:  # fmt: skip
    """Queue the product with the parameters of thin.cu but the last; see `product.product`."""
    _kernel(binary, epilogue, out, tiles, device).launch(
        tiles.cluster * tiles.tiles(rows, columns), *values, int(settled), overlap=True
    )

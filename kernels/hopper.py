"""What launchers of products on Hopper's tensor cores share: numbers of hopper.cuh, bulk copies.

Source: PTX ISA, `cp.async.bulk.tensor`; NVIDIA, CUDA Driver API, `cuTensorMapEncodeTiled`.
"""

from __future__ import annotations

import functools

import torch

from . import cuda, layout

RAW, PLAIN, CORRECTED = range(3)
OUT = {torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ARCHITECTURE = "sm_90a"


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why the product can't run on `device`; None where it can."""
    reason = cuda.unavailable(device)
    if reason is None and torch.cuda.get_device_capability(device)[0] != 9:
        name, version = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return f"{name} has compute capability {version[0]}.{version[1]}: wgmma needs 9.0 (Hopper)"
    return reason


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x (rows, bytes) as the bulk copy engine reads it: rows at multiples of 16 bytes."""
    width = max(16, -(-x.shape[1] // 16) * 16)  # a tensor map has no empty axis
    if x.shape[1] != width:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]))
    return layout.aligned(x)


def bias_type(bias: torch.Tensor | None) -> int:
    """What kernels call the dtype of a bias; 0 without one."""
    return 0 if bias is None else OUT[bias.dtype]


@functools.lru_cache(maxsize=512)
def tensor_map(pointer: int, rows: int, width: int, box: int, bytes_: int) -> bytes:
    """The tensor map of a (rows, width) byte matrix: boxes of `box` rows and 64 or 128 bytes.

    These bytes are swizzled among themselves.

    It says where the matrix lies, and nothing of what it holds: another at the same place may use
    it too.
    """
    from cuda.bindings import driver as d

    modes = d.CUtensorMapSwizzle
    swizzle = {64: modes.CU_TENSOR_MAP_SWIZZLE_64B, 128: modes.CU_TENSOR_MAP_SWIZZLE_128B}[bytes_]
    made = cuda.done(
        d.cuTensorMapEncodeTiled(
            d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            pointer,
            [d.cuuint64_t(width), d.cuuint64_t(rows)],
            [d.cuuint64_t(width)],
            [d.cuuint32_t(bytes_), d.cuuint32_t(box)],
            [d.cuuint32_t(1), d.cuuint32_t(1)],
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return b"".join(int(word).to_bytes(8, "little") for word in made.opaque)

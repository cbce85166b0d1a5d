"""What the driver makes of a matrix for the bulk copy engine, as the emulator reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

KIND = 0x7061546F736E6574  # of hopper.h


def encode(
    kind: Any, rank: int, pointer: int, sizes: Any, strides: Any, box: Any, steps: Any,
    interleave: Any, swizzle: Any, promotion: Any, fill: Any,
) -> tuple[int, Any]:  # fmt: skip
    """In the place of cuTensorMapEncodeTiled, of matrices of bytes; the innermost axis first.

    Source: CUDA Driver API, `cuTensorMapEncodeTiled`, what it asks for.
    """
    from cuda.bindings import driver as d

    assert kind == d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8
    assert interleave == d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    assert fill == d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
    modes = d.CUtensorMapSwizzle
    swizzles = {
        modes.CU_TENSOR_MAP_SWIZZLE_32B: 32, modes.CU_TENSOR_MAP_SWIZZLE_64B: 64,
        modes.CU_TENSOR_MAP_SWIZZLE_128B: 128,
    }  # fmt: skip
    (width, rows), (stride,), inner = map(int, sizes), map(int, strides), list(map(int, box))
    assert (rank, list(map(int, steps))) == (2, [1, 1])
    assert stride % 16 == pointer % 16 == inner[0] % 16 == 0
    assert 0 < width <= 2**32
    assert 0 < rows <= 2**32
    assert width <= stride < 2**40
    assert 0 < inner[0] <= swizzles[swizzle]
    assert 0 < inner[1] <= 256
    words = (KIND, pointer, width, rows, stride, *inner, swizzles[swizzle])
    return 0, SimpleNamespace(opaque=[*words, *[0] * (16 - len(words))])

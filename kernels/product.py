"""y = A B^T of low-bit operands on Hopper's tensor cores, compiled from product.cu at run time.

Int8 operands (2 to 8 bits) accumulate exactly in int32; operands of single bits are compared by AND
and counted, since for signs s = 2 b - 1 the sum of s_a s_b is 4 |a & b| - 2 |a| - 2 |b| + K. The
epilogue turns an accumulator into a dequantized value in the output's dtype. NVRTC compiles each
variant once (about a second) and keeps the binary in the user's cache.

Source: QuEST (arXiv 2502.05003), section 4; PTX ISA, `wgmma.mma_async` and `cp.async.bulk.tensor`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import outputs

if TYPE_CHECKING:
    from cuda.core import ObjectCode

# The numbers of product.cu.
RAW, PLAIN, CORRECTED = range(3)
OUT = {torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
TILE_M, TILE_N, TILE_K, STAGES, CLUSTER, CONSUMERS = 128, 256, 128, 4, 2, 2
THREADS = 128 * (CONSUMERS + 1)
# Alignment, tiles in flight, 16 padded rows that each warp stages for the output, barriers.
SHARED = 1024 + STAGES * (TILE_M + TILE_N) * TILE_K + 4 * CONSUMERS * 16 * 160 + 16 * STAGES
ARCHITECTURE = "sm_90a"


def unavailable(device: torch.device) -> str | None:
    """Why the product can't run on `device`, or None if it can."""
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}: wgmma needs 9.0 (Hopper)"
    try:
        import cuda.bindings
        import cuda.core  # noqa: F401
    except ImportError:
        return "cuda-core or cuda-bindings is not installed: pip install 'quest-lowbit[hopper]'"
    return None


def compile_(binary: bool, epilogue: int, out: torch.dtype, *, cached: bool = True) -> ObjectCode:
    """The binary of a variant for sm_90a; needs NVRTC but no GPU.

    Raises RuntimeError where NVRTC is missing or refuses the source, with what it said.
    """
    from cuda.core import Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache
    from cuda.pathfinder import DynamicLibNotFoundError

    macros = {
        "BINARY": int(binary), "EPILOGUE": epilogue, "OUT": OUT[out],
        "TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": TILE_K, "STAGES": STAGES,
        "CLUSTER": CLUSTER, "CONSUMERS": CONSUMERS,
    }  # fmt: skip
    options = ProgramOptions(
        std="c++17",
        arch=ARCHITECTURE,
        define_macro=[(name, str(value)) for name, value in macros.items()],
    )
    source = Path(__file__).with_name("product.cu").read_text(encoding="utf-8")
    try:
        cache = FileStreamProgramCache() if cached else None
    except OSError:  # a home that can't be written: compile every time
        cache = None
    try:
        return Program(source, "c++", options).compile("cubin", cache=cache)
    except DynamicLibNotFoundError as error:
        raise RuntimeError(
            "NVRTC, the compiler of CUDA C++, is not installed: pip install 'quest-lowbit[hopper]'"
        ) from error
    except Exception as error:
        raise RuntimeError(f"NVRTC does not compile product.cu: {error}") from error


def _done(result: tuple[Any, ...]) -> Any:
    """What a driver call returned; RuntimeError with the driver's own words if it failed."""
    from cuda.bindings import driver

    status, *values = result
    if int(status):
        told = driver.cuGetErrorString(status)[1]
        raise RuntimeError(f"the CUDA driver says: {told.decode() if told else status}")
    return values[0] if values else None


@functools.cache
def _kernel(binary: bool, epilogue: int, out: torch.dtype, device: int) -> tuple[Any, int]:
    """(the variant, loaded on the current device, the number of blocks that fill it)."""
    from cuda.bindings import driver

    module = _done(driver.cuModuleLoadData(compile_(binary, epilogue, out).code))
    function = _done(driver.cuModuleGetFunction(module, b"product"))
    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _done(driver.cuFuncSetAttribute(function, shared, SHARED))
    return function, torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x (rows, bytes) as the bulk copy engine reads it: rows at multiples of 16 bytes."""
    width = max(16, -(-x.shape[1] // 16) * 16)  # a tensor map has no empty axis
    if x.shape[1] != width:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]))
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.lru_cache(maxsize=512)
def _map(pointer: int, rows: int, width: int) -> Any:
    """The tensor map of a (rows, width) byte matrix: boxes of 128 rows and 128 swizzled bytes.

    It says where the matrix lies, and nothing of what it holds: another at the same place may use
    it too.
    """
    from cuda.bindings import driver as d

    return _done(
        d.cuTensorMapEncodeTiled(
            d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            pointer,
            [d.cuuint64_t(width), d.cuuint64_t(rows)],
            [d.cuuint64_t(width)],
            [d.cuuint32_t(TILE_K), d.cuuint32_t(TILE_M)],
            [d.cuuint32_t(1), d.cuuint32_t(1)],
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


_TYPES = (None, None, *[ctypes.c_void_p] * 6, *[ctypes.c_int] * 4, ctypes.c_float)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.dtype,
    *,
    epilogue: int,
    length: int = 0,
    factor: float = 1.0,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    row_sum: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """a (M, bytes), b (N, bytes): int8, or uint8 of eight bits each. Returns (M, N) of `out`.

    epilogue: RAW writes the int32 accumulators; else y = p factor row_scale column_scale + bias.
    PLAIN: p is the accumulator. CORRECTED, for bits: the sum over `length` of products of signs,
    4 acc - row_sum - column_sum - length with the sums of the rows' signs. CORRECTED, for int8: the
    sum of (a + 1/2)(b + 1/2), acc + (row_sum + column_sum - length) / 4 with the sums of 2 a + 1.
    row_scale (M,), column_scale, bias (N,) float32; row_sum (M,), column_sum (N,) int32. acc, or
    with bits 4 acc, must fit int32, which K below 2**17 does.
    p times factor row_scale must stay in float32's range.
    """
    from cuda.bindings import driver

    rows, columns = a.shape[0], b.shape[0]
    y = outputs.empty((rows, columns), out, a.device)
    if y.numel() == 0:
        return y
    kernel, blocks = _kernel(a.dtype == torch.uint8, epilogue, out, a.device.index)
    a, b = _aligned(a), _aligned(b)
    width = a.shape[1]
    clusters = -(-rows // (CLUSTER * TILE_M)) * -(-columns // TILE_N)
    grid = CLUSTER * min(clusters, blocks // CLUSTER)
    vectors = [
        0 if v is None else v.data_ptr()
        for v in (row_scale, column_scale, bias, row_sum, column_sum)
    ]
    values = (
        _map(a.data_ptr(), rows, width), _map(b.data_ptr(), columns, width), y.data_ptr(), *vectors,
        rows, columns, width, length, factor,
    )  # fmt: skip
    stream = torch.cuda.current_stream().cuda_stream
    _done(
        driver.cuLaunchKernel(
            kernel, grid, 1, 1, THREADS, 1, 1, SHARED, stream, (values, _TYPES), 0
        )
    )
    return y

"""Arrays at the edge of mapped memory: a kernel that reads or writes beside them faults."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from quest.kernels import cuda


@contextmanager
def walled(t: torch.Tensor, front: bool = False) -> Iterator[torch.Tensor]:
    """A copy of t on the current GPU that ends, or begins (`front`), where nothing is mapped.

    Skips the test where the driver refuses such memory.
    """
    from cuda.bindings import driver as d

    torch.zeros(1, device="cuda")  # the driver has a context then
    done = cuda.done
    place = d.CUmemLocation()
    place.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    place.id = torch.cuda.current_device()
    wanted, access = d.CUmemAllocationProp(), d.CUmemAccessDesc()
    wanted.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location = access.location = place
    access.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    least = d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    with ExitStack() as undo:
        try:
            page = int(done(d.cuMemGetAllocationGranularity(wanted, least)))
            held = -(-t.nbytes // page) * page
            base = int(done(d.cuMemAddressReserve(held + 2 * page, 0, 0, 0)))
            undo.callback(d.cuMemAddressFree, base, held + 2 * page)
            memory = done(d.cuMemCreate(held, wanted, 0))
            undo.callback(d.cuMemRelease, memory)
            done(d.cuMemMap(base + page, held, 0, memory, 0))
            undo.callback(d.cuMemUnmap, base + page, held)
            done(d.cuMemSetAccess(base + page, held, [access], 1))
        except RuntimeError as error:
            if "not supported" not in str(error) and "not permitted" not in str(error):
                raise
            pytest.skip(f"memory can't be mapped: {error}")
        at = base + page + (0 if front else held - t.nbytes)
        yield (
            torch.as_tensor(_Bytes(at, t.nbytes), device="cuda")
            .view(t.dtype)
            .view(t.shape)
            .copy_(t)
        )
        torch.cuda.synchronize()


@contextmanager
def mapped(t: torch.Tensor, front: bool = False) -> Iterator[torch.Tensor]:
    """As `walled`, in the memory of the CPU."""
    page = mmap.PAGESIZE
    held = -(-t.nbytes // page) * page
    memory = mmap.mmap(-1, held + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    walls = [ctypes.c_void_p(base), ctypes.c_void_p(base + page + held)]
    try:
        for wall in walls:
            assert libc.mprotect(wall, page, 0) == 0
        offset = page + (0 if front else held - t.nbytes)
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=offset)
        yield flat.view(t.dtype).view(t.shape).copy_(t)
    finally:
        for wall in walls:
            libc.mprotect(wall, page, mmap.PROT_READ | mmap.PROT_WRITE)


class _Bytes:
    """Memory as PyTorch takes it from others."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (count,), "typestr": "|u1", "version": 3,
        }  # fmt: skip

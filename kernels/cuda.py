"""CUDA C++ kernels: compiled by NVRTC at run time, cached, launched through the driver.

A source lies beside this file and takes its constants as macros. NVRTC compiles a variant once, in
one to a few seconds, and keeps the binary in the user's cache. For a launch values are packed into
one buffer that the driver copies, and the driver is called with what is ready in memory: that costs
the least host time. Launches can be recorded: see `recorded`.
Source: NVIDIA, CUDA Driver API and NVRTC; cuda-core, cuda-bindings.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cuda.core import ObjectCode


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why CUDA C++ kernels can't run on `device`; None where they can."""
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}: asynchronous copies need 8.0"
    return _toolchain()


def _toolchain() -> str | None:
    """What is missing of what compiles and launches; None where nothing is."""
    try:
        # The very names that are used: older releases of cuda-core lack some.
        from cuda.bindings import driver, nvrtc  # noqa: F401
        from cuda.core import Program, ProgramOptions  # noqa: F401
        from cuda.core.utils import FileStreamProgramCache  # noqa: F401
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        return (
            "cuda-core or cuda-bindings is not installed, or too old: "
            f"pip install 'quest-lowbit[hopper]' ({error})"
        )
    try:
        nvrtc.nvrtcVersion()
    except (DynamicLibNotFoundError, RuntimeError) as error:
        return f"NVRTC is not installed: pip install 'quest-lowbit[hopper]' ({error})"
    try:
        library().cuLaunchKernelEx  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"the CUDA driver is not found, or too old: {error}"
    return None


def _text(source: str) -> str:
    """A source with the headers that it includes: the cache then knows all of it."""
    text = Path(__file__).with_name(source).read_text(encoding="utf-8")
    return re.sub(r'(?m)^#include "(.*)"\n', lambda found: _text(found[1]), text)


def compile_(
    source: str, architecture: str, macros: dict[str, int], *, cached: bool = True
) -> ObjectCode:
    """The binary of a variant of `source`, a file beside this one; needs NVRTC but no GPU.

    Raises RuntimeError where NVRTC is missing or refuses the source, with what it said.
    """
    from cuda.core import Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache
    from cuda.pathfinder import DynamicLibNotFoundError

    options = ProgramOptions(
        std="c++17",
        arch=architecture,
        define_macro=[(name, str(value)) for name, value in macros.items()],
    )
    text = _text(source)
    try:
        cache = FileStreamProgramCache() if cached else None
    except OSError:  # a home that can't be written: compile every time
        cache = None
    try:
        return Program(text, "c++", options).compile("cubin", cache=cache)
    except DynamicLibNotFoundError as error:
        raise RuntimeError(
            "NVRTC, the compiler of CUDA C++, is not installed: pip install 'quest-lowbit[hopper]'"
        ) from error
    except Exception as error:
        raise RuntimeError(f"NVRTC does not compile {source}: {error}") from error


def done(result: tuple[Any, ...]) -> Any:
    """What a driver call returned; RuntimeError with the driver's own words if it failed."""
    from cuda.bindings import driver

    status, *values = result
    if status:
        told = driver.cuGetErrorString(status)[1]
        raise RuntimeError(f"the CUDA driver says: {told.decode() if told else status}")
    return values[0] if values else None


def architecture(device: int) -> str:
    """What NVRTC calls the GPU; with the instructions of its own, where it has them."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


MOST_READY = 1024  # numbers of thread blocks that a kernel is ready to be launched with, a thread


@functools.cache
def overlaps(device: int) -> bool:
    """Whether a launch may overlap with the kernel before it: only there kernels wait for it."""
    return torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared(device: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(done(driver.cuDeviceGetAttribute(attribute, done(driver.cuDeviceGet(device)))))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on one device, ready to be launched on its current stream.

    threads: of a block. shared: bytes of dynamic shared memory. layout: the parameters, in the
    letters of `struct` with alignment as in C: P or Q a pointer, i an int, q a long long, f a
    float, 128s a tensor map, 28s the turns of a product.
    """

    function: Any
    context: Any
    device: int
    threads: int
    shared: int
    layout: str

    @functools.cached_property
    def _local(self) -> threading.local:
        return threading.local()

    def launch(self, blocks: int, *values: Any, overlap: bool = False) -> None:
        """Queue `blocks` blocks with these parameters; RuntimeError where the driver refuses.

        overlap: it may start before the kernel before it in the stream has ended, and waits for
        that itself.
        """
        local = self._local
        packed = getattr(local, "packed", None)
        if packed is None:
            packed = local.packed = _Parameters(self.layout)
            local.ready = {}
        packed.fill(*values)
        ready = local.ready.get((blocks, overlap))
        if ready is None:
            if len(local.ready) >= MOST_READY:  # inputs of ever other lengths
                local.ready.clear()
            ready = local.ready[blocks, overlap] = Ready(self, blocks, overlap, packed)
        ready.queue(torch._C._cuda_getCurrentRawStream(self.device))
        taken: list[Ready] | None = getattr(_recorder, "taken", None)
        if taken is not None:
            taken.append(Ready(self, blocks, overlap, packed.copy()))

    def config(self, blocks: int, *attributes: Any) -> Any:
        """The driver's description of a launch, but for the stream."""
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = self.shared
        if attributes:
            config.attrs, config.numAttrs = list(attributes), len(attributes)
        return config


class Ready:
    """A launch with all that the driver reads but the stream; of one thread."""

    def __init__(self, kernel: Kernel, blocks: int, overlap: bool, values: _Parameters) -> None:
        self.kernel, self.blocks, self.overlap, self.values = kernel, blocks, overlap, values
        self._config = kernel.config(blocks, *([_overlapping()] if overlap else []))
        at = (self._config.getPtr(), int(kernel.function), values.pointers, 0)
        # Bound to its arguments, which are then not looked at again in Python.
        self._call = functools.partial(library().cuLaunchKernelEx, *map(ctypes.c_void_p, at))
        self._stream: int | None = None  # what was last written there; nothing yet

    def on(self, stream: int) -> Callable[[], int]:
        """What queues it on this stream, and returns the driver's status."""
        if stream != self._stream:
            self._config.hStream = self._stream = stream
        return self._call

    def queue(self, stream: int) -> None:
        """Queue it; RuntimeError where the driver refuses."""
        if status := self.on(stream)():
            insist(status, self.kernel, self._call)

    def node(self) -> Any:
        """The driver's description of it as a node of a graph."""
        from cuda.bindings import driver

        node = driver.CUDA_KERNEL_NODE_PARAMS()
        node.func = self.kernel.function
        node.gridDimX, node.gridDimY, node.gridDimZ = self.blocks, 1, 1
        node.blockDimX, node.blockDimY, node.blockDimZ = self.kernel.threads, 1, 1
        node.sharedMemBytes = self.kernel.shared
        node.kernelParams = self.values.pointers
        return node


def insist(status: int, kernel: Kernel, *calls: Callable[[], int]) -> None:
    """Make calls of the driver again, one of which was refused for a reason that may pass.

    Else RuntimeError with the driver's own words.
    """
    from cuda.bindings import driver

    if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        # A thread of autograd's that has not used this device yet.
        done(driver.cuCtxSetCurrent(kernel.context))
        status = next((s for call in calls if (s := call())), 0)
    if status:
        done((driver.CUresult(status),))


@functools.cache
def library() -> ctypes.CDLL:
    """The driver itself: cuda-bindings takes the host as long as the driver does."""
    return ctypes.CDLL("libcuda.so.1")


_recorder = threading.local()


@contextmanager
def recording() -> Iterator[list[Ready]]:
    """The launches of this thread inside the block, each with what it was told."""
    before = getattr(_recorder, "taken", None)
    taken: list[Ready] = []
    _recorder.taken = taken
    try:
        yield taken
    finally:
        _recorder.taken = before


def _overlapping() -> Any:
    """The attribute of a launch that does not wait for the kernel before it to end."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def clusters(kernel: Kernel, size: int) -> int:
    """Clusters of `size` blocks of a kernel that run at once, with its shared memory."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    dimension = attribute.value.clusterDim
    dimension.x, dimension.y, dimension.z = size, 1, 1
    config = kernel.config(size, attribute)
    return int(done(driver.cuOccupancyMaxActiveClusters(kernel.function, config)))


class _Parameters:
    """The parameters of a kernel in one buffer, and the array of pointers to them."""

    def __init__(self, layout: str) -> None:
        self._layout, self._struct = layout, struct.Struct(layout)
        self._buffer = ctypes.create_string_buffer(self._struct.size)
        self.fill = functools.partial(self._struct.pack_into, self._buffer, 0)
        at, address, parts = 0, ctypes.addressof(self._buffer), []
        size = struct.calcsize("P")
        # All of it that are whole words; and those of them that are pointers, which C aligns.
        words = memoryview(self._buffer).cast("B")[: self._struct.size // size * size]
        self._words = words.cast("P")
        self._pointed: list[int] = []
        for letter in _letters(layout):
            at += -at % (1 if letter.endswith("s") else struct.calcsize(letter))
            parts.append(address + at)
            if letter == "P":
                self._pointed.append(at // size)
            at += struct.calcsize(letter)
        self._pointers = (ctypes.c_void_p * len(parts))(*parts)
        self.pointers = ctypes.addressof(self._pointers)

    def copy(self) -> _Parameters:
        """The same values in a buffer of their own."""
        made = _Parameters(self._layout)
        ctypes.memmove(made._buffer, self._buffer, self._struct.size)
        return made

    def places(self, address: int) -> list[tuple[memoryview, int]]:
        """Where the pointers to this address stand: words of memory, and which of them."""
        return [(self._words, at) for at in self._pointed if self._words[at] == address]


def _letters(layout: str) -> list[str]:
    found, count = [], ""
    for c in layout:
        if c.isdigit():
            count += c
        else:
            found += [count + c] if c == "s" else [c] * int(count or 1)
            count = ""
    return found


def load(
    code: ObjectCode, entry: str, device: int, *, threads: int, shared: int, layout: str
) -> Kernel:
    """Load a binary on the current device, which is `device`."""
    from cuda.bindings import driver

    module = done(driver.cuModuleLoadData(code.code))
    function = done(driver.cuModuleGetFunction(module, entry.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    done(driver.cuFuncSetAttribute(function, attribute, shared))
    return Kernel(function, done(driver.cuCtxGetCurrent()), device, threads, shared, layout)


def pointer(t: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for None."""
    return 0 if t is None else t.data_ptr()

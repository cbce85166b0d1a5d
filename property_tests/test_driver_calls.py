"""What the driver and the compiler are asked for, and what is said where one refuses; no GPU.

What launches hand to the driver stands in test_launches.py.
"""

from __future__ import annotations

import ctypes
import re
import struct
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quest.kernels import cuda, recorded

real = pytest.importorskip("cuda.bindings.driver")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
core = pytest.importorskip("cuda.core")
utils = pytest.importorskip("cuda.core.utils")
pathfinder = pytest.importorskip("cuda.pathfinder")

pytestmark = pytest.mark.whole


# --- what there is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "there", "capability", "told"),
    [
        ("cpu", True, (9, 0), "cpu is not a CUDA device"),
        ("cuda:0", False, (9, 0), "there is no CUDA device"),
        ("cuda:0", True, (7, 5), "Some GPU has compute capability 7.5: "),
        ("cuda:0", True, (8, 0), "something is missing"),
        ("cuda:0", True, (9, 0), "something is missing"),
    ],
)
def test_devices_without_kernels(
    device: str,
    there: bool,
    capability: tuple[int, int],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device from compute capability 8.0 on has them, where what compiles them is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(cuda, "_toolchain", lambda: "something is missing")
    found = cuda.unavailable.__wrapped__(torch.device(device))
    assert str(found).startswith(told)


def test_what_is_missing_of_the_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(cuLaunchKernelEx=None)
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 13, 0))
    monkeypatch.setattr(cuda, "library", lambda: library)
    assert cuda._toolchain() is None
    del library.cuLaunchKernelEx
    assert "the CUDA driver is not found, or too old: " in str(cuda._toolchain())
    for error in (RuntimeError("none"), pathfinder.DynamicLibNotFoundError("none")):

        def fails(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(nvrtc, "nvrtcVersion", fails)
        told = "NVRTC is not installed: pip install 'quest-lowbit[hopper]' (none)"
        assert cuda._toolchain() == told


# --- compiling and loading --------------------------------------------------------------------


class Compiler:
    """In the place of NVRTC; `error`: what it raises."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.caches: list[object] = []
        self.error: Exception | None = None
        self.cache: object = "a cache"
        patch.setattr(core, "Program", self._program)
        patch.setattr(utils, "FileStreamProgramCache", self._cache)

    def _program(self, text: str, language: str, options: Any) -> Any:
        assert '#include "' not in text
        assert (language, options.arch, options.std) == ("c++", "sm_90a", "c++17")
        assert options.define_macro == [("LEVELS", "16"), ("FORM", "2")]
        return self

    def _cache(self) -> object:
        if isinstance(self.cache, Exception):
            raise self.cache
        return self.cache

    def compile(self, target: str, cache: object) -> str:
        assert target == "cubin"
        self.caches.append(cache)
        if self.error is not None:
            raise self.error
        return "a binary"


def test_what_the_compiler_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Binaries are kept, unless that is not wanted or no home can be written."""
    compiler = Compiler(monkeypatch)
    asked = ("few.cu", "sm_90a", {"LEVELS": 16, "FORM": 2})
    assert cuda.compile_(*asked) == "a binary"
    assert cuda.compile_(*asked, cached=False) == "a binary"
    compiler.cache = OSError("read-only")
    assert cuda.compile_(*asked) == "a binary"
    assert compiler.caches == ["a cache", None, None]
    compiler.error = pathfinder.DynamicLibNotFoundError("none")
    with pytest.raises(RuntimeError, match="NVRTC, the compiler of CUDA C\\+\\+, is not installed"):
        cuda.compile_(*asked)
    compiler.error = ValueError("line 3")
    with pytest.raises(RuntimeError, match=r"NVRTC does not compile few\.cu: line 3"):
        cuda.compile_(*asked)


def test_what_a_call_of_the_driver_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returned; or its own words, and without any its number."""
    words: dict[Any, bytes | None] = {real.CUresult.CUDA_ERROR_INVALID_VALUE: b"invalid argument"}
    monkeypatch.setattr(real, "cuGetErrorString", lambda status: (0, words.get(status)))
    success, invalid, other = (real.CUresult(n) for n in (0, 1, 2))
    assert cuda.done((success,)) is None
    assert cuda.done((success, 5)) == 5
    with pytest.raises(RuntimeError, match="the CUDA driver says: invalid argument"):
        cuda.done((invalid, 5))
    with pytest.raises(RuntimeError, match=r"the CUDA driver says: \S"):
        cuda.done((other,))


def test_what_is_asked_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    monkeypatch.setattr(real, "cuDeviceGet", lambda device: (0, f"gpu {device}"))
    sizes = {(largest, "gpu 3"): 232448}
    monkeypatch.setattr(real, "cuDeviceGetAttribute", lambda *asked: (0, sizes[asked]))
    assert cuda.shared.__wrapped__(3) == 232448


def test_a_binary_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its kernel may ask for as much shared memory as it is launched with."""
    limits: dict[tuple[Any, ...], int] = {}

    def limit(function: str, attribute: Any, value: int) -> tuple[int]:
        limits[function, attribute] = value
        return (0,)

    monkeypatch.setattr(real, "cuModuleLoadData", lambda code: (0, f"module of {code}"))
    monkeypatch.setattr(
        real, "cuModuleGetFunction", lambda module, name: (0, f"{name.decode()} in {module}")
    )
    monkeypatch.setattr(real, "cuFuncSetAttribute", limit)
    monkeypatch.setattr(real, "cuCtxGetCurrent", lambda: (0, "a context"))
    code: Any = SimpleNamespace(code="bytes")
    made = cuda.load(code, "rows", 3, threads=64, shared=4096, layout="Pi")
    name = "rows in module of bytes"
    assert made == cuda.Kernel(
        function=name, context="a context", device=3, threads=64, shared=4096, layout="Pi"
    )
    most = real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert limits == {(name, most): 4096}


def test_clusters_that_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row of blocks, with the kernel's threads and shared memory."""

    def count(function: int, config: Any) -> tuple[int, int]:
        assert function == 99
        (attribute,) = config.attrs
        cluster = real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        assert attribute.id == cluster
        found = attribute.value.clusterDim
        assert (found.x, found.y, found.z) == (8, 1, 1)
        assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (8, 1, 1)
        assert (config.blockDimX, config.sharedMemBytes, config.numAttrs) == (128, 4096, 1)
        return 0, 13

    monkeypatch.setattr(real, "cuOccupancyMaxActiveClusters", count)
    assert cuda.clusters(_kernel(99), 8) == 13


# --- parameters -------------------------------------------------------------------------------

LAYOUTS = (
    "Pi", "iP", "iPfq", "5sP", "3s5siPf", "3s3sqIP", "128siP", "9Pq8iIf2if", "128s128s6P4if2i28s",
    "128s128s6P4if2i28sP", "128s128s6P4if2i28s2P2i", "6P2q4i2f2P2i2Pf", "4Pqif",
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_lie_as_in_c(layout: str) -> None:
    """Each pointer leads to its value; those of an address can be found, and changed."""
    letters = [
        letter
        for count, c in re.findall(r"(\d*)(\w)", layout)
        for letter in ([count + c] if c == "s" else [c] * int(count or 1))
    ]
    values = [
        n / 2 if c == "f" else bytes([n]) * struct.calcsize(c) if c.endswith("s") else 1000 + n
        for n, c in enumerate(letters)
    ]
    first = cuda._Parameters(layout)
    first.fill(*values)
    twin = first.copy()
    first.fill(*(0 if isinstance(v, int) else v for v in values))

    def told(made: cuda._Parameters) -> list[Any]:
        pointers = (ctypes.c_size_t * len(letters)).from_address(made.pointers)
        for at, c in zip(pointers, letters, strict=True):
            assert at >= 4096  # an address, and no offset
            assert c.endswith("s") or at % struct.calcsize(c) == 0
        raw = [
            ctypes.string_at(at, struct.calcsize(c))
            for at, c in zip(pointers, letters, strict=True)
        ]
        return [struct.unpack(c, each)[0] for c, each in zip(letters, raw, strict=True)]

    assert told(twin) == values
    for n, c in enumerate(letters):
        places = twin.places(1000 + n)
        assert len(places) == (c == "P")
        for words, at in places:
            words[at] = values[n] = 2**63 + n
        assert told(twin) == values
    assert told(first) == [0 if isinstance(v, int) and v else v for v in values]


def test_no_tensor_has_no_address() -> None:
    t = torch.zeros(3)
    assert cuda.pointer(None) == 0
    assert cuda.pointer(t) == t.data_ptr()


# --- launches ---------------------------------------------------------------------------------


def _kernel(function: int) -> cuda.Kernel:
    return cuda.Kernel(function, "a context", 3, threads=128, shared=4096, layout="2P")


class Driver:
    """Launches, each with its stream and the values of its attributes; and graphs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        self.edges: list[tuple[int, int]] = []
        self.overlaps: list[bool] = []  # of each edge
        self.stream = 7
        self.answer = 0
        self.graphs = self.nodes = 0
        patch.setattr(cuda, "library", lambda: self)
        patch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda device: self.stream, raising=False
        )
        for name in ("Create", "AddKernelNode", "AddDependencies", "Instantiate"):
            patch.setattr(real, f"cuGraph{name}", getattr(self, name))
        for name in ("cuGraphExecDestroy", "cuGraphDestroy"):
            patch.setattr(real, name, lambda what: (0,))

    def cuLaunchKernelEx(self, config: ctypes.c_void_p, *rest: object) -> int:
        assert config.value
        *_, stream, attributes, count = struct.unpack("7IQQI", ctypes.string_at(config.value, 52))
        # Of a CUlaunchAttribute, behind its name and four bytes: the value, here an int.
        assert count in (0, 1)
        told = [ctypes.c_int.from_address(attributes + 8).value] if count else []
        self.seen.append((stream, told))
        answer, self.answer = self.answer, 0
        return answer

    def cuGraphExecKernelNodeSetParams_v2(self, *given: object) -> int:
        return 0

    cuGraphLaunch = cuGraphExecKernelNodeSetParams_v2

    def Create(self, flags: int) -> tuple[int, int]:
        assert flags == 0  # as the driver demands
        self.graphs += 1
        return 0, 500

    def AddKernelNode(self, graph: int, before: object, count: int, told: Any) -> tuple[int, int]:
        self.nodes += 1
        return 0, 599 + self.nodes

    def AddDependencies(
        self, graph: int, before: list[int], after: list[int], edges: list[Any], count: int
    ) -> tuple[int]:
        assert len(before) == len(after) == len(edges) == count
        self.edges += zip(before, after, strict=True)
        kinds = real.CUgraphDependencyType
        self.overlaps += [e.type == kinds.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC for e in edges]
        return (0,)

    def Instantiate(self, graph: int, flags: int) -> tuple[int, int]:
        assert (graph, flags) == (500, 0)  # no launch by the device, no priorities of nodes
        return 0, 700


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


@pytest.mark.parametrize("stream", [1, 2, 7, 0])  # 1 and 2: the default ones, by their names
def test_the_first_launch_goes_to_its_stream(stream: int, driver: Driver) -> None:
    driver.stream = stream
    one = _kernel(99)
    one.launch(5, 1, 2)
    one.launch(5, 1, 2, overlap=True)
    assert driver.seen == [(stream, []), (stream, [1])]


def _taken(count: int) -> list[cuda.Ready]:
    """Launches that are recorded: the address n + 1000 stands in the nth."""
    with cuda.recording() as taken:
        for n in range(count):
            _kernel(n).launch(1, 1000 + n, 5)
    return taken


def test_a_launch_alone_is_no_graph(driver: Driver) -> None:
    """It may overlap with the kernel before it; a refusal that may pass is met as elsewhere."""
    again = recorded.Again(_taken(1), 7, 1000)
    driver.seen.clear()
    again.queue(2000)
    assert (driver.graphs, driver.seen) == (0, [(7, [])])
    contexts: list[object] = []

    def enter(context: object) -> tuple[int]:
        contexts.append(context)
        return (0,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "cuCtxSetCurrent", enter)
        driver.answer = 201  # CUDA_ERROR_INVALID_CONTEXT
        again.queue(3000)
    assert contexts == ["a context"]
    assert driver.seen == [(7, [])] * 3


def test_a_graph_is_a_chain(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel waits for the one before it, which ends where none says that it may overlap.

    At exit, where the driver may be gone, it stays.
    """
    ends: list[Any] = []
    finalize = weakref.finalize

    def noted(*given: Any) -> Any:
        ends.append(finalize(*given))
        return ends[-1]

    monkeypatch.setattr(weakref, "finalize", noted)
    again = recorded.Again(_taken(4), 7, 1000, 1003)
    assert (driver.graphs, driver.nodes) == (1, 4)
    assert driver.edges == [(600, 601), (601, 602), (602, 603)]
    assert driver.overlaps == [False] * 3
    assert [end.atexit for end in ends] == [False, False]
    for addresses in ((1,), (1, 2, 3)):
        with pytest.raises(ValueError, match="zip"):
            again.queue(*addresses)


def test_copies_before_a_kernel(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits until each has ended, whatever may overlap; for one alone, too."""
    copies = iter(range(100, 104))
    monkeypatch.setattr(real, "cuGraphAddMemcpyNode", lambda *_: (0, next(copies)))
    with cuda.recording() as taken:
        for n in range(2):
            _kernel(n).launch(1, 1000 + n, 5, overlap=True)
    for launches in (taken, taken[:1]):
        recorded.Again(launches, 7, 1000, copies=((1, 2, 8), (3, 4, 8)))
    assert driver.edges == [(100, 600), (101, 600), (600, 601), (102, 602), (103, 602)]
    assert driver.overlaps == [False, False, True, False, False]


def test_what_was_refused_is_queued_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [201]  # CUDA_ERROR_INVALID_CONTEXT, as on a thread that is new there
    queued: list[int] = []
    monkeypatch.setattr(
        Driver, "cuGraphExecKernelNodeSetParams_v2", lambda *_: answers.pop() if answers else 0
    )
    monkeypatch.setattr(Driver, "cuGraphLaunch", lambda *_: queued.append(1) or 0)
    monkeypatch.setattr(real, "cuCtxSetCurrent", lambda context: (0,))
    again = recorded.Again(_taken(2), 7, 1000, 1001)
    again.queue(2000, 2001)
    assert not answers
    assert queued == [1]

"""CUDA C++ kernels run on a CPU: what NVRTC and the driver would do, by a C++ compiler.

Their sources are translated (`translate`) and compiled with what stands in for the GPU
(`device.h`).
Takes the place of `kernels.cuda`'s compiler and loader, so that launchers are what they are:

    emulated.instead(monkeypatch)
    blocks.quantize(x, program, form=forms.INTEGERS)  # x on the CPU
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quest.kernels import cuda, hopper

from . import tensor_maps
from .translate import cluster, translated

HERE = Path(__file__).parent
# Nothing is contracted or reordered: what a source leaves to NVRTC may differ in the last bit.
# Calls tell of each access, for `runtime.cpp`.
WATCHED = (
    "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=thread",
    "-fsanitize=alignment,bounds",
)  # fmt: skip
PREPROCESSED = ("-E", "-D__CUDA_ARCH__=900", "-x", "c++", "-")
KEPT = 3 * 86400  # seconds
SHARED = 227 * 1024  # bytes of shared memory that a thread block may ask for, on Hopper


class Fault(AssertionError):
    """What a GPU would not have forgiven, or might not have."""


# What is asked of the compiler beyond C++17: half precision, and sections with names.
NEEDED = """
static __attribute__((section("named"))) char first[1];
extern char __start_named[];
extern "C" float half(float x) { return (float)(_Float16)x + (first == __start_named); }
"""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler, where it is GCC and takes what is needed; else None."""
    found = shutil.which("g++")
    if found is None:
        return None
    # To its output, which is thrown away: no file, and no device, is for it to write or to remove.
    line = [found, "-std=c++17", "-x", "c++", "-", "-fPIC", *WATCHED, "-S", "-o", "-"]
    done = subprocess.run(line, input=NEEDED, capture_output=True, text=True, check=False)
    return None if done.returncode else found


@functools.cache
def _compilers_name() -> str:
    """Its version, and what it compiles for."""
    found = compiler()
    assert found is not None
    return _said("g++", [found, "-dumpfullversion", "-dumpmachine"], "")


def compile_(source: str, macros: dict[str, int], entry: str, text: str | None = None) -> Path:
    """The library of a variant of a kernel's source; text: what stands in its place.

    RuntimeError with what the compiler said where it refuses.
    """
    found, text = compiler(), cuda._text(source) if text is None else text
    assert found is not None
    line = [found, *PREPROCESSED, *(f"-D{name}={value}" for name, value in macros.items())]
    plain = _said(source, line, text)
    made = f"EMULATED({entry}, {cluster(plain)})"
    return _library(source, f'#include "device.h"\n{translated(plain)}\n{made}', WATCHED)


@functools.cache
def runtime() -> ctypes.CDLL:
    """What kernels run in, loaded such that their libraries find it."""
    path = _library("runtime.cpp", (HERE / "runtime.cpp").read_text(), ("-O3",))
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _library(name: str, text: str, options: tuple[str, ...]) -> Path:
    """What the compiler makes of a text, once for all processes of this user."""
    found = compiler()
    assert found is not None
    line = [found, "-std=c++17", *options, "-w", "-fPIC"]
    # Not of where the headers lie: copies of the project, for a planted fault, have the same. Nor
    # of those that it does not read: kernels read one of five, and would all be compiled anew.
    told = "\n".join([_compilers_name(), *line, *_headers(text), text])
    line.append(f"-I{HERE}")
    made = _folder() / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.so"
    if made.exists():
        os.utime(made)
    else:
        with tempfile.TemporaryDirectory(dir=_folder()) as work:
            # Linked apart, or the library of the tool that accesses are watched for comes along.
            part, whole = f"{work}/part.o", f"{work}/whole.so"
            _said(name, [*line, "-c", "-x", "c++", "-", "-o", part], text)
            # A library's functions are its own, whatever others are called.
            _said(name, [found, "-shared", "-Wl,-Bsymbolic", part, "-o", whole], "")
            Path(whole).replace(made)
    return made


def _headers(text: str) -> list[str]:
    """The texts of the headers beside this file that a text reads, and of those that these read."""
    found = [(HERE / name).read_text() for name in re.findall(r'(?m)^#include "(.*)"', text)]
    return [*found, *(more for header in found for more in _headers(header))]


def _said(name: str, line: list[str], text: str) -> str:
    """What a command makes of a text; RuntimeError."""
    done = subprocess.run(line, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return done.stdout


@functools.cache
def _folder() -> Path:
    """Where libraries are kept: in the user's cache; those not asked for in days are dropped."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(cache) / "quest" / "emulated"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.stat().st_uid != os.getuid():
            raise OSError("another user's")
        tempfile.TemporaryFile(dir=path).close()
        _drop_old(path)
    except (OSError, RuntimeError):  # no home, or none to write in: compile in every process
        path = Path(tempfile.mkdtemp(prefix="quest-emulated-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _drop_old(path: Path) -> None:
    for old in path.glob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process drops them, too
            if time.time() - old.stat().st_mtime > KEPT:
                old.unlink()


_settled: list[torch.Tensor] | None = None  # None: nothing runs in the emulator


def settle(t: torch.Tensor) -> None:
    """What launches that overlap with the kernel before them may read at once, in this test.

    ValueError unless t is contiguous; RuntimeError outside of `instead`.
    """
    if _settled is None:
        raise RuntimeError("settle belongs into a test whose kernels the emulator runs")
    if not t.is_contiguous():
        raise ValueError("what is settled must be contiguous")
    _settled.append(t)


@dataclass
class Kernel:
    """As `cuda.Kernel`: a variant that is ready to be launched, at once and to its end.

    run: of its library. emulator: which numbers the runs: a number says who goes first and, where
    it is odd, that copies happen as late as they may.
    """

    run: Any
    device: int | None
    threads: int
    shared: int
    layout: str
    emulator: Emulator

    def launch(self, blocks: int, *values: Any, overlap: bool = False) -> None:
        """As there; `Fault` for what a GPU would not forgive."""
        if blocks < 1:
            raise Fault(f"a grid of {blocks} thread blocks")
        packed = cuda._Parameters(self.layout)
        packed.fill(*values)
        ends = [n for t in _settled or () for n in (t.data_ptr(), t.data_ptr() + t.nbytes)]
        known = (ctypes.c_uint64 * len(ends))(*ends)
        runtime().emulated_overlaps(ctypes.c_bool(overlap), known, len(ends) // 2)
        at = ctypes.c_void_p(packed.pointers)
        self.emulator.launches += 1
        for _ in range(self.emulator.runs):
            seed = next(self.emulator.seeds)
            if told := self.run(at, blocks, self.threads, self.shared, seed):
                raise Fault(told.decode())
            self.emulator.ahead = runtime().emulated_ahead()


@dataclass(frozen=True)
class Code:
    """What is compiled once its entry is known."""

    source: str
    macros: dict[str, int]


class Emulator:
    """Compiles and loads in the place of NVRTC and the driver.

    multiprocessors: of the device. runs: of each launch, in other orders. text: of a source, what
    stands in its place. seeds: of the runs to come. launches: so far. ahead: lines of
    128 bytes that the last one asked for into a cache; each is to be read behind that.
    """

    def __init__(self, multiprocessors: int = 2) -> None:
        self.multiprocessors, self.runs, self.launches = multiprocessors, 1, 0
        self.ahead = 0
        self.text: dict[str, str] = {}
        self.seeds = itertools.count()

    def plant(self, source: str, lost: str, instead: str, number: int | None = None) -> None:
        """A fault in the place of a text that a source has once, or of so manieth of several."""
        parts = cuda._text(source).split(lost)
        assert len(parts) == 2 if number is None else len(parts) > number, lost
        at = number or 1
        self.text[source] = lost.join(parts[:at]) + instead + lost.join(parts[at:])

    def compile_(
        self, source: str, architecture: str, macros: dict[str, int], *, cached: bool = True
    ) -> Code:
        """As `cuda.compile_`; what the compiler refuses is refused by `load`."""
        return Code(source, macros)

    def load(
        self, code: Code, entry: str, device: int | None, *, threads: int, shared: int, layout: str
    ) -> Kernel:
        """As `cuda.load`; RuntimeError with what the compiler said."""
        path = compile_(code.source, code.macros, entry, self.text.get(code.source))
        runtime()
        run = ctypes.CDLL(str(path)).emulate
        run.restype = ctypes.c_char_p
        return Kernel(run, device, threads, shared, layout, self)


def instead(patch: pytest.MonkeyPatch, emulator: Emulator | None = None) -> Emulator:
    """Has launchers take tensors on a CPU, and kernels run there."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    emulator = emulator or Emulator()
    patch.setattr(sys.modules[__name__], "_settled", [])
    patch.setattr(cuda, "compile_", emulator.compile_)
    patch.setattr(cuda, "load", emulator.load)
    patch.setattr(cuda, "unavailable", lambda _: None)
    patch.setattr(hopper, "unavailable", lambda _: None)
    patch.setattr(cuda, "shared", lambda _: SHARED)
    patch.setattr(cuda, "processors", lambda _: emulator.multiprocessors)
    patch.setattr(cuda, "clusters", lambda _, size: max(1, emulator.multiprocessors // size))
    patch.setattr(cuda, "architecture", lambda _: "sm_90a")
    patch.setattr(cuda, "overlaps", lambda _: True)
    try:
        from cuda.bindings import driver
    except ImportError:  # then there are no tensor maps, and no products that read them
        patch.setattr(hopper, "unavailable", lambda _: "cuda-bindings is not installed")
    else:
        patch.setattr(driver, "cuTensorMapEncodeTiled", tensor_maps.encode)
    return emulator

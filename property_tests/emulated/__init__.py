"""CUDA C++ kernels run on a CPU: what NVRTC and the driver would do, by a C++ compiler.

Their sources are translated (`translate`) and compiled with what stands in for the GPU
(`device.h`).
Takes the place of `kernels.cuda`'s compiler and loader, so that launchers are what they are:

    emulated.instead(monkeypatch)
    blocks.quantize(x, program, form=blocks.INTEGERS)  # x on the CPU
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quest.kernels import cuda, hopper

from . import tensor_maps
from .translate import cluster, translated

HERE = Path(__file__).parent
# Nothing is contracted or reordered: what a source leaves to NVRTC may differ in the last bit.
# Calls tell of each access, for `runtime.cpp`.
WATCHED = ("-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=thread")
PREPROCESSED = ("-E", "-D__CUDA_ARCH__=900", "-x", "c++", "-")
SHARED = 227 * 1024  # bytes of shared memory that a thread block may ask for, on Hopper


class Fault(AssertionError):
    """What a GPU would not have forgiven, or might not have."""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler; None without one."""
    return shutil.which("g++")


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
    line = [found, "-std=c++17", *options, "-w", "-fPIC", f"-I{HERE}"]
    told = "\n".join([*line, *(at.read_text() for at in sorted(HERE.glob("*.h"))), text])
    made = _folder() / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as work:
            # Linked apart, or the library of the tool that accesses are watched for comes along.
            part, whole = f"{work}/part.o", f"{work}/whole.so"
            _said(name, [*line, "-c", "-x", "c++", "-", "-o", part], text)
            _said(name, [found, "-shared", part, "-o", whole], "")
            Path(whole).replace(made)
    return made


def _said(name: str, line: list[str], text: str) -> str:
    """What a command makes of a text; RuntimeError."""
    done = subprocess.run(line, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return done.stdout


@functools.cache
def _folder() -> Path:
    path = Path(tempfile.gettempdir()) / f"quest-emulated-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@dataclass
class Kernel:
    """As `cuda.Kernel`: a variant that is ready to be launched, at once and to its end."""

    run: Any
    device: int | None
    threads: int
    shared: int
    layout: str
    seeds: list[int]

    def launch(self, blocks: int, *values: Any, overlap: bool = False) -> None:
        """As there; `Fault` for what a GPU would not forgive."""
        assert blocks > 0
        packed = cuda._Parameters(self.layout)
        packed.fill(*values)
        for seed in self.seeds:
            at = ctypes.c_void_p(packed.pointers)
            if told := self.run(at, blocks, self.threads, self.shared, seed):
                raise Fault(told.decode())


@dataclass(frozen=True)
class Code:
    """What `compile_` would have compiled, which needs its entry to be."""

    source: str
    macros: dict[str, int]


class Emulator:
    """Compiles and loads in the place of NVRTC and the driver.

    seeds: of each launch, which is run with each in turn: who goes first, and (odd) whether copies
    happen as late as they may. multiprocessors: of the device.
    """

    def __init__(self, seeds: tuple[int, ...] = (0, 1), multiprocessors: int = 2) -> None:
        self.seeds, self.multiprocessors = list(seeds), multiprocessors
        self.text: dict[str, str] = {}  # of a source, what stands in its place

    def compile_(
        self, source: str, architecture: str, macros: dict[str, int], *, cached: bool = True
    ) -> Code:
        return Code(source, macros)

    def load(
        self, code: Code, entry: str, device: int | None, *, threads: int, shared: int, layout: str
    ) -> Kernel:
        path = compile_(code.source, code.macros, entry, self.text.get(code.source))
        runtime()
        run = ctypes.CDLL(str(path)).emulate
        run.restype = ctypes.c_char_p
        return Kernel(run, device, threads, shared, layout, self.seeds)


def instead(patch: pytest.MonkeyPatch, emulator: Emulator | None = None) -> Emulator:
    """Has launchers take tensors on a CPU, and kernels run there."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    emulator = emulator or Emulator()
    patch.setattr(cuda, "compile_", emulator.compile_)
    patch.setattr(cuda, "load", emulator.load)
    patch.setattr(cuda, "unavailable", lambda _: None)
    patch.setattr(hopper, "unavailable", lambda _: None)
    patch.setattr(cuda, "shared", lambda _: SHARED)
    patch.setattr(cuda, "processors", lambda _: emulator.multiprocessors)
    patch.setattr(cuda, "clusters", lambda _, size: max(1, emulator.multiprocessors // size))
    patch.setattr(cuda, "architecture", lambda _: "sm_90a")
    if importlib.util.find_spec("cuda.bindings") is not None:  # else there are no tensor maps
        patch.setattr("cuda.bindings.driver.cuTensorMapEncodeTiled", tensor_maps.encode)
    return emulator

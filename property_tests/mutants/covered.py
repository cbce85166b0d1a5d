"""What a verdict of a mutant may rest on: files of the project, and the stack of the machine."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from .trace import WATCHED

OURS = "test_mutants"
SUFFIXES = (".py", ".cu", ".cuh", ".json", ".skips", ".xfails")
HELPERS = (".py", ".h", ".cpp")  # of the emulator
PACKAGES = (
    "torch", "triton", "numpy", "scipy", "pytest", "hypothesis", "cuda-core", "nvidia-cuda-nvrtc",
)  # fmt: skip
# NVRTC's package has a name of its own for CUDA 12.
COMPILERS = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
NO_GPU = "no GPU"


def sources(root: Path) -> list[Path]:
    """Every file that is tested."""
    found = [p for name in WATCHED for p in (root / name).rglob("*")]
    return sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())


def tests(root: Path) -> list[Path]:
    """The files of tests, but those of the mutants themselves."""
    found = sorted((root / "property_tests").glob("test_*.py"))
    return [p for p in found if not p.name.startswith(OURS)]


def beside(root: Path, test: Path | None = None) -> list[Path]:
    """What a file of tests needs besides what is tested: itself, helpers, settings, examples.

    Of helpers conftest.py, and each whose name stands in the test or in a helper taken already; of
    a package all files. Where one of those names benchmarks, these too. None: of all files of
    tests.
    """
    folder = root / "property_tests"
    helpers = _helpers(folder)
    settings = [p for p in (root / "conftest.py", root / "pyproject.toml") if p.exists()]
    found = {*settings, *folder.glob("*.json")}
    if test is None:
        needed, named = {*tests(root), *helpers}, True
    else:
        needed = _closure(test, helpers)
        named = any(re.search(r"\bbenchmarks\b", p.read_text()) for p in needed)
    if named:
        found |= {*(root / "benchmarks").glob("*.py")}
    return sorted(found | needed)


def _helpers(folder: Path) -> dict[Path, str]:
    """The helpers, by file the name of the module or package. What judges mutants is none."""
    found = {p: p.stem for p in folder.glob("*.py") if not p.name.startswith("test_")}
    for package in folder.glob("*/__init__.py"):
        name = package.parent.name
        if name != Path(__file__).parent.name:
            files = (p for p in package.parent.rglob("*") if p.suffix in HELPERS and p.is_file())
            found |= dict.fromkeys(files, name)
    return found


def _closure(test: Path, helpers: dict[Path, str]) -> set[Path]:
    """A file of tests and the helpers that it needs."""
    needed = {test}
    new = needed | {p for p, name in helpers.items() if name == "conftest"}
    while new:
        needed |= new
        words = {w for p in new for w in re.findall(r"\w+", p.read_text())}
        new = {p for p, name in helpers.items() if name in words} - needed
    return needed


def digest(parts: Iterable[str]) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def of_files(root: Path, paths: Iterable[Path]) -> str:
    """A digest of files, names and bytes."""
    return digest(f"{p.relative_to(root)} {p.read_bytes().hex()}" for p in paths)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, without asking CUDA, which must not start before a fork."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return os.path.exists("/dev/nvidiactl") and not hidden


@functools.cache
def stack() -> str:
    """The device, and the versions of what tests run on."""
    return ", ".join([_device(), f"python {platform.python_version()}", *_versions(PACKAGES)])


def compilers() -> str:
    """The versions of what compiles CUDA C++."""
    return ", ".join(_versions(COMPILERS))


def _versions(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"no {name}"


def _device() -> str:
    if not has_gpu():
        return NO_GPU
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.check_output(asked, text=True, timeout=60).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "a GPU"

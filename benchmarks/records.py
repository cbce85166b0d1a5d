"""Records: where they lie, which one a run is compared with, and what of it a run lacks.

benchmarks/records/<kind>/NNNN_<name>.json, one folder for each kind of machine: cpu, or the slug of
the GPU's name. pytest-benchmark's own folder name (system, Python version) would hide a record
from everybody with another Python.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

RECORDS = Path(__file__).resolve().parent / "records"


def device_name() -> str:
    """cpu, or the name of the first GPU."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def kind() -> str:
    """The folder of this kind of machine: cpu, nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


@functools.cache
def processor() -> str:
    """The CPU's model, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.machine()


def environment() -> dict[str, str | int]:
    """What the times depend on; nothing that names a machine or its user."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name(),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": np.__version__,
    }


def find(storage: Path, wanted: str | bool) -> list[Path]:
    """The records that `--benchmark-compare[=wanted]` means, oldest first; True: the latest."""
    if wanted is True:
        return sorted((storage / kind()).glob("[0-9][0-9][0-9][0-9]_*.json"))[-1:]
    name = str(wanted)
    if Path(name).is_file():
        return [Path(name)]
    folder, _, stem = name.rpartition("/")
    if Path(name).is_absolute() or "/" in folder or not stem.rstrip("*"):
        return []
    return sorted(storage.glob(f"{folder or kind()}/{stem.rstrip('*')}*.json"))


def load(path: Path) -> dict[str, Any]:
    """A record; ValueError where it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        names = {bench["fullname"] for bench in record["benchmarks"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a benchmark record: {error!r}") from None
    return {**record, "names": names}


def covered(names: Iterable[str], arguments: Iterable[str], root: Path, where: Path) -> set[str]:
    """Those of a record's names (node ids relative to `root`) that pytest's arguments select."""
    found: set[str] = set()
    for argument in arguments:
        path, *inner = argument.split("::")
        try:
            file = (where / path).resolve().relative_to(root).as_posix()
        except ValueError:
            continue
        node = "::".join((file, *inner))
        found |= {
            name
            for name in names
            if file == "."
            or name == node
            or name.startswith((f"{node}::", f"{node}[") if inner else (f"{node}::", f"{node}/"))
        }
    return found

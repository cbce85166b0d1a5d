"""The transform back behind a mask in CUDA C++: what it takes, that it compiles, its launches.

The kernel is a fake where it is launched: one that reads and writes where it is told to.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quest import eager, ops
from quest.kernels import cuda, hadamard, masked, outputs

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(x, y) for x in (BF16, F16) for y in (x, F32)]
CUDA = torch.device("cuda", 3)

each_pair = pytest.mark.parametrize(("dtype", "out"), PAIRS, ids=str)


# --- what is compiled -------------------------------------------------------------------------


@each_pair
def test_every_variant_compiles_without_a_gpu(dtype: torch.dtype, out: torch.dtype) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    made = cuda.compile_("masked.cu", "sm_90a", masked.macros(dtype, out), cached=False)
    assert made.code[:4] == b"\x7fELF"
    assert b"masked" in made.code


@pytest.mark.whole
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@each_pair
def test_nothing_is_spilled(dtype: torch.dtype, out: torch.dtype, architecture: str) -> None:
    """What ptxas says of registers, and of shared memory: there is none."""
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    options = core.ProgramOptions(
        std="c++17", arch=architecture, ptxas_options="-v",
        define_macro=[(name, str(value)) for name, value in masked.macros(dtype, out).items()],
    )  # fmt: skip
    told = io.StringIO()
    core.Program(cuda._text("masked.cu"), "c++", options).compile("cubin", logs=told)
    assert re.findall(r"(\d+) bytes (?:stack|spill)", told.getvalue()) == ["0"] * 3
    assert not re.search(r"[1-9]\d* bytes smem", told.getvalue())


# --- who takes it -----------------------------------------------------------------------------


def _like(dtype: torch.dtype, device: str = "cuda") -> Any:
    """What `supports` looks at."""
    return SimpleNamespace(dtype=dtype, device=torch.device(device))


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 of 16 bits, written as they are or in float32, where CUDA C++ runs."""
    asked: list[torch.device] = []
    monkeypatch.setattr(cuda, "unavailable", lambda device: asked.append(device))
    for dtype, out in PAIRS:
        assert masked.supports(_like(dtype, "cuda:3"), 128, out)
        assert masked.supports(_like(dtype, "cuda:3"), 128, None)
    assert {*asked} == {CUDA}
    for dtype, order, out in (
        (BF16, 64, None), (BF16, 256, None), (F16, 1, None), (F16, 12 * 16, F32),
        (F32, 128, None), (F32, 128, F32), (F32, 128, BF16), (BF16, 128, F16), (F16, 128, BF16),
        (torch.float64, 128, None), (BF16, 128, torch.float64),
    ):  # fmt: skip
        assert not masked.supports(_like(dtype), order, out), (dtype, order, out)
    monkeypatch.setattr(cuda, "unavailable", lambda device: f"not on {device}")
    for dtype, out in PAIRS:
        assert not masked.supports(_like(dtype), 128, out)


def test_a_cpu_has_none() -> None:
    for dtype in (BF16, F16):
        assert not masked.supports(torch.empty(1, 128, dtype=dtype), 128, None)


@pytest.mark.parametrize("taken", [True, False])
def test_the_launcher_asks(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has one of the two kernels, with all that it was told, on the tensor's device."""
    seen: list[tuple[Any, ...]] = []

    def has(name: str, told: Any) -> Any:
        return lambda *given, **more: (seen.append((name, *given, more)), told)[1]

    class Here:
        def __enter__(self) -> None:
            seen.append(("enter",))

        def __exit__(self, *_: object) -> None:
            seen.append(("leave",))

    base = object()
    monkeypatch.setattr(masked, "supports", has("supports", taken))
    monkeypatch.setattr(masked, "transpose", has("masked", "made"))
    monkeypatch.setattr(hadamard, "hadamard", has("hadamard", "made"))
    monkeypatch.setattr(ops.transforms, "base", lambda *_: base)
    monkeypatch.setattr(ops, "device_of", lambda t: (seen.append(("device", t)), Here())[1])
    x, mask = torch.zeros(2, 256, dtype=BF16), torch.zeros(2, 32, dtype=torch.uint8)
    for dtype in (None, F32):
        assert ops.launch_masked_transpose(x, mask, 128, dtype) == "made"
        asked, device, enter, made, leave = seen
        seen.clear()
        assert asked == ("supports", x, 128, dtype, {})
        assert (device, enter, leave) == (("device", x), ("enter",), ("leave",))
        assert made == (
            ("masked", x, mask, dtype, {}) if taken
            else ("hadamard", x, 128, base, {"transpose": True, "mask": mask, "dtype": dtype})
        )  # fmt: skip
    for wrong in (mask[:1], mask.int()):
        with pytest.raises(ValueError, match="mask must be uint8 of shape"):
            ops.launch_masked_transpose(x, wrong, 128)
    assert not seen


# --- what is launched -------------------------------------------------------------------------


def _names() -> list[str]:
    """The kernel's parameters, in their order."""
    text = Path(masked.__file__).with_name("masked.cu").read_text()
    found = re.search(r" masked\(([^()]*)\) {", text)
    assert found is not None
    return [each.split()[-1].lstrip("*") for each in found[1].split(",")]


@dataclass(frozen=True)
class Fake(cuda.Kernel):
    """function: its macros. context: memory that is known, and what it was launched with."""

    def at(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What lies there, which must be known and begin where a vector may."""
        assert address % 16 == 0
        for t in self.context.known:
            storage = t.untyped_storage()
            at, rest = divmod(address - storage.data_ptr(), dtype.itemsize)
            if at >= 0 and (at + math.prod(shape)) * dtype.itemsize <= storage.nbytes():
                assert rest == 0
                return torch.empty(0, dtype=dtype).set_(storage, at, shape)
        raise AssertionError("an address of nothing that was given or made")

    def launch(self, blocks: int, *values: Any, overlap: bool = False) -> None:
        struct.pack(self.layout, *values)
        told = dict(zip(_names(), values, strict=True))
        self.context.launches.append((blocks, overlap, told))
        total = told["total"]
        dtypes = {1: F32, 2: BF16, 3: F16}
        x = self.at(told["x"], (total, 128), dtypes[self.function["IN"]])
        mask = self.at(told["mask"], (total, 16), torch.uint8)
        out = dtypes[self.function["OUT"]]
        y = self.at(told["y"], (total, 128), out)
        y.copy_(eager.masked_transpose(x, mask, 128, out))


@dataclass
class Device:
    known: list[Tensor]
    loaded: list[Fake]
    launches: list[tuple[int, bool, dict[str, Any]]]

    def one(self) -> tuple[int, bool, dict[str, Any]]:
        """The only launch since this was asked last."""
        (found,) = self.launches
        self.launches.clear()
        return found

    def transpose(self, x: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Of what is known from now on, copies of it included."""
        self.known += [x, mask]
        return masked.transpose(x, mask, dtype)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device([], [], [])

    def compile_(source: str, architecture: str, macros: dict[str, int]) -> dict[str, int]:
        assert (source, architecture) == ("masked.cu", "sm of None")
        return macros

    def load(macros: dict[str, int], entry: str, device: None, **how: Any) -> Fake:
        assert entry == "masked"
        fake = Fake(macros, made, device, **how)  # type: ignore[arg-type]
        made.loaded.append(fake)
        return fake

    def noted(f: Any) -> Any:
        def call(*given: Any) -> Tensor:
            t = f(*given)
            made.known.append(t)
            return t

        return call

    monkeypatch.setattr(cuda, "compile_", compile_)
    monkeypatch.setattr(cuda, "architecture", lambda device: f"sm of {device}")
    monkeypatch.setattr(cuda, "load", load)
    monkeypatch.setattr(outputs, "empty", noted(outputs.empty))
    monkeypatch.setattr(masked, "aligned", noted(masked.aligned))
    masked._kernel.cache_clear()
    yield made
    masked._kernel.cache_clear()


def _drawn(*lead: int, width: int = 128, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(width + sum(lead))
    mask = torch.randint(256, (*lead, width // 8), generator=g).to(torch.uint8)
    return torch.randn(*lead, width, generator=g).to(dtype), mask


@pytest.mark.whole
@each_pair
@pytest.mark.parametrize(
    ("lead", "width", "count"),
    [
        ((1,), 128, 1), ((8,), 128, 1), ((9,), 128, 2), ((16,), 128, 2), ((17,), 128, 3),
        ((), 128, 1), ((2, 3), 1408, 9), ((), 8320, 9), ((1, 1), 8192, 8),
    ],
)  # fmt: skip
def test_thread_blocks(
    lead: tuple[int, ...], width: int, count: int, dtype: torch.dtype, out: torch.dtype,
    device: Device,
) -> None:  # fmt: skip
    """One for eight blocks of 128, in whatever rows they lie; the last may have fewer."""
    x, mask = _drawn(*lead, width=width, dtype=dtype)
    for asked in (out, None) if out == dtype else (out,):
        made = device.transpose(x, mask, asked)
        blocks, overlap, told = device.one()
        assert (made.shape, made.dtype) == (x.shape, out)
        assert made.is_contiguous()
        assert torch.equal(made, eager.masked_transpose(x, mask, 128, asked))
        assert (blocks, overlap) == (count, False)
        assert told == {
            "x": x.data_ptr(), "mask": mask.data_ptr(), "y": made.data_ptr(),
            "total": x.numel() // 128,
        }  # fmt: skip
    (kernel,) = device.loaded  # it is remembered
    assert kernel.function == {
        "IN": {BF16: 2, F16: 3}[dtype],
        "OUT": {F32: 1, BF16: 2, F16: 3}[out],
    }
    assert (kernel.threads, kernel.shared) == (32, 0)


@pytest.mark.whole
@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0,), (2, 0, 256)], ids=str)
def test_nothing_is_launched_for_nothing(shape: tuple[int, ...], device: Device) -> None:
    x = torch.zeros(shape, dtype=F16)
    mask = torch.zeros(*shape[:-1], shape[-1] // 8, dtype=torch.uint8)
    for out in (None, F32):
        made = device.transpose(x, mask, out)
        assert (made.shape, made.dtype) == (shape, out or F16)
    assert not device.launches
    assert not device.loaded


def _apart(t: Tensor) -> Tensor:
    """The same values where no 16 bytes begin."""
    made = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    assert made.data_ptr() % 16
    return made


def _strided(t: Tensor) -> Tensor:
    """The same values, neighbours apart."""
    return torch.stack([t, 1 + t], -1)[..., 0]


def _wide(t: Tensor) -> Tensor:
    """The same values in rows that lie 16 bytes further apart."""
    more = 16 // t.element_size()
    return torch.cat([t, t[..., :more]], -1)[..., : t.shape[-1]]


def _turned(t: Tensor) -> Tensor:
    """The same values, the last axis outermost in memory."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.whole
@pytest.mark.parametrize("layout", [_apart, _strided, _wide, _turned])
@pytest.mark.parametrize("which", ["x", "mask", "both"])
def test_what_lies_otherwise_is_copied(which: str, layout: Any, device: Device) -> None:
    """And nothing else is."""
    x, mask = _drawn(3, 5, width=256)
    given = (layout(x) if which != "mask" else x, layout(mask) if which != "x" else mask)
    made = device.transpose(*given)
    told = device.one()[2]
    assert torch.equal(made, eager.masked_transpose(x, mask, 128))
    assert (told["x"] == given[0].data_ptr()) == (which == "mask")
    assert (told["mask"] == given[1].data_ptr()) == (which == "x")


@pytest.mark.whole
def test_a_kernel_of_each_device(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Compiled for its architecture, by the pair of dtypes."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda, "compile_", lambda *told: told)
    monkeypatch.setattr(cuda, "load", lambda *told, **_: seen.append(told))
    for dtype, out in PAIRS:
        for index in (3, 3, 0):
            masked._kernel(dtype, out, index)
    assert seen == [
        (("masked.cu", f"sm of {i}", masked.macros(dtype, out)), "masked", i)
        for dtype, out in PAIRS
        for i in (3, 0)
    ]

"""The adapters that ship, judged by whole runs of the public court; all of them in one process.

Two of the libraries are not here: `fast_hadamard_transform` needs a CUDA device and a build of its
own, and torchao is no dependency. In their place stand modules of the same names, written in plain
PyTorch after their sources. What a stand-in tests is the adapter, and the court's answer to it:
**not** the CUDA library, and not torchao. Where the real ones are installed, the last tests hold
the stand-ins to their bits, and the court judges torchao itself, too.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch

import quest
from quest.conformance import inputs, plugin
from quest.conformance.adapters import torchao_fake_quantizer
from quest.conformance.public import adapter, axes, formats, lists

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = "quest.conformance.adapters"
README = (ROOT / "quest/conformance/adapters/README.md").read_text()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of fewer than 3 examples uniform6 of `Released` passes: its constants are off by 4e-4.
EXAMPLES = 5

# After csrc/fast_hadamard_transform.cpp and ..._common.h at e7706fa: rows padded to a multiple of 8
# and, in the kernel, to a power of two; strides 1, 2, 4, ... in float32; the factor, then one
# rounding; what was padded is cut; the backward is the forward.
FAST_HADAMARD = """
import torch


def _kernel(x, scale):
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"Expected float32, float16 or bfloat16, got {x.dtype}")
    width = x.shape[-1]
    if width > 32768:
        raise RuntimeError("only supports hidden dimension at most 32768 for now")
    order = max(8, 1 << (width - 1).bit_length())
    y = torch.nn.functional.pad(x.reshape(-1, width).float(), (0, order - width))
    if not len(y):
        raise RuntimeError("CUDA error: invalid argument")
    stride = 1
    while stride < order:
        a, b = y.reshape(len(y), -1, 2, stride).unbind(2)
        y = torch.stack([a + b, a - b], 2).reshape(len(y), order)
        stride *= 2
    return (y * scale)[:, :width].to(x.dtype).reshape(x.shape)


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return _kernel(x, scale)

    @staticmethod
    def backward(ctx, grad):
        return _kernel(grad, ctx.scale), None


def hadamard_transform(x, scale=1.0):
    return _Transform.apply(x, scale)
"""

# After torchao 0.18: quantization/qat/fake_quantizer.py, get_group_qparams_symmetric, and
# _choose_qparams_affine, _quantize_affine_no_dtype_cast, _dequantize_affine_no_dtype_check.
QAT = """
import torch

BITS = {getattr(torch, f"int{b}"): b for b in range(2, 9)}


class IntxFakeQuantizeConfig:
    def __init__(self, dtype, granularity=None, *, is_symmetric=None):
        if dtype not in BITS or granularity.axis != 0 or is_symmetric is not True:
            raise ValueError(f"no stand-in for {dtype}, {granularity}, {is_symmetric}")
        self.dtype = dtype


class IntxFakeQuantizer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        assert x.dim() == 2 and x.shape[-1] > 1
        half = 2 ** (BITS[self.config.dtype] - 1)
        zero = torch.zeros_like(x[:, :1])
        low = torch.minimum(x.amin(-1, keepdim=True), zero)
        high = torch.maximum(x.amax(-1, keepdim=True), zero)
        scale = torch.maximum(-low, high) / (half - 0.5)
        scale = scale.clamp(min=torch.finfo(x.dtype).smallest_normal).float()
        codes = torch.round(x * (1.0 / scale)).clamp(-half, half - 1)
        return (codes.to(x.dtype) * scale).to(x.dtype)
"""
STAND_INS = {
    "right/fast_hadamard_transform.py": FAST_HADAMARD,
    "scale/fast_hadamard_transform.py": FAST_HADAMARD.replace("y * scale", "y * scale * scale"),
    "sign/fast_hadamard_transform.py": FAST_HADAMARD.replace("a - b]", "b - a]"),
    "back/fast_hadamard_transform.py": FAST_HADAMARD.replace("grad, ctx.scale", "grad, 1.0"),
    "right/torchao/__init__.py": "",
    "right/torchao/quantization/__init__.py": "",
    "right/torchao/quantization/granularity.py": (
        "class PerAxis:\n    def __init__(self, axis):\n        self.axis = axis\n"
    ),
    "right/torchao/quantization/qat.py": QAT,
    # A quantizer that is what the specification asks for: every expected failure is stale.
    "spec/torchao/__init__.py": "",
    "spec/torchao/quantization/__init__.py": "",
    "spec/torchao/quantization/granularity.py": "PerAxis = int\n",
    "spec/torchao/quantization/qat.py": f"""
import quest, torch
from {SHIPPED}.published import Paper
from quest.conformance.public import formats


def IntxFakeQuantizeConfig(dtype, granularity, *, is_symmetric):
    return quest.quantizer.parse(f"uniform{{str(dtype)[9:]}}/hadamard1/ste/dense")


def IntxFakeQuantizer(q):
    return lambda x: Paper().fake_quantize(x, formats.of(q, x.shape[-1]))
""",
}

# Fewer blocks and grids than the adapters declare, and a CPU.
FEWER = f"""
from {SHIPPED} import fast_hadamard, published, scipy_hadamard


class Scipy(scipy_hadamard.Adapter):
    capabilities = scipy_hadamard.Adapter.capabilities | {{"blocks": [1, 2, 16, 128]}}


class Fast(fast_hadamard.Adapter):
    capabilities = fast_hadamard.Adapter.capabilities | {{"device": "cpu",
                                                         "blocks": [1, 4, 16, 128]}}


class Narrow(Fast):
    capabilities = Fast.capabilities | {{"dtypes": ["float32"], "blocks": [1, 16]}}


class Paper(published.Paper):
    capabilities = published.Paper.capabilities | {{
        "dtypes": ["float32"], "blocks": [1, 16], "grids": ["uniform4", "ternary", "e2m1"],
        "sparsities": ["2:4"], "inputs": ["non_finite"], "estimators": ["trust1.0", "trust0.5"]}}
"""

# Reads [[name, folder of stand-ins, arguments]], writes {name: exit status}: one pytest after the
# other in a process, so that torch is imported once.
DRIVER = """
import json, sys

import pytest

codes = {}
for name, folder, arguments in json.loads(sys.argv[1]):
    sys.path.insert(0, folder)
    codes[name] = pytest.main(["-p", "no:cacheprovider", "-p", "quest.conformance.plugin",
                               "--pyargs", f"--report-json={name}.json", *arguments])
    sys.path.remove(folder)
    for module in list(sys.modules):
        if module.partition(".")[0] in ("torchao", "fast_hadamard_transform", "mine"):
            del sys.modules[module]
    for module in ("fast_hadamard", "torchao_fake_quantizer"):
        sys.modules.pop(f"quest.conformance.adapters.{module}", None)
with open("codes.json", "w") as file:
    json.dump(codes, file)
"""


def argued(impl: str, listed: str = "", *tests: str, skips: bool = False) -> list[str]:
    """The command line of a run. listed: whose expected failures; tests: modules of the court."""
    made = [f"quest.conformance.tests.{t}" for t in tests] or ["quest.conformance"]
    made += [f"--impl={impl}", f"--max-examples={EXAMPLES}"]
    made += [f"--xfails={SHIPPED}:{listed}.xfails"] if listed else []
    return made + ([f"--skips={SHIPPED}:{listed}.skips"] if skips else [])


TORCHAO = argued(f"{SHIPPED}.torchao_fake_quantizer:Adapter", "torchao_fake_quantizer")
WRONG = argued("mine:Narrow", "", "test_hadamard")
# name: (folder of stand-ins, arguments)
RUNS = {
    "scipy": ("none", argued("mine:Scipy", "", "test_hadamard")),
    "released": ("none", argued(f"{SHIPPED}.published:Released", "published", skips=True)),
    "paper": ("none", argued("mine:Paper")),
    "torchao": ("right", TORCHAO),
    "torchao is right": ("spec", TORCHAO),
    "fast": ("right", argued("mine:Fast", "", "test_hadamard")),
    "fast with its factor twice": ("scale", WRONG),
    "fast with a wrong sign": ("sign", WRONG),
    "fast with a wrong backward": ("back", WRONG),
}


def run(where: Path, runs: dict[str, tuple[str, list[str]]]) -> dict[str, tuple[int, Any, str]]:
    """Each run's (exit status, JSON, output of all), from one process in the folder `where`."""
    (where / "mine.py").write_text(FEWER)
    for name, text in STAND_INS.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    asked = [(n, str(where / folder), arguments) for n, (folder, arguments) in runs.items()]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(asked)],
        cwd=where, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    codes = json.loads((where / "codes.json").read_text())
    return {n: (codes[n], json.loads((where / f"{n}.json").read_text()), done.stdout) for n in runs}


@pytest.fixture(scope="module")
def judged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, Any, str]]:
    """The runs that the collected tests ask for; made once, whichever processes share the tests."""
    items = [i for i in request.session.items if i.path == request.path]
    names = {getattr(getattr(i, "callspec", None), "params", {}).get("name") for i in items}
    if any(i.name == RIGHT for i in items):
        names.add("torchao is right")
    wanted = {n: of for n, of in RUNS.items() if n in names}
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return run(tmp_path_factory.mktemp("adapters"), wanted)
    where = tmp_path_factory.getbasetemp().parent / "adapters"  # all workers' own
    where.mkdir(exist_ok=True)
    with (where / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = where / "all.json"
        if not made.exists():
            text = json.dumps(run(where, wanted))
            made.write_text(text)
        return {n: tuple(of) for n, of in json.loads(made.read_text()).items()}


def outcomes(document: Any) -> dict[str, Any]:
    """Each case that was covered, by its full name."""
    return {
        f"{p['property']}[{c['parameters']}]": c
        for p in document["properties"] for c in p["cases"] if c["outcome"] != "not covered"
    }  # fmt: skip


def counted(found: dict[str, Any]) -> tuple[int, int, int]:
    """(passed, failed as expected, skipped); nothing else may be there."""
    kinds = [c["outcome"] for c in found.values()]
    told = tuple(kinds.count(k) for k in ("passed", "expected failure", "skipped"))
    assert sum(told) == len(kinds), kinds
    return told[0], told[1], told[2]


# As README.md's table says of runs with more examples; of `mine`, with fewer blocks and grids.
EXACT = {
    "scipy": ((24, 0, 0), ""),
    "released": ((3, 43, 6), "published"),
    "torchao": ((0, 15, 0), "torchao_fake_quantizer"),
    "paper": ((49, 0, 0), ""),
    "fast": ((30, 0, 0), ""),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_adapter_departs_where_it_says(
    name: str, judged: dict[str, tuple[int, Any, str]]
) -> None:
    code, document, told = judged[name]
    found = outcomes(document)
    counts, listed = EXACT[name]
    assert counted(found) == counts, told
    assert code == pytest.ExitCode.OK
    failed = {n for n, c in found.items() if c["outcome"] == "expected failure"}
    if listed:
        xfails = lists.read("--xfails", f"{SHIPPED}:{listed}.xfails")
        assert failed == {n for n in found if xfails.match(n)}
        assert not xfails.stale()
    for n in failed:
        # An adapter that raises fails as listed, too, and says nothing of what it adapts.
        assert found[n]["failure"]["stage"] != "raised", found[n]["failure"]["told"]
        assert found[n]["elements"] > 0
    for n, c in found.items():
        assert c["outcome"] == "skipped" or c["calls"] > 0, n


RIGHT = "test_a_quantizer_that_is_right_makes_every_expected_failure_stale"


def test_a_quantizer_that_is_right_makes_every_expected_failure_stale(
    judged: dict[str, tuple[int, Any, str]],
) -> None:
    code, document, _ = judged["torchao is right"]
    assert code == pytest.ExitCode.TESTS_FAILED
    assert [c["outcome"] for c in outcomes(document).values()] == ["stale expected failure"] * 15


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("fast with its factor twice", ("test_transform", "test_transpose", "test_inputs")),
        ("fast with a wrong sign", ("test_transform", "test_transpose", "test_inputs")),
        ("fast with a wrong backward", ("test_transpose",)),
    ],
)
def test_a_wrong_library_fails(
    name: str, wrong: tuple[str, ...], judged: dict[str, tuple[int, Any, str]]
) -> None:
    code, document, _ = judged[name]
    assert code == pytest.ExitCode.TESTS_FAILED
    for n, c in outcomes(document).items():
        # Of order 1 neither the factor nor a sign shows.
        test = n.partition("::")[2].partition("[")[0]
        right = test not in wrong or "[1-" in n
        assert c["outcome"] == ("passed" if right else "failed"), n
        assert right or c["failure"]["stage"] == "transform"


def covered(spec: str) -> int:
    """How many properties an adapter covers where it can run."""
    impl, found = adapter.load(spec), 0
    for path in plugin.TESTS.glob("test_*.py"):
        module = importlib.import_module(f"quest.conformance.tests.{path.stem}")
        for function in vars(module).values():
            marks = [m for m in getattr(function, "pytestmark", ()) if m.name == "judges"]
            for mark in marks:
                named = {k: v for k, v in mark.kwargs.items() if k != "declares"}
                sets = [axes.values(k, tuple(v), impl.capabilities) for k, v in named.items()]
                found += sum(
                    axes.uncovered(
                        dataclasses.replace(impl, missing=None), mark.args,
                        mark.kwargs.get("declares", ()), dict(zip(named, values, strict=True)),
                    ) is None
                    for values in itertools.product(*sets)
                )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("scipy_hadamard:Adapter", "all {} that it covers pass"),
        ("published:Paper", "all {} that it covers pass"),
        ("torchao_fake_quantizer:Adapter", "all {} fail"),
        ("fast_hadamard:Adapter", "It covers {}"),
    ],
)
def test_the_readme_s_numbers(spec: str, told: str) -> None:
    row = re.search(rf"^\| `{spec}` \|.*$", README, re.MULTILINE)
    assert row is not None
    assert told.format(covered(f"{SHIPPED}.{spec}")) in row[0]


def test_every_adapter_that_ships_is_run() -> None:
    shipped = {p.stem for p in (ROOT / "quest/conformance/adapters").glob("*.py")} - {"__init__"}
    named = " ".join(" ".join(arguments) for _, arguments in RUNS.values()) + FEWER
    assert shipped == {n for n in shipped if n in named and f"`{n}:" in README}
    lists_ = {p.stem for p in (ROOT / "quest/conformance/adapters").glob("*.xfails")}
    assert lists_ == {listed for _, listed in EXACT.values() if listed}


def stand_in(text: str) -> Any:
    """A stand-in as a module of this process, beside what may be installed."""
    made = ModuleType("stand_in")
    exec(compile(text, "stand_in", "exec"), vars(made))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 4, 6, 8, 16, 137, 1024])
def test_the_stand_in_is_what_its_library_documents(width: int, dtype: torch.dtype) -> None:
    """F.linear(x, scipy.linalg.hadamard(dim)) * scale, dim the next power of two, cut to the width;
    the same for a gradient. Integers and a factor of 2^-5, so that nothing is rounded.
    """
    order = 1 << (width - 1).bit_length()
    h = torch.tensor(scipy.linalg.hadamard(order, dtype=float)[:width, :width])
    x = torch.zeros(3, width, dtype=dtype)
    x[:, :: max(1, width // 8)] = 1.0
    x[1] *= -3
    x.requires_grad_()
    y = stand_in(FAST_HADAMARD).hadamard_transform(x, scale=2**-5)
    assert torch.equal(y.double(), x.double() @ h.T / 32)
    (grad,) = torch.autograd.grad(y, x, x.detach())
    assert torch.equal(grad.double(), x.double() @ h / 32)
    assert y.dtype == grad.dtype == dtype


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(2, 16, dtype=torch.float64), "Expected float32, float16 or bfloat16"),
        (torch.zeros(1, 32776), "at most 32768"),
        (torch.zeros(0, 16), "CUDA error"),
    ],
)
def test_what_the_stand_in_refuses(x: torch.Tensor, told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        stand_in(FAST_HADAMARD).hadamard_transform(x)


def test_the_stand_in_has_the_bits_of_the_cuda_library() -> None:
    library = pytest.importorskip("fast_hadamard_transform")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    made = stand_in(FAST_HADAMARD)
    widths = (1, 2, 4, 6, 24, 137, 256, 1000, 4096, 32768)
    kinds = ("gaussian", "outlier", "heavy", "non_finite")
    for width, dtype, kind in itertools.product(widths, DTYPES, kinds):
        x = inputs.draw(kind, (5, width), dtype, 0).cuda()
        found = library.hadamard_transform(x, scale=width**-0.5)
        due = made.hadamard_transform(x, scale=width**-0.5)
        same = torch.equal(found.nan_to_num(1234.0), due.nan_to_num(1234.0))
        assert same, (width, dtype, kind)


def test_the_stand_in_has_torchao_s_bits() -> None:
    pytest.importorskip("torchao")
    made, axis = stand_in(QAT), SimpleNamespace(axis=0)
    kinds = ("gaussian", "outlier", "zeros", "subnormal", "non_finite")
    for bits, dtype, kind in itertools.product(torchao_fake_quantizer.BITS, DTYPES, kinds):
        config = made.IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), axis, is_symmetric=True)
        q = quest.quantizer.parse(f"uniform{bits}/identity/ste/dense")
        x = inputs.draw(kind, (17, 96), dtype, 0)
        found = torchao_fake_quantizer.Adapter().fake_quantize(x, formats.of(q, 96))
        due = made.IntxFakeQuantizer(config)(x)
        assert found.dtype == due.dtype == dtype
        same = torch.equal(found.nan_to_num(1234.0), due.nan_to_num(1234.0))
        assert same, (bits, dtype, kind)


def test_torchao_itself_departs_where_its_adapter_says(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    code, document, told = run(tmp_path, {"torchao itself": ("none", TORCHAO)})["torchao itself"]
    found = outcomes(document)
    assert counted(found) == (0, 15, 0), told
    assert code == pytest.ExitCode.OK
    assert all(c["failure"]["stage"] != "raised" for c in found.values())

"""Each benchmark on shapes of a CPU: its judge sees what is timed, and torch makes the same.

A time beside a wrong one, and a gate for another kernel, look like results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import baselines, bench_model, cases, gate, timed, timing
from quest import frozen, packing, quantizer
from quest.conformance import examine, inputs, oracle
from quest.conformance.verdict import Verdict
from quest.gate.clock import size
from quest.reference import quantize

FOLDER = Path(timing.__file__).parent
# What others wrote need not be installed.
NAMES = [path.stem for path in sorted(FOLDER.glob("bench_*.py")) if path.stem != "bench_peers"]
Given = dict[str, Any]
pytestmark = pytest.mark.skipif(cases.CUDA, reason="shapes of a GPU take too long")


def _found() -> Iterator[tuple[str, Callable[..., None], Given]]:
    """Name, function and parameters of every benchmark, as pytest makes them of its marks."""
    for module in NAMES:
        held = importlib.import_module(f"benchmarks.{module}")
        for name, function in inspect.getmembers(held, inspect.isfunction):
            if not name.startswith("test_") or function.__module__ != held.__name__:
                continue
            sets: list[tuple[str, Given]] = [(f"{module}.{name}", {})]
            for mark in function.pytestmark:
                if mark.name == "parametrize":
                    names, values = mark.args
                    sets = [
                        (
                            f"{told}-{each.id if hasattr(each, 'id') else each}",
                            before | _named(names, each),
                        )
                        for told, before in sets
                        for each in values
                    ]
            yield from ((told, function, made) for told, made in sets)


def _named(names: str | tuple[str, ...], values: Any) -> Given:
    values = getattr(values, "values", (values,))
    return dict(zip((names,) if isinstance(names, str) else names, values, strict=True))


@pytest.fixture(scope="module")
def given() -> dict[str, Given]:
    """What each benchmark hands to `timed`, by its name; nothing is compiled, nothing left out."""
    made: dict[str, Given] = {}
    found = list(_found())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f: f)
        patch.setattr(nn.Module, "compile", lambda self: None)
        patch.setattr(cases, "EAGER_CALLS", 1)
        for name, function, parameters in found:
            try:
                function(timed=functools.partial(_keep, made, name), **parameters)
            except pytest.skip.Exception as reason:
                pytest.fail(f"{name} is skipped: {reason}")
    assert len(made) == len(found) > 100
    return made


def _keep(made: dict[str, Given], name: str, **told: Any) -> None:
    made[name] = told


class Seen:
    """What a judge asks of the court: dtypes, widths, formats, and the tiles that it chooses."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: set[tuple[str, ...]] = set()
        self.widths: set[int] = set()
        self.layers: set[int] = set()  # their rows
        self.dtypes: set[torch.dtype] = set()
        self.tiles: set[tuple[int, int, int]] = set()
        for name in ("transform", "quantizer", "backward", "encoded", "gated", "normed", "layer",
                     "frozen", "product"):  # fmt: skip
            patch.setattr(examine, name, functools.partial(self._examined, name))
        patch.setattr(gate, "tiles_of", self._tiled)

    def _examined(self, name: str, lane: object, *given: Any, **more: Any) -> list[Verdict]:
        told = [(t.shape, t.dtype) if isinstance(t, Tensor) else t for t in given]
        self.asked.add((name, *map(str, told), *sorted(map(str, more.items()))))
        self.widths.add(given[0].shape[-1])
        self.dtypes.add(given[0].dtype)
        if name in ("layer", "frozen"):
            self.layers.add(len(given[0]))
        return [Verdict(name, 1)]

    @contextlib.contextmanager
    def _tiled(
        self, made: object, rows: int, columns: int, width: int, turned: bool = False
    ) -> Iterator[None]:
        self.tiles.add((rows, columns, width))
        yield


def test_judges_see_what_is_timed(given: dict[str, Given], monkeypatch: pytest.MonkeyPatch) -> None:
    """The very width, dtype and tiles; and what a key opens it opens for one question alone."""
    keys: dict[tuple[str, ...], set[object]] = defaultdict(set)
    for name, told in given.items():
        seen = Seen(monkeypatch)
        told["judge"](gate.lane(), "gaussian")
        keys[tuple(map(str, told["key"]))].add(frozenset({*seen.asked, *seen.tiles}))
        assert seen.asked, name
        if name.startswith("bench_model"):
            continue  # several layers
        shape, parts = told["shape"], 1 + name.startswith("bench_prologue")  # of one tensor
        assert seen.widths == {told.get("draw", [shape])[0][-1] // parts}, name
        assert seen.dtypes == {cases.DTYPE}, name
        assert seen.layers <= {min(shape[0], 4 * gate.ROWS)}, name
        assert not seen.tiles or seen.tiles == {(shape[0], shape[2], shape[1])}, name
    assert not [key for key, asked in keys.items() if len(asked) > 1]


def test_a_prefill_is_judged_with_all_that_surrounds_its_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU, where other kernels add, norm, gate and turn."""
    told: Given = {}
    for name, made in (("CUDA", True), ("DTYPE", torch.bfloat16)):
        monkeypatch.setattr(cases, name, made)
    normal = functools.partial(gate.normal, dtype=torch.bfloat16)
    monkeypatch.setattr(gate, "normal", normal)
    monkeypatch.setattr(bench_model, "_replayed", lambda run: run)
    monkeypatch.setattr(bench_model, "_compile_blocks", lambda model: None)
    bench_model.test_prefill(told.update, cases.TINY, 2, 64, "w4a4")  # type: ignore[arg-type]
    for distribution in gate.DISTRIBUTIONS:
        for verdict in told["judge"](gate.lane(), distribution):
            verdict.require()
    seen, d, hidden = Seen(monkeypatch), cases.TINY.width, cases.TINY.hidden
    told["judge"](gate.lane(), "gaussian")
    assert {name for name, *_ in seen.asked} == {"frozen", "normed", "product"}
    more = {
        each.partition(",")[0] for name, *rest in seen.asked for each in rest if each[:2] == "('"
    }
    assert more == {"('conclusive'", "('gate'", "('residual'", "('rotary'"}
    assert sum(name == "normed" for name, *_ in seen.asked) == 2
    assert seen.tiles == {
        (128, 3 * d, d), (128, d, d), (128, 2 * hidden, d), (128, d, hidden),
    }  # fmt: skip


def _outputs(name: str, ours: Any, torchs: Any) -> tuple[Tensor, Tensor]:
    """One output of both, of one kind."""
    if name.startswith("bench_operand.test_encode_saved"):
        return ours[-1], torchs
    if name.startswith("bench_eager.test_behind_a_norm"):
        return torch.cat(ours, -1), torch.cat(torchs[1:], -1)
    first, second = (t[0] if isinstance(t, tuple) else t for t in (ours, torchs))
    if name.startswith("bench_quantize.test_quantize"):
        bits = 8 * first.shape[-1] // second.shape[-1]
        first = packing.unpack(first, bits, second.shape[-1])
        second = second.to(torch.int16) - second.min()
    return first, second


# Of entries, where nothing but the order of sums differs; and where one of both has few bits.
SAME = ("bench_hadamard", "bench_backward", "bench_quantize", "bench_operand", "bench_prologue")


# A hundred roundings of float32, of the largest; and codes that such a difference may flip, one in
# 1000 as the court has it (verdict.AMBIGUOUS_SHARE).
ROUNDED, AS_ROUNDED = 1e-5, 0.999
# Of quantized layers: two operands of one bit keep 2 / pi of a product, models less (what has no
# part in it, about 0), and 8 bits lose 8e-5 of each operand's square (what is not quantized 1e-12).
RELATED, QUANTIZED = 0.4, 1 - 1e-6
# Losses before training: log(vocabulary), and half the spread of the logits squared.
LOSSES = 0.1

FROZEN = ("bench_linear.test_frozen", "bench_eager", "bench_model.test_prefill")


def test_torch_computes_the_same(given: dict[str, Given], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the last bit where it does the same, or to what quantization costs; and no copy.

    Where it is said ours reads a weight that was quantized before, and nowhere else.
    """
    read: list[int] = []
    real = frozen.linear
    monkeypatch.setattr(frozen, "linear", lambda *a, **k: read.append(1) or real(*a, **k))
    for name, told in given.items():
        inputs = timed._sets(told.get("draw") or (told["shape"],), 1)[0]
        inputs += told["prepare"](*inputs) if "prepare" in told else ()
        made = []
        for call in ("run", "baseline"):
            read.clear()
            made.append(told[call](*inputs))
            assert bool(read) == (call == "run" and name.startswith(FROZEN)), name
        ours, torchs = _outputs(name, *made)
        assert ours.shape == torchs.shape, name
        a, b = (t.double().flatten() for t in (ours, torchs))
        if name.startswith(SAME):
            near = (a - b).abs() <= ROUNDED * b.abs().max()
            assert near.double().mean() > AS_ROUNDED, name
        elif a.numel() == 1:
            assert 0 < (a / b - 1).abs() < LOSSES, name
        else:
            assert RELATED < torch.cosine_similarity(a, b, 0) < QUANTIZED, name


@pytest.mark.parametrize("estimator", ["trust1.0", "clip1.3"])
@pytest.mark.parametrize("pattern", ["dense", "2:4", "pairs4:8"])
@pytest.mark.parametrize("grid", ["uniform4", "ternary", "e2m1"])
def test_torch_quantizes_and_masks_as_the_formulas_say(
    grid: str, pattern: str, estimator: str
) -> None:
    """Pruned entries are masked by a threshold of their own."""
    q = quantizer.parse(f"{grid}/hadamard16/{estimator}/{pattern}")
    x = inputs.draw("gaussian", (32, 256), torch.float32, 0)
    due = quantize.quantize(oracle.lift(x), **oracle.arguments(q, 256))
    h = baselines.matrix(16, "cpu", torch.float32)
    codes, scale, mask, *keep = baselines.quantize(x, h, q)
    values, same = baselines.fake_quantize(x, h, q)
    assert torch.equal(same, mask)
    assert bool(keep) == (q.sparsity is not None)
    pairs = [(mask, due.mask), (scale, due.scale), (codes, due.codes), (values, due.values)]
    pairs += [(kept, due.keep) for kept in keep]
    for made, expected in pairs:
        # Some tens of roundings of float32; another code is off by a step, a tenth or more.
        near = np.isclose(oracle.lift(made), expected, rtol=1e-5, atol=1e-6)
        assert near.mean() > AS_ROUNDED


def test_what_is_counted(given: dict[str, Given]) -> None:
    """Two operations for each product of a layer; what it reads besides its input."""
    for name, told in given.items():
        of_layers = name.startswith(("bench_linear", "bench_eager"))
        counted = of_layers and not name.startswith("bench_linear.test_forward_backward")
        assert told.get("operations", 0.0) == (2.0 * math.prod(told["shape"]) if counted else 0.0)
        assert bool(told.get("constant")) == (of_layers or name.startswith("bench_backward")), name
        if name.startswith("bench_backward"):
            assert size(told["constant"]) == math.prod(told["shape"]) // 8
        elif of_layers:
            _, inside, outside = told["shape"]
            least = inside * outside * cases.DTYPE.itemsize
            assert least <= size(told["constant"]) <= least + 4 * outside, name

"""The fixture's callable: gate, time, hand over to pytest-benchmark."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from quest.gate.clock import input_sets, size

from . import cases, gate, records, timing


class _NoTimeError(Exception):
    """Ends a benchmark without a time."""


def _refuse() -> NoReturn:
    raise _NoTimeError


class Benchmark(Protocol):
    """What is used of pytest-benchmark's fixture."""

    enabled: bool
    extra_info: dict[str, Any]

    def pedantic(self, target: Callable[..., object], **options: Any) -> object:
        """Call `target` for `rounds` rounds and keep what the timer says."""


@dataclass
class Timed:
    """Times one case. clock: the timer that pytest-benchmark has been given for this test."""

    benchmark: Benchmark
    clock: timing.Replay
    info: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        *,
        spec: str,
        shape: tuple[int, ...],
        key: tuple[object, ...],
        judge: gate.Judge,
        run: Callable[..., object],
        baseline: Callable[..., object],
        draw: tuple[tuple[int, ...], ...] | None = None,
        constant: tuple[Tensor, ...] = (),
        prepare: Callable[..., tuple[Tensor, ...]] | None = None,
        operations: float = 0.0,
        ceiling: float = 0.0,
        memory: tuple[int, int] = (0, 0),
        calls: int = 1,
        alone: bool = False,
    ) -> None:
        """Pass the gate, then time `run` and `baseline` on the same normal inputs.

        spec: what is computed; shape: on what. key, judge: see `gate.open_for`. draw: the shapes of
        one set of inputs, by default (shape,). constant: what `run` reads in every call besides.
        prepare: what `run` and `baseline` get after the inputs, made of them beforehand; `run` then
        reads that alone. operations: multiplications and additions of a call. ceiling: TOP/s that
        the tensor cores can do, see `ceilings`. memory: the most bytes that `run` and `baseline`
        held, where that was measured. calls: what `run` and `baseline` do so many times in a row;
        reported is the time of one. alone: on CUDA each is timed by itself, too.
        Bytes moved at the least: inputs and constants read once, outputs of `run` written once.
        """
        __tracebackhide__ = True
        shapes = draw or (shape,)
        try:
            passed = gate.open_for(key, judge)
            inputs = _sets(shapes, 1)[0]
            more = prepare(*inputs) if prepare else ()
            first = inputs + more
            moved = sum(map(size, (more or inputs, constant, run(*first))))
            if self.benchmark.enabled:
                sets = _sets(shapes, input_sets(size(more or inputs), cases.DEVICE))
                if prepare:
                    sets = [each + prepare(*each) for each in sets]
                times = timing.measure(run, baseline, sets, moved * calls, cases.DEVICE)
                times = times.of_one(calls)
        except Exception:
            # A target that fails: pytest-benchmark records no time, and does not miss its call.
            with contextlib.suppress(_NoTimeError):
                self.benchmark.pedantic(_refuse)
            raise
        if not self.benchmark.enabled:
            self.benchmark.pedantic(run, args=first)
            return
        self._report(spec, shape, passed, times, moved, operations)
        if ceiling:
            self.info["fraction_of_rate"] = self.info["tera_operations"] / ceiling
            self.benchmark.extra_info.update(self.info)
        if all(memory):
            self.info |= {"peak_bytes": memory[0], "memory_ratio": memory[0] / memory[1]}
            self.benchmark.extra_info.update(self.info)
        if alone and cases.CUDA:
            self._alone(run, baseline, sets)
        again = itertools.cycle(times.ours)
        self.benchmark.pedantic(
            self.clock.advance, setup=lambda: ((next(again),), {}), rounds=len(times.ours)
        )

    def _alone(
        self,
        run: Callable[..., object],
        baseline: Callable[..., object],
        sets: list[tuple[Tensor, ...]],
    ) -> None:
        def seconds(call: Callable[..., object]) -> float:
            return timing.alone(lambda i: call(*sets[i % len(sets)]), cases.DEVICE)

        # What drifts meets both alike, and two ratios say by how much they differ.
        first, theirs, again, last = map(seconds, (run, baseline, baseline, run))
        low, high = sorted((theirs / first, again / last))
        self.info |= {
            "alone_us": (first + last) / 2 * 1e6,
            "alone_baseline_us": (theirs + again) / 2 * 1e6,
            "alone_ratio": (theirs + again) / (first + last),
            "alone_low": low,
            "alone_high": high,
        }
        self.benchmark.extra_info.update(self.info)

    def _report(
        self,
        spec: str,
        shape: tuple[int, ...],
        passed: gate.Passed,
        times: timing.Times,
        moved: int,
        operations: float,
    ) -> None:
        ours, copy, (low, high) = median(times.ours), median(times.copy), times.interval()
        self.info |= {
            "device": records.device_name(),
            "lane": passed.lane,
            "shape": list(shape),
            "dtype": str(cases.DTYPE).removeprefix("torch."),
            "spec": spec,
            "median_us": ours * 1e6,
            "baseline_us": median(times.baseline) * 1e6,
            "ratio_to_baseline": times.ratio,
            "ratio_low": low,
            "ratio_high": high,
            "copy_us": copy * 1e6,
            "fraction_of_copy": copy / ours,
            "bytes": moved,
            "tera_operations": operations / ours / 1e12,
            "worst_ratio": passed.worst_ratio,
            "elements": passed.elements,
            "host_bound": times.host_bound,
        }
        self.benchmark.extra_info.update(self.info)


def _sets(shapes: tuple[tuple[int, ...], ...], n: int) -> list[tuple[Tensor, ...]]:
    g = torch.Generator(cases.DEVICE).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=g, device=cases.DEVICE, dtype=cases.DTYPE)

    return [tuple(map(normal, shapes)) for _ in range(n)]

"""Products of integers: accumulators bit for bit, and with both scales (T0, T6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from quest.conformance import inputs
from quest.conformance.public import properties
from quest.conformance.public.court import Court
from quest.conformance.strategies import SEEDS

# Rectangular: square shapes hide what is transposed. 127 * 127 * 1024 is below 2^24, where sums in
# float32 stay exact; wider ones need an integer accumulator.
SHAPES = st.tuples(
    st.sampled_from((1, 2, 5, 130)),
    st.sampled_from((1, 3, 7, 257)),
    st.sampled_from((1, 2, 16, 64, 130, 1000)),
)
WIDE = st.tuples(st.sampled_from((1, 3)), st.sampled_from((2, 5)), st.sampled_from((4096, 65536)))
KINDS = st.sampled_from(inputs.INTEGERS)


def _judge(
    court: Court,
    property_: Callable[..., Any],
    kind: str,
    shape: tuple[int, int, int],
    seed: int,
    *scales: str,
) -> None:
    n, m, k = shape
    other = "random" if kind == "one_hot" else kind
    a, b = inputs.integers(kind, n, k, seed), inputs.integers(other, m, k, seed + 1)
    tensors = {
        "a": f"inputs.integers({kind!r}, {n}, {k}, {seed})",
        "b": f"inputs.integers({other!r}, {m}, {k}, {seed + 1})",
    }
    scaled: tuple[torch.Tensor, ...] = ()
    for i, (name, rows) in enumerate(zip(scales, (n, m), strict=False)):
        scaled += (inputs.draw("gaussian", (rows, 1), torch.float32, seed + i).abs(),)
        drawn = f"inputs.draw('gaussian', ({rows}, 1), torch.float32, {seed + i}).abs()"
        tensors |= {name: drawn}
    court.judge(property_, tensors, (a, b, *scaled), "")


@pytest.mark.judges("product", declares=("accumulator",))
@given(kind=KINDS, shape=SHAPES, seed=SEEDS)
def test_product(court: Court, kind: str, shape: tuple[int, int, int], seed: int) -> None:
    _judge(court, properties.product, kind, shape, seed)


@pytest.mark.judges("product", declares=("accumulator", "wide"))
@given(kind=KINDS, shape=WIDE, seed=SEEDS)
@example(kind="coherent", shape=(3, 5, 4096), seed=0)
@example(kind="coherent", shape=(3, 5, 65536), seed=0)
def test_wide_product(court: Court, kind: str, shape: tuple[int, int, int], seed: int) -> None:
    """Sums that leave float32's integers: needs an accumulator that holds them.

    Those of coherent rows do, whatever is drawn, and end in any bits.
    """
    _judge(court, properties.product, kind, shape, seed)


@pytest.mark.judges("scaled_product", declares=("accumulator",))
@given(kind=KINDS, shape=SHAPES, seed=SEEDS)
def test_scaled_product(court: Court, kind: str, shape: tuple[int, int, int], seed: int) -> None:
    _judge(court, properties.scaled_product, kind, shape, seed, "a_scale", "b_scale")

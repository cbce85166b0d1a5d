"""Sparse products with one far token whose scale, times the factor, is 0 in float32."""

from __future__ import annotations

import pytest
import torch

from property_tests import far_scales
from property_tests.places import Place
from quest import compression
from quest.kernels import hopper, sparse

pytestmark = pytest.mark.whole

FEATURES, WIDTH = 130, 64
FACTOR, SCALE, OF_FEATURES = 2.0**-20, 1.5 * 2.0**-140, 1.7 * 2.0**120


@pytest.mark.parametrize("shape", [sparse.WIDE, sparse.NARROW], ids=["wide", "narrow"])
def test_one_far_token_that_float32_makes_0(place: Place, shape: sparse.Shape) -> None:
    """Only its mark tells of it: its near part is 0, and so is all that lies beside the mark.

    In the emulator for a few tokens, those of other warps and lanes.
    """
    tokens, to = shape.columns, place.device
    if reason := hopper.unavailable(torch.device(to)):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(tokens)
    x, w = (torch.randint(-128, 128, (n, WIDTH), generator=g).to(torch.int8)
            for n in (tokens, FEATURES))  # fmt: skip
    w.view(FEATURES, -1, 4)[..., 1::2] = 0
    p = x.long().numpy() @ w.long().numpy().T
    of_features = torch.full((FEATURES,), OF_FEATURES)
    values, metadata = (t.to(to) for t in compression.compress(w))
    for token in range(0, tokens, 1 if to == "cuda" else 29):
        scale = torch.zeros(tokens)
        scale[token] = SCALE
        expected = far_scales.dequantized(p, FACTOR, scale, of_features)
        assert expected[token].count_nonzero() > FEATURES / 2
        with sparse.only(shape):
            y = sparse.product(
                values, metadata, x.to(to), torch.float32, epilogue=hopper.PLAIN, factor=FACTOR,
                feature_scale=of_features.to(to), token_scale=scale.to(to),
            )  # fmt: skip
        assert torch.equal(y.cpu(), expected), token

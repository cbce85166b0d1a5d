"""Other people's kernels, where they are installed; what is called "torch" is the peer here.

- torchao's int8 layer (dynamic per-token activations, per-channel weights, absmax scales, no
  transform), compiled as its documentation asks. Ours is the frozen W8A8 layer, uncompiled.
- gemlite's layer of packed weights: groups of 128 weights, no transform, activations and the
  product in bfloat16, so that it spares the memory's traffic alone. Ours is the frozen layer whose
  activations have so few bits, too. Configurations that gemlite does not ship it tunes when first
  called.
- The CUDA fast Hadamard transform (Dao-AILab): a block is one of its rows.

What a peer computes is held against the same in torch, coarsely: a broken one has no time. Eight
bits of torchao's, and gemlite's weights, rounded to bfloat16 twice, make some hundredths.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quest

from . import baselines, cases
from .bench_hadamard import time_transform
from .bench_linear import forward, time_frozen
from .timed import Timed

# Theirs, not ours.
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore::{kind}Warning" for kind in ("Deprecation", "Future", "Syntax", "User"))
)

GROUP = 128  # weights of a gemlite scale


def _close(peer: Tensor, due: Tensor) -> None:
    """ValueError where they differ by more than a twentieth."""
    error = (peer.double() - due.double()).norm() / due.double().norm()
    if not error < 5e-2:
        raise ValueError(f"the peer's result is off by {float(error):.2g} of its norm")


@pytest.mark.parametrize(("tokens", "inside", "outside"), cases.peers())
def test_torchao_int8(timed: Timed, tokens: int, inside: int, outside: int) -> None:
    """The forward of an int8 layer: inference."""
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    made = quest.recipe("w8a8")
    torch.manual_seed(0)
    dense = nn.Linear(inside, outside, bias=False, device=cases.DEVICE, dtype=cases.DTYPE)
    ours = quest.Linear.from_linear(dense, made).freeze()
    model = nn.Sequential(nn.Linear(inside, outside, bias=False)).to(dense.weight)
    model[0].weight = nn.Parameter(dense.weight.detach().clone())
    x = torch.randn(tokens, inside, device=cases.DEVICE, dtype=cases.DTYPE)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    torch.compiler.reset()
    peer = torch.compile(model)

    _close(forward(peer, x), forward(dense, x))
    time_frozen(timed, made, ours, tokens, lambda x: forward(ours, x), lambda x: forward(peer, x))


def _grouped(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in) uint8, scales and zeros (out * in / GROUP, 1): (code - zero) scale."""
    groups = weight.float().reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((groups - low) / scale).round().to(torch.uint8)
    return codes.reshape(weight.shape), scale.to(weight.dtype), (-low / scale).to(weight.dtype)


@pytest.mark.parametrize(("tokens", "inside", "outside", "recipe"), cases.packed_peers())
def test_gemlite(timed: Timed, tokens: int, inside: int, outside: int, recipe: str) -> None:
    """The forward of a layer whose weights are packed: inference with few tokens."""
    if cases.DEVICE != "cuda":
        pytest.skip("gemlite needs a GPU")
    helper = pytest.importorskip("gemlite.helper", exc_type=ImportError)
    made = quest.recipe(recipe)
    bits = (made.weight.grid.levels - 1).bit_length()
    torch.manual_seed(0)
    dense = nn.Linear(inside, outside, bias=False, device=cases.DEVICE, dtype=cases.DTYPE)
    ours = quest.Linear.from_linear(dense, made).freeze()
    codes, scale, zero = _grouped(dense.weight.detach(), bits)
    packer = helper.A16Wn(device=cases.DEVICE, dtype=cases.DTYPE)
    peer = packer.from_weights(codes, scale, zero, bits, GROUP)
    held = ((codes.reshape(-1, GROUP).float() - zero) * scale).reshape(codes.shape)
    x = torch.randn(tokens, inside, device=cases.DEVICE, dtype=cases.DTYPE)

    _close(forward(peer, x), x.float() @ held.T)
    time_frozen(timed, made, ours, tokens, lambda x: forward(ours, x), lambda x: forward(peer, x))


@pytest.mark.parametrize(("width", "order"), cases.rotated_peers())
def test_fast_hadamard(timed: Timed, width: int, order: int) -> None:
    """y = x H."""
    if cases.DEVICE != "cuda":
        pytest.skip("fast_hadamard_transform needs a GPU")
    library = pytest.importorskip("fast_hadamard_transform", exc_type=ImportError)

    def peer(x: Tensor) -> Tensor:
        y: Tensor = library.hadamard_transform(x.view(-1, order), scale=order**-0.5)
        return y.view(x.shape)

    x = torch.randn(16, width, device=cases.DEVICE, dtype=cases.DTYPE)
    _close(peer(x), baselines.rotate(x, baselines.matrix(order, cases.DEVICE, cases.DTYPE)))
    time_transform(timed, width, order, peer)

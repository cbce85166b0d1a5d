"""Other people's low-bit layers, where they are installed; what is called "torch" is the peer here.

torchao's int8 layer (dynamic per-token activations, per-channel weights, absmax scales, no
transform), compiled as its documentation asks. Ours is the frozen W8A8 layer, uncompiled.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quest

from . import cases
from .bench_linear import time_frozen
from .timed import Timed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
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
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    torch.compiler.reset()
    peer = torch.compile(model)

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(x)
        return y

    time_frozen(timed, made, ours, tokens, lambda x: forward(ours, x), lambda x: forward(peer, x))

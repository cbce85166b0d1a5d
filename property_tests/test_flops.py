"""What torch's FlopCounterMode counts of layers: as of torch.nn's, on either path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import quest
from quest import lowbit, operands, paths
from quest.compression import compress
from quest.gated_product import gated_product
from quest.mlp import low_bit_swiglu
from quest.packed import packed_product
from quest.rotated_product import rotated_product
from quest.sparse_product import sparse_product

M, K, N = 6, 64, 32
PRODUCT = 2 * M * N * K


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.whole
@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8", "w4a4-2:4"])
@pytest.mark.parametrize("needs", [(False, True), (True, False), (True, True)])
def test_a_layer_counts_as_torch_s(path: str, recipe: str, needs: tuple[bool, bool]) -> None:
    """Forward and backward, of what the gradients need."""

    def run(layer: nn.Module) -> Callable[[], object]:
        layer.requires_grad_(needs[1])
        x = torch.ones(2, M // 2, K, requires_grad=needs[0])
        return lambda: layer(x).sum().backward()

    expected = counted(run(nn.Linear(K, N)))
    assert expected == PRODUCT * (1 + sum(needs))
    with paths.only(path):
        assert counted(run(quest.Linear(K, N, recipe=recipe))) == expected


def test_layers_that_share_an_input() -> None:
    """One that nobody used costs its forward only."""
    layers = [quest.Linear(K, n, recipe="w4a4") for n in (N, 2 * N)]
    x = torch.ones(M, K, requires_grad=True)
    with paths.only("integers"):
        assert counted(lambda: quest.together(x, layers)[1].sum().backward()) == PRODUCT * 7


@pytest.mark.whole
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_in_evaluation(frozen: bool) -> None:
    """By module as well."""
    model = nn.Sequential(quest.Linear(K, N, recipe="w4a4"), nn.ReLU(), nn.Linear(N, K))
    if frozen:
        quest.freeze_(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(M, K))
    counts = counter.get_flop_counts()
    assert [sum(counts[name].values()) for name in ("Sequential", "Sequential.0")] == [
        2 * PRODUCT,
        PRODUCT,
    ]


def test_a_mlp_in_one_operator() -> None:
    """gate, up and down; the backward makes the first two again."""
    made = quest.recipe("w4a4")
    specs = (made.activation.spec, made.weight.spec) * 2
    x = torch.ones(M, K, requires_grad=True)
    gate, up = (torch.ones(N, K, requires_grad=True) for _ in range(2))
    down = torch.ones(3 * K, N, requires_grad=True)

    def forward(saves: bool) -> Tensor:
        return low_bit_swiglu(x, [gate, up], [], down, None, *specs, saves)[0]

    with torch.no_grad():
        assert counted(lambda: forward(False)) == PRODUCT * (2 + 3)
    assert counted(lambda: forward(True).sum().backward()) == PRODUCT * 3 * (2 + 3) + PRODUCT * 2


@pytest.mark.whole
@pytest.mark.parametrize(("path", "again"), [("values", 2), ("integers", 3)])
def test_a_mlp_that_is_made_again(path: str, again: int) -> None:
    """The counter's hooks make it a checkpoint, which makes `down` again where that saves codes."""
    gate, up = (quest.Linear(K, N, recipe="w4a4") for _ in range(2))
    down, x = quest.Linear(N, K, recipe="w4a4"), torch.ones(M, K, requires_grad=True)
    with paths.only(path):
        total = counted(lambda: quest.swiglu(x, gate, up, down, recompute=True).sum().backward())
    assert total == PRODUCT * (3 * 3 + again)


@pytest.mark.whole
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w4a4-2:4"])
def test_products_by_themselves(recipe: str) -> None:
    """As frozen layers call them where something watches: of what the operands stand for."""
    made = quest.recipe(recipe)
    pair = made.activation, made.weight
    kinds = operands.kinds(*pair)
    assert kinds is not None
    a, b = (
        lowbit.operand(torch.randn(n, K), q.spec, kind)
        for n, q, kind in zip((M, N), pair, kinds, strict=True)
    )
    names = ",".join(q.require_grid().name for q in pair)
    rest = (a[1], b[1], a[2], b[2], None, names, ",".join(kinds), K, torch.bfloat16)
    angles, residual = torch.ones(M, N // 2), torch.ones(M, N, dtype=torch.bfloat16)
    if made.weight.sparsity is not None:
        assert counted(lambda: sparse_product(a[0], *compress(b[0]), *rest)) == PRODUCT
        return
    packed = made.weight.pack(torch.randn(N, K)).codes
    for call in (
        lambda: lowbit.accumulate(a[0], b[0]),
        lambda: lowbit.product(a[0], b[0], *rest),
        lambda: lowbit.product(a[0], b[0], *rest, residual=residual),
        lambda: gated_product(a[0], b[0], *rest),
        lambda: rotated_product(a[0], b[0], *rest, angles, angles, N),
        lambda: packed_product(a[0], packed, *rest),
        lambda: packed_product(a[0], packed, *rest, settled=True),
    ):
        assert counted(call) == PRODUCT

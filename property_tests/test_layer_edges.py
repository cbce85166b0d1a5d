"""What layers on the integer path check and differentiate, and layers in models, at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quest
from quest import grids, lowbit_linear, paths, prologue
from quest.lowbit_linear import low_bit_linear, low_bit_linear_backward

pytestmark = pytest.mark.whole

TWO, FOUR = (quest.Quantizer(grids.uniform(bits)) for bits in (2, 4))
PRUNED = quest.Quantizer(grids.uniform(4), sparsity=quest.NM(2, 4))


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _checks(x: Tensor, *weights: Tensor, weight: quest.Quantizer = FOUR) -> None:
    made = lowbit_linear.pair(FOUR.spec, weight.spec)
    lowbit_linear.check(x, weights, [], made, None)


ROWS, WEIGHT = torch.zeros(3, 128), torch.zeros(5, 128)


@pytest.mark.parametrize(
    ("x", "weights", "error", "told"),
    [
        (ROWS.int(), (WEIGHT,), TypeError, "x must be float32, bfloat16 or float16, got"),
        (ROWS.double(), (WEIGHT,), TypeError, "x must be float32, bfloat16 or float16, got"),
        (ROWS, (WEIGHT.int(),), TypeError, "a weight must be float32, bfloat16 or float16, got"),
        (ROWS, (WEIGHT, WEIGHT.int()), TypeError, "a weight must be float32, bfloat16 or float16"),
        (ROWS, (WEIGHT[0],), ValueError, r"a weight must be \(out, 128\) on cpu, got shape \(128,"),
        (ROWS, (WEIGHT[:, :64],), ValueError, r"a weight must be \(out, 128\) on cpu, got shape"),
        (ROWS, (WEIGHT.to("meta"),), ValueError, r"a weight must be \(out, 128\) on cpu, .* meta"),
        (ROWS, (WEIGHT, WEIGHT.half()), TypeError, "got torch.float32 and torch.float16"),
        (ROWS, (WEIGHT.half(), WEIGHT), TypeError, "got torch.float16 and torch.float32"),
    ],
)  # fmt: skip
def test_what_the_layer_of_integers_does_not_take(
    x: Tensor, weights: tuple[Tensor, ...], error: type[Exception], told: str
) -> None:
    _checks(ROWS, WEIGHT, WEIGHT)
    with pytest.raises(error, match=told):
        _checks(x, *weights)


def test_a_weight_that_its_own_quantizer_does_not_take() -> None:
    with pytest.raises(ValueError, match="width 6 is not divisible by the group of 4"):
        _checks(ROWS[:, :6], WEIGHT[:, :6], weight=PRUNED)


def _grads(
    x: Tensor, weights: list[Tensor], grads: list[Tensor], used: list[int]
) -> list[Tensor | None]:
    """Of x and of each weight, where these outputs have a gradient."""
    asked = [t.detach().clone().requires_grad_(t.requires_grad) for t in (x, *weights)]
    ys = low_bit_linear(asked[0], asked[1:], [], TWO.spec, FOUR.spec, torch.float32, True)
    torch.autograd.backward([ys[i] for i in used], [grads[i] for i in used])
    return [t.grad for t in asked]


@pytest.mark.parametrize("used", [[0, 1, 2], [0, 2], [1, 2], [1]], ids=str)
def test_each_weight_s_gradients_are_those_that_it_has_alone(used: list[int]) -> None:
    """And those of x are summed."""
    x = _random(3, 128).requires_grad_()
    weights = [_random(5, 128, seed=20 + i).requires_grad_() for i in range(3)]
    grads = [_random(3, 5, seed=10 + i) for i in range(3)]
    found = _grads(x, weights, grads, used)
    total = torch.zeros_like(x)
    for i, w in enumerate(weights):
        if i not in used:
            assert found[1 + i] is None
            continue
        dx, dw = _grads(x, [w], [grads[i]], [0])
        assert dx is not None
        assert dw is not None
        total = total + dx
        made = found[1 + i]
        assert made is not None
        # The same operations on the same numbers: equal but for the order of a library's sums.
        torch.testing.assert_close(made, dw, rtol=1e-5, atol=1e-5)
    assert found[0] is not None
    # Added before the transform and not behind it: some 15 roundings of 2^-24, of up to 32.
    torch.testing.assert_close(found[0], total, rtol=1e-4, atol=1e-4)


def test_one_weight_of_two_asks_alone() -> None:
    x, grads = _random(3, 128), [_random(3, 5, seed=i) for i in (2, 3)]
    for asks in (0, 1):
        weights = [_random(5, 128, seed=1 + i).requires_grad_(i == asks) for i in range(2)]
        found = _grads(x, weights, grads, [0, 1])
        assert [g is not None for g in found] == [False, asks == 0, asks == 1]


def test_gradients_have_the_dtype_of_what_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rounded to no other: of a weight in float32 beside an x in bfloat16, or reversed."""
    made: list[list[Tensor]] = []

    def watched(*arguments: Any) -> list[Tensor]:
        made.append(low_bit_linear_backward(*arguments))
        return made[-1]

    monkeypatch.setattr(lowbit_linear, "low_bit_linear_backward", watched)
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        x = _random(3, 128, dtype=dtypes[0]).requires_grad_()
        weight = _random(5, 128, seed=1, dtype=dtypes[1]).requires_grad_()
        found = _grads(x, [weight], [_random(3, 5)], [0])
        assert [t.dtype for t in made.pop()] == list(dtypes)
        assert [t is not None and t.dtype for t in found] == list(dtypes)


def test_a_gate_is_checked_as_the_layer_checks_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one operator makes the product and multiplies it."""
    monkeypatch.setattr(prologue, "has_kernel", lambda *_: True)
    layer = quest.Linear(128, 5)
    gate, narrow = _random(3, 128, dtype=torch.bfloat16), _random(3, 64)
    with paths.only("integers"):
        with pytest.raises(TypeError, match=r"x must have the weight's dtype torch\.float32"):
            quest.gated(gate, gate, layer)
        with pytest.raises(ValueError, match=r"x must have 128 columns \(in_features\), got"):
            quest.gated(narrow, narrow, layer)
        assert quest.gated(gate.float(), gate.float(), layer).shape == (3, 5)


# Layers in models.


def test_a_frozen_weight_is_made_again_where_a_conversion_ends_in_the_same_memory() -> None:
    """An allocator may give a converted weight the address that it had before."""
    layer = quest.Linear(16, 4).freeze()
    memory, x = layer.weight.data, _random(3, 16)
    layer.bfloat16()
    layer._apply(lambda t: memory.copy_(-t))
    assert layer.weight.data_ptr() == memory.data_ptr()
    with torch.no_grad():
        y = layer.eval()(x)
    fresh = quest.Linear(16, 4)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(y, fresh(x))


class Model(nn.Module):
    """A body, a head by its name, and one that a method names; all of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.inner = nn.ModuleDict({"lm_head": nn.Linear(8, 8)})
        self.named = nn.Linear(8, 8)
        self.again = nn.ModuleList([self.body[0]])

    def get_output_embeddings(self) -> nn.Module:
        """The head, as Hugging Face's models have it."""
        return self.named


def test_heads_stay_whoever_names_them() -> None:
    model = Model()
    quest.quantize_(model, "w4a4")
    assert type(model.body[0]) is quest.Linear
    assert type(model.inner["lm_head"]) is nn.Linear
    assert type(model.named) is nn.Linear


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    model = Model()
    quest.quantize_(model, "w4a4")
    assert type(model.again[0]) is quest.Linear
    assert model.again[0] is model.body[0]

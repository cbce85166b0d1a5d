"""The differentiable layer on the integer path: its fakes, and gradients that nobody asks for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import quest
from quest import grids, lowbit_linear
from quest.lowbit_linear import low_bit_linear, low_bit_linear_backward, saves

pytestmark = pytest.mark.whole

ONE, TWO, FOUR, EIGHT, PRUNED = (
    quest.Quantizer(grids.uniform(1)), quest.Quantizer(grids.uniform(2)),
    quest.Quantizer(grids.uniform(4)), quest.Quantizer(grids.uniform(8)),
    quest.Quantizer(grids.uniform(4), sparsity=quest.NM(2, 4)),
)  # fmt: skip
PAIRS = [(ONE, ONE), (TWO, FOUR), (FOUR, TWO), (EIGHT, FOUR), (FOUR, EIGHT), (PRUNED, FOUR),
         (ONE, FOUR)]  # fmt: skip


def _alike(made: Sequence[Tensor], fake: Sequence[Tensor]) -> None:
    seen = [[(t.shape, t.dtype) for t in ts] for ts in (made, fake)]
    assert seen[0] == seen[1]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0].grid}-{p[1].grid}")
def test_the_fakes_say_what_is_returned(pair: tuple[quest.Quantizer, quest.Quantizer]) -> None:
    """Also of another dtype than x and the weights have, and of rows with two axes before them."""
    a, w = (q.spec for q in pair)
    x, weights = _random(2, 3, 128, dtype=torch.bfloat16), [_random(5, 128), _random(7, 128)]
    for saved in (False, True):
        rest: tuple[Any, ...] = ([], a, w, torch.float16, saved)
        made = low_bit_linear(x, weights, *rest)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (x, *weights)]
            _alike(made, low_bit_linear(fakes[0], fakes[1:], *rest))
    read = made[2:]
    assert len(read) == 9
    grads = [_random(6, 5), _random(6, 7)]
    for needs_x in (False, True):
        for needs_w in ([True, False], [True, True], [False, False]):
            back = (a, w, 128, torch.bfloat16, torch.float16, needs_x, needs_w)
            found = low_bit_linear_backward(grads, read, *back)
            assert len(found) == needs_x + sum(needs_w)
            with FakeTensorMode() as mode:
                of = [[mode.from_tensor(t) for t in ts] for ts in (grads, read)]
                _alike(found, low_bit_linear_backward(*of, *back))


def test_which_weights_few_rows_meet_packed() -> None:
    """Of 2 and 4 bits, dense, beside activations that can be multiplied with them: single bits are
    packed in any case.
    """
    found = {}
    for name in ("w1a1", "w2a2", "w3a3", "w4a4", "w8a8", "w2a4", "w4a2", "w4a8", "w4a4-2:4"):
        made = quest.recipe(name)
        found[name] = lowbit_linear.pair(made.activation.spec, made.weight.spec).packed
    assert {n: bits for n, bits in found.items() if bits} == {
        "w2a2": 2, "w4a4": 4, "w2a4": 2, "w4a2": 4,
    }  # fmt: skip


def test_the_backward_s_fake_wants_one_answer_for_each_gradient() -> None:
    x, w = _random(3, 128), _random(5, 128)
    _, *read = low_bit_linear(x, [w], [], FOUR.spec, FOUR.spec, torch.float32, True)
    with FakeTensorMode() as mode:
        g, *read = (mode.from_tensor(t) for t in (_random(3, 5), *read))
        with pytest.raises(ValueError, match="argument 2 is longer"):
            low_bit_linear_backward(
                [g], read, FOUR.spec, FOUR.spec, 128, torch.float32, torch.float32, True,
                [True, True],
            )  # fmt: skip


def test_the_fake_finds_the_product_that_a_pair_has() -> None:
    """Operands that differ: activation and weight may not be taken for one another."""
    with FakeTensorMode() as mode:
        x, w = mode.from_tensor(_random(3, 128)), mode.from_tensor(_random(5, 128))
        _, a, _, _, b, _, _ = low_bit_linear(x, [w], [], TWO.spec, FOUR.spec, torch.float32, True)
    assert (a.shape, b.shape) == ((3, 32), (5, 64))


def test_what_asks_for_a_gradient() -> None:
    x, w, b = _random(3, 128), _random(5, 128), _random(5)
    asking = [t.clone().requires_grad_() for t in (x, w, b)]
    assert not saves(x, [w], [b])
    assert not saves(x, [w], [])
    for made in ((asking[0], [w], [b]), (x, [w, asking[1]], []), (x, [w], [b, asking[2]])):
        assert saves(*made)
        with torch.no_grad():
            assert not saves(*made)


def _layer(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], gate: Tensor | None = None
) -> list[Tensor]:
    made: list[Tensor] = low_bit_linear(
        x, weights, biases, FOUR.spec, FOUR.spec, torch.float32, True, gate
    )
    return made


def test_what_the_backward_reads_asks_for_no_gradient() -> None:
    x, w = _random(3, 128).requires_grad_(), _random(5, 128).requires_grad_()
    y, *read = _layer(x, [w], [])
    assert y.requires_grad
    assert [t.requires_grad for t in read] == [False] * len(read)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Of the operator that multiplies in the backward."""
    seen: list[tuple[Any, ...]] = []

    def watched(*arguments: Any) -> list[Tensor]:
        seen.append(arguments)
        made: list[Tensor] = low_bit_linear_backward(*arguments)
        return made

    monkeypatch.setattr(lowbit_linear, "low_bit_linear_backward", watched)
    return seen


def test_a_weight_whose_output_nobody_used_has_no_gradient(calls: list[tuple[Any, ...]]) -> None:
    """Not even zeros, and none of its products is made."""
    x = _random(3, 128).requires_grad_()
    weights = [_random(5, 128).requires_grad_() for _ in range(3)]
    biases = [_random(5).requires_grad_() for _ in range(3)]
    ys = _layer(x, weights, biases)
    torch.autograd.backward(ys[1].sum())
    assert [w.grad is None for w in weights] == [True, False, True]
    assert [b.grad is None for b in biases] == [True, False, True]
    assert [len(c[0]) for c in calls] == [1]
    alone, w = x.detach().clone().requires_grad_(), weights[1].detach().clone().requires_grad_()
    torch.autograd.backward(_layer(alone, [w], [biases[1].detach()])[0].sum())
    for one, other in ((x, alone), (weights[1], w)):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_gradients_of_biases_of_unlike_dtypes() -> None:
    """Each is a sum in the layer's dtype, rounded to its own bias's."""
    weights = [_random(5, 128), _random(5, 128)]
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        biases = [_random(5).to(dtype).requires_grad_() for dtype in dtypes]
        ys = _layer(_random(6, 128), weights, biases)
        grads = [_random(6, 5), _random(6, 5) / 3]
        torch.autograd.backward(ys[:2], grads)
        for bias, grad in zip(biases, grads, strict=True):
            assert bias.grad is not None
            assert torch.equal(bias.grad, grad.sum(0).to(bias.dtype))


def test_biases_alone_ask_for_no_product(calls: list[tuple[Any, ...]]) -> None:
    x, w = _random(3, 128), _random(5, 128)
    b = [_random(5).requires_grad_(), _random(5), _random(5).bfloat16().requires_grad_()]
    ys = _layer(x, [w] * 3, b)
    g = [_random(3, 5), _random(3, 5) + 1, _random(3, 5) - 1]
    torch.autograd.backward(ys[:3], g)
    assert not calls
    assert b[1].grad is None
    for i in (0, 2):
        found = b[i].grad
        assert found is not None
        assert torch.equal(found, g[i].sum(0).to(b[i].dtype))


class _Context(SimpleNamespace):
    """Of two weights and biases, without a gate; it has saved nothing."""

    def __init__(self, *needs: Any) -> None:
        super().__init__(
            count=2, shape=(3, 128), dtype=torch.float32, w_dtype=torch.float32, gated=False,
            biases=[torch.float32] * 2, needs_input_grad=(*needs, *[False] * 4),
        )  # fmt: skip


def test_a_bias_that_asks_for_nothing_is_not_summed() -> None:
    context = _Context(False, [False, False], [True, False])
    dx, dws, dbs, *rest = lowbit_linear._backward(context, [_random(3, 5), _random(3, 5)])
    assert (dx, dws, rest) == (None, [None, None], [None] * 4)
    assert [t is None for t in dbs] == [False, True]
    context = _Context(False, [False, False], False)
    context.biases = []
    assert lowbit_linear._backward(context, [_random(3, 5), None])[2] == []


def test_outputs_without_a_gradient_give_none(calls: list[tuple[Any, ...]]) -> None:
    """All of them, as where what used them had none for them."""
    context = _Context(True, [True, True], [True, True])
    dx, dws, dbs, *_ = lowbit_linear._backward(context, [None, None, _random(3, 64)])
    assert (dx, dws, dbs, calls) == (None, [None, None], [None, None], [])


def test_x_alone_asks() -> None:
    x, w = _random(3, 128).requires_grad_(), _random(5, 128)
    y = _layer(x, [w], [])[0]
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    values = FOUR(w).double()
    expected = torch.where(FOUR.quantize(x).mask, values.sum(0), 0.0)
    # Back and forth, each a product with a matrix of 128 entries of 128 ** -0.5 a row: its error is
    # at most 128 u 128 ** 0.5 of the row's norm. And a sum of five values, each rounded.
    eps = torch.finfo(torch.float32).eps
    bound = 128**1.5 * eps * expected.norm(dim=1) + 6 * eps * values.abs().sum(0).norm()
    made = FOUR.transform.apply(x.grad).double()
    assert ((made - expected).norm(dim=1) <= bound).all()


def test_a_layer_that_saved_nothing_has_no_backward() -> None:
    x, w = _random(3, 128).requires_grad_(), _random(5, 128)
    with pytest.raises(RuntimeError, match="was told to save nothing, and a gradient is asked"):
        low_bit_linear(x, [w], [], FOUR.spec, FOUR.spec, torch.float32, False)


def test_what_cuda_launches() -> None:
    """Each part of a layer on CUDA is the launcher of its name."""
    for name, function in lowbit_linear._CUDA._asdict().items():
        assert function.__name__.lstrip("_") == f"launch_{name}"

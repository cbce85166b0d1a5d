"""What the sparse product refuses, and what it gives its kernel, which is a fake here; no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quest
from quest import compression, grids, lowbit
from quest.kernels import hopper, sparse
from quest.sparse_product import eager_sparse_product, sparse_product

pytestmark = pytest.mark.whole

FOUR, EIGHT = (quest.Quantizer(grids.uniform(bits)) for bits in (4, 8))
SPARSE = quest.recipe("w4a4-2:4").weight
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def _arguments(kind: str = "integers", features: int = 24) -> tuple[Tensor, list[Any]]:
    """The weight's operand, and the arguments of `sparse_product`, for 5 rows of 256 entries."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 256, generator=g) for n in (5, features))
    q = FOUR if kind == "integers" else EIGHT
    a, a_scale, _, a_sums = lowbit.encode(x, q.spec, kind)
    b, b_scale, _, b_sums = lowbit.encode(w, SPARSE.spec, "integers")
    names = f"{q.require_grid().name},{SPARSE.require_grid().name}"
    rest = [a_scale, b_scale, a_sums, b_sums, torch.randn(features, generator=g)]
    said = [names, f"{kind},integers", 256, torch.float16]
    return b, [a, *compression.compress(b), *rest, *said]


@pytest.mark.parametrize(
    ("position", "value", "told"),
    [
        (1, torch.tensor(1).char(), r"values must be torch.int8 of shape \(0, 128\) .* shape \(\)"),
        (1, torch.zeros(24, 128, 1).char(), r"values must be .* got torch.int8 of shape \(24, 128"),
        (1, torch.zeros(24, 64).char(), r"values must be .* of shape \(24, 128\) on cpu for a wid"),
        (1, torch.zeros(24, 128).int(), "values must be torch.int8 .* got torch.int32 of shape"),
        (2, torch.zeros(23, 8).int(), r"metadata must be torch.int32 of shape \(24, 8\) on cpu"),
        (2, torch.zeros(24, 16).int(), r"metadata must be torch.int32 of shape \(24, 8\) on cpu"),
        (2, torch.zeros(24, 8), "metadata must be torch.int32 .* got torch.float32 of shape"),
        (9, "integers,codes", "kinds must be integers or codes, and integers, got 'integers,co"),
        (9, "bits,bits", "kinds must be integers or codes, and integers, got 'bits,bits'"),
    ],
)
def test_what_is_refused(position: int, value: Any, told: str) -> None:
    _, arguments = _arguments()
    arguments[position] = value
    with pytest.raises(ValueError, match=told):
        eager_sparse_product(*arguments)


@pytest.mark.parametrize("kind", ["integers", "codes"])
@pytest.mark.parametrize("features", [1, 24])
def test_that_it_is_the_product_of_the_operand(features: int, kind: str) -> None:
    operand, (a, _, _, *rest) = _arguments(kind, features)
    expected = lowbit.eager_product(a, operand, *rest)
    assert torch.equal(sparse_product(*_arguments(kind, features)[1]), expected)


def test_rows_that_are_one_in_memory() -> None:
    """Nothing is looked at beyond the eight values that there are."""
    x, w = torch.randn(5, 16), torch.randn(1, 16)
    a, a_scale, _, a_sums = lowbit.encode(x, FOUR.spec, "integers")
    b, *rest = lowbit.encode(w, SPARSE.spec, "integers")
    values, metadata, w_scale, w_sums = (
        t.expand(200, -1) for t in (*compression.compress(b), rest[0], rest[2])
    )
    assert (values.shape, values.untyped_storage().nbytes()) == ((200, 8), 8)
    said = (None, "uniform4,uniform4", "integers,integers", 16, torch.float32)
    y = sparse_product(a, values, metadata, a_scale, w_scale, a_sums, w_sums, *said)
    one = lowbit.eager_product(a, b, a_scale, rest[0], a_sums, rest[2], *said)
    assert torch.equal(y, one.expand(-1, 200))


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _on_cuda(*arguments: Any) -> Any:
    """The operator's kernel for CUDA, of tensors that lie elsewhere."""
    return torch.ops.quest.sparse_product.default.redispatch(CUDA, *arguments)


@pytest.mark.parametrize("kind", ["integers", "codes"])
@pytest.mark.parametrize("biased", [False, True])
def test_what_the_kernel_is_given(biased: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors without gaps; of codes c, which stand for c + 1/2, twice the sums of the weight."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    made = torch.zeros(1)

    def product(*given: Any, **named: Any) -> Tensor:
        seen.append((given, named))
        return made

    monkeypatch.setattr(sparse, "product", product)
    monkeypatch.setattr(hopper, "unavailable", lambda device: None)
    a, values, metadata, a_scale, w_scale, a_sums, w_sums, bias, *said = _arguments(kind)[1]
    bias = bias if biased else None
    y = _on_cuda(
        a, values, metadata, *map(_strided, (a_scale, w_scale, a_sums, w_sums)),
        None if bias is None else _strided(bias), *said,
    )  # fmt: skip
    assert y.data_ptr() == made.data_ptr()
    ((given, named),) = seen
    assert given[3:] == (torch.float16,)
    for found, t in zip(given, (values, metadata, a), strict=False):
        assert torch.equal(found, t)
    codes = kind == "codes"
    assert named.pop("epilogue") == (hopper.CORRECTED if codes else hopper.PLAIN)
    # An integer stands for half of its grid's step, eight times, of 4 bits; for codes the
    # accumulator counts in halves.
    steps = [q.require_grid().step or 0 for q in (EIGHT if codes else FOUR, SPARSE)]
    assert named.pop("factor") == steps[0] * steps[1] / (16 if codes else 16 * 16)
    vectors = {
        "feature_scale": w_scale, "token_scale": a_scale,
        "feature_sum": 2 * w_sums if codes else None, "bias": bias,
    }  # fmt: skip
    assert set(named) == set(vectors)
    for name, t in vectors.items():
        if t is None:
            assert named[name] is None
        else:
            assert torch.equal(named[name], t)
            assert named[name].is_contiguous()


def test_a_device_without_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "unavailable", lambda device: f"{device} is too old")
    monkeypatch.setattr(sparse, "product", lambda *_, **__: pytest.fail("was launched"))
    with pytest.raises(RuntimeError, match="the low-bit product can't run here: cpu is too old"):
        _on_cuda(*_arguments()[1])

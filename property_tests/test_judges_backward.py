"""The judges of a transform's backward and of a layer as an adjoint hold and bite."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.honest import BF16, F32, SEEDS, Array, by_matrix, sign_matrix, tensor
from property_tests.honest_layer import transposed_case
from quest.conformance import inputs, judges, oracle
from quest.conformance.verdict import Rejected, Verdict
from quest.reference import bounds, hadamard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 8, 128, 12, 40])
@given(seed=SEEDS)
def test_transposed_holds(order: int, dtype: torch.dtype, seed: int) -> None:
    grad, flags, packed = transposed_case(order, seed, dtype)
    taken = oracle.lift(grad) * flags
    ways = [hadamard.apply_transpose(taken, order)]
    ways.append(by_matrix(sign_matrix(order).T.astype(F32), taken.astype(F32), order)
                * F32(order**-0.5))  # fmt: skip
    for way in ways:
        judges.transposed(grad, packed, tensor(way, dtype), order).require()


BACKWARD_FAULTS: list[tuple[str, Callable[[Array, Array, int], Array]]] = [
    ("mask left out", lambda g, m, n: hadamard.apply_transpose(g, n)),
    ("mask inverted", lambda g, m, n: hadamard.apply_transpose(g * ~m, n)),
    ("mask after H^T", lambda g, m, n: hadamard.apply_transpose(g, n) * m),
    ("mask of the next row", lambda g, m, n: hadamard.apply_transpose(g * np.roll(m, 1, 0), n)),
    ("H^T left out", lambda g, m, n: g * m),
    ("H where H^T is due", lambda g, m, n: hadamard.apply(g * m, n)),
    ("n^-1/2 missing", lambda g, m, n: hadamard.apply_transpose(g * m, n) * n**0.5),
    ("H in bfloat16", lambda g, m, n: by_matrix(
        tensor(sign_matrix(n).T * n**-0.5, BF16).double().numpy(), g * m, n)),
    ("unwritten tail", lambda g, m, n: np.where(
        np.arange(g.shape[-1]) < n, hadamard.apply_transpose(g * m, n), math.nan)),
]  # fmt: skip


@pytest.mark.parametrize("wrong", [pytest.param(f[1], id=f[0]) for f in BACKWARD_FAULTS])
@pytest.mark.parametrize("order", [12, 40])
def test_transposed_bites(wrong: Callable[..., Array], order: int) -> None:
    grad, flags, packed = transposed_case(order, 0, torch.float32)
    with pytest.raises(Rejected, match=r"^backward: at"):
        judges.transposed(grad, packed, tensor(wrong(oracle.lift(grad), flags, order)), order
                          ).require()  # fmt: skip


def test_transposed_bites_where_a_masked_infinity_spreads() -> None:
    grad, flags, packed = transposed_case(8, 0, torch.float32)
    grad[0, int(np.flatnonzero(~flags[0])[0])] = math.inf
    g64 = oracle.lift(grad)
    chosen = np.where(flags, g64, 0.0)
    judges.transposed(grad, packed, tensor(hadamard.apply_transpose(chosen, 8)), 8).require()
    with np.errstate(invalid="ignore"):
        product = hadamard.apply_transpose(g64 * flags, 8)
    with pytest.raises(Rejected, match=r"^backward: at \(0, \d+\) it is .*nan"):
        judges.transposed(grad, packed, tensor(product), 8).require()


# --- the adjoint ------------------------------------------------------------------------------


def adjoint_case(
    order: int, dtype: torch.dtype, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Array]]:
    x = inputs.draw("gaussian", (5, 2 * order), dtype, seed)
    w = inputs.draw("gaussian", (7, 2 * order), dtype, seed + 1)
    g = inputs.draw("gaussian", (5, 7), dtype, seed + 2)
    x64, w64, g64 = map(oracle.lift, (x, w, g))
    return (x, w, g), {"y": x64 @ w64.T, "dx": g64 @ w64, "dw": g64.T @ x64}


def adjoint(case: tuple[Tensor, ...], out: dict[str, Array], order: int) -> Verdict:
    tensors = {k: tensor(v, case[0].dtype) for k, v in out.items()}
    return judges.adjoint(case[0], case[1], case[2], tensors, order, bounds.U32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**16), order=st.sampled_from([1, 8, 128, 12, 28]))
def test_adjoint_holds(seed: int, order: int, dtype: torch.dtype) -> None:
    case, out = adjoint_case(order, dtype, seed)
    adjoint(case, out, order).require()
    low = {k: tensor(v.astype(F32), dtype).double().numpy() for k, v in out.items()}
    adjoint(case, low, order).require()


@pytest.mark.parametrize("order", [12, 28])
@pytest.mark.parametrize("name", ["dx", "dw"])
def test_adjoint_bites(order: int, name: str) -> None:
    for seed in range(5):
        case, out = adjoint_case(order, torch.float32, seed)
        for wrong in (
            hadamard.apply(out[name], order),
            hadamard.apply_transpose(out[name], order),
            -out[name],
            out[name][:, ::-1],
            out[name] * math.nan,
        ):
            with pytest.raises(Rejected, match=rf"^adjoint: .*<{name}, v>"):
                adjoint(case, out | {name: wrong}, order).require()

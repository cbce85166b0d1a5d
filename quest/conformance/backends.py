"""The operators of each backend of a lane: as registered, in plain PyTorch, or launched."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any


@functools.cache
def operators(backend: str) -> Any:
    """The functions of a backend by operator name."""
    from quest import (
        compression,
        eager,
        gated_product,
        lowbit,
        ops,
        prologue,
        rotated_product,
        sparse_product,
    )

    if backend == "dispatch":
        return SimpleNamespace(
            compress=compression.compress,
            gated_encode=prologue.gated_encode,
            gated_encode_shown=prologue.gated_encode_shown,
            normed_encode=prologue.normed_encode,
            normed_encode_shown=prologue.normed_encode_shown,
            encode=lambda x, q, kind: lowbit.encode(x, q.spec, kind),
            operand=lambda x, q, kind: lowbit.operand(x, q.spec, kind),
            pack_operand=lambda a, q: lowbit.pack_operand(a, q.spec),
            decode=lambda a, scale, q, *rest: lowbit.decode(a, scale, q.spec, *rest),
            accumulate=lowbit.accumulate,
            product=lowbit.product,
            gated_product=gated_product.gated_product,
            rotated_product=rotated_product.rotated_product,
            sparse_product=sparse_product.sparse_product,
            hadamard=ops.hadamard,
            masked_transpose=ops.masked_transpose,
            fake_quantize=lambda x, q: ops.fake_quantize(x, q.spec),
            quantize=lambda x, q, packed: ops.quantize(x, q.spec, packed),
        )
    if backend not in ("eager", "launch"):
        raise ValueError(f"there is no backend {backend!r}")
    functions = (
        (
            eager.hadamard, eager.masked_transpose, eager.quantize, eager.encode, eager.decode,
            compression.eager_compress, lowbit.eager_operand, eager.pack_operand,
            prologue.eager_gated_encode, prologue.eager_normed_encode,
        )
        if backend == "eager"
        else (
            ops.launch_hadamard, ops.launch_masked_transpose, ops.launch_quantize,
            lowbit.launch_encode, lowbit.launch_decode, compression.launch_compress,
            lowbit.launch_operand, lowbit.launch_pack,
            functools.partial(prologue.launch_gated_encode, show=True),
            functools.partial(prologue.launch_normed_encode, show=True),
        )
    )  # fmt: skip
    return SimpleNamespace(
        compress=functions[5],
        gated_encode=lambda *arguments: functions[8](*arguments)[:3],
        gated_encode_shown=functions[8],
        normed_encode=lambda *arguments: functions[9](*arguments)[:4],
        normed_encode_shown=functions[9],
        encode=functions[3],
        operand=functions[6],
        pack_operand=functions[7],
        decode=functions[4],
        accumulate=eager.accumulate,
        product=lowbit.eager_product,
        gated_product=gated_product.eager_gated_product,
        rotated_product=rotated_product.eager_rotated_product,
        sparse_product=sparse_product.eager_sparse_product,
        hadamard=functions[0],
        masked_transpose=functions[1],
        fake_quantize=lambda x, q: functions[2](x, q, values=True, codes=False, packed=True)[::3],
        quantize=lambda x, q, packed: functions[2](x, q, values=False, codes=True, packed=packed)[
            1:
        ],
    )

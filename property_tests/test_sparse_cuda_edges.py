"""Sparse products where tiles, turns, scales and memory end; operands are drawn, not quantized.

On a GPU, and, what is not too large, in the emulator.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import quest
from property_tests import far_scales, overlapped
from property_tests.places import Place, on_a_gpu
from quest import compression, operands
from quest.conformance import judges
from quest.kernels import cuda, hopper, outputs, product, sparse

pytestmark = pytest.mark.whole

TILES = {"wide": sparse.WIDE, "narrow": sparse.NARROW}


@pytest.fixture(autouse=True)
def _on_hopper(place: Place) -> None:
    if reason := hopper.unavailable(torch.device(place.device)):
        pytest.skip(reason)


@dataclass(frozen=True)
class Operands:
    """x (tokens, width) and w (features, width) int8, w 2:4 sparse, and what dequantizes."""

    x: torch.Tensor
    w: torch.Tensor
    token_scale: torch.Tensor
    feature_scale: torch.Tensor
    bias: torch.Tensor


def _draw(tokens: int, features: int, width: int, added: torch.dtype = torch.float32) -> Operands:
    g = torch.Generator().manual_seed(tokens + features)
    x, w = (torch.randint(-128, 128, (n, width), generator=g).to(torch.int8)
            for n in (tokens, features))  # fmt: skip
    places = torch.rand((features, width // 4, 4), generator=g).argsort(-1).argsort(-1)
    # Neighbours differ by more than 16 bits hide; what is made fits float16.
    of_tokens, of_features = (
        torch.exp2(torch.randint(-9, -4, (n,), generator=g)) * (1 + torch.rand(n, generator=g))
        for n in (tokens, features)
    )
    bias = 10 * torch.randn(features, generator=g)
    kept = w * (places < 2).reshape(w.shape)
    return Operands(x, kept, of_tokens, of_features, bias.to(added))


def _made(
    place: Place, o: Operands, tiles: str, out: torch.dtype, epilogue: int,
    metadata: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product, in memory that held NaN; metadata: that of w, where it lies elsewhere."""
    to = place.device
    values, words = compression.compress(o.w)
    rest: dict[str, Any] = {}
    if epilogue != hopper.RAW:
        rest = {
            "feature_scale": o.feature_scale.to(to), "token_scale": o.token_scale.to(to),
            "bias": o.bias.to(to),
        }  # fmt: skip
    if epilogue == hopper.CORRECTED:
        rest["feature_sum"] = 2 * o.w.sum(-1, dtype=torch.int32).to(to)
    with sparse.only(TILES[tiles]), outputs.poisoned(0xFF):
        return sparse.product(
            values.to(to), words.to(to) if metadata is None else metadata, o.x.to(to), out,
            epilogue=epilogue, **rest,
        )  # fmt: skip


def _judge(o: Operands, y: torch.Tensor, epilogue: int) -> None:
    """T0, or T6; codes are each 1/2 less than what they stand for."""
    if epilogue == hopper.RAW:
        judges.accumulated(o.x, o.w, y.cpu()).require()
        return
    codes = epilogue == hopper.CORRECTED
    whole = (judges.whole(o.x, "codes" if codes else "integers", o.x.shape[1]),
             judges.whole(o.w, "integers", o.w.shape[1]))  # fmt: skip
    scales = (o.token_scale[:, None], o.feature_scale[:, None])
    units = (0.5 if codes else 1.0, 1.0)
    judges.multiplied(whole, units, scales, o.bias, y.cpu()).require()


def test_many_tokens(place: Place) -> None:
    """Tiles are counted, and there are few of them: 2^31 / 256 would be too many."""
    o = _draw(33000, 8, 64)
    _judge(o, _made(place, o, "wide", torch.float32, hopper.PLAIN), hopper.PLAIN)


@pytest.mark.parametrize(
    ("tiles", "epilogue", "out", "shape"),
    [
        ("wide", hopper.PLAIN, torch.float32, (300, 2100, 640)),
        ("narrow", hopper.PLAIN, torch.float32, (300, 601, 512)),
        ("wide", hopper.CORRECTED, torch.bfloat16, (300, 601, 512)),
        ("narrow", hopper.CORRECTED, torch.float16, (200, 2100, 640)),
        ("narrow", hopper.RAW, torch.int32, (20, 2100, 640)),
    ],
    ids=str,
)
def test_turns_of_one_cluster(
    place: Place, tiles: str, epilogue: int, out: torch.dtype, shape: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What one turn writes to shared memory leaves alone what the next ones wait at and read.

    More row tiles than share the L2 cache; a last tile that begins early; an odd count of blocks of
    256 entries, and an even one; rows of y that begin at no vector.
    """
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    o = _draw(*shape, torch.float16 if out == torch.bfloat16 else torch.bfloat16)
    _judge(o, _made(place, o, tiles, out, epilogue), epilogue)


@pytest.mark.parametrize("others", ["drawn", "0"])
@pytest.mark.parametrize("tiles", list(TILES))
def test_one_far_token_anywhere_in_a_tile(
    place: Place, tiles: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread learns of it, whichever token has it, and only that token's row changes.

    In two turns: at the second, scales of 0 lie all around, and look like those of no far token.
    In the emulator for a few tokens, those of other warps and lanes.
    """
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    tokens = TILES[tiles].columns
    o = _draw(tokens, 330, 64)
    if others == "0":
        o = Operands(o.x, o.w, torch.zeros(tokens), o.feature_scale, o.bias)
    everywhere = Operands(o.x, o.w, torch.full((tokens,), 1e30), o.feature_scale, o.bias)
    plain, far = (
        _made(place, each, tiles, torch.float32, hopper.PLAIN).cpu() for each in (o, everywhere)
    )
    _judge(o, plain, hopper.PLAIN)
    _judge(everywhere, far, hopper.PLAIN)
    to = place.device
    values, metadata = (t.to(to) for t in compression.compress(o.w))
    x, of_features, bias = (t.to(to) for t in (o.x, o.feature_scale, o.bias))
    for token in range(0, tokens, 1 if to == "cuda" else 29):
        one, expected = o.token_scale.clone(), plain.clone()
        one[token], expected[token] = 1e30, far[token]
        with sparse.only(TILES[tiles]):
            y = sparse.product(
                values, metadata, x, torch.float32, epilogue=hopper.PLAIN,
                feature_scale=of_features, token_scale=one.to(to), bias=bias,
            )  # fmt: skip
        assert torch.equal(y.cpu(), expected), token


@pytest.mark.parametrize("tiles", list(TILES))
def test_far_tokens_with_a_bias(place: Place, tiles: str) -> None:
    """The least of them, and the largest near ones, are rounded as the dense product does it."""
    tokens = TILES[tiles].columns
    o = _draw(tokens, 257, 64)
    scale = o.token_scale.clone()
    end = torch.tensor(far_scales.HIGH)  # near; as a power of two it would show nothing
    scale[:31], scale[-31:] = end.nextafter(torch.zeros(())), end.nextafter(torch.tensor(torch.inf))
    # Such rows are then as large as the bias.
    o = Operands(o.x, o.w, scale, o.feature_scale * 2.0**-86, 100 * o.bias)
    y = _made(place, o, tiles, torch.float32, hopper.PLAIN)
    _judge(o, y, hopper.PLAIN)
    x, w, row, column, bias = (
        t.to(place.device) for t in (o.x, o.w, scale, o.feature_scale, o.bias)
    )
    dense = product.product(
        x, w, torch.float32, epilogue=hopper.PLAIN, row_scale=row, column_scale=column, bias=bias
    )
    assert torch.equal(y, dense)


@pytest.mark.parametrize("factor", [1.0, far_scales.FACTOR])
def test_scales_near_and_far(place: Place, factor: float) -> None:
    """Each token is rounded as it would be by itself, in one tile with others."""
    o = _draw(64, 130, 256)
    token, feature, to = far_scales.rows(factor), far_scales.columns(130), place.device
    values, metadata = (t.to(to) for t in compression.compress(o.w))
    with sparse.only(sparse.NARROW), outputs.poisoned(0xFF):
        y = sparse.product(
            values, metadata, o.x.to(to), torch.float32, epilogue=hopper.PLAIN, factor=factor,
            feature_scale=feature.to(to), token_scale=token.to(to),
        )  # fmt: skip
    p = o.x.numpy().astype(np.int64) @ o.w.numpy().astype(np.int64).T
    assert torch.equal(y.cpu(), far_scales.dequantized(p, factor, token, feature))


@on_a_gpu
@pytest.mark.parametrize(
    ("tiles", "epilogue", "out"),
    [("wide", hopper.CORRECTED, torch.bfloat16), ("narrow", hopper.PLAIN, torch.float32)],
    ids=str,
)
def test_nothing_lies_in_local_memory(
    place: Place, tiles: str, epilogue: int, out: torch.dtype
) -> None:
    """Consumers have registers for all they hold. An array would take gigabytes besides.

    So much does the driver set aside, for every thread that the GPU can hold at a time.
    """
    from cuda.bindings import driver as d

    o = _draw(5, 8, 64)
    _judge(o, _made(place, o, tiles, out, epilogue), epilogue)
    kernel = sparse._kernel(epilogue, out, TILES[tiles], torch.cuda.current_device())
    size = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
    assert cuda.done(d.cuFuncGetAttribute(size, kernel.function)) == 0


@on_a_gpu
def test_what_the_kernel_before_makes_is_waited_for(place: Place) -> None:
    made = quest.recipe("w4a4-2:4")
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    values, metadata = (t.to(place.device) for t in compression.compress(_draw(8, 256, 1024).w))

    def multiply(x: torch.Tensor) -> torch.Tensor:
        with sparse.only(sparse.NARROW):
            return sparse.product(values, metadata, x, torch.int32, epilogue=hopper.RAW)

    for late in overlapped.operands(made.activation.spec, kinds[0]):
        y = multiply(late[0])
        torch.cuda.synchronize()
        assert torch.equal(y, multiply(late[0]))
        del late, y


# The last: what goes out of bounds takes the device away from all that follow.
@pytest.mark.parametrize(
    ("tiles", "epilogue", "out"),
    [
        ("wide", hopper.PLAIN, torch.float32),
        ("wide", hopper.CORRECTED, torch.bfloat16),
        ("narrow", hopper.CORRECTED, torch.float16),
        ("narrow", hopper.RAW, torch.int32),
    ],
    ids=str,
)
def test_one_token_and_one_more_than_a_tile(
    place: Place, tiles: str, epilogue: int, out: torch.dtype
) -> None:
    """Each is written, in rows shorter than a vector, which begin at none."""
    for tokens in (1, TILES[tiles].columns + 1):
        o = _draw(tokens, 3, 64)
        _judge(o, _made(place, o, tiles, out, epilogue), epilogue)


def test_vectors_at_the_end_of_memory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read behind scales or a bias, or written behind y, of a tile that hangs over."""
    o = _draw(40, 600, 64)
    with ExitStack() as memory:
        placed = [
            memory.enter_context(place.walled(t))
            for t in (o.token_scale, o.feature_scale, o.bias, torch.full((40, 600), torch.nan))
        ]
        monkeypatch.setattr(outputs, "empty", lambda *_: placed[3])
        made = Operands(o.x, o.w, *placed[:3])
        y = _made(place, made, "narrow", torch.float32, hopper.PLAIN).cpu().clone()
    _judge(o, y, hopper.PLAIN)


@pytest.mark.parametrize("width", [256, 512, 640])
def test_metadata_at_the_end_of_memory(place: Place, width: int) -> None:
    """It is asked for ahead, and for rows of a tile below the last: never for more than there is.

    For one block, an even count of them and an odd one.
    """
    o = _draw(40, 600, width)
    with place.walled(compression.compress(o.w)[1]) as metadata:
        y = _made(place, o, "narrow", torch.float32, hopper.PLAIN, metadata).cpu()
    _judge(o, y, hopper.PLAIN)

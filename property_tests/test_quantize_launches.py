"""What the Triton quantizer takes, and what its kernel is launched with: the kernel is a fake.

It gets its arguments by the names that the kernel gives them. No GPU.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quest import transforms
from quest.kernels import quantize
from quest.kernels.quantize import DISTANCE, Program
from quest.reference import hadamard

pytestmark = pytest.mark.whole

# 16 levels in steps of 1 / 4, no transform; what tests change of it they say.
PLAIN = Program(
    order=1, base=None, levels=16, step=0.25, points=None, midpoints=None, zero_code=0, offset=8,
    bits=4, estimator=DISTANCE, threshold=0.1, pruned_threshold=0.2, group=None,
)  # fmt: skip
FOURS = replace(PLAIN, group=(2, 4, False))
Call = dict[str, Any]


def table(levels: int) -> Program:
    """A grid by its points."""
    points = torch.linspace(-1, 1, levels)
    missing = 2 ** (levels - 1).bit_length() - levels
    mids = torch.cat([(points[1:] + points[:-1]) / 2, torch.full((missing,), math.inf)])
    return replace(PLAIN, levels=levels, points=points, midpoints=mids, bits=8)


def sylvester(log: int) -> Tensor:
    """(2^log, 2^log) of +1 and -1."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(log):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def blocks(x: Tensor, matrix: Tensor) -> Tensor:
    """The matrix on each of x's blocks."""
    return (x.double().unflatten(-1, (-1, len(matrix))) @ matrix.T).flatten(-2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The arguments of each launch, and what of the transform came before it."""
    names = list(inspect.signature(quantize._quantize.fn).parameters)
    found: list[Call] = []
    before: list[str] = []

    class Fake:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return functools.partial(self.launch, grid)

        def launch(self, grid: tuple[int, ...], *values: Any, num_warps: int) -> None:
            assert num_warps == 1
            named = dict(zip(names, values, strict=True))
            found.append(named | {"grid": grid, "before": tuple(before)})

    def tile(x: Tensor, order: int, norm: float, dtype: torch.dtype, *, near_one: bool) -> Tensor:
        assert dtype == torch.float32
        assert near_one
        before.append("tile")
        return norm * blocks(x, sylvester(order.bit_length() - 1))

    def base(x: Tensor, base: Tensor, columns: int, norm: float, dtype: torch.dtype) -> Tensor:
        assert dtype == torch.float32
        before.append("base")
        parts = x.double().unflatten(-1, (-1, len(base), columns))
        return norm * (base.T.double() @ parts).flatten(-3)

    monkeypatch.setattr(quantize, "_quantize", Fake())
    monkeypatch.setattr(quantize, "launch_tile", tile)
    monkeypatch.setattr(quantize, "launch_base", base)
    return found


def run(program: Program, x: Tensor, **asked: Any) -> tuple[Tensor, ...]:
    """values, codes, scale, mask, keep."""
    return quantize.quantize(x, program, **{"values": False, "codes": True, "packed": True} | asked)


@pytest.mark.parametrize(
    ("group", "taken"),
    [
        (None, True),
        ((1, 2, False), True),
        ((2, 4, False), True),
        ((2, 4, True), True),
        ((4, 8, True), True),
        ((1, 1, False), False),
        ((1, 3, False), False),
        ((2, 5, False), False),
        ((3, 6, False), False),
        ((4, 8, False), False),
        ((2, 2, True), False),
        ((2, 6, True), False),
        ((6, 12, True), False),
        ((8, 16, True), False),
    ],
    ids=str,
)
def test_groups_of_two_or_four_entries_or_pairs(
    group: tuple[int, int, bool] | None, taken: bool, calls: list[Call]
) -> None:
    program = replace(PLAIN, group=group)
    assert quantize.supports(program) is taken
    if taken:
        run(program, torch.ones(2, 48))
        m, pairs = (group[1], group[2]) if group else (0, False)
        assert (calls[0]["M"], calls[0]["M"] > 0 and calls[0]["PAIRS"]) == (m, pairs)
    else:
        with pytest.raises(ValueError, match=r"group .* is not one of \(2, 4\) entries or pairs"):
            run(program, torch.ones(2, 48))
        assert not calls


@pytest.mark.parametrize(
    ("width", "order"), [(1, 1), (16, 1), (17, 1), (96, 32), (1000, 8), (1024, 1), (7168, 1024)]
)
def test_a_program_holds_1024_entries(width: int, order: int, calls: list[Call]) -> None:
    """Whole rows where they fit, in turns where they do not; each row in one program."""
    run(replace(PLAIN, order=order), torch.ones(130, width))
    (call,) = calls
    rows, w, turns = call["ROWS"], call["WIDTH"], call["CHUNKS"]
    assert rows * w == 1024
    assert w == 2 ** call["LOG_WIDTH"]
    assert w % order == 0
    assert w * (turns - 1) < width <= w * turns
    assert w < 2 * max(16, width, order)
    assert (call["rows"], call["width"]) == (130, width)
    (programs,) = call["grid"]
    assert rows * (programs - 1) < 130 <= rows * programs


@pytest.mark.parametrize(
    ("order", "before"),
    [
        (1, ()),
        (16, ()),
        (64, ()),  # as much as a program holds
        (128, ("tile",)),
        (256, ("tile",)),
        (12 * 4, ("base",)),
        (12 * 64, ("base",)),
        (12 * 128, ("tile", "base")),
        (20 * 256, ("tile", "base")),
    ],
)
def test_the_transform_is_orthonormal_whoever_does_which_part(
    order: int, before: tuple[str, ...], calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's count of entries makes the mean of squares that of the transformed row."""
    monkeypatch.setattr(quantize, "CHUNK", 64)  # orders stay small
    x = torch.randn(2, 2 * order, generator=torch.Generator().manual_seed(order))
    base = transforms.base(transforms.split(order)[0], x.device)
    run(replace(PLAIN, order=order, base=base), x)
    (call,) = calls
    assert call["before"] == before
    came = call["x_ptr"].double()
    power = call["power_ptr"].double() if call["PRESCALED"] else torch.ones(2, 1)
    assert call["PRESCALED"] == bool(before)
    assert call["LOG"] >= 0
    y = blocks(came, sylvester(call["LOG"])) * call["norm"] * power
    torch.testing.assert_close(y, torch.from_numpy(hadamard.apply(x, order)))
    assert isinstance(call["count"], float)
    mean = (came * power).square().sum(-1) / call["count"]
    torch.testing.assert_close(mean, x.double().square().mean(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", [3, 127, 128, 129, 256])
def test_codes_of_a_table_are_signed_where_they_fit(levels: int, calls: list[Call]) -> None:
    """Up to 128 levels. Uniform grids have signed codes, and integers are signed."""
    x = torch.ones(2, 16)
    byte = torch.int8 if levels <= 128 else torch.uint8
    assert run(table(levels), x, packed=False)[1].dtype == byte
    assert run(table(levels), x)[1].dtype == torch.uint8  # packed
    assert run(replace(PLAIN, levels=levels), x, packed=False)[1].dtype == torch.int8
    coded = quantize.encode(x, table(levels), kind="codes", integer=1.0)
    assert coded[0].dtype == byte
    made = quantize.encode(x, table(levels), kind="integers", integer=1.0)
    assert made[0].dtype == torch.int8
    assert calls[0]["points_ptr"].shape == (levels,)
    assert calls[0]["TABLE"]
    assert len(calls[0]["mids_ptr"]) == 2 ** calls[0]["LOG_LEVELS"] - 1


@pytest.mark.parametrize("group", [None, (2, 4, False)])
def test_what_is_asked_for_is_made_and_nothing_else(
    group: tuple[int, int, bool] | None, calls: list[Call]
) -> None:
    x, program = torch.ones(3, 12), replace(PLAIN, group=group)
    values, codes, scale, mask, keep = run(program, x, values=True, codes=False)
    assert [t.shape for t in (values, codes, scale, mask, keep)] == [
        (3, 12), (0,), (3, 1), (3, 2), (0,),
    ]  # fmt: skip
    assert (calls[-1]["VALUES"], calls[-1]["CODES"], calls[-1]["SUMS"]) == (True, False, False)
    values, codes, scale, mask, keep = run(program, x)
    kept = (3, 2) if group else (0,)
    assert [t.shape for t in (values, codes, scale, mask, keep)] == [
        (0,), (3, 6), (3, 1), (3, 2), kept,
    ]  # fmt: skip
    assert (calls[-1]["VALUES"], calls[-1]["CODES"], calls[-1]["SUMS"]) == (False, True, False)
    for kind, stored in (("integers", False), ("codes", True)):
        operand, scale, mask, sums = quantize.encode(x, program, kind=kind, integer=2.0)
        assert [t.shape for t in (operand, scale, mask, sums)] == [(3, 12), (3, 1), (3, 2), (3, 1)]
        call = calls[-1]
        assert (call["VALUES"], call["CODES"], call["INTEGERS"]) == (False, stored, not stored)
        assert (call["SUMS"], call["integer"]) == (True, 2.0)
        # Integers need no selection: what is pruned is 0.
        assert call["keep_ptr"].shape == ((3, 2) if group and stored else (0,))


def test_rows_without_entries_are_rows_of_zeros(calls: list[Call]) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # what is not written is NaN, or the largest
    try:
        _, scale, _, sums = quantize.encode(torch.ones(3, 0), FOURS, kind="codes", integer=1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert scale.tolist() == [[0.0]] * 3
    assert sums.tolist() == [[0]] * 3
    assert not calls


@pytest.mark.parametrize(("turns", "sums"), [(1, True), (3, False), (3, True)])
def test_hopper_s_compiler_takes_rows_in_one_turn_and_in_several(turns: int, sums: bool) -> None:
    """What the interpreter lets pass it does not: a value that changes its shape in a loop, say."""
    kernel = quantize._quantize
    chosen = {
        "LOG": 4, "LEVELS": 16, "TABLE": False, "LOG_LEVELS": 4, "OFFSET": 8, "ESTIMATOR": DISTANCE,
        "N": 2, "M": 4, "PAIRS": False, "VALUES": True, "CODES": True, "BITS": 0,
        "INTEGERS": False, "PACK_MASK": True, "SUMS": sums, "PRESCALED": False, "CHUNKS": turns,
        "ROWS": 1, "WIDTH": 1024, "LOG_WIDTH": 10,
    }  # fmt: skip
    entries = {"codes_ptr": "*i8", "mask_ptr": "*u8", "keep_ptr": "*u8", "sums_ptr": "*i32"}
    whole = ("rows", "width", "code_bytes", "mask_bytes", "zero_code")

    def kind(name: str) -> str:
        if name.endswith("_ptr"):
            return entries.get(name, "*fp32")
        return "constexpr" if name in chosen else "i32" if name in whole else "fp32"

    names = list(inspect.signature(kernel.fn).parameters)
    source = ASTSource(
        kernel, {n: kind(n) for n in names}, {(names.index(n),): v for n, v in chosen.items()}
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert made.asm["cubin"][:4] == b"\x7fELF"

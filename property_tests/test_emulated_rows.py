"""rows.cu broken on purpose, which the emulator sees."""

from __future__ import annotations

import pytest
import torch

from property_tests import emulated, places
from quest import lowbit, operands, ops
from quest.conformance import examine, inputs
from quest.kernels import blocks, forms
from quest.quantizer import parse

FOUR = "uniform4/hadamard128/ste/dense"
NEAR, WIDE, LONG, FAR, NORMED, MANY = "near", "wide", "long", "far", "normed", "many"
UNDER_WAY = "global memory before the kernel before it has ended"


def _quantize(rows: str) -> None:
    """Rows of several warps; of more than the product waits for; of several turns; rare ones.

    And more than run at a time.
    """
    width = {WIDE: 8192 + 128, LONG: 17408}.get(rows, 2048)
    x = inputs.draw("gaussian", (36 if rows == MANY else 3, width), torch.bfloat16, 0)
    if rows == FAR:
        x *= 2.0**100
    q, lane = parse(FOUR), places.CPU.lane
    kind = (operands.kinds(q, q) or ("",))[0]
    if rows == NORMED:
        weight = inputs.draw("gaussian", (width,), torch.bfloat16, 1)
        found = examine.normed(lane, x, None, weight, 1e-5, q, kind)
    else:
        found = examine.operand(lane, x, q, kind)
    for verdict in found:
        verdict.require()


WAIT = "  wait_for_previous();\n"
# Of rows; what is lost, what stands there instead, and how it shows: None, by numbers.
BROKEN = {
    "a wait": (NEAR, WAIT, "", f"reads {UNDER_WAY}"),
    "a wait behind the first row": (
        WIDE, WAIT, "  u32 early[WORDS];\n  read(early, x, begin, blocks);\n" + WAIT,
        f"reads {UNDER_WAY}",
    ),
    "sums that are not there": (
        NEAR, "= value;\n  meet();", "= value;", "a race: thread",
    ),
    "a largest that is not there": (FAR, "= top;\n    meet();", "= top;", "a race: thread"),
    "sums of codes that are not there": (NEAR, "= sum;\n  meet();", "= sum;", "a race: thread"),
    "one place for two sums": (
        NORMED, "s = over_row(s, first);", "s = over_row(s, before);", "a race: thread",
    ),
    "a turn": (LONG, "if (!LONG || block == begin) break;", "if (block == last) break;", None),
    "its own row ahead": (
        MANY, "ask_ahead(row + ahead * stride,", "ask_ahead(row,", "read by nobody",
    ),
    "more than a row ahead": (MANY, "128 * blocks) asm", "128 * blocks + 1) asm", "asks again"),
    "a row that is not there ahead": (
        MANY, "ahead && blockIdx.x + ahead < gridDim.x", "ahead", "read by nobody",
    ),
    "lines of what is written": (
        MANY, "ask_ahead(row + ahead * stride, blocks)",
        "ask_ahead(out + blockIdx.x * (128 * blocks), blocks / 2)", "read by nobody",
    ),
    "chunks of a lane": (NEAR, "{32 * q + r, 16, 8,", "{32 * q + r, 8, 16,", None),
}  # fmt: skip


@pytest.mark.parametrize("rows", [NEAR, WIDE, LONG, FAR, NORMED, MANY])
def test_what_is_whole(rows: str, emulator: emulated.Emulator) -> None:
    _quantize(rows)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name: str, emulator: emulated.Emulator) -> None:
    rows, lost, instead, told = BROKEN[name]
    emulator.plant("rows.cu", lost, instead)
    emulator.runs = 4
    with pytest.raises(AssertionError, match=told):
        _quantize(rows)


@pytest.mark.parametrize(
    ("count", "width", "dtype", "lines"),
    [
        # Each of two multiprocessors has 32 warps at a time; of more rows than these are, those are
        # asked for that lie half as many further on.
        (32, 2048, torch.bfloat16, 0), (36, 2048, torch.bfloat16, 20 * 32),
        (33, 2048, torch.float16, 17 * 32), (66, 128, torch.bfloat16, 34 * 2),
        (5, 16384, torch.bfloat16, 3 * 256), (5, 16512, torch.bfloat16, 0),
        (36, 2048, torch.float32, 0),
    ],
)  # fmt: skip
def test_what_is_asked_for_ahead(
    count: int, width: int, dtype: torch.dtype, lines: int, emulator: emulated.Emulator
) -> None:
    """Each line of the rows further on, once, and nothing else; see `rows._ahead`."""
    q = parse(FOUR)
    x = inputs.draw("gaussian", (count, width), dtype, 0)
    lowbit.launch_encode(x, q, "integers")
    assert (emulator.launches, emulator.ahead) == (1, lines)
    lowbit.launch_operand(x, q, "integers")  # without a mask
    assert (emulator.launches, emulator.ahead) == (2, lines)
    if dtype == torch.float32:  # which no norm takes
        return
    weight = inputs.draw("gaussian", (width,), dtype, 1)
    blocks.normed(x, None, weight, 1e-5, ops.program(q, x), form=forms.INTEGERS)
    assert (emulator.launches, emulator.ahead) == (3, lines)

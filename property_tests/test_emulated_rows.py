"""rows.cu broken on purpose, which the emulator sees."""

from __future__ import annotations

import pytest
import torch

from property_tests import emulated, places
from quest import operands
from quest.conformance import examine, inputs
from quest.quantizer import parse

FOUR = "uniform4/hadamard128/ste/dense"
NEAR, WIDE, LONG, FAR, NORMED = "near", "wide", "long", "far", "normed"
UNDER_WAY = "global memory before the kernel before it has ended"


def _quantize(rows: str) -> None:
    """Rows of several warps; of more than the product waits for; of several turns; rare ones."""
    width = {WIDE: 8192 + 128, LONG: 17408}.get(rows, 2048)
    x = inputs.draw("gaussian", (3, width), torch.bfloat16, 0)
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
    "chunks of a lane": (NEAR, "{32 * q + r, 16, 8,", "{32 * q + r, 8, 16,", None),
}  # fmt: skip


@pytest.mark.parametrize("rows", [NEAR, WIDE, LONG, FAR, NORMED])
def test_what_is_whole(rows: str, emulator: emulated.Emulator) -> None:
    _quantize(rows)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name: str, emulator: emulated.Emulator) -> None:
    rows, lost, instead, told = BROKEN[name]
    emulator.plant("rows.cu", lost, instead)
    emulator.runs = 4
    with pytest.raises(AssertionError, match=told):
        _quantize(rows)

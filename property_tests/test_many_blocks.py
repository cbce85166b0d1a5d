"""Hadamard blocks that 32 bits don't count, on a GPU with the memory for what they become.

A row that stands for all of them takes no memory: its stride is 0.
"""

from __future__ import annotations

import torch

from property_tests.prologues import SPECS, on_hopper
from property_tests.room import Room, only_one  # noqa: F401 - the fixture `room`
from quest import prologue
from quest.conformance import inputs
from quest.kernels import outputs

ROWS, WIDTH = 2**27, 2048  # 2^31 blocks of 128
ROOM = 40 * 2**30  # 32 GiB of single bits, one of scales and sums, and what the comparison takes


@on_hopper
def test_blocks_beyond_32_bits(room: Room) -> None:
    """Of equal rows every one becomes what a few of them become."""
    spec, kind = SPECS["w1a1"]
    gate, value = inputs.draw("gaussian", (2, WIDTH), torch.bfloat16, 0).cuda()
    few, many = ((gate.expand(n, WIDTH), value.expand(n, WIDTH)) for n in (40, ROWS))
    room(ROOM)
    with outputs.poisoned(0xFF):
        expected = [t[0] for t in prologue.gated_encode(*few, spec, kind)]
        found = prologue.gated_encode(*many, spec, kind)
        for t, row in zip(found, expected, strict=True):
            for part in t.split(2**22):
                assert torch.equal(part, row.expand_as(part))
    assert expected[2] != -1  # what poison would be

"""masked.cu broken on purpose, which the emulator sees."""

from __future__ import annotations

import contextlib

import pytest
import torch

from property_tests import emulated
from property_tests.places import CPU
from quest.conformance import examine, inputs, lanes
from quest.kernels import masked

pytestmark = pytest.mark.whole

BROKEN = {
    "a bit": ("& 15) * 0x10204080", "& 15) * 0x10204040"),
    "a nibble": ("byte >> 4 * i", "byte >> 3 * i"),
    "a byte": (">> 8 * quad", ">> 8 * (quad ^ 1)"),
    "halves of a word": ("0xBBAA : 0x9988", "0xBBAA : 0x8899"),
    "the last block": ("if (own < total) {", "if (own < total - 1) {"),
    "a block": ("first + 2 * quad + c / 2", "first + 2 * quad + c % 2"),
    "a half of a block": ("8 * (c % 2) + eighth", "8 * (c / 2) + eighth"),
    "a group": ("(i64)blockIdx.x * 8,", "(i64)blockIdx.x * 8 % 64,"),
    "the normalisation": ("made[8 * c + e] * NORM", "made[8 * c + e] * (NORM * 1.0001f)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken(name: str, emulator: emulated.Emulator) -> None:
    old, new = BROKEN[name]
    grad = inputs.draw("gaussian", (70, 128), torch.float64, 4).bfloat16()
    generator = torch.Generator().manual_seed(4)
    mask = torch.randint(256, (70, 16), generator=generator).to(torch.uint8)
    assert not [v for v in examine.backward(CPU.lane, grad, mask, 128) if v.failure]
    masked._kernel.cache_clear()
    emulator.plant("masked.cu", old, new)
    with contextlib.suppress(lanes.GuardError):  # what is not written differs between two runs
        assert [v for v in examine.backward(CPU.lane, grad, mask, 128) if v.failure]

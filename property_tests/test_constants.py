"""The literals that production code holds are what the oracle writes."""

from __future__ import annotations

from pathlib import Path

import torch

import quest.constants
from quest import transforms
from quest.conformance import constants
from quest.reference import hadamard


def test_the_file_is_what_the_oracle_renders() -> None:
    text = Path(quest.constants.__file__).read_text(encoding="utf-8")
    assert text == constants.render(), "run python -m quest.conformance.constants"


def test_bases_unfold_to_the_oracle_s() -> None:
    cpu = torch.device("cpu")
    for m in (12, 20, 28):
        base = transforms.base(m, cpu)
        assert base is not None
        assert torch.equal(base.double(), torch.from_numpy(hadamard.base(m)))
    for order in (12, 24, 40, 56, 160, 1024):
        m, power = transforms.split(order)
        assert m * power == order
        full = torch.ones(1, 1) if m == 1 else transforms.base(m, cpu)
        signs = torch.tensor(transforms._signs(power), dtype=torch.float32)
        whole = torch.kron(full, signs).double()
        assert torch.equal(whole, torch.from_numpy(hadamard.matrix(order))), order


def test_orders_beyond_a_tile_keep_natural_order() -> None:
    """A Sylvester factor moves to the base: 2^15 = 2 x 2^14, 12 * 2^15 = 24 x 2^14."""
    assert transforms.split(2**15) == (2, 2**14)
    assert transforms.split(12 * 2**15) == (24, 2**14)
    base = transforms.base(24, torch.device("cpu"))
    assert base is not None
    assert torch.equal(base.double(), torch.from_numpy(hadamard.matrix(24)))

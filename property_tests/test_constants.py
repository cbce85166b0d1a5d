"""The literals that production code holds are what the oracle writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import quest.constants
from quest import transforms
from quest.conformance import constants
from quest.reference import grids, hadamard

NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")


def test_the_file_is_what_the_oracle_renders() -> None:
    """To the letter, but for the digits of floats: those depend on the machine's exp in the end."""
    text = Path(quest.constants.__file__).read_text(encoding="utf-8")
    rendered = constants.render()
    told = "run python -m quest.conformance.constants"
    assert NUMBER.sub("#", text) == NUMBER.sub("#", rendered), told
    # The oracle's own tolerance of 1e-12 in a slope moves a constant by less than 2^-36 of it.
    for a, b in zip(NUMBER.findall(text), NUMBER.findall(rendered), strict=True):
        assert float(a) == pytest.approx(float(b), rel=2.0**-36), told


def test_the_file_is_written_when_nothing_else_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "constants.py"
    monkeypatch.setattr(quest.constants, "__file__", str(path))
    for arguments, status in ((["--help"], 0), (["all"], 2), (["--force"], 2)):
        assert CliRunner().invoke(constants.main, arguments).exit_code == status
        assert not path.exists()
    assert CliRunner().invoke(constants.main, []).exit_code == 0
    assert path.read_text(encoding="utf-8") == constants.render()


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16, 32, 64, 128, 256])
def test_alphas_are_stationary(levels: int) -> None:
    unit = (2 * np.arange(levels) - (levels - 1)) / (levels - 1)
    assert abs(grids._slope(quest.constants.UNIFORM_ALPHA[levels], unit)) <= 1e-12


def test_alpha_of_e2m1_is_stationary() -> None:
    half = np.array([0.5, 1, 1.5, 2, 3, 4, 6])
    unit = np.concatenate([-half[::-1], [0], half])
    assert abs(grids._slope(quest.constants.E2M1_ALPHA, unit)) <= 1e-12


@pytest.mark.parametrize("bits", range(1, 9))
def test_free_points_are_the_means_of_their_cells(bits: int) -> None:
    half = np.array(quest.constants.LLOYD_MAX[bits])
    points = np.concatenate([-half[::-1], half])
    assert len(points) == 2**bits
    # What the oracle stops at, and as much again for another machine's rounding.
    assert grids._lloyd_residual(points) <= 4e-13


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
    assert transforms.split(2**20) == (64, 2**14)
    assert transforms.base(1, torch.device("cpu")) is None
    for m in (2, 24, 64):
        base = transforms.base(m, torch.device("cpu"))
        assert base is not None
        assert base.dtype == torch.float32
        assert torch.equal(base.double(), torch.from_numpy(hadamard.matrix(m)))


def test_a_transform_s_limits_are_its_kernel_s() -> None:
    """`quest.transforms` splits an order without importing Triton, so it holds its own copy."""
    kernel = pytest.importorskip("quest.kernels.hadamard")
    assert transforms.MAX_POWER == kernel.TILE_LIMIT
    assert transforms.MAX_BASE == kernel.BASE_LIMIT

"""The rule of `quest.paths`, on shapes: where each product begins, as it was measured; no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quest
from quest import frozen, operands, paths
from quest.kernels import hopper

pytestmark = pytest.mark.whole


def test_integers_are_multiplied_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of rows."""
    four = quest.recipe("w4a4")
    for there, expected in ((True, "integers"), (False, "values")):
        monkeypatch.setattr(paths, "has_integers", lambda *_, there=there: there)
        for shape in ((0, 128), (1, 128), (512, 128), (2, 256, 128), (128,)):
            x: Any = SimpleNamespace(shape=shape)
            assert paths.choose(x, four) == expected, shape


@pytest.mark.parametrize(("bits", "most"), [(1, 16), (2, 32), (4, 32)])
def test_up_to_which_rows_packed_codes_are_read(bits: int, most: int) -> None:
    """On the 7B shapes: where their product crosses that of the operand."""
    taken = [rows for rows in range(100) if paths.reads_packed(rows, bits, 4096)]
    assert taken == list(range(1, most + 1))


def test_from_which_rows_on_a_compressed_weight_is_read() -> None:
    assert [paths.reads_compressed(rows) for rows in (384, 511, 512, 513)] == [
        False, False, True, True,
    ]  # fmt: skip


def test_up_to_which_rows_a_compiler_adds_and_norms() -> None:
    for rows, width in ((1024, 2048), (372, 5632)):
        assert paths.compiles_sums(torch.empty(rows, width, device="meta"))
        assert not paths.compiles_sums(torch.empty(rows + 1, width, device="meta"))


def test_bits_of_a_code() -> None:
    """None where rows have no entries, or there are no rows."""
    for bits in (1, 2, 4, 8):
        packed = torch.empty((3, 128 * bits // 8), dtype=torch.uint8)
        assert frozen._bits(packed, 128) == bits
    assert frozen._bits(torch.empty((3, 0), dtype=torch.uint8), 0) == 0
    assert frozen._bits(None, 128) == 0
    assert not paths.reads_packed(1, 4, 0)


def test_a_path_is_forced_inside_its_block_alone() -> None:
    def allowed() -> list[bool]:
        return [paths.allows(path) for path in paths.PATHS]

    x, four = torch.empty(1, 128), quest.recipe("w4a4")
    assert allowed() == [True, True]
    with paths.only("integers"):
        assert (allowed(), paths.choose(x, four)) == ([False, True], "integers")
        with paths.only("values"):
            assert (allowed(), paths.choose(x, four)) == ([True, False], "values")
        assert (allowed(), paths.choose(x, four)) == ([False, True], "integers")
        with pytest.raises(KeyError), paths.only("values"):
            raise KeyError
        assert allowed() == [False, True]
    assert (allowed(), paths.choose(x, four)) == ([True, True], "values")


def test_which_recipes_have_integers_where_there_is_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = {torch.device("cuda", 0): None, torch.device("cuda", 1): "no Hopper"}
    monkeypatch.setattr(hopper, "unavailable", kernels.__getitem__)
    known = {"w4a4": True, "w1a1": True, "w1a8": True, "w4a4-2:4": True, "w4a16": False,
             "bf16": False}  # fmt: skip
    for name, expected in known.items():
        recipe = quest.recipe(name)
        for index in (0, 1):
            for width in (256, operands.MAX_WIDTH, operands.MAX_WIDTH + 1):
                t: Any = SimpleNamespace(shape=(2, width), device=torch.device("cuda", index))
                fits = expected and index == 0 and width <= operands.MAX_WIDTH
                assert paths.has_integers(t, recipe) is fits, (name, index, width)
        assert not paths.has_integers(torch.empty(2, 256), recipe)

"""What the property tests draw: a shape, a seed, a distribution and a layout, never the array.

Arrays that are drawn element by element hold very few distinct values; a few edits on top of a
drawn one are enough to shrink a failure to the entries that matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import quest
from quest.conformance import inputs, lanes

LANES = lanes.all_lanes()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {
    **{f"uniform{b}": quest.grids.uniform(b) for b in range(1, 9)},
    "ternary": quest.grids.ternary(),
    "e2m1": quest.grids.e2m1(),
    **{f"lloyd_max{b}": quest.grids.lloyd_max(b) for b in (1, 2, 3, 4, 8)},
}
SPARSITIES = (None, quest.NM(2, 4), quest.Pairwise(4, 8), quest.NM(1, 2), quest.NM(4, 8))
ESTIMATORS = (
    quest.Trust(),
    quest.Trust(0.5),
    quest.Trust(1.5),
    quest.Clip(1.3),
    quest.Clip(0.6),
    quest.STE(),
)
ORDERS = (1, 2, 8, 16, 32, 64, 128, 256, 12, 24, 20, 40, 28, 56)
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Case:
    """One input; its repr is the call that makes it again.

    edits: (index, value), written into the drawn tensor, flat and modulo its size.
    """

    distribution: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    seed: int
    edits: tuple[tuple[int, float], ...] = ()

    def make(self) -> torch.Tensor:
        x = inputs.edit(
            inputs.draw(self.distribution, self.shape, self.dtype, self.seed), self.edits
        )
        return inputs.lay_out(inputs.equal_rows(x) if self.layout == "expanded" else x, self.layout)

    def expression(self) -> str:
        """Python that makes the tensor."""
        drawn = f"inputs.draw({self.distribution!r}, {self.shape}, {self.dtype}, {self.seed})"
        if self.edits:
            drawn = f"inputs.edit({drawn}, {self.edits})"
        if self.layout == "contiguous":
            return drawn
        if self.layout == "expanded":
            drawn = f"inputs.equal_rows({drawn})"
        return f"inputs.lay_out({drawn}, {self.layout!r})"

    def code(self, name: str = "x") -> str:
        """Python that gives the tensor a name."""
        return f"{name} = {self.expression()}"


HEADER = "import torch, quest\nfrom quest.conformance import examine, inputs, lanes\n"


def lane_code(lane: lanes.Lane) -> str:
    """Python that finds the lane again."""
    return f"lane = next(l for l in lanes.all_lanes() if l.name == {lane.name!r})\n"


def widths(order: int, group: int = 1) -> st.SearchStrategy[int]:
    """Widths that an order and a group divide: one block, odd counts, up to about 400."""
    step = order * group // _gcd(order, group)
    return st.sampled_from([n for n in (1, 2, 3, 5, 7, 11, 13) if n * step <= max(400, step)]).map(
        lambda n: n * step
    )


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def leads() -> st.SearchStrategy[tuple[int, ...]]:
    """Leading axes: none, one row, prime rows, several axes, no rows."""
    return st.sampled_from([(3,), (), (1,), (7,), (17,), (2, 3), (0,), (1, 1, 2)])


def edits() -> st.SearchStrategy[tuple[tuple[int, float], ...]]:
    """Up to three entries of a tensor, set to values that every dtype holds."""
    values = st.sampled_from((1.0, 0.0, -1.0, 0.5, 3.0, -0.0))
    return st.lists(st.tuples(st.integers(0, 15), values), max_size=3).map(tuple)


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype,
    width: st.SearchStrategy[int],
    *,
    distributions: Sequence[str] = tuple(inputs.DISTRIBUTIONS),
    lead: st.SearchStrategy[tuple[int, ...]] | None = None,
    layouts: Sequence[str] = inputs.LAYOUTS,
    edited: bool = False,
) -> Case:
    """Inputs of a width; what stands first in a sequence is what failures shrink to."""
    return Case(
        distribution=draw(st.sampled_from(tuple(distributions))),
        shape=(*draw(leads() if lead is None else lead), draw(width)),
        dtype=dtype,
        layout=draw(st.sampled_from(tuple(layouts))),
        seed=draw(SEEDS),
        edits=draw(edits()) if edited else (),
    )

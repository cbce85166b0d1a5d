"""What the property tests draw: a shape, a seed, a distribution and a layout, never the array."""

from __future__ import annotations

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
    """One input; its repr is the call that makes it again."""

    distribution: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    seed: int

    def make(self) -> torch.Tensor:
        x = inputs.draw(self.distribution, self.shape, self.dtype, self.seed)
        return inputs.lay_out(inputs.equal_rows(x) if self.layout == "expanded" else x, self.layout)

    def code(self, name: str = "x") -> str:
        """Python that makes the tensor."""
        drawn = f"inputs.draw({self.distribution!r}, {self.shape}, {self.dtype}, {self.seed})"
        if self.layout == "expanded":
            drawn = f"inputs.equal_rows({drawn})"
        return f"{name} = inputs.lay_out({drawn}, {self.layout!r})"


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


@st.composite
def cases(
    draw: st.DrawFn, dtype: torch.dtype, width: st.SearchStrategy[int], finite: bool = False
) -> Case:
    """Inputs of a width."""
    names = [n for n in inputs.DISTRIBUTIONS if not (finite and n == "non_finite")]
    return Case(
        distribution=draw(st.sampled_from(names)),
        shape=(*draw(leads()), draw(width)),
        dtype=dtype,
        layout=draw(st.sampled_from(inputs.LAYOUTS)),
        seed=draw(SEEDS),
    )

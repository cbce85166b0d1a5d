"""What the properties draw: small first, so that failures shrink to what a reader takes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st

import quest
from quest.conformance import inputs, strategies
from quest.conformance.public.capabilities import Capabilities
from quest.conformance.public.court import Court
from quest.conformance.verdict import AMBIGUOUS_SHARE, Verdict
from quest.estimators import Estimator
from quest.reference import bounds

# Finite, of moderate size, and without values on a midpoint but by chance.
PLAIN = ("gaussian", "heavy", "outlier")
# Rows whose sums are exact: zeros, equal magnitudes and cancellation, midpoints at 0.
TIED = ("zeros", "one_hot", "equal", "alternating", "integers")
EXTREMES = ("tiny", "subnormal", "huge", "mixed_rows")
ROWS = st.sampled_from(((1,), (3,), (7,), (17,)))


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    made: torch.dtype = getattr(torch, name)
    return made


def grid(court: Court, data: st.DataObject) -> str:
    """One of the declared grids."""
    return court.asked.choose(data, "grid", court.impl.capabilities.grids)


def declared_estimator(court: Court, data: st.DataObject) -> Estimator:
    """One of the declared estimators, on any grid."""
    names = court.impl.capabilities.estimators
    return quest.estimators.parse(court.asked.choose(data, "estimator", names))


def block(court: Court, data: st.DataObject, group: int = 1) -> int:
    """One of the declared blocks for which there are rows within `max_width`."""
    capabilities = court.impl.capabilities
    return court.asked.choose(data, "block", sorted(capabilities.blocks),
                              lambda b: capabilities.narrow(b, group))  # fmt: skip


def widths(block: int, capabilities: Capabilities, group: int = 1) -> st.SearchStrategy[int]:
    """Widths that the block, the group and the adapter's own multiple divide, within its limit."""
    limit = capabilities.max_width
    found = strategies.widths(capabilities.least_width(block, group))
    return found if limit is None else found.filter(lambda n: n <= limit)


def plain(
    dtype: str, block: int, capabilities: Capabilities, *, ties: bool, group: int = 1
) -> st.SearchStrategy[strategies.Case]:
    """Contiguous finite matrices; ties: with rows whose entries fall on midpoints."""
    return strategies.cases(
        dtype_of(dtype), widths(block, capabilities, group),
        distributions=(*(TIED if ties else ()), *PLAIN), lead=ROWS,
        layouts=("contiguous",), edited=ties,
    )  # fmt: skip


def family(
    name: str, dtype: str, block: int, capabilities: Capabilities, *, ties: bool
) -> st.SearchStrategy[strategies.Case]:
    """One of the kinds of inputs of `capabilities.INPUTS`."""
    names = (*(TIED if ties else ()), *PLAIN)
    lead: st.SearchStrategy[tuple[int, ...]] = ROWS
    layouts: tuple[str, ...] = ("contiguous",)
    if name == "extremes":
        names = EXTREMES if ties else EXTREMES[:3]
    elif name == "non_finite":
        names = ("non_finite",)
    elif name == "empty":
        lead = st.just((0,))
    elif name == "axes":
        lead = st.sampled_from(((), (1, 1, 2), (2, 3)))
    else:
        layouts = inputs.LAYOUTS[1:]
    return strategies.cases(
        dtype_of(dtype), widths(block, capabilities), distributions=names, lead=lead,
        layouts=layouts,
    )  # fmt: skip


def estimator(grid: str, capabilities: Capabilities) -> Estimator:
    """The published estimator of a grid where it is declared, else the first that is, else STE."""
    parsed = [quest.estimators.parse(e) for e in capabilities.estimators]
    published = quest.Clip(1.3) if quest.grids.parse(grid).levels == 2 else quest.Trust()
    return published if published in parsed else next(iter(parsed), quest.STE())


def judge(
    court: Court, property_: Callable[..., list[Verdict]], case: strategies.Case,
    q: quest.Quantizer,
) -> None:  # fmt: skip
    """Judge a property of a quantizer that knows the rules on ambiguous elements."""
    # Equal rows flip together, and the rules on ambiguous codes count independent ones; of
    # subnormal rows no code is certain.
    sure = case.layout != "expanded" and case.distribution in PLAIN
    if sure and (told := undecided(court.impl.capabilities, q, case.shape[-1])):
        court.asked.left(told)
        sure = False
    code = f"{quantizer(q.spec)}, conclusive={sure}"
    court.judge(property_, {"x": case}, (case.make(), q), code, conclusive=sure)


def undecided(capabilities: Capabilities, q: quest.Quantizer, width: int) -> str | None:
    """Why the rules on ambiguous codes can't be applied to rows of that width; None where they can.

    They allow one in 1000. Fine grids in large blocks have more by the bound alone, whatever the
    implementation does. Half of it is the limit, since rows differ.
    """
    order = q.transform.order(width)
    share = bounds.ambiguous_share(q.require_grid().midpoints, order, capabilities.sums(order))
    if share <= AMBIGUOUS_SHARE / 2:
        return None
    how = f"a {capabilities.rotation} leaves more than 1 code in 2000 open"
    return f"codes that lean to one side, where {how}: {q.grid} in blocks of {order}"


def quantizer(spec: str) -> str:
    """Python that makes a quantizer again."""
    return f"quest.quantizer.parse({spec!r})"

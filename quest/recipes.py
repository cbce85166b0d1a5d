"""Names like "w4a4" to the two quantizers of a linear layer.

Source: method, sections 4 and 7; the published defaults of QuEST (arXiv 2502.05003).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from . import grids
from .estimators import STE, Clip, Estimator, Trust
from .grids import Grid
from .quantizer import Quantizer
from .sparsity import NM, Pairwise, Sparsity
from .transforms import Hadamard, Identity, Transform

PASS_THROUGH = Quantizer(None, Identity(), STE())
NAMES = (
    "bf16, fp4, or w<bits>a<bits> with bits 1, 1.58 or 2 to 8 (w4a16: weights only); "
    "-2:4 or -4:8 makes the weights sparse"
)
_PATTERN = re.compile(
    r"(?:w(?P<w>1\.58|[1-8])a(?P<a>1\.58|16|[1-8])|(?P<fp4>fp4))(?P<s>-2:4|-4:8)?"
)


@dataclass(frozen=True)
class Recipe:
    """The quantizers of a layer's weight and activation; both must rotate alike."""

    name: str
    weight: Quantizer
    activation: Quantizer

    def __post_init__(self) -> None:
        for part in ("weight", "activation"):
            if not isinstance(getattr(self, part), Quantizer):
                raise TypeError(f"{part} must be a Quantizer, got {getattr(self, part)!r}")
        if self.weight.transform != self.activation.transform:
            raise ValueError(
                "weight and activation must use the same transform, got "
                f"{self.weight.transform} and {self.activation.transform}"
            )
        if self.activation.sparsity is not None:
            raise ValueError(
                f"activation must be dense, got sparsity {self.activation.sparsity}: only weights "
                "are pruned"
            )

    def __str__(self) -> str:
        return self.name

    @property
    def spec(self) -> str:
        """Everything that fixes the numbers, as one string; equal specs compute the same."""
        return f"{self.weight.spec} x {self.activation.spec}"


def _grid(bits: str) -> Grid | None:
    if bits == "16":
        return None
    return grids.ternary() if bits == "1.58" else grids.uniform(int(bits))


def _default_estimator(grid: Grid | None, transform: Transform) -> Estimator:
    if grid is None:
        return STE()
    if grid.levels == 2:
        # Published for 1 bit: 1.30 with the Hadamard transform, 1.25 without.
        return Clip(1.25 if isinstance(transform, Identity) else 1.30)
    return Trust()


def _changed(
    q: Quantizer,
    transform: Transform | None,
    estimator: Estimator | None,
    sparsity: Sparsity | None = None,
) -> Quantizer:
    turn = q.transform if transform is None else transform
    if estimator is None:
        chosen = q.estimator != _default_estimator(q.grid, q.transform)
        estimator = q.estimator if chosen else _default_estimator(q.grid, turn)
    kept = q.sparsity if sparsity is None else sparsity
    return replace(q, transform=turn, estimator=estimator, sparsity=kept)


def recipe(
    name: str | Recipe,
    *,
    transform: Transform | None = None,
    estimator: Estimator | None = None,
    sparsity: Sparsity | None = None,
    weight: Quantizer | None = None,
    activation: Quantizer | None = None,
) -> Recipe:
    """The recipe of a name; keywords override a part of it.

    name: bf16 (no quantization), w1a1 ... w8a8 and mixtures, w1.58a1.58, w4a16 (weights only),
    fp4 (E2M1), each but bf16 with -2:4 or -4:8 for sparse weights; or a `Recipe`, returned as is.
    transform and estimator apply to both operands, sparsity to the weight; weight and activation
    replace a quantizer as a whole, and go with no other keyword but each other. An estimator that
    is the default of its grid and transform (Clip(1.30) at 1 bit, Clip(1.25) without a rotation)
    becomes the default of the new transform; any other stays. Raises ValueError for an unknown
    name.
    """
    whole, parts = (weight, activation), (transform, estimator, sparsity)
    if any(q is not None for q in whole) and any(part is not None for part in parts):
        raise ValueError("weight and activation replace whole quantizers: set the parts in them")
    if isinstance(name, Recipe):
        made = name
    elif not isinstance(name, str):
        raise TypeError(f"recipe must be a name or a Recipe, got {name!r}")
    elif name == "bf16":
        made = Recipe(name, PASS_THROUGH, PASS_THROUGH)
    elif match := _PATTERN.fullmatch(name):
        rotation = Hadamard()
        patterns: dict[str | None, Sparsity] = {"-2:4": NM(2, 4), "-4:8": Pairwise(4, 8)}
        pattern = patterns.get(match["s"])
        w, a = (grids.e2m1(),) * 2 if match["fp4"] else (_grid(match["w"]), _grid(match["a"]))
        made = Recipe(
            name,
            Quantizer(w, rotation, _default_estimator(w, rotation), pattern),
            Quantizer(a, rotation, _default_estimator(a, rotation)),
        )
    else:
        raise ValueError(f"recipe must be {NAMES}; got {name!r}")
    changed = {
        "weight": _changed(made.weight, *parts) if weight is None else weight,
        "activation": (
            _changed(made.activation, transform, estimator) if activation is None else activation
        ),
    }
    if all(getattr(made, part) == value for part, value in changed.items()):
        return made
    return Recipe(f"{made.name} (changed)", **changed)

"""The judges, T0 to T7: is what a lane wrote admissible, by a bound that was derived?

Each takes what the lane really produced in the stage before, lifts it to float64, asks the oracle
what the stage should be, and gives a `Verdict`. There is one place where right and wrong are
decided, and this is it.

`sums` says how an implementation takes the sums of a transform; our lanes are butterflies.
"""

from .basis import bits, close, exact, form
from .codes import coded, masked, pruned, selected
from .layers import adjoint, layer
from .products import accumulated, gated_product, multiplied, values_product
from .prologues import added, gated, gated_backward, normed, turned_heads
from .stored import compressed, dequantized, encoded, packed, packed_bits, whole
from .transforms import rotated, scaled, transposed

__all__ = [
    "accumulated",
    "added",
    "adjoint",
    "bits",
    "close",
    "coded",
    "compressed",
    "dequantized",
    "encoded",
    "exact",
    "form",
    "gated",
    "gated_backward",
    "gated_product",
    "layer",
    "masked",
    "multiplied",
    "normed",
    "packed",
    "packed_bits",
    "pruned",
    "rotated",
    "scaled",
    "selected",
    "transposed",
    "turned_heads",
    "values_product",
    "whole",
]

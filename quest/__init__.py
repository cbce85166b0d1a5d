"""QuEST: training with weights and activations of 1 to 8 bits, verified against a float64 oracle.

    layer = quest.Linear(1024, 4096, recipe="w4a4")
    quest.quantize_(model, "w1a1")

Method: arXiv 2502.05003.
"""

from . import grids
from .estimators import STE, Clip, Trust
from .linear import Linear, quantize_
from .quantizer import Packed, Quantized, Quantizer
from .recipes import Recipe, recipe
from .sparsity import NM, Pairwise
from .transforms import Hadamard, Identity

__all__ = [
    "NM",
    "STE",
    "Clip",
    "Hadamard",
    "Identity",
    "Linear",
    "Packed",
    "Pairwise",
    "Quantized",
    "Quantizer",
    "Recipe",
    "Trust",
    "grids",
    "quantize_",
    "recipe",
]
__version__ = "0.1.0"

"""QuEST: training with weights and activations of 1 to 8 bits, verified against a float64 oracle.

    layer = quest.Linear(1024, 4096, recipe="w4a4")
    quest.quantize_(model, "w1a1")
    quest.freeze_(model)  # for inference

Method: arXiv 2502.05003.

PyTorch takes seconds to import, and `quest --help` does not wait for it: where nobody has imported
it, a name is imported when it is asked for. Programs that know the operators only by
``torch.ops.quest``, as exported ones do, say ``import quest.operators``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "torch" in sys.modules:
    from . import grids
    from .estimators import STE, Clip, Trust
    from .joint import together
    from .linear import Linear, freeze_, quantize_
    from .mlp import normed_swiglu, swiglu
    from .prologue import gated, normed
    from .quantizer import Packed, Quantized, Quantizer
    from .recipes import Recipe, recipe
    from .residual import added
    from .rotary import Rotary
    from .sparsity import NM, Pairwise
    from .transforms import Hadamard, Identity
else:
    _HOMES = {
        **dict.fromkeys(("STE", "Clip", "Trust"), "estimators"),
        "Rotary": "rotary",
        "added": "residual",
        "together": "joint",
        **dict.fromkeys(("gated", "normed"), "prologue"),
        **dict.fromkeys(("Linear", "freeze_", "quantize_"), "linear"),
        **dict.fromkeys(("normed_swiglu", "swiglu"), "mlp"),
        **dict.fromkeys(("Packed", "Quantized", "Quantizer"), "quantizer"),
        **dict.fromkeys(("Recipe", "recipe"), "recipes"),
        **dict.fromkeys(("NM", "Pairwise"), "sparsity"),
        **dict.fromkeys(("Hadamard", "Identity"), "transforms"),
    }
    # As they are there where PyTorch was imported first, and docs name them.
    _MODULES = {
        "compression",
        "grids",
        "lowbit",
        "lowbit_linear",
        "ops",
        "packing",
        "paths",
        "sparse_product",
        *_HOMES.values(),
    }

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(f"quest.{_HOMES[name]}"), name)
        if name in _MODULES:
            return import_module(f"quest.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
    "Rotary",
    "Trust",
    "added",
    "freeze_",
    "gated",
    "grids",
    "normed",
    "normed_swiglu",
    "quantize_",
    "recipe",
    "swiglu",
    "together",
]
__version__ = "0.1.0"

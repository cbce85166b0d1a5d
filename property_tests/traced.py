"""triton-viz's sanitizer over launches of the Triton kernels, in a process of its own.

    echo '{"quest.kernels": ["compress"]}' | TRITON_INTERPRET=1 python -m property_tests.traced

Reads names of `CASES` for each package that holds the kernels, `quest.kernels` or a copy of that
folder, and prints what the sanitizer says of each, as JSON.

The sanitizer asks a solver whether any lane of any program can leave the memory of the launch's
arguments. By itself triton-viz 3.0 stops at every butterfly; what `adapted` changes:
- A loop over `tl.static_range` runs turn by turn, its index a number, as the compiler unrolls it.
  triton-viz puts one unknown in place of the index, and shapes that follow from it are refused.
- What a load returns, and all that is computed of it, is a new unknown each time: any number that
  may be there. triton-viz computes some of it, and stops at splits, permutations and most floats.
- Each `tl.arange` is an unknown of its own. triton-viz makes all of one length the same unknown, so
  that lanes off the diagonal of two axes of one length are never asked about.
The latter two let more happen than can: they can raise a false alarm, and hide nothing. Not seen:
an access that lands in another argument, numbers that 32 bits don't hold (the solver's have no
end), and what is done where a branch that depends on data is not taken (ours have no other side).
Tiles are those of the interpreter. Works on triton-viz's internals, hence on version 3.0 alone.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quest import ops, transforms

Case = Callable[[Any], object]

# The kernels that are launched, by module.
KERNELS = {
    "pack": ("_pack",),
    "decode": ("_decode",),
    "compress": ("_compress",),
    "hadamard": ("_transform", "_base_product"),
    "quantize": ("_quantize",),
}


def _place() -> str:
    """The line of the kernel that is executed, as file:line."""
    frame: Any = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name.removesuffix(".py") in KERNELS and "triton_viz" not in path.parts:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a kernel"


@functools.cache
def adapted() -> type[Any]:
    """The sanitizer's class, changed as above; changes Triton's interpreter, too."""
    import triton.language as tl
    import z3
    from triton.runtime.interpreter import interpreter_builder
    from triton_viz.clients.sanitizer import sanitizer as viz
    from triton_viz.core import data
    from triton_viz.core.callbacks import ForLoopCallbacks, OpCallbacks
    from triton_viz.core.patch import OPERATION_REGISTRY

    numbers = itertools.count()

    class Unknown(viz.SymbolicExpr):
        """Any number, or any truth value."""

        SUPPORTED_OPS = (*viz.SymbolicExpr.SUPPORTED_OPS, "unknown")

        def __init__(self, dtype: Any = None, truth: bool = False) -> None:
            super().__init__("unknown")
            self.dtype = dtype
            self.z3 = (z3.Bool if truth else z3.Int)(f"unknown_{next(numbers)}")

    def unknown(value: Any) -> bool:
        value = value.handle if isinstance(value, tl.core.tensor) else value
        return isinstance(value, viz.SymbolicExpr) and bool(value.has_op("unknown"))

    class Adapted(viz.SymbolicSanitizer):
        """Notes the lines that it checks: a launch without checks proves nothing."""

        def __init__(self) -> None:
            super().__init__(abort_on_error=False)
            self.checked: set[str] = set()

        def _handle_access_check(self, expr: Any) -> None:
            expr.place = _place()  # triton-viz would name this file
            self.checked.add(expr.place)
            super()._handle_access_check(expr)

        def register_op_callback(self, op_type: Any) -> Any:
            original = super().register_op_callback(op_type).op_overrider
            if original is None:
                return OpCallbacks()

            def load(*arguments: Any) -> Any:
                made = original(*arguments)
                return Unknown(made.dtype)

            def arange(*arguments: Any) -> Any:
                made = original(*arguments)
                made.z3 = z3.Int(f"lane_{next(numbers)}")
                first, end = made.start.to_py(), made.end.to_py()
                made.constraints = z3.And(made.z3 >= first, made.z3 < end)
                return made

            def where(cond: Any, yes: Any, no: Any, op: Any) -> Any:
                if op is not np.where or not any(map(unknown, (cond, yes, no))):
                    return original(cond, yes, no, op)
                return original(Unknown(truth=True) if unknown(cond) else cond, yes, no, op)

            def of_two(a: Any, b: Any, op: Any) -> Any:
                # Of integers, codes and masks; what becomes of floats is cast, and unknown, before
                # it can be an address.
                exact = op in (np.add, np.bitwise_and)
                if exact or not (unknown(a) or unknown(b)):
                    return original(a, b, op)
                return Unknown(viz.SymbolicExpr.from_value(a).dtype)

            def other(*arguments: Any, **named: Any) -> Any:
                if any(map(unknown, (*arguments, *named.values()))):
                    return Unknown()
                return original(*arguments, **named)

            # Those that hand a lane's own value on.
            same = (data.AddPtr, data.Splat, data.ExpandDims, data.Broadcast)
            kept = (data.Store, data.RawStore, *same)
            overriders: dict[Any, Callable[..., Any]] = {
                data.Load: load, data.RawLoad: load, data.MakeRange: arange,
                data.TernaryOp: where, data.BinaryOp: of_two,
            }  # fmt: skip
            chosen = original if op_type in kept else overriders.get(op_type, other)
            return OpCallbacks(op_overrider=chosen)

        def register_for_loop_callback(self) -> Any:
            loops = super().register_for_loop_callback()

            def wrapped(iterable: Any, line: int, kind: str, *rest: Any) -> Any:
                if kind != "tl_static_range":
                    return loops.range_wrapper_factory(iterable, line, kind, *rest)
                if any(outer.lineno == line for outer in self.loop_stack):
                    raise RuntimeError(f"triton-viz takes two loops for one, line {line}")
                return None  # the range itself

            return ForLoopCallbacks(
                range_wrapper_factory=wrapped,
                before_loop_callback=loops.before_loop_callback,
                loop_iter_overrider=loops.loop_iter_overrider,
                after_loop_callback=loops.after_loop_callback,
            )

    def opaque(name: str) -> Callable[..., Any]:
        original = getattr(interpreter_builder, name)

        def operation(*arguments: Any) -> Any:
            if not any(isinstance(a, viz.SymbolicExpr) for a in arguments):
                return original(*arguments)
            return (Unknown(), Unknown()) if name == "create_split" else Unknown()

        return operation

    known = OPERATION_REGISTRY["triton"].namespaces[interpreter_builder]
    for name in ("create_split", "create_trans", "create_fma"):
        if name in known:
            raise RuntimeError(f"triton-viz knows {name} now: leave it out here")
        setattr(interpreter_builder, name, opaque(name))
    return Adapted


def _codes(rows: int, width: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.zeros(rows, width, dtype=dtype)


def _quantize(spec: str, width: int, **asked: Any) -> Case:
    """Three rows of float32 by the quantizer of this name; `asked` as in `kernels.quantize`."""

    def launch(kernels: Any) -> object:
        x = torch.zeros(3, width)
        program = ops.program(ops.quantizer(spec), x)
        if "kind" in asked:
            return kernels.quantize.encode(x, program, **asked)
        given = {"values": True, "codes": True, "packed": True} | asked
        return kernels.quantize.quantize(x, program, **given)

    return launch


def _transform(width: int, order: int, dtype: torch.dtype, masked: bool = False) -> Case:
    """Three rows through the transform; orders may have a base of 12."""

    def launch(kernels: Any) -> object:
        mask = torch.zeros(3, -(-width // 8), dtype=torch.uint8) if masked else None
        base = transforms.base(transforms.split(order)[0], torch.device("cpu"))
        x = torch.zeros(3, width, dtype=dtype)
        return kernels.hadamard.hadamard(x, order, base, masked, mask)

    return launch


# Few rows, and widths that no tile divides: most are primes, or a prime number of blocks.
CASES: dict[str, Case] = {
    "pack 2 bits": lambda k: k.pack.pack(_codes(3, 37), 2, 2, 3),
    "pack 4 bits": lambda k: k.pack.pack(_codes(5, 4099), 4, 1, 7),
    "decode 1 bit": lambda k: k.decode.decode(
        _codes(3, 5, torch.uint8), torch.ones(3, 1), 37, 1.0, torch.float32,
        bits=1, stride=2, top=1,
    ),
    "decode 4 bits": lambda k: k.decode.decode(
        _codes(5, 550, torch.uint8), torch.ones(5, 1), 1099, 1.0, torch.bfloat16,
        bits=4, stride=2, top=15,
    ),
    "decode 8 bits": lambda k: k.decode.decode(
        _codes(3, 37), torch.ones(3, 1), 37, 1.0, torch.float32, bits=8, stride=1, top=0
    ),
    "compress": lambda k: k.compress.compress(_codes(11, 4 * 67)),
    "transform of 16 bits": _transform(8 * 131, 8, torch.bfloat16),
    "transform of 32 bits": _transform(8 * 131, 8, torch.float32),
    "transform with a mask": _transform(8 * 131, 8, torch.float16, masked=True),
    "transform of order 1": _transform(37, 1, torch.float32, masked=True),
    "transform of order 16384": _transform(16384, 16384, torch.float16),
    "transform of blocks as rows": _transform(16 * 5, 16, torch.bfloat16, masked=True),
    "transform with a base": _transform(24 * 5, 24, torch.float32),
    "transform with a base, of 16 bits": _transform(24 * 5, 24, torch.bfloat16),
    "quantize": _quantize("uniform4/identity/trust1.0/dense", 37),
    "quantize unpacked": _quantize("uniform8/hadamard8/clip1.3/dense", 8 * 131, packed=False),
    "quantize chunks": _quantize("uniform2/identity/ste/dense", 8209),
    "quantize a table": _quantize("e2m1/hadamard8/trust1.0/dense", 8 * 5),
    "quantize a large table": _quantize("lloyd_max8/identity/trust1.0/dense", 37, packed=False),
    "quantize 2:4": _quantize("uniform4/hadamard4/trust1.0/2:4", 4 * 37),
    "quantize pairs 4:8": _quantize("uniform4/hadamard8/clip1.3/pairs4:8", 8 * 5, packed=False),
    "quantize with a base": _quantize("uniform4/hadamard12/trust1.0/dense", 12 * 5),
    "encode bits": _quantize("uniform1/hadamard8/clip1.3/dense", 8 * 5, kind="bits", integer=2.0),
    "encode integers": _quantize(
        "ternary/identity/trust1.0/dense", 8209, kind="integers", integer=1.0
    ),
}  # fmt: skip


def sanitize(package: str, cases: Iterable[str], first: bool) -> dict[str, dict[str, Any]]:
    """What is found in each case: the lines that were checked, and accesses out of bounds.

    What triton-viz can't do is an "error" instead. first: no case after one that finds something.
    """
    import triton_viz
    from triton_viz.clients.sanitizer import sanitizer as viz
    from triton_viz.core import patch

    modules = {name: importlib.import_module(f"{package}.{name}") for name in KERNELS}
    sanitizers = []
    adapted_class = adapted()
    for name, module in modules.items():
        for kernel in KERNELS[name]:
            sanitizers.append(adapted_class())
            setattr(module, kernel, triton_viz.trace(sanitizers[-1])(getattr(module, kernel)))
        # Functions that kernels of other modules call look for it, too.
        vars(module)["_triton_viz_loop_patcher"] = patch._loop_patcher
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        viz._fn_symbolic_cache_set.clear()  # else a launch like an earlier one is passed over
        for s in sanitizers:
            s.records.clear()
            s.checked.clear()
        try:
            CASES[case](SimpleNamespace(**modules))
        except Exception as error:
            found[case] = {"error": f"{type(error).__name__}: {error}"}
            continue
        found[case] = {
            "checked": sorted(set().union(*(s.checked for s in sanitizers))),
            "out": [
                f"{r.symbolic_expr.place}: {r.op_type.name} of {r.tensor_name}"
                for s in sanitizers
                for r in s.records
            ],
        }
        if first and found[case]["out"]:
            break
    return found


def main() -> None:
    """Runs {package: [case, ...]} from standard input; with --first as `sanitize` does."""
    first = sys.argv[1:] == ["--first"]
    found = {name: sanitize(name, cases, first) for name, cases in json.load(sys.stdin).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

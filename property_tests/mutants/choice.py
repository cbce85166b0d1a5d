"""Which tests are run on a mutant, and in which order.

Only tests that execute a mutated line can notice it, so those come first, the file's own tests
before all others and cheap ones before dear ones. A value that was made once, while modules were
imported or by a cache, reaches further: then tests that touch the file follow, and at last all.

The quick profile takes one in 16 parameters of a test. What survives it meets the ci profile, in
the files that are about the mutated one: a mutant that only this kills is told apart.

What killed other mutants of the same function, or file, goes first of all: there one test often
kills most. The cheapest for its kills is the first of them, and a few are enough.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from . import covered, cuda_source
from .baseline import IMPORT, Baseline
from .mutant import ROOT, Mutant, read
from .trace import WATCHED

# Of few.cu, and of the header with its PTX.
_FEW = (
    "cuda_corners",
    "few_cuda_edges", "few", "packed_product", "frozen", "launch_rules", "few_launches",
    "cuda_texts", "races", "memcheck", "barriers", "many_rows",
)  # fmt: skip
# Of product.cu, and of its header.
_PRODUCT = (
    "cuda_corners",
    "product_cuda_edges",
    "product_judged",
    "product",
    "gated_product",
    "added_product",
    "rotated_product",
    "layer",
    "frozen",
    "cuda_texts",
    "races",
    "memcheck",
    "barriers",
    "many_rows",
)
# Of the judges, by topic: those that call lanes, or `examine`, first.
_JUDGES = (
    "judges_guard", "judges_hearing", "judges_gate", "judges_norm", "judges",
    "judges_transforms", "judges_rules", "judges_values", "judges_backward", "judges_layer",
)  # fmt: skip
# The tests that are about a file.
OWN = {
    "kernels/recorded.py": ("driver_calls", "launches", "direct"),
    "kernels/blocks.py": (
        "launch_edges",
        "block_launches",
        "launch_rules",
        "direct_launches",
        "blocks",
        "prologue_kernel",
    ),
    "kernels/blocks.cu": (
        "cuda_corners",
        "blocks_cuda_edges",
        "blocks_teams_cuda_edges",
        "blocks_drawn",
        "blocks",
        "prologue_kernel",
        "gated_layer",
        "prologue",
        "product",
        "layer",
        "launch_rules",
        "block_launches",
        "many_blocks",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/exchange.cuh": (
        "blocks_cuda_edges",
        "blocks_teams_cuda_edges",
        "blocks_drawn",
        "blocks",
        "prologue_kernel",
        "gated_layer",
        "prologue",
        "product",
        "layer",
        "launch_rules",
        "block_launches",
        "many_blocks",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/codes.cuh": (
        "rows_cuda_edges",
        "blocks_cuda_edges",
        "blocks_teams_cuda_edges",
        "blocks_drawn",
        "blocks",
        "rows",
        "prologue_kernel",
        "launch_rules",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/rotate.cuh": (
        "masked_cuda_edges",
        "rows_cuda_edges",
        "blocks_cuda_edges",
        "blocks_teams_cuda_edges",
        "blocks_drawn",
        "blocks",
        "rows",
        "masked",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/cuda.py": ("driver_calls", "launches", "launch_rules", "product", "few", "blocks"),
    "kernels/compress.py": (
        "compress_cases",
        "launch_rules",
        "layout",
        "compress",
        "many_entries",
    ),
    "kernels/decode.py": (
        "launch_edges",
        "packed_tiles",
        "launch_rules",
        "packed_operand",
        "product",
        "many_entries",
    ),
    "kernels/few.py": ("launch_edges", "few_launches", "launch_rules", "few"),
    "kernels/few.cu": _FEW,
    "kernels/few_ptx.cuh": _FEW,
    "kernels/bias.cuh": (
        "few_cuda_edges",
        "product",
        "few",
        "sparse_product",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/gate.cuh": (
        "cuda_corners",
        "blocks_teams_cuda_edges",
        "blocks_drawn",
        "prologue_kernel",
        "prologue",
        "gated_product",
        "cuda_texts",
    ),
    "kernels/halves.cuh": (
        "blocks_cuda_edges",
        "blocks_teams_cuda_edges",
        "blocks_drawn",
        "masked_cuda_edges",
        "blocks",
        "masked",
        "rows",
        "launch_rules",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/hadamard.py": (
        "launch_edges",
        "transform_launches",
        "launch_rules",
        "transform_edges",
        "hadamard_cases",
        "hadamard",
        "backward",
        "constants",
        "many_entries",
    ),
    "kernels/hopper.cuh": (
        "product_cuda_edges",
        "sparse_cuda_edges",
        "product_judged",
        "sparse_judged",
        "product",
        "sparse_product",
        "frozen",
        "launch_rules",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/hopper.py": (
        "product_launches",
        "launch_rules",
        "product",
        "product_errors",
        "sparse_product",
    ),
    "kernels/layout.py": ("layout", "few", "rows", "masked"),
    "kernels/forms.py": (
        "layout",
        "block_launches",
        "launch_rules",
        "few_launches",
        "prologue_kernel",
    ),
    "kernels/masked.cu": (
        "masked_cuda_edges",
        "masked",
        "backward",
        "launch_rules",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/masked.py": ("layout", "masked", "launch_rules", "masked_cuda_edges"),
    "kernels/outputs.py": ("launch_edges", "outputs", "api", "errors"),
    "kernels/overlap.cuh": (
        "rows_cuda_edges",
        "few_cuda_edges",
        "product_cuda_edges",
        "sparse_cuda_edges",
        "cuda_texts",
    ),
    "kernels/pack.py": (
        "launch_edges",
        "packed_tiles",
        "launch_rules",
        "packed_operand",
        "many_entries",
    ),
    "kernels/product.py": (
        "layout",
        "product_launches",
        "launch_rules",
        "product",
        "gated_product",
        "added_product",
        "rotated_product",
        "product_errors",
    ),
    "kernels/product.cu": ("product_launches", "cuda_turns", *_PRODUCT),
    "kernels/product.cuh": _PRODUCT,
    "kernels/rotary.cuh": ("rotated_product", "cuda_turns", "races", "memcheck"),
    "kernels/quantize.py": (
        "launch_edges",
        "quantize_launches",
        "quantize_rows",
        "launch_rules",
        "quantizer",
        "product",
        "many_entries",
    ),
    "kernels/rows.cu": (
        "cuda_corners",
        "rows_cuda_edges",
        "blocks_cuda_edges",
        "blocks_drawn",
        "rows",
        "frozen",
        "launch_rules",
        "few_launches",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
    ),
    "kernels/rows.py": (
        "cuda_corners",
        "few_launches",
        "launch_rules",
        "emulated_rows",
        "rows",
        "blocks_cuda_edges",
    ),
    "kernels/scales.cuh": (
        "product_cuda_edges",
        "few_cuda_edges",
        "sparse_cuda_edges",
        "sparse_far_cuda_edges",
        "cuda_texts",
    ),
    "kernels/sparse.cu": (
        "cuda_corners",
        "product_launches",
        "sparse_cuda_edges",
        "sparse_judged",
        "sparse_far_cuda_edges",
        "sparse_product",
        "launch_rules",
        "cuda_texts",
        "races",
        "memcheck",
        "barriers",
        "many_rows",
    ),
    "kernels/sparse.py": ("launch_edges", "product_launches", "launch_rules", "sparse_product"),
    "kernels/whole.py": ("launch_rules", "quantizer", "hadamard"),
    "quest/compression.py": (
        "grids_and_transforms_edges",
        "compress_edges",
        "compress_cases",
        "compress",
        "sparse_product",
    ),
    "quest/direct.py": (
        "frozen_corners",
        "direct_launches",
        "recorded_calls",
        "direct",
        "gated_product",
        "added_product",
        "rotary",
        "frozen",
    ),
    "quest/eager.py": (
        "grids_and_transforms_edges",
        "eager_edges",
        "hadamard",
        "backward",
        "product",
        "quantizer",
        "operators",
        "packed_operand",
        "prologue",
        "gated_layer",
    ),
    "quest/estimators.py": ("api", "errors"),
    "quest/flops.py": ("flops",),
    "quest/frozen.py": (
        "layer_edges",
        "frozen_weights",
        "gated_product",
        "added_product",
        "rotary",
        "frozen",
        "joint",
        "sparse_product",
    ),
    "quest/gated_product.py": ("gated_product", "flops"),
    "quest/grids.py": ("grids_and_transforms_edges", "grids", "api", "constants", "errors"),
    "quest/joint.py": (
        "grids_and_transforms_edges",
        "shared_inputs",
        "recorded_calls",
        "gated_product",
        "added_product",
        "rotary",
        "joint",
    ),
    "quest/linear.py": (
        "layer_edges",
        "layer_life",
        "recorded_calls",
        "linear",
        "quantize_model",
        "layer",
    ),
    "quest/lowbit.py": (
        "launch_edges",
        "operand_launches",
        "operand_checks",
        "product",
        "added_product",
        "rotated_product",
        "product_errors",
        "rows",
        "packed_operand",
        "errors",
        "flops",
    ),
    "quest/lowbit_linear.py": (
        "layer_edges",
        "low_bit_layer_edges",
        "operand_checks",
        "layer",
        "joint",
        "live_layers",
        "gated_layer",
        "product_errors",
        "prologue_launches",
        "flops",
    ),
    "quest/mlp.py": ("mlp_edges", "gated_product", "added_product", "mlp", "flops"),
    "quest/operands.py": ("operand_forms", "product", "product_errors", "packed_operand", "errors"),
    "quest/operators.py": ("api",),
    "quest/ops.py": (
        "launch_edges",
        "operator_launches",
        "masked",
        "operators",
        "errors",
        "hadamard",
    ),
    "quest/packed.py": (
        "frozen_corners",
        "grids_and_transforms_edges",
        "operand_launches",
        "operand_checks",
        "packed_product",
        "live_layers",
        "few",
        "flops",
    ),
    "quest/packing.py": ("grids_and_transforms_edges", "packing", "errors"),
    "quest/paths.py": ("paths", "launch_rules", "frozen", "linear"),
    "quest/prologue.py": (
        "frozen_corners",
        "prologue_launches",
        "prologue_rules",
        "gated_product",
        "rotary",
        "prologue",
        "prologue_layers",
        "gated_layer",
    ),
    "quest/quantizer.py": ("grids_and_transforms_edges", "api", "errors", "quantizer"),
    "quest/recipes.py": ("api", "errors"),
    "quest/residual.py": ("added_product", "frozen_corners"),
    "quest/rotary.py": ("rotary", "rotated_product", "frozen_corners"),
    "quest/rotated_product.py": ("rotated_product", "rotary", "flops"),
    "quest/scalars.py": ("errors",),
    "quest/sparse_product.py": ("sparse_product_checks", "sparse_product", "flops"),
    "quest/sparsity.py": ("api", "errors"),
    "quest/transforms.py": (
        "grids_and_transforms_edges",
        "api",
        "eager_edges",
        "hadamard",
        "errors",
    ),
    "property_tests/ledger.py": ("report", "verdict"),
    "quest/conformance/examine.py": (
        *_JUDGES,
        "added_product",
        "rotated_product",
        "frozen",
        "backward",
    ),
    "quest/conformance/judges/basis.py": ("judges_edges", *_JUDGES),
    "quest/conformance/judges/codes.py": ("judges_edges", *_JUDGES),
    "quest/conformance/judges/layers.py": ("judges_edges", *_JUDGES),
    "quest/conformance/judges/products.py": ("judges_edges", *_JUDGES),
    "quest/conformance/judges/prologues.py": ("judges_edges", *_JUDGES),
    "quest/conformance/judges/stored.py": ("judges_edges", *_JUDGES),
    "quest/conformance/judges/transforms.py": ("judges_edges", *_JUDGES),
    "quest/conformance/exact_rows.py": ("conformance_public",),
    "quest/conformance/propagated.py": ("conformance_public",),
    "quest/conformance/public/properties.py": ("conformance_public",),
    "quest/conformance/lanes.py": (*_JUDGES, "frozen"),
    "quest/conformance/stages.py": (*_JUDGES, "frozen"),
    "quest/conformance/backends.py": (*_JUDGES, "frozen"),
    "quest/conformance/interpreter.py": (*_JUDGES, "frozen"),
    "quest/conformance/verdict.py": ("verdict",),
    "quest/conformance/verify.py": ("verify",),
    "reference/bounds.py": ("bounds", "judges_edges", *_JUDGES),
    "reference/compression.py": ("compress",),
}
# The court must be held by the tests of the court: those that run production code can't tell a
# bound that is too wide.
HELPERS = (
    *_JUDGES, "judges_edges", "bounds", "verdict", "inputs", "reference_estimators",
    "reference_grids", "reference_hadamard", "reference_linear", "reference_packing",
    "reference_quantize", "reference_sparsity",
)  # fmt: skip
# What an open mutant has passed, in this order: its first tests; all tests about its file; all
# that could notice, in the quick profile. What passes those and the ci profile has survived.
PASSED = FIRST, OWN_TESTS, QUICK = "first tests", "own tests", "quick profile"
# A first process stays small: what it imports and runs is paid by every mutant.
FIRST_FILES, FIRST_SECONDS = 3, 15.0
LIKELY = 8  # that killed others go first: behind as many the file's own order finds more


@functools.cache
def test_file(test: str) -> str:
    """hadamard, of property_tests/test_hadamard.py::test_transform[...]."""
    found = re.match(r"property_tests/test_(\w+)\.py", test)
    return found[1] if found else ""


@dataclass(frozen=True)
class Part:
    """What one process runs: `tests` in order, with their usual seconds; all of `paths` if none.

    passed: what a mutant has passed that survives this; "": everything.
    """

    profile: str
    paths: tuple[str, ...]
    tests: dict[str, float]
    passed: str = ""


def launchers(file: str) -> list[str]:
    """The Python files that launch what is compiled from a .cu file, or from a header."""
    sources = cuda_source.holders(file, ROOT)
    return [f.replace(".cu", ".py") for f in sources]


def stages(
    mutant: Mutant,
    baseline: Baseline,
    killers: Counter[str] | None = None,
    narrow: bool = False,
    named: Collection[str] = (),
) -> list[Part]:
    """What runs on a mutant until something kills it; nothing where no test executes its lines.

    killers: tests by how likely it is that they are the one; see `journal.Journal.killers`.
    narrow: the baseline knows the tests about the file alone. named: of those only these, as in
    OWN, whether or not they were seen to execute its lines: some read a text, or start a process.
    """
    order = _order(mutant, baseline, killers or Counter(), named)
    if not order:
        return []
    first: list[str] = []
    files: set[str] = set()
    left = FIRST_SECONDS
    for test in order:
        file, seconds = test_file(test), baseline.tests[test]
        if (file in files or len(files) < FIRST_FILES) and (seconds <= left or not first):
            first.append(test)
            files.add(file)
            left -= seconds
    rest = [t for t in order if t not in set(first)]
    parts = [quick({t: baseline.tests[t] for t in part}) for part in (first, rest) if part]
    touched = {test_file(t) for t in order}
    own = tuple(f"property_tests/test_{n}.py" for n in OWN.get(mutant.file, ()) if n in touched)
    parts += [Part("ci", own, {})] if own else []
    text = cuda_source.is_cuda(mutant.file)
    # Without a GPU tests compile CUDA C++ and emulate some of it: nothing survives that.
    last = OWN_TESTS if narrow else QUICK if text and not covered.has_gpu() else ""
    if named:
        last = FIRST
    passed = [FIRST] * (len(parts) - 1) + [last]
    if len(parts) > 1 and own and not narrow:
        passed[-2] = QUICK
    return [replace(part, passed=p) for part, p in zip(parts, passed, strict=True)]


def quick(tests: dict[str, float]) -> Part:
    """These tests in the quick profile."""
    return Part("quick", tuple(dict.fromkeys(t.partition("::")[0] for t in tests)), tests)


def _order(
    mutant: Mutant, baseline: Baseline, killers: Counter[str], named: Collection[str]
) -> list[str]:
    own = {f: i for i, f in enumerate(OWN.get(mutant.file, ()))}
    covering = set() if named else _covering(mutant, baseline)
    groups = [covering - {IMPORT}, baseline.touching(mutant.file)]
    if named:
        wanted = {f for f in named if f in own}
        groups = [{t for t in baseline.tests if test_file(t) in wanted}]
    elif not covering:
        return []
    elif IMPORT in covering:  # all, of which only its own are likely to look
        groups = [{t for t in baseline.tests if test_file(t) in own}, *groups, {*baseline.tests}]
    elif _is_compiled(mutant.file):  # which tests read a text, or only compile it, is not seen
        groups.append({t for t in baseline.tests if test_file(t) in own})
    order: dict[str, None] = {}
    for group in groups:
        likely = sorted(
            (t for t in group if killers[t]), key=lambda t: (baseline.tests[t] / killers[t], t)
        )[:LIKELY]
        ranked = sorted(
            group, key=lambda t: (own.get(test_file(t), len(own)), baseline.tests[t], t)
        )
        order |= dict.fromkeys([*likely, *ranked])
    chosen = [t for t in order if t not in baseline.failed]
    if mutant.family == "court":
        chosen = [t for t in chosen if test_file(t) in (*HELPERS, *own)]
    return chosen


@functools.cache
def _is_compiled(file: str) -> bool:
    """Whether a file holds a kernel, in CUDA C++ or for Triton."""
    return cuda_source.is_cuda(file) or b"@triton.jit" in read(file)


@functools.cache
def _bodies(file: str) -> set[int]:
    """The lines of a file that stand in a function."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.update(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
    return found


@functools.cache
def _launches(file: str) -> list[tuple[str, int]]:
    """File and line of each launch of what is compiled from a .cu file, or from a header."""
    return [
        (python, n) for python in launchers(file)
        for n, line in enumerate(read(python).decode().splitlines(), 1) if ".launch(" in line
    ]  # fmt: skip


def _at_import(mutant: Mutant) -> bool:
    """Whether a line of it stands in no function."""
    first, last = mutant.lines
    return not {*range(first, last + 1)} <= _bodies(mutant.file)


def _covering(mutant: Mutant, baseline: Baseline) -> set[str]:
    if mutant.file.partition("/")[0] not in WATCHED:
        return {IMPORT}  # a helper of the tests: any of them may need it
    if not cuda_source.is_cuda(mutant.file):
        found = baseline.covering(mutant.file, *mutant.lines)
        # What runs at import may have run before anything was looked at: every test may need it.
        return found | {IMPORT} if found and _at_import(mutant) else found
    # What a test executes of a CUDA C++ kernel is not seen; that it is launched is. Tests of the
    # emulator break kernels by their text, and fail where that is another.
    launched = [baseline.covering(file, n, n) for file, n in _launches(mutant.file)]
    found = set().union(*launched) - {IMPORT}
    return {t for t in found if not test_file(t).startswith("emulated")}

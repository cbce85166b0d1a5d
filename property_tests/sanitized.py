r"""Every CUDA C++ kernel once at a small shape, for compute-sanitizer.

    compute-sanitizer --report-api-errors no --tool memcheck python -m property_tests.sanitized
    compute-sanitizer --report-api-errors no --tool racecheck python -m property_tests.sanitized few

An argument that is a launch's name selects that one, any other those whose names contain it.
Loading a kernel asks the driver for things that some devices refuse, which is no fault of a kernel:
hence without API errors.
What the kernels compute is judged by the tests; here they only have to run to their end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

import quest
from quest import compression, lowbit, operands, ops, prologue
from quest.gated_product import gated_product
from quest.kernels import cuda, hopper, product, sparse
from quest.kernels import rows as by_row
from quest.packed import packed_product
from quest.rotated_product import rotated_product
from quest.sparse_product import sparse_product

Launch = Callable[[], object]
TIME = 900  # seconds that a tool may take for a test: the slowest took about 100


def _normal(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + width)
    return torch.randn(rows, width, generator=generator).to("cuda", dtype)


def _encoded(name: str, x: torch.Tensor, w: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], ...]:
    """(operand, scale, sums) of both sides of a recipe, and what their product is called with."""
    made = quest.recipe(name)
    kinds = operands.kinds(made.activation, made.weight) or ("", "")
    found = []
    for t, q, kind in ((x, made.activation, kinds[0]), (w, made.weight, kinds[1])):
        operand, scale, _, sums = lowbit.encode(t, q.spec, kind)
        found.append((operand, scale, sums))
    return tuple(found)


def _kind(name: str) -> str:
    """Of the operand of a recipe's input."""
    made = quest.recipe(name)
    return (operands.kinds(made.activation, made.weight) or ("",))[0]


def _names(name: str) -> tuple[str, str]:
    made = quest.recipe(name)
    pair = (made.activation, made.weight)
    grids = ",".join(q.require_grid().name for q in pair)
    return grids, ",".join(operands.kinds(*pair) or ())


def _product(
    name: str, tiles: product.Shape, bias: torch.dtype | None = None, width: int = 640,
    rows: int = 300, gate: bool = False, residual: bool = False,
) -> Launch:  # fmt: skip
    def run() -> object:
        a, b = _encoded(name, _normal(rows, width), _normal(600, width))
        added = None if bias is None else _normal(1, 600, bias)[0]
        further = (_normal(rows, 600),) if residual else ()
        with product.only(tiles):
            return (gated_product if gate else lowbit.product)(
                a[0], b[0], a[1], b[1], a[2], b[2], added, *_names(name), width, torch.bfloat16,
                *further,
            )  # fmt: skip

    return run


def _rotated(name: str, tiles: product.Shape, head: int, bias: torch.dtype | None = None) -> Launch:
    """Of three sequences; of 600 columns most heads are turned, some are not, and 24 are none."""

    def run() -> object:
        a, b = _encoded(name, _normal(300, 640), _normal(600, 640))
        added = None if bias is None else _normal(1, 600, bias)[0]
        angle = _normal(100, head // 2, torch.float32)
        with product.only(tiles):
            return rotated_product(
                a[0], b[0], a[1], b[1], a[2], b[2], added, *_names(name), 640, torch.bfloat16,
                angle.cos(), angle.sin(), 3 * 128,
            )  # fmt: skip

    return run


def _accumulators(tiles: product.Shape) -> Launch:
    def run() -> object:
        a, b = _encoded("w4a4", _normal(300, 640), _normal(600, 640))
        with product.only(tiles):
            return lowbit.accumulate(a[0], b[0])

    return run


def _sparse(tiles: sparse.Shape, bias: torch.dtype | None = None, width: int = 640) -> Launch:
    def run() -> object:
        name = "w4a4-2:4"
        a, b = _encoded(name, _normal(300, width), _normal(600, width))
        kept = compression.compress(b[0])
        added = None if bias is None else _normal(1, 600, bias)[0]
        with sparse.only(tiles):
            return sparse_product(
                a[0], *kept, a[1], b[1], a[2], b[2], added, *_names(name), width, torch.bfloat16
            )

    return run


def _sparse_accumulators() -> Launch:
    """Several turns of a cluster; tokens that leave an odd count of spans."""

    def run() -> object:
        a, b = _encoded("w4a4-2:4", _normal(5, 256), _normal(600, 256))
        values, metadata = compression.compress(b[0])
        with mock.patch.object(cuda, "processors", return_value=2), sparse.only(sparse.NARROW):
            return sparse.product(values, metadata, a[0], torch.int32, epilogue=hopper.RAW)

    return run


def _quantized(x: torch.Tensor, name: str, few: bool) -> object:
    """With masks, saved, as values, packed and without a mask; few: by rows.cu, else blocks.cu."""
    made, kind = quest.recipe(name).activation, _kind(name)
    with mock.patch.object(by_row, "takes", return_value=few):
        encoded = lowbit.encode(x, made.spec, kind), lowbit.operand(x, made.spec, kind)
        return *encoded, lowbit.launch_encode_saved(x, made, kind), made(x), made.pack(x)


def _blocks(name: str, width: int, dtype: torch.dtype, few: bool = False) -> Launch:
    def run() -> object:
        x = _normal(9, width, dtype)
        x[3], x[5, 7] = 0.0, float("nan")
        return _quantized(x, name, few)

    return run


def _in_turns(launch: Launch) -> Launch:
    """As where there is one multiprocessor: its blocks take several turns."""

    def run() -> object:
        with mock.patch.object(cuda, "processors", return_value=1):
            return launch()

    return run


def _rows(name: str, width: int, dtype: torch.dtype) -> Launch:
    return _blocks(name, width, dtype, few=True)


# More than the blocks of one multiprocessor take in a turn, twice: 256 rows of 128, 128 of 256, 40
# of 768, 16 of 2048 and of 4096, 10 of 5632, 5 of 11008 (`blocks._shape`).
TURNS = {128: 1000, 256: 500, 768: 90, 2048: 37, 4096: 37, 5632: 23, 11008: 12}


def _many(width: int) -> Launch:
    """Rows that one multiprocessor takes in turns."""

    def run() -> object:
        x = _normal(TURNS[width], width)
        x[3], x[5, 7] = 0.0, float("nan")
        return _quantized(x, "w4a4", few=False)

    return run


def _prologues(name: str, width: int, dtype: torch.dtype) -> Launch:
    """A gate, a norm, and a norm of a sum; each with its rows shown, and without; a gate's mask."""

    def run() -> object:
        x, other = _normal(TURNS[width], 2 * width, dtype).tensor_split(2, -1)
        x[3], x[5, 7] = 0.0, float("nan")
        weight = _normal(1, width, dtype)[0]
        spec, kind = quest.recipe(name).activation.spec, _kind(name)
        if not prologue.has_kernel(spec, x):
            raise RuntimeError(f"there is no kernel with a prologue for {name}, {width}, {dtype}")
        gates: list[tuple[torch.Tensor, ...]] = [
            gated(x, other, spec, kind)
            for gated in (prologue.gated_encode, prologue.gated_encode_shown)
        ]
        gates.append(prologue.launch_encode_gated(x, other, ops.quantizer(spec), kind))
        norms = []
        for few in (False, True):  # rows: either kernel makes them where there is no sum
            with mock.patch.object(by_row, "takes", return_value=few):
                norms += [
                    normed(x, residual, weight, 1e-5, spec, kind)
                    for normed in (prologue.normed_encode, prologue.normed_encode_shown)
                    for residual in (None, other)[: 2 - few]
                ]
        return gates, norms

    return _in_turns(run)


def _masked(rows: int, dtype: torch.dtype, out: torch.dtype | None = None) -> Launch:
    """Gradients turned back behind a mask; a group of eight blocks that is not full, too."""

    def run() -> object:
        grad = _normal(rows, 128, dtype)
        mask = torch.randint(256, (rows, 16), device="cuda").to(torch.uint8)
        return ops.launch_masked_transpose(grad, mask, 128, out)

    return run


def _few(name: str, rows: int, width: int, columns: int = 130) -> Launch:
    def run() -> object:
        w = _normal(columns, width)
        a, b = _encoded(name, _normal(rows, width), w)
        packed = quest.recipe(name).weight.pack(w).codes
        return packed_product(
            a[0], packed, a[1], b[1], a[2], b[2], None, *_names(name), width, torch.bfloat16
        )

    return run


def _frozen(name: str, rows: int) -> Launch:
    """A layer in eager mode: kernels that overlap, and weights asked for early."""

    def run() -> object:
        layer = quest.Linear(640, 600, recipe=name, device="cuda", dtype=torch.bfloat16).freeze()
        x = _normal(rows, 640)
        with torch.no_grad():
            return [layer(x) for _ in range(3)]

    return run


def launches() -> Iterator[tuple[str, Launch]]:
    """Names, and what to call."""
    for name in ("w1a1", "w4a4", "w8a8"):
        for told in ("tall", "narrow") if name == "w1a1" else ("wide", "tall", "narrow"):
            tiles = product.KINDS[told]
            yield f"product {name} {told}", _product(name, tiles)
            yield f"gated product {name} {told}", _product(name, tiles, torch.float16, gate=True)
            yield f"added product {name} {told}", _product(name, tiles, residual=True)
            yield f"rotated product {name} {told}", _rotated(name, tiles, 128)
    yield "rotated product w4a4 heads of 32", _rotated("w4a4", product.NARROW, 32, torch.float32)
    yield "product w4a4 40 rows", _product("w4a4", product.NARROW, rows=40)  # less than a tile
    yield "product int32", _accumulators(product.NARROW)
    for told, shape in (("wide", sparse.WIDE), ("narrow", sparse.NARROW)):
        yield f"sparse {told}", _sparse(shape)
    yield "sparse 512 entries", _sparse(sparse.NARROW, width=512)  # an even count of blocks
    yield "sparse int32", _sparse_accumulators()
    for bias in ops.DTYPES:
        for name in ("w1a1", "w4a4"):
            yield f"product {name} bias {bias}", _product(name, product.NARROW, bias)
        yield f"sparse bias {bias}", _sparse(sparse.NARROW, bias)
    for dtype in (torch.bfloat16, torch.float32):
        yield f"blocks w2a2 4096 {dtype}", _blocks("w2a2", 4096, dtype)  # saved in 2 bits
    # The widest row: as many warps as a block may have.
    yield "blocks w4a4 49152 in turns", _in_turns(_blocks("w4a4", 49152, torch.bfloat16))
    yield "prologues w2a2 4096", _prologues("w2a2", 4096, torch.bfloat16)
    # Two rows a team of three warps, whose threads leave each other sums; and, of 16 blocks a warp,
    # five rows a team of two. Of 16 blocks a row has a warp.
    for width in (5632, 768, 2048):
        yield f"blocks w4a4 {width} in turns", _in_turns(_many(width))
        yield f"prologues w4a4 {width}", _prologues("w4a4", width, torch.bfloat16)
    for width in (768, 2048):  # codes of 2 bits, which fewer lanes write; of float32, one of a mask
        yield f"blocks w2a2 {width}", _blocks("w2a2", width, torch.bfloat16)
        yield f"blocks w1a1 {width} torch.float32", _blocks("w1a1", width, torch.float32)
        yield f"rows w2a2 {width}", _rows("w2a2", width, torch.bfloat16)
    # Lanes that exchange nothing while they sum squares, since each has a row.
    yield "prologues w4a4 128", _prologues("w4a4", 128, torch.bfloat16)
    yield "rows w4a4 17408", _rows("w4a4", 17408, torch.bfloat16)  # two turns of a row
    for name in ("w1a1", "w4a4", "w8a8"):
        for width in (256, 4096, 11008):
            for dtype in (torch.bfloat16, torch.float32):
                yield f"blocks {name} {width} {dtype}", _blocks(name, width, dtype)
                yield f"rows {name} {width} {dtype}", _rows(name, width, dtype)
            for dtype in (torch.bfloat16, torch.float16):
                yield f"prologues {name} {width} {dtype}", _prologues(name, width, dtype)
        for rows in (1, 12, 20, 300):
            yield f"frozen {name} {rows} rows", _frozen(name, rows)
    yield "frozen w4a4-2:4 600 rows", _frozen("w4a4-2:4", 600)  # compressed
    for name in ("w1a1", "w4a4"):
        for rows in (5, 40):
            yield f"few {name} {rows} rows", _few(name, rows, 1152)
        # The last tile's upper half ends where the weights do; several turns of a warp in a tile.
        yield f"few {name} 140 columns", _few(name, 5, 1152, 140)
        yield f"few {name} 4224 wide", _few(name, 5, 4224)
        yield f"few {name} 8320 wide", _few(name, 5, 8320)  # weights asked for before all else
    yield "few clusters", _few("w4a4", 40, 4096)  # more of A than a block of threads can hold
    for dtype, out in ((torch.bfloat16, None), (torch.float16, torch.float32)):
        for rows in (64, 77):
            yield f"masked {rows} {dtype}", _masked(rows, dtype, out)


def check(tool: str, wanted: tuple[str, ...], **environment: str) -> None:
    """A test: fails where the tool finds a fault, or a launch does not come to its end.

    Skips where there is no compute-sanitizer or no Hopper GPU.
    """
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = hopper.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)
    # A session of its own: what the tool has started ends with it.
    with subprocess.Popen(
        [found, "--report-api-errors", "no", "--tool", tool, "--error-exitcode", "9",
         sys.executable, "-m", "property_tests.sanitized", *wanted],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            told = process.communicate(timeout=TIME)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            told = process.communicate()[0]
            pytest.fail(f"{tool} did not end in {TIME} s; it said:\n{told[-3000:]}")
    assert process.returncode == 0, told[-3000:]
    assert set(wanted) <= set(told.splitlines())


def chosen(wanted: list[str], names: list[str]) -> list[str]:
    """Those of `names` that the arguments select; SystemExit where one selects none."""
    selected: set[str] = set()
    for word in wanted:
        found = {word} if word in names else {told for told in names if word in told}
        if not found:
            raise SystemExit(f"nothing is called {word}; there are {', '.join(names)}")
        selected |= found
    return [told for told in names if not wanted or told in selected]


def main(wanted: list[str]) -> None:
    """Run what is wanted, everything by default, and say what ran.

    SystemExit where nothing is called so, and where no kernel of CUDA C++ runs.
    """
    known = dict(launches())
    selected = chosen(wanted, list(known))
    if reason := cuda.unavailable(torch.device("cuda")):
        raise SystemExit(f"kernels in CUDA C++ can't be launched here: {reason}")
    for told in selected:
        known[told]()
        torch.cuda.synchronize()
        print(told, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What runs a mutant: the interpreter that is forked, and CUDA C++ that is compiled first."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from property_tests.mutants import interpreter, pool, runner
from property_tests.mutants.choice import quick
from property_tests.mutants.mutant import ROOT, Mutant, read
from quest.kernels import blocks

FIRST = "property_tests/test_packing.py::test_the_first_element_is_in_the_lowest_bits"


def alive(number: int) -> bool:
    """Whether a process is there, and no corpse."""
    stat = Path(f"/proc/{number}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def gone(number: int) -> bool:
    for _ in range(100):
        if not alive(number):
            return True
        time.sleep(0.1)
    return False


ASKS = """
import os, sys
from pathlib import Path
from property_tests.mutants import interpreter
from quest.conformance import lanes, inputs
import torch
interpreter.use(Path(sys.argv[1]), Path(sys.argv[2]))
lane = lanes.all_lanes()[1]
x = torch.ones(2, 16)
y = lane.call("hadamard", x, order=16, transpose=False)["y"]
assert y[0].tolist() == [4.0] + [0.0] * 15, y
print(Path(sys.argv[2]).read_text(), flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_forked_interpreter_computes_and_ends_with_who_asked(tmp_path: Path) -> None:
    server = interpreter.Server(tmp_path)
    try:
        asking = [sys.executable, "-c", ASKS, str(server.address), str(tmp_path / "worker")]
        for way in ("it ends by itself", "it is ended"):
            process = subprocess.Popen(
                asking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            assert process.stdout is not None
            worker = int(process.stdout.readline())
            assert alive(worker)
            if way == "it is ended":
                interpreter.end(tmp_path / "worker")
                assert gone(worker)
            process.communicate("")
            assert process.returncode == 0
            assert gone(worker), way
    finally:
        server.close()


def test_a_server_ends_with_who_started_it(tmp_path: Path) -> None:
    starts = (
        "import os, sys\nfrom pathlib import Path\n"
        "from property_tests.mutants.interpreter import Server\n"
        "server = Server(Path(sys.argv[1]))\nprint(server._process.pid, flush=True)\nos.abort()\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", starts, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert gone(int(told.stdout))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, runner.Result]:
    """What becomes of four texts of a kernel that a test compiles in one variant."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    import torch

    file = "kernels/blocks.cu"
    size = len(read(file))
    sign = read(file).index(b"a + b") + 1

    def planted(name: str, start: int, end: int, new: str) -> Mutant:
        return Mutant(name, "cuda", file, (1, 1), start, end, new, "")

    chosen = [
        planted("comment", size, size, "\n// Nothing.\n"),
        planted("unused", size, size, "\nstatic __device__ int unused(int x) { return x + 1; }\n"),
        planted("broken", size, size, "\nint x = ;\n"),
        planted("sum", sign, sign + 3, " - "),
    ]
    macros = blocks.macros(torch.bfloat16, 16, True, blocks.VALUES, 0)
    variants = (("blocks.cu", "sm_90a", tuple(macros.items())),)
    found: dict[str, runner.Result] = {}
    with pool.workshop() as folder:
        runner.run(
            chosen, lambda m: [quick({FIRST: 10.0})], folder, 2,
            lambda m, result: found.__setitem__(m.id, result), variants=variants,
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("comment", "identical"),
        ("unused", "identical"),
        ("broken", "refused"),
        ("sum", "survived"),  # of this test: it runs
    ],
)
def test_cuda_is_compiled_before_a_test_runs(
    outcomes: dict[str, runner.Result], name: str, outcome: str
) -> None:
    assert outcomes[name].outcome == outcome

"""Out-of-bounds accesses in Triton's interpreter are seen, those in bounds are let through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quest.conformance.addresses import OutOfBoundsError, Spans

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
PLANTED = """
import json, torch, triton, triton.language as tl
from quest.conformance import addresses

addresses.watch()

@triton.jit
def copy(x_ptr, y_ptr, read, write, ahead, behind, WIDTH: tl.constexpr):
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(x_ptr + i + ahead, mask=i < read, other=0.0)  # the load
    tl.store(y_ptr + i + behind, x, mask=i < write)  # the store

@triton.jit
def add(x_ptr, at):
    tl.atomic_add(x_ptr + at, 1.0)

@triton.jit
def bare(x_ptr, y_ptr):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i, tl.load(x_ptr + i))

def told(kernel, grid, *arguments, **static):
    try:
        kernel[grid](*arguments, **static)
    except Exception as error:
        return str(error)
    return "fine"

x, y = torch.ones(20), torch.zeros(20)
# Margins of a larger buffer around the argument are not the argument.
inner = torch.ones(60)[20:40]
print(json.dumps({
    "fine": told(copy, (2,), x, y, 20, 20, 0, 0, WIDTH=16),
    "read the tail": told(copy, (2,), x, y, 32, 20, 0, 0, WIDTH=16),
    "read one ahead": told(copy, (2,), inner, y, 20, 20, 1, 0, WIDTH=16),
    "read one behind": told(copy, (2,), inner, y, 20, 20, -1, 0, WIDTH=16),
    "write the tail": told(copy, (2,), x, y, 20, 32, 0, 0, WIDTH=16),
    "write far off": told(copy, (1,), x, y, 0, 1, 0, 1 << 30, WIDTH=1),
    "all masked": told(copy, (2,), x, y, 0, 0, 1 << 30, 0, WIDTH=16),
    "no mask": told(bare, (1,), x, x.new_zeros(15)),
    "strided": told(bare, (1,), torch.ones(40)[::2], y),
    "by name": told(copy, (2,), x_ptr=x, y_ptr=y, read=32, write=20, ahead=0, behind=0, WIDTH=16),
    "atomic": told(add, (1,), x, 20),
    "atomic in bounds": told(add, (1,), x, 19),
}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    script = tmp_path_factory.mktemp("planted") / "planted.py"
    script.write_text(PLANTED)
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", ["fine", "all masked", "strided", "atomic in bounds"])
def test_in_bounds(told: dict[str, str], case: str) -> None:
    assert told[case] == "fine"


LOAD, STORE = (
    f"planted.py:{1 + next(i for i, s in enumerate(PLANTED.splitlines()) if mark in s)}"
    for mark in ("# the load", "# the store")
)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("read the tail", f"{LOAD}: masked load touches 48 bytes past the end of x_ptr"),
        ("by name", f"{LOAD}: masked load touches 48 bytes past the end of x_ptr"),
        ("read one ahead", f"{LOAD}: masked load touches 4 bytes past the end of x_ptr"),
        ("read one behind", f"{LOAD}: masked load touches 4 bytes before x_ptr"),
        ("write the tail", f"{STORE}: masked store touches 48 bytes past the end of y_ptr"),
        ("write far off", f"{STORE}: masked store touches memory outside"),
        ("no mask", "masked store touches 4 bytes past the end of y_ptr"),
        ("atomic", "atomic rmw touches memory outside x_ptr, 0 bytes behind x_ptr"),
    ],
)
def test_out_of_bounds(told: dict[str, str], case: str, message: str) -> None:
    assert "OutOfBoundsError" in told[case]
    assert message in told[case]


def test_views_of_one_memory_are_one_span() -> None:
    x = torch.zeros(10)
    spans = Spans({"all": x, "part": x[2:4], "none": x[:0], "y": torch.zeros(3)})
    assert len(spans.names) == 2
    assert "all, part" in spans.names
    spans.check(np.array([x.data_ptr(), x.data_ptr() + 36], dtype=np.uint64), 4, "load")
    with pytest.raises(OutOfBoundsError, match="past the end of all, part"):
        spans.check(np.array([x.data_ptr() + 37], dtype=np.uint64), 4, "load")
    with pytest.raises(OutOfBoundsError, match="any argument"):
        Spans({}).check(np.array([x.data_ptr()], dtype=np.uint64), 4, "load")


def test_the_interpreter_lane_watches() -> None:
    # Its process ends at once, for want of a pipe.
    code = (
        "import sys; from quest.conformance import addresses, worker; "
        "addresses.watch = lambda: print('watched', file=sys.stderr); worker.main()"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=120, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stderr == "watched\n"

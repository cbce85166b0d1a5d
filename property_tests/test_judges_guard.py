"""What guards every call of a lane: outputs left unwritten, inputs changed, results that differ."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quest.conformance import inputs, interpreter, lanes, stages
from quest.kernels import outputs

FAKE = lanes.Lane("fake", "cpu", "eager")
LAID = inputs.equal_rows(inputs.draw("gaussian", (3, 4), torch.float32, 0))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Puts a function in place of a lane's stage and calls it, guarded."""

    def call(function: Callable[[Tensor], Tensor], x: Tensor, lane: lanes.Lane = FAKE) -> Any:
        monkeypatch.setitem(stages.STAGES, "hadamard", lambda _, t: {"y": function(t)})
        return lane.call("hadamard", x)

    return call


def filled(x: Tensor, count: int) -> Tensor:
    """An output from the launchers' allocator with its first `count` elements written."""
    out = outputs.empty(x.shape, x.dtype, x.device)
    out.view(-1)[:count] = 1.0
    return out


def test_guard_passes_a_clean_lane(stage: Callable[..., Any]) -> None:
    x = inputs.lay_out(inputs.draw("gaussian", (3, 5), torch.float32, 0), "padded")
    y = stage(lambda t: t * 2, x)["y"]
    assert torch.equal(y, x * 2)
    assert torch.equal(stage(lambda t: filled(t, 15), x)["y"], torch.ones(3, 5))
    nan = stage(lambda t: t * math.nan, x)["y"]
    assert nan.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32])
@pytest.mark.parametrize("missing", [1, 2, 15])
def test_guard_sees_an_unwritten_tail(
    stage: Callable[..., Any], dtype: torch.dtype, missing: int
) -> None:
    x = torch.ones(3, 5, dtype=dtype)
    with pytest.raises(lanes.GuardError, match="y differs between two runs"):
        stage(lambda t: filled(t, 15 - missing), x)


def whole(t: Tensor) -> Tensor:
    """All of a tensor's storage, gaps and margins included."""
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_guard_sees_a_changed_input(stage: Callable[..., Any], layout: str) -> None:
    x = inputs.lay_out(LAID, layout)
    with pytest.raises(lanes.GuardError, match="input 0 was changed"):
        stage(lambda t: whole(t).mul_(2), x)
    before = x.clone()
    with pytest.raises(lanes.GuardError, match="input 0 was changed"):
        stage(lambda t: whole(t).neg_().neg_().add_(1) * 1, x)
    assert torch.equal(x, before), "a lane works on copies"


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "expanded"])
@pytest.mark.parametrize("gap", [0, -1])
def test_guard_sees_a_write_into_a_gap(stage: Callable[..., Any], layout: str, gap: int) -> None:
    x = inputs.lay_out(LAID, layout)

    def spill(t: Tensor) -> Tensor:
        flat = whole(t)
        flat[flat.isnan().nonzero()[gap]] = 1.0
        return t * 1

    with pytest.raises(lanes.GuardError, match="input 0 was changed"):
        stage(spill, x)


def test_guard_sees_what_is_not_deterministic(stage: Callable[..., Any]) -> None:
    calls = iter(range(10))
    with pytest.raises(lanes.GuardError, match="not deterministic"):
        stage(lambda t: t + next(calls), torch.ones(3))
    with pytest.raises(lanes.GuardError, match="not deterministic"):
        stage(lambda t: t * torch.rand(3), torch.ones(3))
    sign = iter((1.0, -1.0))
    with pytest.raises(lanes.GuardError, match="not deterministic"):
        stage(lambda t: t * 0 * next(sign), torch.ones(3))  # 0 and -0


def test_guard_sees_another_device(stage: Callable[..., Any]) -> None:
    with pytest.raises(lanes.GuardError, match="y is on meta, not cpu"):
        stage(lambda t: t.to("meta"), torch.ones(3))
    if torch.cuda.is_available():
        with pytest.raises(lanes.GuardError, match="y is on cpu, not cuda"):
            stage(lambda t: t.cpu(), torch.ones(3), lanes.Lane("fake", "cuda", "eager"))


def test_guard_passes_on_what_a_stage_raises(stage: Callable[..., Any]) -> None:
    def broken(t: Tensor) -> Tensor:
        raise ZeroDivisionError("the lane's own")

    with pytest.raises(ZeroDivisionError, match="own"):
        stage(broken, torch.ones(3))
    # The allocator is back to normal.
    assert outputs._poison is None


def test_poison_fills_every_byte() -> None:
    with outputs.poisoned(0xFF):
        assert outputs.empty((3,), torch.float32, torch.device("cpu")).isnan().all()
        assert (outputs.empty((3,), torch.int8, torch.device("cpu")) == -1).all()
        with outputs.poisoned(0x55):
            assert (outputs.empty((3,), torch.uint8, torch.device("cpu")) == 0x55).all()
        assert outputs.empty((3,), torch.bfloat16, torch.device("cpu")).isnan().all()
    with pytest.raises(ValueError, match=r"byte must be in 0\.\.255, got 256"), \
            outputs.poisoned(256):  # fmt: skip
        pass


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_transfer_and_pipe_keep_strides_offset_and_gaps(layout: str) -> None:
    x = inputs.lay_out(LAID, layout)
    pipe = io.BytesIO()
    interpreter.send(pipe, x)
    pipe.seek(0)
    for y in (lanes.transfer(x, "cpu"), interpreter.receive(pipe)):
        assert (y.stride(), y.storage_offset()) == (x.stride(), x.storage_offset())
        assert stages.storage_bytes(y) == stages.storage_bytes(x)
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("wrong", ["operand", "scale", "h", ""])
def test_guard_sees_rows_that_are_others_where_they_are_shown(wrong: str) -> None:
    """Of a prologue, whose rows nobody sees in use."""
    names = ("operand", "scale", "sums", "h", "x")
    made = {name: torch.full((3, 2), float(i)) for i, name in enumerate(names)}

    def shown(*_: object) -> tuple[Tensor, ...]:
        return tuple(made.values())

    def used(*_: object) -> tuple[Tensor, ...]:
        return tuple(-t if name == wrong else t for name, t in made.items())[:-1]

    told = f"{wrong} is another where the rows of a prologue are shown"
    with pytest.raises(lanes.GuardError, match=told) if wrong else contextlib.nullcontext():
        assert stages._prologue(FAKE, (shown, used), names) == made

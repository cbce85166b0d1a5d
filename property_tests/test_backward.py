"""The fused backward in every lane: (grad * mask) H^T (T7)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from property_tests.lane_marks import every_dtype, every_lane, fewer
from property_tests.ledger import LEDGER
from quest.conformance import examine, inputs, judges
from quest.conformance.lanes import Lane
from quest.conformance.strategies import HEADER, ORDERS, SEEDS, Case, cases, lane_code, widths
from quest.quantizer import parse
from quest.reference import bounds


@every_lane
@every_dtype
@pytest.mark.parametrize("order", ORDERS)
@fewer
@given(data=st.data())
def test_masked_transpose(lane: Lane, dtype: torch.dtype, order: int, data: st.DataObject) -> None:
    case = data.draw(cases(dtype, widths(order)))
    seed = data.draw(SEEDS, label="mask seed")
    bytes_ = -(-case.shape[-1] // 8)
    mask = torch.randint(
        256, (*case.shape[:-1], bytes_), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    layout = data.draw(st.sampled_from(("contiguous", "strided")), label="mask layout")
    if layout == "strided":
        mask = torch.stack([mask, mask], -1).flatten(-2)[..., ::2]
    found = examine.backward(lane, case.make(), mask, order)
    code = (
        f"g = torch.Generator().manual_seed({seed})\nmask = torch.randint(256, "
        f"{tuple(mask.shape)}, generator=g).to(torch.uint8)\n"
        f"print(examine.backward(lane, x, mask, {order}))"
    )
    LEDGER.judge(lane, found, f"{HEADER}{lane_code(lane)}{case.code()}\n{code}")


@every_lane
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("distribution", ["gaussian", "equal"])
def test_layouts(lane: Lane, layout: str, distribution: str) -> None:
    case = Case(distribution, (2, 3, 96), torch.float32, layout, 0)
    mask = torch.randint(256, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    for order in (32, 12):
        found = examine.backward(lane, case.make(), mask.to(torch.uint8), order)
        LEDGER.judge(lane, found, f"{case}, order {order}")


@every_lane
@pytest.mark.parametrize(("order", "shape"), [(128, (3, 1280)), (16, (2, 2064)), (20, (70, 1200))])
def test_the_last_tile_is_partial(lane: Lane, order: int, shape: tuple[int, int]) -> None:
    grad = inputs.draw("gaussian", shape, torch.float32, 1)
    mask = torch.randint(256, (shape[0], shape[1] // 8), generator=torch.Generator().manual_seed(1))
    found = examine.backward(lane, grad, mask.to(torch.uint8), order)
    LEDGER.judge(lane, found, f"partial tiles, {shape}, order {order}")


@every_lane
def test_masked_infinities_do_not_spread(lane: Lane) -> None:
    grad = inputs.draw("gaussian", (4, 256), torch.float32, 1)
    grad[:, 3], grad[:, 9] = float("inf"), float("nan")
    mask = torch.full((4, 32), 255, dtype=torch.uint8)
    mask[:, 0], mask[:, 1] = 255 - 8, 255 - 2
    dx = lane.call("masked_transpose", grad, mask, order=128)["dx"]
    assert dx.isfinite().all()
    LEDGER.judge(lane, examine.backward(lane, grad, mask, 128), "masked infinities")


def test_whose_gradients_are_turned_on_tensor_cores() -> None:
    """Of masked.cu, for 16 bits and blocks of 128; nobody else's."""
    gpu, emulated = Lane("triton-cuda", "cuda", "dispatch"), Lane("e", "cpu", "emulated")
    halves = (torch.bfloat16, torch.float16)
    cases = [(lane, dtype, 128, True) for lane in (gpu, emulated) for dtype in halves]
    cases += [
        (lane, dtype, order, False)
        for lane, dtype, order in (
            (gpu, torch.float32, 128), (emulated, torch.float32, 128),
            *((gpu, dtype, order) for dtype in halves for order in (1, 64, 127, 129, 256, 1024)),
            *(
                (Lane(name, device, backend), dtype, 128) for dtype in halves
                for name, device, backend in (
                    ("torch-cpu", "cpu", "eager"), ("torch-cuda", "cuda", "eager"),
                    ("triton-interpreter", "cpu", "launch"),
                )
            ),
        )
    ]  # fmt: skip
    for lane, dtype, order, expected in cases:
        by = examine.TENSOR_CORES if expected else bounds.BUTTERFLY
        assert examine.turned_by(lane, dtype, order) == by, (lane, dtype, order)


class Stub(Lane):
    """What a plain lane writes, under another's name."""

    def call(self, stage: str, *tensors: torch.Tensor, **static: Any) -> dict[str, torch.Tensor]:
        return Lane("torch-cpu", "cpu", "eager").call(stage, *tensors, **static)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["triton-cuda", "torch-cpu"])
def test_what_bounds_gradients(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wider bound of those that are turned back on tensor cores, only behind a mask."""
    seen: list[object] = []

    def noted(real: Any, at: int) -> Any:
        return lambda *given: (seen.append(given[at]), real(*given))[1]

    monkeypatch.setattr(judges, "transposed", noted(judges.transposed, 4))
    monkeypatch.setattr(judges, "layer", noted(judges.layer, 9))
    lane = Stub(name, "cpu", "eager")
    wide = name == "triton-cuda" and dtype == torch.bfloat16
    by = examine.TENSOR_CORES if wide else bounds.BUTTERFLY
    grad = inputs.draw("gaussian", (3, 256), dtype, 0)
    mask = torch.full((3, 32), 0x5A, dtype=torch.uint8)
    for order, expected in ((128, by), (64, bounds.BUTTERFLY)):
        found = examine.backward(lane, grad, mask, order)
        assert seen == [expected]
        assert not [v for v in found if v.failure]
        seen.clear()
    x, w = (inputs.draw("gaussian", (n, 256), dtype, n) for n in (5, 24))
    out = inputs.draw("gaussian", (5, 24), dtype, 1)
    narrow = quest.Recipe("narrow", *2 * (parse("uniform4/hadamard64/trust1.0/dense"),))
    for made, expected in (
        (quest.recipe("w4a4"), by), (quest.recipe("w4a16"), by),
        (quest.recipe("bf16", transform=quest.Hadamard(128)), bounds.BUTTERFLY),
        (narrow, bounds.BUTTERFLY),
    ):  # fmt: skip
        found = examine.layer(lane, x, w, out, None, made)
        assert seen == [expected], made
        assert not [v for v in found if v.failure]
        seen.clear()

"""Parametrisation over lanes: one that this machine lacks is skipped, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from quest.conformance import lanes
from quest.conformance.strategies import DTYPES, LANES


def every_lane(function: Any) -> Any:
    """Run a test in each lane; the terminal summary names those that this machine can't run."""
    params = [
        pytest.param(
            lane,
            id=lane.name,
            marks=[pytest.mark.skip(reason=reason)] if (reason := lanes.missing(lane)) else [],
        )
        for lane in LANES
    ]
    return pytest.mark.parametrize("lane", params)(function)


def every_dtype(function: Any) -> Any:
    """Run a test in float32, bfloat16 and float16."""
    names = [str(d).removeprefix("torch.") for d in DTYPES]
    return pytest.mark.parametrize("dtype", DTYPES, ids=names)(function)


def fewer(function: Any) -> Any:
    """A third of the profile's examples: each is judged in four lanes, interpreted or compiled."""
    return settings(max_examples=max(2, settings.default.max_examples // 3))(function)

"""The results as JSON: what was judged, by property and parameters, with versions."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch

import quest

from .results import NOT_COVERED, Outcome, Results
from .summary import counts


def _plain(value: Any) -> Any:
    """JSON has no infinities: they become the strings "inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def machine() -> dict[str, str | None]:
    """Versions, and the GPU if there is one."""
    return {
        "quest": quest.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hypothesis": hypothesis.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _case(params: str, outcome: Outcome) -> dict[str, Any]:
    made: dict[str, Any] = {"parameters": params, "outcome": outcome.outcome}
    if outcome.reason:
        made["reason"] = outcome.reason
    if outcome.outcome != NOT_COVERED:
        made |= {k: v for k, v in outcome.record.items() if k != "points"}
    return made


def document(results: Results) -> dict[str, Any]:
    """The whole run; a property's `failure` holds its smallest failing example."""
    impl = results.impl
    return {
        "implementation": impl.spec,
        "missing": impl.missing,
        "machine": machine(),
        "capabilities": dataclasses.asdict(impl.capabilities),
        "undeclared": impl.capabilities.undeclared(),
        "departures": list(impl.departures),
        "functions that nobody calls": list(impl.unknown),
        "properties": [
            {
                "property": name,
                "outcomes": dict(counts(outcomes)),
                "elements": sum(o.record.get("elements", 0) for o in outcomes.values()),
                "ratio": max((o.record.get("ratio", 0.0) for o in outcomes.values()), default=0),
                "cases": [_case(params, outcome) for params, outcome in outcomes.items()],
            }
            for name, outcomes in results.properties().items()
        ],
    }


def write(path: Path, results: Results) -> None:
    """Write `document` to a file."""
    path.write_text(json.dumps(_plain(document(results)), indent=1) + "\n", encoding="utf-8")

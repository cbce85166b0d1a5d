"""``metrics.jsonl``: one JSON object a line for each step of each recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from quest.train import files


@dataclass(frozen=True)
class Row:
    """One finished step.

    ``loss`` (of this step's batch, before its update) and ``val_loss`` (after it; None unless it
    was measured) are in nats a token, ``val_loss_per_byte`` in nats a byte. ``tokens`` and
    ``seconds`` count from the start of training, validation included. ``grad_norm`` is before
    clipping.
    """

    recipe: str
    step: int
    loss: float
    val_loss: float | None
    val_loss_per_byte: float | None
    lr: float
    tokens: int
    seconds: float
    grad_norm: float


class Metrics:
    """The file and its rows. Every row is on the disk before the next step starts."""

    def __init__(self, path: Path, finished: Mapping[str, int]) -> None:
        """Keep the rows of an earlier run up to the step that each recipe has ``finished``."""
        self._path = path
        self.rows = [
            row
            for row in _read(path)
            if row.step <= finished.get(row.recipe, math.inf)  # other recipes keep all of theirs
        ]
        files.replace_text(path, "".join(map(_line, self.rows)))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    @property
    def recipes(self) -> list[str]:
        """In the order in which they were trained."""
        return list(dict.fromkeys(row.recipe for row in self.rows))

    def of(self, recipe: str) -> list[Row]:
        return [row for row in self.rows if row.recipe == recipe]


def _line(row: Row) -> str:
    return json.dumps(asdict(row), allow_nan=False) + "\n"


def _read(path: Path) -> Iterable[Row]:
    """The rows of ``path``. A crash can cut the last line short: what is not a row is dropped."""
    names = {field.name for field in fields(Row)}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and names == values.keys():
            yield Row(**values)

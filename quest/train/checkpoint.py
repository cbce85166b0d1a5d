"""All that a run needs to go on as if it had not stopped, in one file per recipe.

A checkpoint holds the weights, the optimizer's state, the number of finished steps and the seconds
they took, and an *identity*: what the run was, flat and of plain values, so that another one is
refused by the name of what differs. Batches are a function of the step (see `data`) and nothing
else is random, so no generator has to be kept.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quest.models import LlamaConfig
from quest.recipes import recipe as recipe_of
from quest.train import files
from quest.train.config import TrainConfig
from quest.train.data import Dataset
from quest.train.errors import UserError

FORMAT = 1

Identity = dict[str, str | int | float]


@dataclass(frozen=True)
class Checkpoint:
    identity: Identity
    step: int
    seconds: float
    model: Mapping[str, Any]
    optimizer: dict[str, Any]


def identity(recipe: str, model: LlamaConfig, config: TrainConfig, data: Dataset) -> Identity:
    """What has to be equal for a run to go on.

    The number of steps is not part of it: a run may be made longer, and its learning rate then
    follows the schedule of the longer run. Nor is the micro-batch or the device, which change the
    numbers by rounding alone.
    """
    return {
        "recipe": recipe,
        # The name's meaning, too: a default that changes between versions is another recipe.
        "quantizers": recipe_of(recipe).spec,
        "tokenizer": data.encoder.name,
        **asdict(model),
        "data": data.fingerprint,
        "batch": config.batch,
        "seq": config.seq,
        "lr": config.lr,
        "seed": config.seed,
    }


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path``; the previous one stays until the new one is complete."""
    content = {"format": FORMAT, **vars(checkpoint)}

    def write(new: Path) -> None:
        try:
            torch.save(content, new)
        except RuntimeError as error:  # which is what torch makes of a disk that is full
            told = str(error).partition("\n")[0]
            if "inline_container" not in told and "PytorchStreamWriter" not in told:
                raise
            raise OSError(
                f"checkpoint {path} cannot be written (is the disk full?); torch says: {told}"
            ) from error

    files.replace(path, write)


def load(path: Path, expected: Identity) -> Checkpoint:
    """Read a checkpoint, on the CPU, of the run that ``expected`` describes.

    Raises `UserError` where the file is damaged, is no checkpoint, or is of another run.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch reads past a sum that does not fit
            if file.testzip() is not None:
                raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("format") != FORMAT:
            raise ValueError
        checkpoint = Checkpoint(**content)
        found = dict(checkpoint.identity)
    # A damaged file fails in the zip reader, the unpickler or above, each with its own exceptions.
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is damaged or of another format: cannot resume from it"
        ) from error
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(
                f"checkpoint {path} is of another run: its {name} is "
                f"{_short(found.get(name))}, not {_short(value)}"
            )
    return checkpoint


def _short(value: object) -> str:
    """Twelve characters tell two digests apart."""
    return value[:12] if isinstance(value, str) else str(value)

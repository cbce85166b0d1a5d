"""The output folder: which files in it are ours, and may therefore be replaced.

``run.json`` is written first and replaced last. It names the recipes of the run and so, with the
fixed names below, every file that ``quest train`` writes. Nothing else in the folder is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quest.train import files
from quest.train.errors import UserError

WRITER = "quest train"
# What reading a manifest raises where no run of ours lies, whatever else it may be.
NO_RUN = FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError


class RunFolder:
    """Paths of one run's files, and the rules for entering a folder that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    def checkpoint(self, recipe: str) -> Path:
        """Colons, as in ``w4a4-2:4``, are no part of a file's name everywhere."""
        return self.path / f"checkpoint-{re.sub(r'[^A-Za-z0-9.-]', '_', recipe)}.pt"

    def check(self, recipes: Iterable[str], *, resume: bool, overwrite: bool) -> None:
        """Raise `UserError` where a run of ``recipes`` may not start here. Writes nothing."""
        if resume and overwrite:
            raise UserError("--resume continues a run and --overwrite removes it: choose one")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: --out needs a folder")
        trained = self._recipes()
        if resume:
            if trained is None:
                raise UserError(f"{self.path} holds no run of {WRITER}: nothing to resume")
            for recipe in recipes:
                if recipe not in trained:
                    raise UserError(
                        f"{self.path} was trained with {', '.join(trained)}: "
                        f"cannot resume it with recipe {recipe}"
                    )
        elif self.path.exists() and any(self.path.iterdir()):
            if not overwrite:
                raise UserError(
                    f"{self.path} exists: continue it with --resume, replace it with --overwrite, "
                    "or choose another --out"
                )
            ours = set(self._files(trained or []) if trained is not None else [])
            for file in self._files(recipes):
                if file not in ours and file.exists():
                    raise UserError(
                        f"{file} was not written by {WRITER}: move it away or choose another --out"
                    )

    def open(self, recipes: list[str], about: Mapping[str, object], *, resume: bool) -> None:
        """Create the folder, or empty it of an earlier run's files, and name the run in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made: {error.strerror}") from error
        trained = self._recipes() or []
        if resume:
            recipes = trained
        else:
            for file in self._files(trained):
                if file != self.manifest:
                    file.unlink(missing_ok=True)
        manifest = json.dumps({"written_by": WRITER, "recipes": recipes, **about}, indent=2)
        files.replace_text(self.manifest, manifest + "\n")

    def _files(self, recipes: Iterable[str]) -> list[Path]:
        named = [self.manifest, self.metrics, self.plot, *map(self.checkpoint, recipes)]
        return [*named, *map(files.temporary, named)]

    @property
    def steps(self) -> int | None:
        """Of the run that lies here, or None."""
        try:
            steps = self._manifest()["config"]["steps"]
            return steps if type(steps) is int and steps > 0 else None
        except NO_RUN:
            return None

    def _recipes(self) -> list[str] | None:
        """The recipes of the run that lies here, or None."""
        try:
            return [str(recipe) for recipe in self._manifest()["recipes"]]
        except NO_RUN:
            return None

    def _manifest(self) -> Any:
        """What the run that lies here says of itself; one of `NO_RUN` where there is none."""
        manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        if manifest["written_by"] != WRITER:
            raise ValueError
        return manifest

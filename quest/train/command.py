"""The whole of ``quest train``: check everything, train each recipe, draw, sum up."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from quest.linear import quantize_
from quest.models import SIZES, Llama
from quest.recipes import recipe
from quest.train import checkpoint, files, loop, plot, progress
from quest.train.config import TrainConfig
from quest.train.data import ByteEncoder, Dataset, FileEncoder, encode
from quest.train.errors import UserError
from quest.train.folder import RunFolder
from quest.train.metrics import Metrics
from quest.train.text import load_text


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    ``data`` are files, folders and globs (none: the standard library's source), ``tokenizer`` a
    Hugging Face file or None for bytes, ``device`` a name that torch knows or "auto". ``graph``
    captures the step on a GPU and changes nothing on a CPU. ``recompute`` is
    `Llama.recompute_`'s: all blocks, none, or how many.
    """

    recipes: Sequence[str]
    out: Path
    config: TrainConfig
    data: Sequence[str] = ()
    tokenizer: Path | None = None
    device: str = "auto"
    compile: bool = False
    graph: bool = True
    recompute: bool | int = False
    resume: bool = False
    overwrite: bool = False


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises `UserError` for what this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError
        torch.empty(0, device=device)
    # torch raises RuntimeError, AssertionError or NotImplementedError, by device and build.
    except Exception as error:
        raise UserError(f"device {name!r} cannot be used here: try auto or cpu") from error
    return device


def run(request: Request, console: Console) -> list[loop.Outcome]:
    """Train every recipe on the same batches; writes into ``request.out`` and tells ``console``.

    Raises `UserError` for input that cannot be used, before anything on the disk is changed; and,
    after some steps, where a GPU can't capture one, which ``request.graph`` asks for.
    """
    config = request.config
    try:
        recipes = list(dict.fromkeys(recipe(name).name for name in request.recipes))
    except ValueError as error:
        raise UserError(str(error)) from error
    layers = SIZES[config.size].layers
    if not 0 <= request.recompute <= layers:
        raise UserError(
            f"--recompute is {request.recompute}: a model of size {config.size} has {layers} blocks"
        )
    device = choose_device(request.device)
    folder = RunFolder(request.out)
    folder.check(recipes, resume=request.resume, overwrite=request.overwrite)
    encoder = FileEncoder(request.tokenizer) if request.tokenizer else ByteEncoder()
    own = (folder.manifest, folder.metrics)
    text = load_text(request.data, config.seq + 1, (*own, *map(files.temporary, own)))
    data = encode(text, encoder, config.seq)
    finished = _finished(request, recipes, folder, data) if request.resume else {}
    _check_models(request, recipes, data)

    about = {
        "config": asdict(config),
        "data": {"sources": list(request.data) or "standard library", "sha256": text.fingerprint},
        "tokenizer": str(request.tokenizer) if request.tokenizer else "bytes",
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    folder.open(recipes, about, resume=request.resume)
    metrics = Metrics(folder.metrics, finished)
    _announce(console, request, data, device, text.files, len(text.skipped))
    job = loop.Job(
        config, data, folder, metrics, device, request.compile, request.graph, request.recompute
    )
    watcher = progress.watcher(console)
    outcomes = []
    for name in recipes:
        outcomes.append(loop.train(job, name, watcher, resume=request.resume))
        title = f"Llama {config.size}, the same batches for every recipe"
        plot.draw(folder.plot, metrics, data, title)
    console.print(progress.summary(outcomes, data))
    console.print(f"{folder.metrics}\n{folder.plot}", soft_wrap=True, highlight=False)
    return outcomes


def _finished(
    request: Request, recipes: Sequence[str], folder: RunFolder, data: Dataset
) -> dict[str, int]:
    """Steps that each recipe's checkpoint has done, 0 where it had not begun."""
    architecture = SIZES[request.config.size].architecture(data.vocab_size)
    finished = dict.fromkeys(recipes, 0)
    for name in recipes:
        path = folder.checkpoint(name)
        if path.exists():
            identity = checkpoint.identity(name, architecture, request.config, data)
            finished[name] = checkpoint.load(path, identity).step
            if finished[name] > request.config.steps:
                raise UserError(
                    f"checkpoint {path} has done {finished[name]} steps: "
                    f"--steps {request.config.steps} is fewer"
                )
    if not any(finished.values()):
        raise UserError(
            f"{folder.path} holds no checkpoint yet: start again with --overwrite, not --resume"
        )
    return finished


def _check_models(request: Request, recipes: Sequence[str], data: Dataset) -> None:
    """Raise `UserError` where a recipe does not fit the architecture, without using memory."""
    for name in recipes:
        try:
            with torch.device("meta"):
                model = Llama(SIZES[request.config.size].architecture(data.vocab_size))
            quantize_(model, name)
        except ValueError as error:
            raise UserError(str(error)) from error


def _announce(
    console: Console,
    request: Request,
    data: Dataset,
    device: torch.device,
    files: int,
    skipped: int,
) -> None:
    config = request.config
    left_out = f", {skipped} empty or binary ones skipped" if skipped else ""
    numbers = "bfloat16" if device.type == "cuda" else "float32"
    console.print(
        f"text    {files} {'file' if files == 1 else 'files'}{left_out}: "
        f"{len(data.train):,} {data.encoder.unit}s to train on, {len(data.held_out):,} held out\n"
        f"model   Llama {config.size}, vocabulary {data.vocab_size}, on {device} "
        f"in {numbers} around the quantized layers\n"
        f"steps   {config.steps} of {config.batch} x {config.seq} {data.encoder.unit}s",
        soft_wrap=True,
        highlight=False,
    )

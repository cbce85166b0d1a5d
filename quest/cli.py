"""The command ``quest``.

Exit status: 0 done, 1 something failed, 2 the input cannot be used, 130 interrupted, 143 ended by
SIGTERM. Whatever goes wrong that a user can mend is one line on stderr.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from . import __version__

USAGE = 2
TOO_LITTLE_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
INTERRUPTED = 130


class FailedError(Exception):
    """Ends the command with ``status`` and one line."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


def _finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    # A range lets infinity pass, and NaN, which compares with nothing.
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


def _blocks(context: click.Context, option: click.Parameter, value: str) -> bool | int:
    """All or none, or of how many."""
    if value in ("all", "0"):
        return value == "all"
    if not value.isascii() or not value.isdecimal():
        raise click.BadParameter(f"{value!r} is no number of blocks")
    return int(value)


@click.group()
@click.version_option(__version__, prog_name="quest")
def quest() -> None:
    """QuEST: training language models with weights and activations of 1 to 8 bits."""


@quest.command()
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the report as JSON.",
)
@click.option(
    "--html",
    "html_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the report as one page with pictures.",
)
@click.option(
    "--lane",
    "lanes",
    multiple=True,
    metavar="NAME",
    help="Only this implementation (repeatable). Default: all that this machine can run.",
)
@click.option("--quick", is_flag=True, help="A tenth of the rows.")
@click.option("--record", is_flag=True, help="Keep the ratios of rows that pass as the new record.")
def verify(
    json_path: Path | None,
    html_path: Path | None,
    lanes: tuple[str, ...],
    quick: bool,
    record: bool,
) -> int:
    """Judge every kernel of this machine by the oracle."""
    from quest.conformance.verify import run

    try:
        return run(json_path, lanes, quick, record, html_path)
    except ValueError as error:
        raise FailedError(str(error), USAGE) from None


@quest.command()
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    default=("w1a1",),
    show_default=True,
    metavar="NAME",
    help="bf16, w1a1, w4a4, fp4, w4a4-2:4, ... (repeatable: each is trained on the same batches).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/train"),
    show_default=True,
    metavar="FOLDER",
    help="Where metrics.jsonl, loss.png and the checkpoints go.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoints in --out.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run's files from --out.")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Text: a file, folder or quoted glob (repeatable). Default: the source of "
    "Python's standard library.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A Hugging Face tokenizer.json. Default: bytes.",
)
@click.option(
    "--size",
    default="demo",
    show_default=True,
    metavar="SIZE",
    help="demo, or published: 30M, 50M, 100M, 200M, 430M, 800M.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Default: by the size; with --resume those of the run in --out.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Sequences a step. Default: by the size.")
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    help="Sequences computed at once; smaller takes less memory. Default: at most 64.",
)
@click.option("--seq", type=click.IntRange(min=1), help="Tokens a sequence. Default: by the size.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    callback=_finite,
    help="Peak learning rate. Default: by the size.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the initial weights and the batches.",
)
@click.option("--eval-every", type=click.IntRange(min=1), help="Steps. Default: 12 times a run.")
@click.option("--save-every", type=click.IntRange(min=1), help="Steps. Default: 5 times a run.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--compile", "compile_", is_flag=True, help="Use torch.compile.")
@click.option(
    "--graph/--no-graph",
    default=True,
    show_default=True,
    help="On a GPU: capture the step as CUDA graphs, and replay them. The same numbers.",
)
@click.option(
    "--recompute",
    is_flag=False,
    flag_value="all",
    default="0",
    metavar="[BLOCKS]",
    callback=_blocks,
    help="Make an MLP's wide activations again in the backward, of all blocks or of so many: less "
    "memory, more time. The same numbers.",
)
def train(
    recipes: tuple[str, ...],
    out: Path,
    resume: bool,
    overwrite: bool,
    data: tuple[str, ...],
    tokenizer: Path | None,
    size: str,
    device: str,
    compile_: bool,
    graph: bool,
    recompute: bool | int,
    **settings: Any,
) -> int:
    """Train a Llama on real text and draw its loss.

    With no options: a small one with 1-bit weights and activations, in minutes on two CPU cores.
    """
    from rich.console import Console
    from torch import OutOfMemoryError

    from quest.train import Request, TrainConfig, UserError, run
    from quest.train.folder import RunFolder
    from quest.train.loop import DivergedError

    try:
        if resume and settings["steps"] is None:
            # The size's would be another schedule of the learning rate.
            settings["steps"] = RunFolder(out).steps
        request = Request(
            recipes=recipes,
            out=out,
            config=TrainConfig.for_size(size, **settings),
            data=data,
            tokenizer=tokenizer,
            device=device,
            compile=compile_,
            graph=graph,
            recompute=recompute,
            resume=resume,
            overwrite=overwrite,
        )
        run(request, Console())
    except UserError as error:
        raise FailedError(str(error), USAGE) from error
    except (DivergedError, OSError) as error:
        raise FailedError(str(error), 1) from error
    except (RuntimeError, MemoryError) as error:
        # torch has a class of its own for one of the places where it is missed.
        known = isinstance(error, OutOfMemoryError | MemoryError)
        if not known and not any(text in str(error) for text in TOO_LITTLE_MEMORY):
            raise
        told = str(error).partition("\n")[0]
        raise FailedError(
            "there is too little memory: fewer sequences at once (--micro-batch), shorter ones "
            f"(--seq) and --recompute take less; torch says: {told}",
            1,
        ) from error
    except KeyboardInterrupt as error:
        from quest.train.stopping import Stopped

        if isinstance(error, Stopped):
            raise FailedError(
                f"interrupted {error}: --resume goes on from there", 128 + error.number
            ) from error
        kept = any(RunFolder(out).checkpoint(name).exists() for name in recipes)
        told = "--resume goes on from the last checkpoint" if kept else "no checkpoint was written"
        raise FailedError(f"interrupted: {told}", INTERRUPTED) from error
    return 0


@quest.command()
@click.option("--base", metavar="REV", help="The revision to compare with: main, HEAD~1, a tag.")
@click.option("--change", metavar="REV", help="Default: the working tree, uncommitted changes too.")
@click.option(
    "--filter",
    "expression",
    default="",
    metavar="EXPR",
    help="Only these benchmarks, as pytest's -k takes them: hadamard, 'quantize and uniform4'.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=10),
    default=150,
    show_default=True,
    help="Pairs of a benchmark at the most; fewer where they tell enough.",
)
@click.option("--full", is_flag=True, help="All of quest verify, not its quick form.")
@click.option("--lane", "lanes", multiple=True, metavar="NAME", help="Of quest verify, repeatable.")
@click.option(
    "--aa",
    "same",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Benchmarks on which base is timed against itself.",
)
@click.option(
    "--allow-old-base",
    is_flag=True,
    help="Judge the change alone where base can't be verified or timed.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    callback=_finite,
    help="Seconds for each answer of a benchmark's process: judge and compile, or a turn.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write the report as JSON.",
)
@click.option(
    "--power",
    is_flag=True,
    help="Instead: false alarms and slowdowns found, by simulation.",
)
def gate(
    base: str | None,
    change: str | None,
    expression: str,
    rounds: int,
    full: bool,
    lanes: tuple[str, ...],
    same: int,
    allow_old_base: bool,
    limit: float,
    json_path: Path | None,
    power: bool,
) -> int:
    """Is a change still right, and still as fast as its base?

    quest verify first, then the benchmarks of both in turn, in two worktrees. Status 1 where a
    check is red, an error ratio or peak memory grew, a benchmark is missing, or one is slower by
    more than 3% with the whole of its 95% interval.
    """
    if base is None and not power:
        raise click.UsageError("missing option '--base'")
    from quest.gate import command

    if base is None or power:
        return command.run_power()
    options = [*(() if full else ("--quick",)), *(f"--lane={name}" for name in lanes)]
    try:
        return command.run(
            command.Request(
                base,
                change,
                expression,
                rounds,
                tuple(options),
                same,
                allow_old_base,
                limit,
                json_path,
            )
        )
    except ValueError as error:
        raise FailedError(str(error), USAGE) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``quest`` with ``arguments`` (default: the process's) and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((name for name in given[:1] if name in quest.commands), None)
    where = f"quest {command}" if command else "quest"
    try:
        status = quest.main(given or ["--help"], prog_name="quest", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else where
        # click's own sentence for this one differs between its versions.
        sentence = (
            f"no such option: {error.option_name}"
            if isinstance(error, click.NoSuchOption)
            else error.format_message()
        )
        message = " ".join(sentence.split()).rstrip(".")
        print(f"{where}: {message[:1].lower()}{message[1:]} (see {where} --help)", file=sys.stderr)
        return USAGE
    except FailedError as error:
        print(f"{where}: {error}", file=sys.stderr)
        return error.status
    except (click.Abort, KeyboardInterrupt):
        print(f"{where}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Show training as it runs: a live bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from quest.train.data import Dataset
from quest.train.loop import Outcome, Watcher
from quest.train.metrics import Row

PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal
RATE_STEPS = 20  # tokens a second are a mean over the last so many steps


class Rate:
    """Tokens a second over the last steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_STEPS + 1)

    def mark(self, tokens: int) -> float:
        """Note that ``tokens`` are done by now."""
        now = time.perf_counter()
        self._marks.append((now, tokens))
        then, before = self._marks[0]
        return (tokens - before) / (now - then) if now > then else 0.0


class Bar:
    """A bar per recipe; finished ones stay on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, recipe: str, step: int, steps: int, tokens_per_step: int) -> None:
        self._rate = Rate()
        self._rate.mark(step * tokens_per_step)
        self._val = "  –  "
        self._progress = Progress(
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task(recipe, total=steps, completed=step, numbers="")
        self._progress.start()

    def step(self, row: Row) -> None:
        if row.val_loss is not None:
            self._val = f"{row.val_loss:.3f}"
        self._progress.update(
            self._task,
            completed=row.step,
            numbers=f"loss {row.loss:.3f}  val [bold]{self._val}[/]  "
            f"{self._rate.mark(row.tokens):,.0f} tok/s",
        )

    def stop(self) -> None:
        self._progress.stop()


class Lines:
    """A line every ten seconds, and one for the first step, the last, and each validation."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, recipe: str, step: int, steps: int, tokens_per_step: int) -> None:
        self._steps = steps
        self._first = step + 1
        self._rate = Rate()
        self._rate.mark(step * tokens_per_step)
        self._shown = time.perf_counter()

    def step(self, row: Row) -> None:
        rate = self._rate.mark(row.tokens)
        now = time.perf_counter()
        due = now - self._shown >= PLAIN_INTERVAL
        if not due and row.val_loss is None and row.step not in (self._first, self._steps):
            return
        self._shown = now
        val = "" if row.val_loss is None else f"  val {row.val_loss:.3f}"
        left = (self._steps - row.step) * (row.tokens // row.step) / rate if rate else 0.0
        self._console.print(
            f"{row.recipe}  step {row.step}/{self._steps}  loss {row.loss:.3f}{val}  "
            f"{rate:,.0f} tok/s  {left:.0f} s left",
            soft_wrap=True,
            highlight=False,
        )

    def stop(self) -> None:
        pass


def watcher(console: Console) -> Watcher:
    """The one that fits ``console``."""
    return Bar(console) if console.is_terminal else Lines(console)


def summary(outcomes: Sequence[Outcome], data: Dataset) -> Table:
    """The last word: how each recipe ended, and how far behind the first one."""
    table = Table(title="Validation loss on held-out text")
    table.add_column("recipe", style="bold")
    for name in ("parameters", "steps", "time", "tokens/s"):
        table.add_column(name, justify="right")
    per_token = data.encoder.unit != "byte"
    if per_token:
        table.add_column("nats/token", justify="right")
    table.add_column("nats/byte", justify="right", style="bold")
    if len(outcomes) > 1:
        table.add_column(f"against {outcomes[0].recipe}", justify="right")
    for outcome in outcomes:
        rate = outcome.tokens / outcome.seconds if outcome.seconds else 0.0
        cells = [
            outcome.recipe,
            f"{outcome.parameters / 1e6:.2f} M",
            f"{outcome.steps:,}",
            f"{int(outcome.seconds) // 60}:{int(outcome.seconds) % 60:02d}",
            f"{rate:,.0f}",
        ]
        if per_token:
            cells.append(f"{outcome.val_loss:.3f}")
        cells.append(f"{outcome.val_loss_per_byte:.3f}")
        if len(outcomes) > 1:
            cells.append(f"{outcome.val_loss_per_byte - outcomes[0].val_loss_per_byte:+.3f}")
        table.add_row(*cells)
    return table

"""Training: schedule, optimizer, learning, checkpoints and resuming."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import quest
from quest.models import SIZES, Llama, Size, llama
from quest.train import (
    Request,
    TrainConfig,
    UserError,
    checkpoint,
    command,
    files,
    loop,
    metrics,
    plot,
    progress,
    run,
    stopping,
)
from quest.train.data import ByteEncoder, Dataset
from quest.train.folder import RunFolder
from quest.train.metrics import Metrics, Row
from quest.train.optimizer import adamw, learning_rate
from quest.train.plot import spread

TEXT = "".join(f"{i} is followed by {i + 1}, as ever.\n" for i in range(400))


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A run of 20 steps that takes a second, without the half second of a picture."""
    monkeypatch.setattr(plot, "draw", lambda *_: None)
    monkeypatch.setitem(SIZES, "tiny", Size(1, 128, 2, lr=3e-3, tokens=20 * 64, batch=2, seq=32))
    (tmp_path / "text.txt").write_text(TEXT)
    config = TrainConfig.for_size("tiny", eval_every=5, save_every=10)
    assert config.steps == 20
    return Request(["w1a1"], tmp_path / "out", config, data=[str(tmp_path / "text.txt")],
                   device="cpu")  # fmt: skip


def quietly(request: Request) -> list[loop.Outcome]:
    return run(request, Console(quiet=True))


def rows(out: Path) -> list[dict[str, float]]:
    """The metrics, without the one number that no two runs share."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


class Stop:
    """A watcher that interrupts a run after ``step``, as Ctrl-C would."""

    def __init__(self, step: int, recipe: str = "w1a1") -> None:
        self.at = (recipe, step)

    def start(self, recipe: str, step: int, steps: int, tokens_per_step: int) -> None: ...

    def step(self, row: Row) -> None:
        if (row.recipe, row.step) == self.at:
            raise KeyboardInterrupt

    def stop(self) -> None: ...


def interrupt(request: Request, monkeypatch: pytest.MonkeyPatch, stop: Stop) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(progress, "watcher", lambda console: stop)
        with pytest.raises(KeyboardInterrupt):
            quietly(request)


class Signalled(Stop):
    """A watcher during whose step a signal comes."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(step)
        self.number = number

    def step(self, row: Row) -> None:
        if (row.recipe, row.step) == self.at:
            signal.raise_signal(self.number)


@given(steps=st.integers(1, 3000), peak=st.floats(1e-5, 1.0), data=st.data())
def test_learning_rate_follows_its_formula(steps: int, peak: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps - 1))
    warm_up = max(1, round(0.1 * steps))
    if step < warm_up:
        expected = peak * (step + 1) / warm_up
    else:
        cosine = math.cos(math.pi * (step - warm_up) / (steps - warm_up))
        expected = peak * (0.55 + 0.45 * cosine)
    assert learning_rate(step, steps, peak) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.1)  # half of the cosine
    assert 0.2 < rates[99] < 0.201
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_weight_decay_spares_norms_and_the_embedding(request_: Request) -> None:
    model = Llama(SIZES["tiny"].architecture(256))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, keep = adamw(model).param_groups
    assert decay["weight_decay"] == 0.1
    assert keep["weight_decay"] == 0
    assert decay["betas"] == keep["betas"] == (0.9, 0.95)
    spared = {names[id(parameter)] for parameter in keep["params"]}
    assert spared == {
        "embed_tokens.weight",
        "norm.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
    }
    assert len(decay["params"]) + len(spared) == len(names)


def test_both_recipes_learn_from_the_same_batches(request_: Request) -> None:
    outcomes = quietly(replace(request_, recipes=["bf16", "w1a1"]))
    assert [outcome.recipe for outcome in outcomes] == ["bf16", "w1a1"]
    written = rows(request_.out)
    assert [(row["recipe"], row["step"]) for row in written] == [
        (recipe, step) for recipe in ("bf16", "w1a1") for step in range(1, 21)
    ]
    for outcome, part in zip(outcomes, (written[:20], written[20:]), strict=True):
        assert part[0]["loss"] == pytest.approx(math.log(256), abs=0.5)
        assert outcome.val_loss == part[-1]["val_loss"] < part[0]["loss"] - 1.5
        assert [r["step"] for r in part if r["val_loss"] is not None] == [5, 10, 15, 20]
        assert all(r["grad_norm"] > 0 for r in part)
        assert [r["tokens"] for r in part] == [64 * step for step in range(1, 21)]
        assert [r["lr"] for r in part] == [learning_rate(s, 20, 3e-3) for s in range(20)]
    assert written[0]["loss"] != written[20]["loss"]


def test_what_the_backward_makes_again_has_the_same_numbers(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def swiglu(*given: Any, recompute: bool) -> torch.Tensor:
        asked.append(recompute)
        return quest.swiglu(*given, recompute=recompute)

    monkeypatch.setattr(llama, "swiglu", swiglu)
    both = replace(request_, recipes=["bf16", "w1a1"])
    again = replace(both, out=tmp_path / "again", recompute=True)
    for request in (both, again):
        quietly(request)
        assert set(asked) == {request.recompute}
        asked.clear()
    assert rows(both.out) == rows(again.out)


def test_recipes_start_from_the_same_weights(request_: Request) -> None:
    quietly(request_)
    data = Dataset(torch.zeros(99), torch.zeros(99), ByteEncoder(), 1.0, "")
    job = loop.Job(
        request_.config, data, RunFolder(request_.out),
        Metrics(request_.out / "other.jsonl", {}), torch.device("cpu"), False,
    )  # fmt: skip
    dense, quantized = loop.build(job, "bf16"), loop.build(job, "w1a1")
    for (name, ours), (other, theirs) in zip(
        dense.named_parameters(), quantized.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    tokens = torch.arange(20)[None]
    assert not torch.allclose(dense(tokens), quantized(tokens))


def test_a_seed_is_of_the_weights_and_of_the_batches(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, started, real = [], [], loop.build

    def batch(self: Dataset, *given: int) -> torch.Tensor:
        asked.append(given)
        return real_batch(self, *given)

    def build(job: loop.Job, recipe: str) -> Llama:
        model = real(job, recipe)
        started.append(model.lm_head.weight.detach().clone())
        return model

    real_batch = Dataset.batch
    monkeypatch.setattr(Dataset, "batch", batch)
    monkeypatch.setattr(loop, "build", build)
    for seed in (0, 3):
        config = replace(request_.config, seed=seed, steps=2)
        quietly(replace(request_, config=config, overwrite=True))
    assert asked == [(seed, step, 2, 32) for seed in (0, 3) for step in range(2)]
    assert not torch.equal(*started)


def test_a_validation_is_the_mean_of_its_windows(request_: Request) -> None:
    """Also where the last micro-batch has fewer."""
    quietly(request_)
    held_out = torch.arange(5 * 32 + 1, dtype=torch.uint8)
    data = Dataset(torch.zeros(99), held_out, ByteEncoder(), 1.0, "")
    job = loop.Job(
        replace(request_.config, micro_batch=3), data, RunFolder(request_.out),
        Metrics(request_.out / "other.jsonl", {}), torch.device("cpu"), False,
    )  # fmt: skip
    model = loop.build(job, "bf16")
    windows = data.held_out_windows(64, 32)
    assert len(windows) == 5
    whole = loop.token_loss(model, windows, job.device).item()
    # Sums of float32 in another order: a few units of 2^-24.
    assert loop.validate(model, job) == pytest.approx(whole, rel=1e-6)


def test_losses_a_byte_are_of_the_held_out_text(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = command.encode
    monkeypatch.setattr(command, "encode", lambda *a: replace(real(*a), bytes_per_token=4.0))
    (outcome,) = quietly(request_)
    last = rows(request_.out)[-1]
    assert outcome.val_loss == last["val_loss"]
    assert outcome.val_loss_per_byte == last["val_loss_per_byte"] == outcome.val_loss / 4


def test_a_text_of_hardly_two_sequences(request_: Request, tmp_path: Path) -> None:
    """A twentieth of it is no sequence: one is held out."""
    (tmp_path / "text.txt").write_text(TEXT[:80])
    quietly(replace(request_, config=replace(request_.config, steps=1)))


def test_settings_that_are_given_count() -> None:
    given = {"batch": 16, "micro_batch": 4, "seq": 256, "lr": 0.5, "seed": 7, "eval_every": 3,
             "save_every": 5}  # fmt: skip
    config = TrainConfig.for_size("30M", **given)  # type: ignore[arg-type]
    assert {name: getattr(config, name) for name in given} == given
    assert config.steps == 3_000_000_000 // (16 * 256)  # the same tokens, whatever the batch
    assert TrainConfig.for_size("30M", batch=16).micro_batch == 16


def test_a_run_is_compiled_where_that_is_asked(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(Llama, "compile", lambda model: compiled.append(model))
    once = replace(request_, config=replace(request_.config, steps=1))
    quietly(once)
    assert not compiled
    quietly(replace(once, overwrite=True, compile=True))
    assert len(compiled) == 1


@pytest.mark.parametrize("stopped_at", [10, 13])
def test_a_resumed_run_is_bit_exact(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    straight = replace(request_, out=tmp_path / "straight")
    quietly(straight)
    interrupt(request_, monkeypatch, Stop(stopped_at))
    assert len(rows(request_.out)) == stopped_at
    with (request_.out / "metrics.jsonl").open("a") as file:
        file.write('{"recipe": "w1a1", "st')  # cut by the crash
    (outcome,) = quietly(replace(request_, resume=True))

    assert rows(request_.out) == rows(straight.out)
    ours, theirs = (
        torch.load(folder / "checkpoint-w1a1.pt", weights_only=True)
        for folder in (request_.out, straight.out)
    )
    assert ours["step"] == theirs["step"] == 20
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])

    (again,) = quietly(replace(request_, resume=True))  # nothing is left to do
    assert again == outcome
    assert rows(request_.out) == rows(straight.out)


@pytest.fixture
def not_ignored() -> Iterator[None]:
    """Signals end a process, also where a shell has put the tests into the background."""
    before = {each: signal.getsignal(each) for each in stopping.SIGNALS}
    for each in before:
        default = signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
        signal.signal(each, default)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("not_ignored")
@pytest.mark.parametrize("number", stopping.SIGNALS)
@pytest.mark.parametrize("at", [7, 19, 20])
def test_a_signal_ends_a_run_behind_a_step_that_is_saved(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int
) -> None:
    """Also where it is the last one of a recipe that others follow."""
    request_ = replace(request_, recipes=["w1a1", "bf16"])
    straight = replace(request_, out=tmp_path / "straight")
    quietly(straight)
    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(progress, "watcher", lambda console: Signalled(at, number))
        with pytest.raises(
            stopping.Stopped, match=rf"after step {min(at + 1, 20)} of w1a1"
        ) as told:
            quietly(request_)
    assert told.value.number == number
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before
    saved = torch.load(request_.out / "checkpoint-w1a1.pt", weights_only=True)
    assert saved["step"] == len(rows(request_.out)) == min(at + 1, 20)
    assert not (request_.out / "checkpoint-bf16.pt").exists()
    quietly(replace(request_, resume=True))
    assert rows(request_.out) == rows(straight.out)


@pytest.mark.usefixtures("not_ignored")
def test_a_second_signal_stops_at_once() -> None:
    with stopping.heard() as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt) as told:
            signal.raise_signal(signal.SIGINT)
    assert type(told.value) is KeyboardInterrupt


def test_signals_that_are_ignored_stay_so() -> None:
    """As SIGINT of what a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.heard() as came:
            signal.raise_signal(signal.SIGINT)
        assert not came
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_the_main_thread_s() -> None:
    heard = []

    def listen() -> None:
        with stopping.heard() as came:
            heard.append(came)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [[]]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_stopped_between_recipes_goes_on(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = replace(request_, recipes=["bf16", "w1a1"])
    straight = replace(both, out=tmp_path / "straight")
    quietly(straight)
    interrupt(both, monkeypatch, Stop(4))
    quietly(replace(both, resume=True))
    assert rows(both.out) == rows(straight.out)


def test_the_time_of_a_resumed_run_goes_on(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(request_, monkeypatch, Stop(10))
    path = request_.out / "checkpoint-w1a1.pt"
    held = torch.load(path, weights_only=True)
    torch.save(held | {"seconds": 1000.0}, path)
    (outcome,) = quietly(replace(request_, resume=True))
    lines = (request_.out / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert 1000 < seconds[10] < seconds[19] == outcome.seconds < 1100


def test_a_longer_run_may_follow(request_: Request) -> None:
    quietly(request_)
    longer = replace(request_, resume=True, config=replace(request_.config, steps=25))
    quietly(longer)
    assert [row["step"] for row in rows(request_.out)] == list(range(1, 26))


def test_micro_batches_add_up_to_the_batch(request_: Request, tmp_path: Path) -> None:
    whole = replace(request_, recipes=["bf16"], config=replace(request_.config, steps=3))
    parts = replace(whole, out=tmp_path / "parts", config=replace(whole.config, micro_batch=1))
    quietly(whole)
    quietly(parts)
    for ours, theirs in zip(rows(whole.out), rows(parts.out), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-3}, "its lr is 0.003, not 0.001"),
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"batch": 4}, "its batch is 2, not 4"),
        ({"seq": 16}, "its seq is 32, not 16"),
        ({"size": "wider"}, "its width is 128, not 256"),
        ({"size": "headed"}, "its heads is 2, not 4"),
        ({"steps": 5}, "has done 20 steps: --steps 5 is fewer"),
    ],
)
def test_another_run_is_refused(
    finished: Request, change: dict[str, float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "wider", Size(1, 256, 2, lr=3e-3, tokens=1))
    monkeypatch.setitem(SIZES, "headed", Size(1, 128, 4, lr=3e-3, tokens=1))
    monkeypatch.setitem(SIZES, "tiny", Size(1, 128, 2, lr=3e-3, tokens=1))
    before = snapshot(finished.out)
    config = replace(finished.config, **change)
    with pytest.raises(UserError, match=message):
        quietly(replace(finished, resume=True, config=config))
    assert snapshot(finished.out) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A finished run, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw", lambda *_: None)
        patch.setitem(SIZES, "tiny", Size(1, 128, 2, lr=3e-3, tokens=20 * 64, batch=2, seq=32))
        (folder / "text.txt").write_text(TEXT)
        request = Request(
            ["w1a1"], folder / "out", TrainConfig.for_size("tiny"),
            data=[str(folder / "text.txt")], device="cpu",
        )  # fmt: skip
        quietly(request)
    return request


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_checkpoint_cut_short_is_refused(request_: Request, share: float) -> None:
    quietly(request_)
    path = request_.out / "checkpoint-w1a1.pt"
    contents = path.read_bytes()
    path.write_bytes(contents[: int(share * len(contents))])
    before = snapshot(request_.out)
    with pytest.raises(UserError, match=r"checkpoint-w1a1.pt is damaged"):
        quietly(replace(request_, resume=True))
    assert snapshot(request_.out) == before


def test_a_checkpoint_with_another_byte_is_refused(request_: Request) -> None:
    """torch reads a weight whose sum does not fit, and training would go on from it."""
    quietly(request_)
    path = request_.out / "checkpoint-w1a1.pt"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    longer = replace(request_.config, steps=30)
    with pytest.raises(UserError, match=r"checkpoint-w1a1.pt is damaged"):
        quietly(replace(request_, resume=True, config=longer))


def test_a_full_disk_is_told_as_one(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises a RuntimeError that names no file."""

    def full(*_: object) -> None:
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 8\nmore"
        )

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint .*w1a1.pt cannot be written \(.*pos 9 vs 8$"):
        quietly(request_)


def test_another_error_than_a_full_disk_is_itself(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "save", lacks)
    with pytest.raises(torch.OutOfMemoryError):
        quietly(request_)


def test_lines_show_every_validation() -> None:
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    lines = progress.Lines(console)
    lines.start("w1a1", 0, 9, 64)
    for step in range(1, 10):
        val = 2.0 + step if step in (4, 9) else None
        lines.step(Row("w1a1", step, 1.0, val, val, 1e-3, 64 * step, 0.1 * step, 1.0))
    shown = console.export_text().splitlines()
    assert [line.split()[2] for line in shown] == ["1/9", "4/9", "9/9"]
    assert "val 6.000" in shown[1]


def test_a_checkpoint_of_another_recipe_is_refused(request_: Request) -> None:
    quietly(replace(request_, recipes=["bf16", "w1a1"]))
    (request_.out / "checkpoint-bf16.pt").replace(request_.out / "checkpoint-w1a1.pt")
    with pytest.raises(UserError, match="its recipe is bf16, not w1a1"):
        quietly(replace(request_, resume=True))


def test_a_recipe_that_means_something_else_now_is_refused(
    finished: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size(1, 128, 2, lr=3e-3, tokens=1))
    monkeypatch.setattr(checkpoint, "recipe_of", lambda name: SimpleNamespace(spec="another"))
    with pytest.raises(UserError, match=r"its quantizers is .*, not another"):
        quietly(replace(finished, resume=True))


def test_other_text_is_refused(request_: Request, tmp_path: Path) -> None:
    quietly(request_)
    (tmp_path / "text.txt").write_text(TEXT.replace("ever", "never"))
    with pytest.raises(UserError, match=r"its data is [0-9a-f]{12}, not [0-9a-f]{12}$"):
        quietly(replace(request_, resume=True))


def test_a_crash_while_writing_keeps_the_last_checkpoint(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(request_, monkeypatch, Stop(12))
    path = request_.out / "checkpoint-w1a1.pt"
    before = path.read_bytes()

    def half(content: object, new: Path) -> None:
        new.write_bytes(before[:1000])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space"):
            quietly(replace(request_, resume=True))
    assert path.read_bytes() == before
    assert not files.temporary(path).exists()
    quietly(replace(request_, resume=True))


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "x", []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(names) or real(*names))
    files.replace_text(path, "four")
    assert done == [4, (files.temporary(path), path)]
    assert path.read_text() == "four"


@pytest.mark.parametrize("training", [True, False], ids=["training", "held out"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_diverged_run_stops(
    factor: float, training: bool, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is of the steps before, and the run goes on from there."""
    sound = [14 if training else 2]
    name = "token_loss" if training else "validate"
    real = getattr(loop, name)

    def broken(model: nn.Module, *given: object) -> Any:
        value = real(model, *given)
        if training and not model.training:
            return value
        sound[0] -= 1
        return value if sound[0] >= 0 else value * factor

    with monkeypatch.context() as patch:
        patch.setattr(loop, name, broken)
        _stops(factor, training, request_)
    (outcome,) = quietly(replace(request_, resume=True))
    assert math.isfinite(outcome.val_loss)
    assert len(rows(request_.out)) == 20


def _stops(factor: float, training: bool, request_: Request) -> None:
    told = f"w1a1: the loss{'' if training else ' on held-out text'} is {factor} at step 15"
    with pytest.raises(loop.DivergedError, match=told):
        quietly(request_)
    assert len(rows(request_.out)) == 14
    assert all(math.isfinite(row["loss"]) for row in rows(request_.out))


def test_a_gradient_that_is_not_finite_stops_a_run(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is of before the update, which made the weights no numbers."""
    real = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *given: real(*given) * math.inf)
    with pytest.raises(loop.DivergedError, match="w1a1: the gradient's norm is inf at step 1"):
        quietly(request_)
    assert not rows(request_.out)


def test_metrics_are_json() -> None:
    row = Row("w1a1", 1, math.nan, None, None, 0.1, 64, 1.0, 1.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics._line(row)


def test_a_run_does_not_read_what_it_writes(
    request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a folder of texts with the run's own below it: the text is the same when it goes on."""
    run_ = replace(request_, data=[str(tmp_path)], out=tmp_path / "runs" / "one")
    interrupt(run_, monkeypatch, Stop(12))
    assert (tmp_path / "runs" / "one" / "metrics.jsonl").exists()
    (outcome,) = quietly(replace(run_, resume=True))
    assert outcome.steps == 20
    before = json.loads((run_.out / "run.json").read_text())["data"]["sha256"]
    quietly(replace(run_, overwrite=True))
    assert json.loads((run_.out / "run.json").read_text())["data"]["sha256"] == before


def test_recipes_with_a_colon_get_a_file_of_their_own() -> None:
    folder = RunFolder(Path("x"))
    assert folder.checkpoint("w4a4-2:4").name == "checkpoint-w4a4-2_4.pt"
    assert folder.checkpoint("../../etc").parent == Path("x")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 1, "model": Path}, path)
    with pytest.raises(UserError, match="damaged or of another format"):
        checkpoint.load(path, {})


def test_the_summary_of_two_recipes() -> None:
    data = Dataset(torch.zeros(9), torch.zeros(9), ByteEncoder(), 1.0, "")
    ended = [
        loop.Outcome("bf16", 2_500_000, 20, 1280, 64.0, 1.5, 1.5),
        loop.Outcome("w1a1", 2_500_000, 20, 1280, 128.0, 1.75, 1.75),
    ]
    table = progress.summary(ended, data)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells == {
        "recipe": ["bf16", "w1a1"], "parameters": ["2.50 M"] * 2, "steps": ["20"] * 2,
        "time": ["1:04", "2:08"], "tokens/s": ["20", "10"], "nats/byte": ["1.500", "1.750"],
        "against bf16": ["+0.000", "+0.250"],
    }  # fmt: skip


def test_a_rate_is_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what a run had done before it was resumed."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rate, tokens = progress.Rate(), 10**9
    assert rate.mark(tokens) == 0
    for step in range(40):
        now[0] += 2 if step < 20 else 1
        tokens += 64
        found = rate.mark(tokens)
        assert step >= 20 or found == 32
    assert found == 64


@given(st.lists(st.floats(-5, 5), max_size=6), st.floats(1e-3, 1))
def test_labels_are_spread_in_order(heights: list[float], gap: float) -> None:
    moved = spread(heights, gap)
    assert all(new >= old for new, old in zip(moved, heights, strict=True))
    ordered = sorted(moved)
    assert all(b - a > gap * 0.999 for a, b in pairwise(ordered))


@pytest.mark.parametrize("loss", [0.5, 3.0, 5.5])  # below and above the entropy, and no learning
def test_the_picture(tmp_path: Path, loss: float) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", {})
    for recipe in ("bf16", "w1a1"):
        for step in range(1, 4):
            val = loss if step == 3 else None
            metrics.add(Row(recipe, step, 5.5, val, val, 0.1, step * 64, step * 0.1, 1.0))
    data = Dataset(torch.zeros(9), torch.arange(24, dtype=torch.uint8), ByteEncoder(), 1.0, "")
    path = tmp_path / "loss.png"
    path.write_text("an earlier picture")
    plot.draw(path, metrics, data, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2

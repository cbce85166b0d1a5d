"""An update of the weights: plain, and as graphs that are captured once and replayed.

Without a GPU a stand-in captures: it runs what it is given, puts all tensors back and runs it again
at each replay. That tests the cut and the order; what a CUDA graph keeps, only a GPU shows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import quest
from quest.cli import main
from quest.models import SIZES, Llama, LlamaConfig, Size
from quest.train import Request, TrainConfig, UserError, loop, plot, progress, run
from quest.train.metrics import Row
from quest.train.optimizer import adamw, capturable, restore, set_rate, state_of
from quest.train.step import WARM_UP, CapturedStep, CudaGraphs, Step

CONFIG = LlamaConfig(vocab_size=64, layers=2, width=128, heads=2)
RATES = [1e-3 * (i + 1) for i in range(WARM_UP + 3)]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class _NoValues(TorchDispatchMode):
    """Refuses what would wait for the device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


class Stand:
    """Captures on the CPU. log: what was asked for, in order."""

    def __init__(self, step: Step) -> None:
        self.log: list[str] = []
        self._step = step
        self._made = 0

    def aside(self, run: Callable[[], None]) -> None:
        self.log.append("aside")
        run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        name = f"graph {self._made}"
        self._made += 1
        self.log.append(f"capture {name}")
        optimizer = self._step.optimizer
        held = [
            self._step.total, self._step.norm, *self._step.model.parameters(),
            *(t for each in optimizer.state.values() for t in each.values()),
            *(p.grad for p in self._step.model.parameters() if p.grad is not None),
        ]  # fmt: skip
        before = [t.detach().clone() for t in held]
        # The CPU's fused update reads its step and rate; one on a GPU does not.
        with nullcontext() if run == self._step.end else _NoValues():
            run()
        with torch.no_grad():
            for t, was in zip(held, before, strict=True):
                t.copy_(was)

        def replay() -> None:
            self.log.append(name)
            run()

        return replay


class _Stop:
    """A watcher that interrupts a run after a step."""

    def __init__(self, at: int) -> None:
        self._at = at

    def start(self, recipe: str, step: int, steps: int, tokens_per_step: int) -> None: ...

    def step(self, row: Row) -> None:
        if row.step == self._at:
            raise KeyboardInterrupt

    def stop(self) -> None: ...


def _stop_after(request: Request, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(progress, "watcher", lambda console: _Stop(step))
        with pytest.raises(KeyboardInterrupt):
            run(request, Console(quiet=True))


def _model(recipe: str, device: str = "cpu") -> Llama:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    quest.quantize_(model, recipe)
    return model.to(device)


def _step(recipe: str, device: str = "cpu") -> Step:
    model = _model(recipe, device)
    return Step(model, adamw(model), lambda w: loop.token_loss(model, w, torch.device(device)))


def _batch(step: int, batch: int = 5, seq: int = 16) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randint(CONFIG.vocab_size, (batch, seq + 1), generator=g)


def _train(
    update: Step | CapturedStep, micro_batch: int, seq: int = 16
) -> list[tuple[float, float]]:
    return [update(_batch(i, seq=seq), micro_batch, rate) for i, rate in enumerate(RATES)]


def _everything(step: Step) -> list[Tensor]:
    states = [t for each in step.optimizer.state.values() for t in each.values()]
    return [*step.model.parameters(), *states]


@pytest.mark.parametrize("recipe", ["bf16", "w4a4"])
@pytest.mark.parametrize(
    ("micro_batch", "replays"),
    [(5, [0]), (2, [0, 1, 2]), (1, [0, 1, 1, 1, 1]), (3, [0, 1])],
)
def test_captured_is_plain(recipe: str, micro_batch: int, replays: list[int]) -> None:
    plain, other = _step(recipe), _step(recipe)
    stand = Stand(other)
    captured = CapturedStep(other, stand)
    assert _train(captured, micro_batch) == _train(plain, micro_batch)
    assert all(map(torch.equal, _everything(other), _everything(plain)))
    graphs = max(replays) + 2
    assert stand.log == [
        *["aside"] * WARM_UP,
        *[f"capture graph {i}" for i in range(graphs)],
        *[f"graph {i}" for _ in RATES[WARM_UP:] for i in (*replays, graphs - 1)],
    ]


def test_a_rate_that_a_graph_reads_gives_the_same_updates() -> None:
    numbers, tensors = _step("bf16"), _step("bf16")
    rate = torch.zeros(())
    for group in tensors.optimizer.param_groups:
        group["lr"] = rate
    for i, r in enumerate(RATES):
        single = torch.tensor(r).item()  # as a float32 has it
        assert numbers(_batch(i), 5, single) == tensors(_batch(i), 5, single)
        assert all(group["lr"] is rate for group in tensors.optimizer.param_groups)
        assert rate == torch.tensor(r)
    assert all(map(torch.equal, _everything(numbers), _everything(tensors)))


def test_each_micro_batch_counts_by_its_share() -> None:
    """A single update by the gradient of the whole batch's mean loss, written out."""
    step = _step("bf16")
    model = copy.deepcopy(step.model)
    batch = _batch(0)
    logits = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for rate in (0.0, 1e-3):  # at 0 nothing moves, and nothing is left for the next step
        got = step(batch, 2, rate)
        assert got == pytest.approx((loss.item(), norm.item()), rel=1e-5)
    for ours, theirs in zip(step.model.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad / max(1.0, norm.item()))


def test_another_shape_is_refused() -> None:
    step = _step("bf16")
    captured = CapturedStep(step, Stand(step))
    captured(_batch(0), 2, 1e-3)
    with pytest.raises(ValueError, match="batches of one shape and part"):
        captured(_batch(0, batch=4), 2, 1e-3)
    with pytest.raises(ValueError, match="batches of one shape and part"):
        captured(_batch(0), 3, 1e-3)


def test_what_a_checkpoint_keeps_is_the_same_everywhere() -> None:
    """Of a rate that is a tensor as of one that is none; and either can be resumed as the other."""
    number, tensor = _step("bf16"), _step("bf16")
    for group in tensor.optimizer.param_groups:
        group["lr"] = torch.zeros(())
    for step in (number, tensor):
        step(_batch(0), 5, 0.5)
    kept = [state_of(step.optimizer) for step in (number, tensor)]
    assert kept[0]["param_groups"] == kept[1]["param_groups"]
    assert all(type(group["lr"]) is float for group in kept[1]["param_groups"])
    rates = [group["lr"] for group in tensor.optimizer.param_groups]
    restore(tensor.optimizer, kept[0])
    assert all(
        group["lr"] is rate
        for group, rate in zip(tensor.optimizer.param_groups, rates, strict=True)
    )
    restore(number.optimizer, kept[1])
    assert [group["lr"] for group in number.optimizer.param_groups] == [0.5, 0.5]
    set_rate(tensor.optimizer, 0.25)
    assert rates[0] == 0.25


def test_capturable_is_for_the_capture_alone() -> None:
    optimizer = _step("bf16").optimizer

    def fails() -> None:
        with capturable(optimizer):
            assert all(group["capturable"] for group in optimizer.param_groups)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not any(group["capturable"] for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("device", "graph", "kind"),
    [
        ("cpu", True, Step),
        ("cpu", False, Step),
        ("cuda", False, Step),
        ("cuda", True, CapturedStep),
    ],
)
def test_a_step_is_captured_on_a_gpu(
    device: str, graph: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CudaGraphs", lambda device: None)
    step = _step("bf16")
    job: Any = dataclasses.make_dataclass("Job", ["device", "graph"])(torch.device(device), graph)
    assert type(loop.stepper(step.model, step.optimizer, job)) is kind


@pytest.mark.parametrize(
    ("options", "graph", "recompute"),
    [
        ((), True, False),
        (("--graph",), True, False),
        (("--no-graph",), False, False),
        (("--recompute",), True, True),
        (("--recompute", "3"), True, 3),
        (("--recompute", "0"), True, False),
    ],
)
def test_the_command_says_whether_to_capture_and_to_make_again(
    options: tuple[str, ...], graph: bool, recompute: bool | int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[bool, bool]] = []

    def stepper(model: Any, optimizer: Any, job: Any) -> None:
        seen.append((job.graph, job.recompute))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "stepper", stepper)
    out = ["--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    assert main(["train", "--recipe", "w4a4", *out, *options]) != 0
    assert seen == [(graph, recompute)]
    assert type(seen[0][1]) is type(recompute)


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ("5", "--recompute is 5: a model of size demo has 4 blocks"),
        ("some", "'some' is no number of blocks"), ("1.5", "no number of blocks"),
    ],
)  # fmt: skip
def test_blocks_that_there_are_not(
    blocks: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), f"--recompute={blocks}"]) != 0
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_request_of_fewer_blocks_than_none(tmp_path: Path) -> None:
    config = TrainConfig.for_size("demo")
    with pytest.raises(UserError, match="--recompute is -1: a model of size demo has 4 blocks"):
        run(Request(("w4a4",), tmp_path / "run", config, recompute=-1), Console())
    assert not (tmp_path / "run").exists()


@cuda
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# The attention that always adds in one order multiplies float32 without tensor cores, as asked.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication")
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8", "fp4", "bf16"])
@pytest.mark.parametrize("micro_batch", [5, 2])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_cuda_graph_is_the_plain_step(
    recipe: str, micro_batch: int, compiled: bool, recompute: bool
) -> None:
    """Losses, norms, weights and the optimizer's state, bit for bit, over captured steps.

    256 tokens a sequence: two take the integers' path on Hopper, and one that of the values.
    """
    torch.compiler.reset()
    step = _step(recipe, "cuda")
    if recompute:
        step.model.recompute_()
    # Compiled once: a second time the compiler may choose sums in another order.
    for block in step.model.layers if compiled else ():
        block.compile()
    start = copy.deepcopy(step.model.state_dict())
    # Attention's fused backward adds in another order each time.
    with sdpa_kernel(SDPBackend.MATH):
        plain = _train(step, micro_batch, seq=256)
        # Detached: a graph that is kept would keep what adds up gradients on this stream.
        expected = [t.detach().clone() for t in _everything(step)]
        step.model.load_state_dict(start)
        again = Step(step.model, adamw(step.model), step._loss)
        captured = _train(
            CapturedStep(again, CudaGraphs(torch.device("cuda"))), micro_batch, seq=256
        )
    assert captured == plain
    assert all(map(torch.equal, _everything(again), expected))


@cuda
def test_what_can_not_be_captured() -> None:
    graphs = CudaGraphs(torch.device("cuda"))
    x = torch.ones((), device="cuda")
    with pytest.raises(UserError, match="--no-graph trains without one"):
        graphs.capture(lambda: x.fill_(x.item()) and None)


@cuda
@pytest.mark.parametrize("recipe", ["w1a1", "bf16"])
def test_a_run_with_graphs_resumes_without(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other way: the checkpoint of either goes on as the other, with the same numbers."""
    monkeypatch.setattr(plot, "draw", lambda *_: None)
    monkeypatch.setitem(SIZES, "tiny", Size(1, 128, 2, lr=3e-3, tokens=20 * 64, batch=2, seq=32))
    (tmp_path / "text.txt").write_text(
        "".join(f"{i}, then {i + 1}, as ever.\n" for i in range(400))
    )
    config = TrainConfig.for_size("tiny", steps=20, save_every=10)
    whole = Request([recipe], tmp_path / "whole", config, data=[str(tmp_path / "text.txt")],
                    device="cuda", graph=False)  # fmt: skip
    weights = []
    with sdpa_kernel(SDPBackend.MATH):
        run(whole, Console(quiet=True))
        for first in (True, False):
            out = tmp_path / f"graph first {first}"
            half = dataclasses.replace(whole, out=out, graph=first)
            # The schedule is that of the whole run, so it is stopped and not shortened.
            _stop_after(half, 10, monkeypatch)
            run(dataclasses.replace(half, graph=not first, resume=True), Console(quiet=True))
            weights.append(torch.load(out / f"checkpoint-{recipe}.pt", weights_only=True)["model"])
    expected = torch.load(whole.out / f"checkpoint-{recipe}.pt", weights_only=True)["model"]
    for each in weights:
        assert all(torch.equal(each[name], expected[name]) for name in expected)

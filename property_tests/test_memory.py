"""What `python -m benchmarks.memory` counts, against what the shapes say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from click.testing import CliRunner

from benchmarks import memory
from quest.models import LlamaConfig

# torch.compile itself looks at the gradient of a block's input.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# With so large a vocabulary the loss is the peak: all blocks still hold what they saved.
CONFIG = LlamaConfig(vocab_size=8192, layers=3, width=128, heads=2)
SHAPE = memory.Shape(CONFIG, sequences=4, length=64)
D, HIDDEN, N, LAYERS = CONFIG.width, CONFIG.hidden, SHAPE.tokens, CONFIG.layers
MATRICES = LAYERS * (4 * D * D + 3 * D * HIDDEN)  # entries of the weights that are quantized
PARAMETERS = MATRICES + 2 * CONFIG.vocab_size * D + (2 * LAYERS + 1) * D


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize(("recipe", "bits"), [("w4a4", 4), ("w2a2", 2), ("w8a8", 8), ("w1a1", 1)])
def test_what_our_layers_hold(recipe: str, bits: int, compiled: bool) -> None:
    found = memory.at_peak(SHAPE, recipe, compiled)
    inputs = LAYERS * N * (3 * D + HIDDEN)  # of q, k and v; o; gate and up; down
    assert found[memory.OURS] == inputs * bits // 8 + inputs // 8
    assert found[memory.OURS_WEIGHTS] == MATRICES * bits // 8 + MATRICES // 8
    # The head alone is not ours.
    assert found[memory.WEIGHTS] == 2 * CONFIG.vocab_size * D


def test_a_model_in_bf16() -> None:
    found = memory.at_peak(SHAPE, "bf16")
    assert found[memory.PARAMETERS] == 4 * PARAMETERS
    steps = found[memory.OPTIMIZER] - 8 * PARAMETERS
    assert steps == 4 * (7 * LAYERS + 2 + 2 * LAYERS + 1)  # one number a parameter
    assert found[memory.OURS] == found[memory.OURS_WEIGHTS] == 0
    assert found[memory.WEIGHTS] == 2 * (MATRICES + CONFIG.vocab_size * D)
    # Gate, up and what down reads.
    assert found[memory.GATED] == 3 * LAYERS * N * HIDDEN * 2
    assert found[memory.LOGITS] == N * CONFIG.vocab_size * 4


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_gate_and_up_again(recipe: str, compiled: bool) -> None:
    """No activation of the hidden width waits; the operands are those that wait in any case."""
    found = memory.at_peak(SHAPE, recipe, compiled, recompute=True)
    kept = memory.at_peak(SHAPE, recipe, compiled)
    assert found[memory.GATED] == 0
    assert kept[memory.GATED] >= 2 * LAYERS * N * HIDDEN * 2
    for kind in (memory.OURS, memory.OURS_WEIGHTS, memory.LOGITS, memory.PARAMETERS):
        assert found[kind] == kept[kind]
    plain, other = (memory.at_peak(SHAPE, "bf16", compiled, again) for again in (False, True))
    assert plain == other


def test_the_peak_may_hold_gradients() -> None:
    """With few tokens the end of the backward holds the most: all gradients and nothing saved."""
    few = memory.Shape(CONFIG, sequences=1, length=8)
    found = memory.at_peak(few, "bf16")
    assert found[memory.GRADIENTS] >= 4 * (PARAMETERS - CONFIG.vocab_size * D)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, ...]] = []
    monkeypatch.setattr(memory, "at_peak", lambda shape, recipe, *how: asked.append(how) or Counter(
        {memory.PARAMETERS: 2 * 10**9, memory.LOGITS: {"bf16": 2, "w4a4": 1}[recipe] * 10**9}
    ))  # fmt: skip
    monkeypatch.setattr(memory.cases, "CUDA", True)
    monkeypatch.setattr(memory, "measured", lambda shape, recipe, again: (5 + again) * 10**9)
    options = ["--recipe", "bf16", "--recipe", "w4a4"]
    again = CliRunner().invoke(memory.main, [*options, "--recompute"])
    assert again.output.splitlines()[-2].split()[-2:] == ["6.00", "6.00"]
    assert "gate and up again in the backward" in again.output.splitlines()[0]
    made = CliRunner().invoke(memory.main, options)
    assert made.exit_code == 0, made.output
    assert "again" not in made.output
    assert asked == [(True, True), (True, True), (True, False), (True, False)]
    lines = {line.split("  ")[0]: line.split()[-2:] for line in made.output.splitlines()}
    assert lines["parameters"] == ["2.00", "2.00"]
    assert lines["gradients"] == ["0.00", "0.00"]
    assert lines["saved: logits and loss"] == ["2.00", "1.00"]
    assert lines["sum"] == ["4.00", "3.00"]
    assert lines["max_memory_allocated"] == ["5.00", "5.00"]
    assert "over bf16" in lines


def test_storages_count_once_and_until_their_end() -> None:
    live = memory.Live(SHAPE)
    with live:
        x = torch.zeros(1000)
        views = x[10:], x.view(10, 100)
        assert live.now == {memory.AT_WORK: 4000}
        live.keep(views[0])
        assert live.now.total() == 4000
        assert live.now[memory.AT_WORK] == 0
        y = x + 1
        assert live.now.total() == 8000
        del x, views
        z = y[:1]
        del y
        assert live.now[memory.AT_WORK] == 4000
        del z
    assert live.now.total() == 0
    assert live.peak.total() == 8000


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--recipe", "w4b4"], "Invalid value for --recipe: recipe must be"),
        (["--recipe", "w4a16"], "Invalid value for --recipe: w4a16 has no product of integers"),
        (["--size", "demo", "--sequences", "2", "--length", "128"], "256 tokens are as many as"),
    ],
)
def test_what_can_not_be_reckoned(options: list[str], told: str) -> None:
    done = CliRunner().invoke(memory.main, options)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())

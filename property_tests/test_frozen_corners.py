"""Corners of frozen layers that planted faults outlived: each test has killed one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

import quest
from property_tests import test_prologue_rules, test_recorded_calls
from property_tests.test_prologue_rules import HALF, Seen, _frozen, _layer, _norm, _pair
from property_tests.test_recorded_calls import Calls
from quest import operands, paths
from quest.packed import bits_of

pytestmark = [
    pytest.mark.whole,
    # torch's own forward mode asks for it.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

seen, calls = test_prologue_rules.seen, test_recorded_calls.calls  # fixtures
ROWS = 200  # more than are multiplied packed
REFUSED = "no forward-mode derivatives"


def test_a_weight_of_another_dtype_at_its_place() -> None:
    """The same bytes as floats of another kind are another weight."""
    torch.manual_seed(0)
    layer = quest.Linear(128, 16, False, "w4a4").to(torch.bfloat16).eval().freeze()
    before = layer.current()
    layer.weight.data = layer.weight.data.view(torch.float16)
    assert layer.current() is not before
    other = quest.Linear(128, 16, False, "w4a4").half().eval()
    other.weight.data = layer.weight.data.clone()
    x = torch.randn(3, 128).half()
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("rows", [128, 64])
def test_another_view_of_a_weight_that_was_never_written(rows: int) -> None:
    """Its transpose, or some of its rows, begins at the same address, and is another weight."""
    layer = quest.Linear(128, 128, False, "w4a4").eval()
    layer.weight = torch.nn.Parameter(torch.randn(128, 128, generator=torch.manual_seed(0)))
    before, held = layer.weight, layer.freeze().current()
    view = before.detach()[:rows] if rows < 128 else before.detach().t()
    layer.weight = torch.nn.Parameter(view)
    assert (layer.weight.data_ptr(), layer.weight._version) == (before.data_ptr(), before._version)
    assert layer.current() is not held
    other = quest.Linear(128, rows, False, "w4a4").eval()
    other.weight.data = view.clone()
    x = torch.randn(3, 128)
    with torch.no_grad():
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_knows_no_address(copied: Callable[[quest.Linear], quest.Linear]) -> None:
    """What its original's weight let go may be another's, and become the copy's weight."""
    torch.manual_seed(0)
    layer = quest.Linear(128, 16, False, "w4a4").eval().freeze()
    twin, x = copied(layer), torch.randn(3, 128)
    layer.weight.detach().numpy()[:] += 1  # which PyTorch does not count
    twin.weight = layer.weight
    other = quest.Linear(128, 16, False, "w4a4").eval()
    other.weight = layer.weight
    with torch.no_grad():
        assert torch.equal(twin(x), other(x))


def test_a_bias_of_another_dtype_beside_frozen_values() -> None:
    """It is converted, as where integers are multiplied."""
    torch.manual_seed(0)
    layer = quest.Linear(128, 16, True, "w4a4").to(torch.bfloat16).eval().freeze()
    x = torch.randn(3, 128).to(torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        layer.bias = torch.nn.Parameter(layer.bias.float())
        assert torch.equal(layer(x), expected)


def test_signs_beside_integers_are_not_packed() -> None:
    """Their product has single bits on both sides, or on neither."""
    made = quest.recipe("w1a4")
    pair = operands.kinds(made.activation, made.weight)
    assert pair == ("integers", "integers")
    names = ",".join(q.require_grid().name for q in (made.activation, made.weight))
    assert bits_of(names, ",".join(pair)) == 0


def test_a_layer_frozen_as_values_is_not_quantized_again(
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = _layer().eval().freeze()  # as values, on a CPU
    monkeypatch.setattr(paths, "choose", lambda *_: "integers")
    gate, up = _pair()
    with torch.no_grad():
        y = quest.gated(gate, up, layer)
        assert seen.none()
        assert torch.equal(y, layer(torch.nn.functional.silu(gate) * up))


@pytest.mark.parametrize(
    ("kind", "what"),
    [("gated", "x"), ("gated", "beside"), ("added", "x"), ("added", "beside"), ("normed", "x"),
     ("normed", "beside"), ("normed", "weight")],
)  # fmt: skip
def test_tangents_of_each_input_of_a_frozen_layer(
    kind: str,
    what: str,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which torch.no_grad leaves on."""
    (layer,), norm = _frozen(monkeypatch, outs=(256,)), _norm()
    g = torch.Generator().manual_seed(0)
    given = {name: torch.randn(ROWS, 256, generator=g).to(HALF) for name in ("x", "beside")}
    given["weight"] = norm.weight.detach().clone()
    with torch.no_grad(), forward_ad.dual_level():
        given[what] = forward_ad.make_dual(given[what], torch.ones_like(given[what]))
        x, beside = given["x"], given["beside"]
        if what == "weight":
            del norm.weight
            norm._parameters["weight"] = given["weight"]  # type: ignore[assignment]
        run = {
            "gated": lambda: quest.gated(x, beside, layer),
            "normed": lambda: quest.normed(x, norm, (layer,), beside),
            "added": lambda: quest.added(x, layer, beside),
        }[kind]
        with pytest.raises(NotImplementedError, match=REFUSED):
            run()


@pytest.mark.parametrize("which", [0, 1], ids=["cos", "sin"])
@pytest.mark.parametrize("kind", ["together", "normed"])
def test_tangents_of_angles(
    kind: str,
    which: int,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, norm = _frozen(monkeypatch, outs=(64, 32)), _norm()
    x, angle = torch.randn(ROWS, 256).to(HALF), torch.randn(ROWS, 16)
    tables = [angle.cos(), angle.sin()]
    with torch.no_grad(), forward_ad.dual_level():
        tables[which] = forward_ad.make_dual(tables[which], torch.ones_like(tables[which]))
        rotary = quest.Rotary(tables[0], tables[1], 1)
        run = {
            "together": lambda: quest.together(x, layers, rotary),
            "normed": lambda: quest.normed(x, norm, layers, None, rotary),
        }[kind]
        with pytest.raises(NotImplementedError, match=REFUSED):
            run()


@pytest.mark.parametrize("name", ["together", "gated", "normed", "added", "alone"])
@pytest.mark.parametrize("recorded", [False, True])
def test_forward_mode_is_refused_by_recorded_calls(
    recorded: bool,
    name: str,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = (lambda: calls.alone(calls.x)) if name == "alone" else getattr(calls, name)
    if recorded:
        calls.record(run)
    calls.reads()
    # As the fake says of what lies on a GPU, but for what is asked here.
    monkeypatch.setattr("quest.ops.direct", lambda _: forward_ad._current_level < 0)
    with forward_ad.dual_level():
        calls.x = forward_ad.make_dual(calls.x, torch.ones_like(calls.x))
        with pytest.raises(NotImplementedError, match=REFUSED):
            run()


@pytest.mark.parametrize("pattern", [quest.NM(1, 2), quest.NM(4, 8)], ids=str)
def test_patterns_that_have_no_compressed_form(
    pattern: quest.NM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four entries there may be more than two: only 2:4 is compressed."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    layer = quest.Linear(256, 8, recipe=quest.recipe("w4a4", sparsity=pattern)).freeze()
    held = layer.current()
    assert held is not None
    assert held.kept is None
    assert held.metadata is None

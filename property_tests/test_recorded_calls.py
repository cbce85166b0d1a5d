"""Calls of layers, behind nothing, a gate or a norm, that were recorded: what is looked at again.

No GPU: the kernels are fakes. A recorded call queues what it recorded and launches nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import quest
from property_tests.fake_launches import Kept, Kernels, Stream
from quest import direct, frozen, joint, ops, paths, prologue
from quest.kernels import recorded

pytestmark = pytest.mark.whole

WIDTH, OUTS, HALF = 256, (24, 8, 16), torch.bfloat16
Run = Callable[[], object]


class Calls:
    """Layers as on Hopper whose weights lie stacked, another by itself, and a norm, on a CPU.

    x, other: (3, WIDTH).
    """

    def __init__(self, patch: pytest.MonkeyPatch, bias: bool) -> None:
        torch.manual_seed(0)
        direct._plan.cache_clear()
        self.kernels = Kernels(patch)
        Stream(patch)
        patch.setattr(paths, "has_integers", lambda *_: True)
        patch.setattr(prologue, "has_kernel", lambda *_: True)
        self.layers = [self.layer(n, bias) for n in OUTS]
        assert joint.stack(self.layers)
        self.alone = self.layer(OUTS[0], bias)
        self.norm = nn.RMSNorm(WIDTH, 1e-5, dtype=HALF)
        self.x, self.other = torch.randn(2, 3, WIDTH).to(HALF)
        room = direct.Joined.room

        def kept(
            joined: direct.Joined, biases: list[Tensor], x: Tensor, *stay: bool
        ) -> Tensor | None:
            found = room(joined, biases, x, *stay)
            self.kernels.memory += [] if found is None else [found]
            return found

        patch.setattr(direct.Joined, "room", kept)
        freeze = frozen.freeze

        def held(weight: Tensor, recipe: quest.Recipe) -> frozen.Frozen:
            made = freeze(weight, recipe)
            self._reads(made)
            return made

        patch.setattr(frozen, "freeze", held)

    @staticmethod
    def layer(out: int, bias: bool) -> quest.Linear:
        return quest.Linear(WIDTH, out, bias, "w4a4").to(HALF).eval().freeze()

    def _reads(self, held: frozen.Frozen) -> None:
        one = held if held.whole is None else held.whole.frozen
        found = (one.operand, one.packed, one.scale, one.sums)
        self.kernels.memory += [t for t in found if t is not None]

    def reads(self) -> None:
        """Let the kernels read what there is now."""
        for layer in (*self.layers, self.alone):
            if layer._frozen is not None:
                self._reads(layer._frozen)
            if layer.bias is not None:
                self.kernels.memory.append(layer.bias)

    def joined(self) -> list[float]:
        """What lies where launches read the biases of several layers."""
        held = self.layers[1]._frozen
        assert held is not None
        assert held.whole is not None
        ((_, memory),) = held.whole.frozen.biases.values()
        found: list[float] = memory.tolist()
        return found

    def together(self) -> tuple[Tensor, ...]:
        return quest.together(self.x, self.layers)

    def gated(self) -> Tensor:
        return quest.gated(self.x, self.other, self.alone)

    def normed(self) -> Tensor:
        return quest.normed(self.x, self.norm, [self.alone])[1][0]

    def added(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return quest.normed(self.x, self.norm, self.layers, self.other)

    def queued(self, run: Run) -> bool:
        """Whether a call was recorded before, and its launches are queued and no others."""
        self.reads()
        self.kernels.take()
        before = len(Kept.all)
        run()
        launched = self.kernels.take()
        assert len(Kept.all) - before in (0, 1)
        assert (len(Kept.all) > before) != bool(launched)
        return not launched

    def record(self, *runs: Run) -> list[Kept]:
        """The launches that are recorded for each."""
        found = []
        for run in runs:
            assert [self.queued(run) for _ in range(3)] == [False, False, True]
            found.append(Kept.all[-1][0])
        return found


@pytest.fixture(params=[False, True], ids=["", "bias"])
def calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Calls]:
    with torch.no_grad():
        yield Calls(monkeypatch, request.param)
    direct._plan.cache_clear()


def _flat(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [t for part in made for t in _flat(part)]


def test_what_comes_out(calls: Calls) -> None:
    """Of each layer its columns of what the launches wrote, and of a norm h, or x itself."""
    for run in (calls.together, calls.gated, calls.normed, calls.added):
        calls.reads()
        first, _ = run(), run()
        made = run()
        for t, like in zip(_flat(made), _flat(first), strict=True):
            assert (t.shape, t.dtype, t.stride()) == (like.shape, like.dtype, like.stride())
        _, told = Kept.all[-1]
        y = _flat(made)[0] if run is not calls.added else made[1][0]  # type: ignore[index]
        assert y.data_ptr() in told
    made = calls.added()
    assert [t.data_ptr() for t in (calls.x, calls.other)] == list(Kept.all[-1][1][:2])
    assert made[0].data_ptr() == Kept.all[-1][1][-1]
    start = 0
    for t, out in zip(made[1], OUTS, strict=True):
        assert t.data_ptr() == made[1][0].data_ptr() + 2 * start
        start += out
    assert quest.normed(calls.x, calls.norm, [calls.alone])[0] is calls.x
    assert joint.split(calls.x, [calls.alone])[0] is calls.x  # of one layer no view is made


def test_nothing_is_checked_again(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is recorded costs the host what queues it, and what may have changed."""
    pair = [calls.layer(8, calls.alone.bias is not None) for _ in range(2)]
    assert joint.stack(pair)
    held = pair[0]._frozen
    assert held is not None
    calls._reads(held)
    runs = (
        calls.together, calls.gated, calls.normed, calls.added,
        lambda: quest.together(calls.x, pair),
    )  # fmt: skip
    calls.record(*runs)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("checked again")

    for owner, name in (
        (prologue, "_check_pair"), (prologue, "_held"), (joint, "alike"), (joint, "joined"),
        (quest.Linear, "check"), (quest.Linear, "current"), (frozen, "linear"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    assert all(calls.queued(run) for run in runs)


def _hook(module: nn.Module, kind: str) -> Iterator[None]:
    handle = getattr(module, f"register_{kind}_hook")(lambda *_: None)
    yield
    handle.remove()


def _everywhere(kind: str) -> Iterator[None]:
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda *_: None)
    yield
    handle.remove()


def _forward(module: nn.Module) -> Iterator[None]:
    module.forward = module.forward  # as libraries that move weights do
    yield
    del module.forward


def _graded() -> Iterator[None]:
    with torch.enable_grad():
        yield


def _values() -> Iterator[None]:
    with paths.only("values"):
        yield


def _another_class(module: nn.Module) -> Iterator[None]:
    """Whose forward may do anything."""
    before, module.__class__ = module.__class__, type("Other", (type(module),), {})
    yield
    module.__class__ = before


def _captured() -> Iterator[None]:
    """The memory of a graph is its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
        patch.setattr(direct.Joined, "__setitem__", None)
        yield


def _compiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(ops, "direct", lambda _: False)
        yield


PASSING: dict[str, Callable[[nn.Module], Iterator[None]]] = {
    "forward hook": lambda m: _hook(m, "forward"),
    "pre hook": lambda m: _hook(m, "forward_pre"),
    "backward hook": lambda m: _hook(m, "full_backward"),
    "global hook": lambda _: _everywhere("forward"),
    "another forward": _forward,
    "another class": _another_class,
    "a capture": lambda _: _captured(),
    "gradients": lambda _: _graded(),
    "values": lambda _: _values(),
    "a compiler": lambda _: _compiled(),
}


@pytest.mark.parametrize("what", PASSING)
def test_what_must_be_seen(what: str, calls: Calls) -> None:
    """At any of the layers and at the norm; after it the recorded calls are there again."""
    runs = {"together": calls.together, "gated": calls.gated, "added": calls.added}
    kept = dict(zip(runs, calls.record(*runs.values()), strict=True))
    of_layers = (*((m, ("together", "added")) for m in calls.layers), (calls.alone, ("gated",)))
    for module, names in (*of_layers, (calls.norm, ("added",))):
        if module is calls.norm and what in ("gradients", "values", "a compiler", "a capture"):
            continue
        for name in names:
            seen = len(Kept.all)
            with contextlib.contextmanager(lambda m=module: PASSING[what](m))():
                calls.reads()
                runs[name]()
            # Layers whose norm is called may use their own.
            assert all(launches is not kept[name] for launches, _ in Kept.all[seen:]), name
            assert calls.queued(runs[name]), name
            assert Kept.all[-1][0] is kept[name]


def test_what_is_another_call(calls: Calls) -> None:
    """Other inputs, an eps, a norm's weight, an order of layers, a bias that is gone."""
    runs = (calls.together, calls.gated, calls.normed, calls.added)
    kept = dict(zip(runs, calls.record(*runs), strict=True))
    x, other, weight, first = calls.x, calls.other, calls.norm.weight, calls.layers[0]

    def uses(run: Run) -> bool:
        seen = len(Kept.all)
        calls.reads()
        run()
        return any(launches is kept[run] for launches, _ in Kept.all[seen:])

    def same() -> bool:
        found = [uses(run) for run in runs]
        assert len(set(found)) == 1
        return found[0]

    for mine, its in ((x[:2].clone(), other[:2].clone()), (x.mT.contiguous().mT, other)):
        calls.x, calls.other = mine, its
        assert not same()
    calls.x, calls.other = x, other
    assert same()
    calls.x, calls.other = other, x
    assert same()
    calls.x, calls.other = x, other
    for eps in (0.25, None):
        calls.norm.eps = eps
        assert not uses(calls.added)
        assert not uses(calls.normed)
    calls.norm.eps = 1e-5
    for another in (nn.Parameter(weight.detach().clone()), None):
        calls.norm.weight = another
        assert not uses(calls.added)
        assert not uses(calls.normed)
    calls.norm.weight = weight
    assert same()
    calls.norm.__class__ = type("Norm", (nn.RMSNorm,), {})
    assert not uses(calls.added)
    calls.norm.__class__ = nn.RMSNorm
    before = calls.layers[:]
    for layers in ([*before[1:], first], before[1:], [*before, first], [first, first, first]):
        calls.layers[:] = layers
        assert not uses(calls.together)
        assert not uses(calls.added)
        made = calls.together()
        assert [t.shape[-1] for t in made] == [layer.out_features for layer in layers]
    calls.layers[:] = before
    assert same()
    if first.bias is not None:
        first.bias = None  # as if it were zeros
        # Joined elsewhere, and so another call: made again once it has been recorded.
        assert not uses(calls.together)
        assert [calls.queued(calls.together) for _ in range(2)] == [False, True]
        assert calls.joined() == [0.0] * OUTS[0] + torch.cat([b.bias for b in before[1:]]).tolist()
    first.set_recipe("w2a4")
    assert not uses(calls.together)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_what_has_changed(part: str, calls: Calls) -> None:
    """In place, or as a whole: of any layer."""
    if calls.alone.bias is None and part == "bias":
        pytest.skip("none has a bias")
    calls.record(calls.together, calls.gated, calls.added)
    for layer, run in ((calls.alone, calls.gated), (calls.layers[1], calls.together)):
        t = getattr(layer, part)
        if part == "weight":
            t.neg_()
            _recorded_no_more(calls, run)
        setattr(layer, part, nn.Parameter(t.detach().clone()))
        if part == "weight" or run is calls.gated:
            _recorded_no_more(calls, run)
    parametrize.register_parametrization(calls.alone, part, nn.Identity())
    assert not calls.queued(calls.gated)


def _recorded_no_more(calls: Calls, run: Run) -> None:
    """At the first call; what there is then is recorded in time."""
    seen = len(Kept.all)
    calls.reads()
    run()
    assert len(Kept.all) == seen


def test_biases_as_they_are(calls: Calls) -> None:
    """Joined before each call, however they were written; one alone is read where it lies."""
    if calls.alone.bias is None:
        pytest.skip("none has a bias")
    runs = (calls.together, calls.added)
    calls.record(*runs)
    one = calls.layers[0]._frozen
    assert one is not None
    assert one.whole is not None
    whole = one.whole.frozen
    for layer in calls.layers:
        for write in (
            layer.bias.neg_,
            layer.bias.data.neg_,
            lambda b=layer.bias: b.view(torch.int16).numpy().fill(7),  # which nothing counts
        ):
            write()
            assert all(calls.queued(run) for run in runs)
            assert calls.joined() == torch.cat([each.bias for each in calls.layers]).tolist()
    # By the graph that reads them; nothing else is queued for that.
    launches = [found[0] for found in whole.calls.values() if found]
    assert len(launches) == len(runs)
    for found in launches:
        assert [(size, at) for _, at, size in found.copies] == [
            (2 * out, layer.bias.data_ptr()) for out, layer in zip(OUTS, calls.layers, strict=True)
        ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", lambda *_, **__: pytest.fail("joined by a launch"))
        assert all(calls.queued(run) for run in runs)
    # Others are not where those lay, whose memory is not given to another.
    (held,) = {id(found[2][1]): found[2][1] for found in whole.calls.values() if found}.values()
    layer.bias = nn.Parameter(layer.bias + 1)
    for run in runs:
        _recorded_no_more(calls, run)
    assert calls.joined() == torch.cat([each.bias for each in calls.layers]).tolist()
    ((_, memory),) = whole.biases.values()
    assert memory.data_ptr() != held.data_ptr()
    assert [[calls.queued(run) for _ in range(2)] for run in runs] == [[False, True]] * 2
    # Where no call was recorded they are not.
    before = calls.joined()
    calls.layers[0].bias.fill_(77)
    assert joint.again((calls.x[:1],), calls.layers) is None
    assert calls.joined() == before


def test_biases_that_are_more_than_copied(calls: Calls) -> None:
    """Of another dtype, or apart: joined by a launch of torch's before each call."""
    if calls.alone.bias is None:
        pytest.skip("none has a bias")
    layer = calls.layers[1]
    for other in (layer.bias.float(), torch.randn(OUTS[1], 2).to(HALF)[:, 0]):
        layer.bias = nn.Parameter(other)
        calls.reads()
        calls.record(calls.together)
        for each in calls.layers:
            each.bias.data.neg_()
            assert calls.queued(calls.together)
            assert calls.joined() == torch.cat([one.bias for one in calls.layers]).tolist()


def test_no_room_for_biases_without_a_recorded_call(calls: Calls) -> None:
    assert joint.again((calls.x,), calls.layers) is None
    held = calls.layers[0]._frozen
    assert held is not None
    assert held.whole is not None
    assert not held.whole.frozen.biases


def test_a_norm_without_an_eps_is_no_layer_with_a_bias(calls: Calls) -> None:
    """Though what both read is one tensor, and neither is told anything."""
    square = calls.layer(WIDTH, True)
    calls.kernels.memory += [calls.norm.weight]
    square.bias = calls.norm.weight
    held = square._frozen
    assert held is not None
    for _ in range(3):
        calls._reads(held)
        square(calls.x)
    assert len(Kept.all) == 1
    square.bias = None
    calls.norm.eps = None
    quest.normed(calls.x, calls.norm, [square])
    assert len(Kept.all) == 1
    # Nor is one without a weight a layer without a bias behind one with a weight.
    calls.norm.eps = 0.25
    for _ in range(3):
        quest.normed(calls.x, calls.norm, [square])
    assert len(Kept.all) == 2
    (layer, _), (behind, _) = Kept.all
    square.bias, calls.norm.weight = calls.norm.weight, None
    quest.normed(calls.x, calls.norm, [square])
    assert Kept.all[-1][0] is layer is not behind


def test_what_can_t_be_recorded_is_tried_once(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one tensor is given twice, so that its address stands in two places."""
    tries: list[int] = []

    def refuse(*_: object, copies: object) -> None:
        tries.append(1)
        raise ValueError

    monkeypatch.setattr(recorded, "Again", refuse)
    for _ in range(5):
        assert not calls.queued(calls.gated)
    assert len(tries) == 1


def test_layers_without_a_recorded_call(calls: Calls) -> None:
    """Those of torch, those that are not frozen, none; and what is no tensor is told."""
    calls.record(calls.together, calls.gated, calls.added)
    plain, live = nn.Linear(WIDTH, 8, dtype=HALF), quest.Linear(WIDTH, 8, True, "w4a4").to(HALF)
    for other in (plain, live):
        assert joint.again((calls.x,), (other,)) is None
        assert joint.again((calls.x,), (*calls.layers[:2], other)) is None
    assert joint.again((calls.x,), ()) is None
    assert joint.again((calls.x,), tuple(calls.layers)) is not None
    for wrong in (None, calls.x.tolist()):
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
            quest.together(wrong, calls.layers)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"gate must be a torch\.Tensor"):
            quest.gated(wrong, calls.x, calls.alone)  # type: ignore[arg-type]
        for residual in (None, calls.x):
            with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
                quest.normed(wrong, calls.norm, calls.layers, residual)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one layer"):
        quest.normed(calls.x, calls.norm, [])
    single = nn.RMSNorm(WIDTH, 1e-5)  # which no kernel takes
    made = quest.normed(calls.x.float(), single, (n for n in [plain.float(), plain]))[1]
    assert len(made) == 2
    with pytest.raises(TypeError, match="layers must be a sequence"):
        quest.normed(calls.x, calls.norm, calls.alone)  # type: ignore[arg-type]

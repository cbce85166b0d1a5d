"""Frozen layers that nothing watches: fewer steps on the host, the same kernels and bits."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import gc
import pickle
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import quest
from property_tests.fake_launches import Stream
from quest import direct, frozen, joint, ops, paths
from quest.kernels import cuda, hopper, outputs, product, recorded

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _layer(recipe: str, width: int = 3840, bias: torch.dtype | None = None) -> quest.Linear:
    torch.manual_seed(0)
    layer = quest.Linear(width, 200, bias is not None, recipe, device="cuda").bfloat16()
    if bias is not None:
        layer.bias = torch.nn.Parameter(torch.randn(200, device="cuda", dtype=bias))
    return layer.eval().freeze()


def _needs_product() -> None:
    reason = hopper.unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)


def _watched(layer: quest.Linear, x: Tensor) -> Tensor:
    """y by operators."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ops, "direct", lambda _: False)
        y: Tensor = layer(x)
    return y


@on_cuda
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 20, 70, 700])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8", "w4a8", "w1.58a1.58", "w4a4-2:4"])
def test_layers_that_nothing_watches(recipe: str, rows: int, bias: torch.dtype | None) -> None:
    """They are launched without operators, and give the same bits; of strided rows, too."""
    for width in (3840, 136):  # in blocks of 128, and not
        layer = _layer(recipe, width, bias)
        x = torch.randn(rows, 2 * width, device="cuda").bfloat16()[:, :width]
        expected = _watched(layer, x)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(layer(x), expected)
                assert torch.equal(layer(x[None].contiguous())[0], expected)
            assert layer(x[:0]).shape == (0, 200)


@on_cuda
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 20, 70, 700])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8"])
def test_calls_are_made_again(
    recipe: str, rows: int, bias: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what was recorded of the first: other inputs, elsewhere, in turns with other layers."""
    _needs_product()
    layers = [_layer(recipe, bias=bias), _layer(recipe, bias=bias)]
    g = torch.Generator("cuda").manual_seed(1)
    xs = [torch.randn(rows, 3840, device="cuda", generator=g).bfloat16() for _ in range(4)]
    expected = [[_watched(layer, x) for x in xs] for layer in layers]
    with torch.no_grad():
        for layer in layers:
            assert not layer._frozen.calls
            layer(xs[0])
            assert list(layer._frozen.calls.values()) == [None]
            layer(xs[0])
            assert None not in layer._frozen.calls.values()
        monkeypatch.setattr(direct, "recorded", None)  # neither again the first way
        monkeypatch.setattr(quest.Linear, "check", None)
        for _ in range(3):
            made = [[layer(x) for layer in layers] for x in xs]
            for i, ys in enumerate(made):
                for y, right in zip(ys, expected, strict=True):
                    assert torch.equal(y, right[i])
        with torch.inference_mode():
            assert torch.equal(layers[0](xs[2]), expected[0][2])
        if bias is not None:  # which is read as it is now, however it was written
            layers[0].bias.data.neg_()
            made = layers[0](xs[1])
            assert not torch.equal(made, expected[0][1])
            monkeypatch.undo()
            assert torch.equal(made, _watched(layers[0], xs[1]))


@on_cuda
@pytest.mark.parametrize("watched", [False, True], ids=["direct", "operators"])
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("recipe", ["w4a4", "w2a2", "w1a1"])
def test_a_chain_that_overlaps(
    recipe: str, rows: int, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer quantizes what the one before has just written, eagerly and under a graph."""
    _needs_product()
    if watched:
        monkeypatch.setattr(ops, "direct", lambda _: False)
    torch.manual_seed(0)
    layers = [
        quest.Linear(1024, 1024, False, recipe, device="cuda").bfloat16().eval().freeze()
        for _ in range(30)
    ]
    start = torch.randn(rows, 1024, device="cuda").bfloat16()

    @torch.no_grad()
    def chain(apart: bool = False) -> Tensor:
        x = start
        for layer in layers:
            x = layer(x)
            if apart:
                torch.cuda.synchronize()
        return x

    expected = chain(apart=True)
    assert expected.isfinite().all()
    assert expected.any()
    for _ in range(5):  # launches, and then what was recorded of them
        assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@on_cuda
def test_another_bias() -> None:
    """One elsewhere is another kind of call; one that kernels can't read is converted, or told."""
    _needs_product()
    layer = _layer("w4a4", bias=torch.float32)
    x = torch.randn(70, 3840, device="cuda").bfloat16()
    with torch.no_grad():
        layer(x)
        layer(x)
        apart = torch.randn(200, 2, device="cuda")[:, 0]
        for bias in (torch.randn(200, device="cuda"), apart, None):
            layer.bias = None if bias is None else torch.nn.Parameter(bias)
            expected = _watched(layer, x)
            for _ in range(3):
                assert torch.equal(layer(x), expected)
        layer.bias = torch.nn.Parameter(torch.zeros(199, device="cuda"))
        with pytest.raises(ValueError, match=r"bias must be .*\(200,\)"):
            layer(x)


@on_cuda
@pytest.mark.parametrize("rows", [1, 5, 70, 700])
def test_stacked_layers_with_biases(rows: int) -> None:
    """q, k and v of a model whose attention has biases: as they are at each call, all recorded."""
    _needs_product()
    layers = [_layer("w4a4", bias=torch.bfloat16) for _ in range(3)]
    assert joint.stack(layers)
    x = torch.randn(rows, 3840, device="cuda").bfloat16()
    with torch.no_grad():
        for _ in range(3):
            expected = [_watched(layer, x) for layer in layers]
            for made, right in zip(quest.together(x, layers), expected, strict=True):
                assert torch.equal(made, right)
            layers[1].bias.data.neg_()
    held = layers[0]._frozen
    assert held is not None
    assert held.whole is not None
    assert [call is not None for call in held.whole.frozen.calls.values()] == [True]


@on_cuda
def test_what_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that the recorded launches can't know of."""
    _needs_product()
    layer, x = _layer("w4a4"), torch.randn(70, 3840, device="cuda").bfloat16()
    seen: list[int] = []
    real = direct.linear
    monkeypatch.setattr(direct, "linear", lambda *a: seen.append(1) or real(*a))

    def passes(run: object = None, calls: int = 1, x: Tensor = x) -> Tensor:
        before = len(seen)
        y: Tensor = layer(x)
        torch.cuda.synchronize()
        assert len(seen) - before == calls, run
        return y

    with torch.no_grad():
        first = passes("first")
        passes("second")
        passes("again", 0)
        passes("another shape", x=x[None])
        passes("rows apart", x=torch.randn(70, 4000, device="cuda").bfloat16()[:, :3840])
        passes("misaligned", x=torch.randn(70 * 3840 + 1, device="cuda").bfloat16()[1:].view_as(x))
        with outputs.poisoned(0xFF):
            passes("poison")
        with product.only(product.NARROW):
            passes("other tiles")
        with torch.autocast("cuda", torch.float16):
            assert passes("autocast to another dtype").dtype == torch.float16
        with torch.autocast("cuda", torch.bfloat16):
            passes("autocast")
            passes("autocast, second")
            assert torch.equal(passes("autocast again", 0), first)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            passes("another stream")
            passes("another stream, second")
            passes("another stream again", 0)
            assert torch.equal(passes("and again", 0), first)
        torch.cuda.current_stream().wait_stream(side)
        told: list[Tensor] = []
        thread = threading.Thread(target=lambda: told.append(_without_gradient(layer, x)))
        before = len(seen)
        thread.start()
        thread.join()
        assert len(seen) == before + 1
        assert torch.equal(told[0], first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not twin._frozen.calls
            assert torch.equal(twin(x), first)
        x.neg_()
        graph.replay()
        assert torch.equal(y, passes("again", 0))
        layer.weight.neg_()  # frozen anew
        assert torch.equal(passes("another weight"), _watched(layer, x))
        with paths.only("values"):
            passes("the other path", 0)
    passes("a gradient", 0)


def _without_gradient(layer: quest.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = layer(x)
        torch.cuda.synchronize()
    return y


@on_cuda
def test_memory_between_kernels_outlives_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is new may have the number of one that ended, and so its calls."""
    _needs_product()
    layer, x = _layer("w4a4"), torch.randn(70, 3840, device="cuda").bfloat16()
    expected = _watched(layer, x)
    monkeypatch.setattr(direct, "get_ident", lambda: 1)
    told: list[Tensor] = []

    def calls(n: int) -> None:
        told.extend(_without_gradient(layer, x) for _ in range(n))

    def run(n: int) -> None:
        thread = threading.Thread(target=calls, args=(n,))
        thread.start()
        thread.join()

    run(2)
    ((_, _, (memory, *_)),) = layer._frozen.calls.values()
    size = memory.numel()
    del memory, _
    gc.collect()
    others = [torch.full((size,), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
    monkeypatch.setattr(direct, "linear", None)
    run(2)
    assert len(told) == 4
    assert all(torch.equal(y, expected) for y in told)
    assert all((other == 7).all() for other in others)


@on_cuda
def test_calls_that_are_kept() -> None:
    """So many kinds for a weight, the oldest go; and none of large inputs."""
    _needs_product()
    layer = _layer("w4a4", 128)
    with torch.no_grad():
        for rows in range(1, direct.MOST_CALLS + 3):
            layer(torch.ones(rows, 128, device="cuda", dtype=torch.bfloat16))
        kept = [kind[0][0] for kind in layer._frozen.calls]
        assert kept == list(range(3, direct.MOST_CALLS + 3))
        layer._frozen.calls.clear()
        rows = direct.MOST_ELEMENTS // 128 + 1
        for _ in range(3):
            layer(torch.ones(rows, 128, device="cuda", dtype=torch.bfloat16))
        assert not layer._frozen.calls


class _Driver:
    """Takes launches, and keeps the addresses that each was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def cuLaunchKernelEx(self, *arguments: ctypes.c_void_p) -> int:
        pointers = ctypes.cast(arguments[2], ctypes.POINTER(ctypes.c_void_p))
        told = [ctypes.c_size_t.from_address(pointers[i] or 0).value for i in range(2)]
        self.seen.append((told[0], told[1]))
        return 0


class _Launches:
    """In the place of a graph: launches with the parameters that each was told last."""

    def __init__(self, launches: Sequence[cuda.Ready], copies: recorded.Copies) -> None:
        assert not copies
        self._launches, self._told = launches, list(launches)
        for of in range(len(launches)):
            self._tell(of)

    def _tell(self, of: int) -> int:
        one = self._launches[of]
        self._told[of] = cuda.Ready(one.kernel, one.blocks, one.overlap, one.values.copy())
        return 0

    def calls(self, stream: int) -> tuple[tuple[Callable[[], int], ...], Callable[[], int]]:
        tells = tuple(functools.partial(self._tell, of) for of in range(len(self._told)))
        return tells, lambda: max(launch.on(stream)() for launch in self._told)


def test_the_rule_of_recorded_calls_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels, a driver that only listens, and tensors that lie on the CPU."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    driver, stream, thread = _Driver(), [7], [1]
    monkeypatch.setattr(cuda, "library", lambda: driver)
    monkeypatch.setattr(recorded, "Graph", _Launches)
    monkeypatch.setattr(ops, "direct", lambda _: True)
    monkeypatch.setattr(direct, "get_ident", lambda: thread[0])
    for name, value in (
        ("_cuda_getDevice", lambda: -1), ("_cuda_isCurrentStreamCapturing", lambda: False),
        ("_cuda_getCurrentRawStream", lambda _: stream[0]),
    ):  # fmt: skip
        monkeypatch.setattr(torch._C, name, value, raising=False)
    kernels = [cuda.Kernel(n, None, -1, threads=32, shared=0, layout="2P") for n in (1, 2)]
    held = frozen.Frozen()

    def run(x: Tensor) -> tuple[Tensor]:
        y, between = torch.empty(len(x), 3), direct._between(100, x.device).data_ptr()
        kernels[0].launch(1, x.data_ptr(), between)
        kernels[1].launch(1, between, y.data_ptr(), overlap=True)
        return (y,)

    def call(x: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
        driver.seen.clear()
        made, again = direct.again(held, (x,), (bias,)), True
        if made is None:
            made, again = direct.recorded(held, (x,), (bias,), lambda: run(x)), False
        assert made is not None
        (y,) = made
        return y, again

    def check(x: Tensor, recorded: bool, bias: Tensor | None = None) -> int:
        """The address between both kernels."""
        y, again = call(x, bias)
        assert again == recorded
        (first, between), (same, last) = driver.seen
        assert (first, same, last) == (x.data_ptr(), between, y.data_ptr())
        return between

    x, other = torch.zeros(2, 5, 8)
    check(x, False)
    between = check(x, False)
    assert [check(t, True) for t in (other, x, other)] == [between] * 3
    check(torch.zeros(4, 8), False)
    check(x.double(), False)
    for _ in range(3):  # not of rows that are no view, each in one piece and at 16 bytes
        check(x.t().contiguous().t(), False)
        check(torch.zeros(5, 10)[:, :8], False)
    apart = torch.zeros(5, 12)[:, :8]
    for again in (False, False, True):
        check(apart, again)
    for changed, value in ((stream, 8), (thread, 2)):
        before, changed[0] = changed[0], value
        check(x, False)
        check(x, False)
        check(x, True)
        changed[0] = before
    assert check(other, True) == between
    for block in (outputs.poisoned(1), product.only(product.NARROW), paths.only("values")):
        with block:
            check(x, False)
    for where, name in (
        (torch, "is_autocast_enabled"),
        (torch._C, "_cuda_isCurrentStreamCapturing"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *_: True)
            check(x, False)
    check(x, True)
    twice, bias, brain = torch.zeros(2, 4), torch.zeros(3), torch.zeros(3).bfloat16()
    # Each is another kind: elsewhere, of another dtype, of another shape.
    for told in (bias, brain, brain.view(torch.float16), brain[:2], twice[0]):
        check(x, False, told)
        check(x, False, told)
        check(x, True, told)
    check(x, True, torch.nn.Parameter(bias))  # the same memory
    for _ in range(3):
        check(x, False, twice[:, 0])
        check(x, False, bias.double())
        check(x, False, bias.as_subclass(_Watched))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *_: True)
        for cast in (torch.float32, torch.bfloat16):
            patch.setattr(torch, "get_autocast_dtype", lambda _, cast=cast: cast)
            check(x, False)
            check(x, False)
            check(x, True)
    check(x, True)


class _Watched(Tensor):
    """No plain tensor: its data may stand elsewhere."""


def test_which_biases_a_kernel_can_read() -> None:
    """Those of its dtypes that lie in one piece, beside the input, one for each column."""
    x, bias = torch.zeros(2, 8), torch.zeros(3)
    assert direct.fits(None, x, 3)
    for dtype in ops.DTYPES:
        assert direct.fits(bias.to(dtype), x, 3)
    assert direct.fits(torch.nn.Parameter(bias), x, 3)
    for wrong in (
        bias.double(), torch.zeros(4), bias[None], torch.zeros(6)[::2], bias.to("meta"),
        bias.as_subclass(_Watched),
    ):  # fmt: skip
        assert not direct.fits(wrong, x, 3)


def test_joined_biases_lie_where_they_lay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they were written, on a stream; other biases, and else each call, have their own."""
    stream = Stream(monkeypatch)
    layers, one, x = [quest.Linear(16, n, True) for n in (3, 4)], frozen.Frozen(), torch.zeros(2)

    def check(memory: Tensor | None = None) -> Tensor:
        made = joint.joined(layers, one, x)
        assert made is not None
        biases = [layer.bias.detach() for layer in layers]
        assert torch.equal(made, torch.cat(biases))
        assert made.dtype == torch.cat(biases).dtype
        assert memory is None or made.data_ptr() == memory.data_ptr()
        return made

    with torch.no_grad():
        with torch.inference_mode():  # a first call there is none of the others' concern
            first = check()
        layers[1].bias.data.neg_()
        check(first)
        layers[0].bias.numpy()[:] = 5  # which PyTorch does not count
        check(first)
        before = layers[0].bias
        for other in (torch.randn(3), torch.randn(3, 2)[:, 0]):
            layers[0].bias = torch.nn.Parameter(other)
            second = check(check())
            # The kernels of a call that was recorded of those before may still read them there.
            assert second.data_ptr() != first.data_ptr()
        layers[0].bias = before
        first = check()
        with torch.inference_mode():
            layers[1].bias = torch.nn.Parameter(torch.randn(4))
            first = check(check())
            check(first)
        check(first)
        stream.number = 8  # where nothing waits until that of stream 7 is written
        assert check(check()).data_ptr() != first.data_ptr()
        stream.number = 7
        check(first)
        for dtypes in (
            (torch.bfloat16, torch.float16),
            (torch.float16,) * 2,
            (torch.bfloat16,) * 2,
        ):
            for layer, dtype in zip(layers, dtypes, strict=True):
                layer.bias = torch.nn.Parameter(layer.bias.to(dtype))
            check(check())
        layers.append(quest.Linear(16, 2, True).to(torch.bfloat16))
        kept = check(check())
        layers[2].bias = None
        made = joint.joined(layers, one, x)  # with zeros for the bias that one lacks
        assert made is not None
        assert torch.equal(made, torch.cat([kept[:7], torch.zeros(2)]))
        layers.pop()
        kept = check(check())
        monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
        assert check().data_ptr() != kept.data_ptr()
        monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
        stream.device = 0  # another than x's, whose stream may capture
        assert check().data_ptr() != kept.data_ptr()
        stream.device = -1
        check(kept)
        layers[0].bias = torch.nn.Parameter(torch.randn(3).to(torch.bfloat16).as_subclass(_Watched))
        assert check().data_ptr() != kept.data_ptr()
        monkeypatch.setattr(ops, "direct", lambda _: False)
        layers[0].bias = torch.nn.Parameter(torch.randn(3).to(torch.bfloat16))
        assert check().data_ptr() != kept.data_ptr()
    for layer in layers:
        layer.bias = None
    assert joint.joined(layers, one, x) is None
    assert joint.joined(layers[:1], one, x) is None


def test_memory_for_joined_biases_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept for so many streams, and none is of use to a copy."""
    stream = Stream(monkeypatch)
    joined, biases, x = direct.Joined(), [torch.ones(2), torch.ones(3)], torch.zeros(1)
    for n in range(direct.MOST_STREAMS + 1):
        stream.number = n
        assert joined.room(biases, x) is joined.room(biases, x)
        assert len(joined) == n % direct.MOST_STREAMS + 1
    assert joined.room([torch.empty(2, device="meta"), torch.ones(3)], x) is None
    for twin in (copy.deepcopy(joined), pickle.loads(pickle.dumps(joined))):
        assert type(twin) is direct.Joined
        assert not twin
    assert "Joined" not in repr(frozen.Frozen())
    held = frozen.Frozen()
    assert dataclasses.replace(held).biases is not held.biases


def test_what_is_copied_of_joined_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as it lies, one behind the other; nothing where they are converted or lie apart."""
    Stream(monkeypatch)
    joined, x = direct.Joined(), torch.zeros(1)
    biases = [torch.ones(2), torch.ones(0), torch.ones(3)]
    room = joined.room(biases, x)
    assert room is not None
    at = room.data_ptr()
    assert joined.copies(room) == [
        (at, biases[0].data_ptr(), 8), (at + 8, biases[2].data_ptr(), 12)
    ]  # fmt: skip
    assert joined.copies(None) == joined.copies(biases[0]) == []
    for other in (biases[2].half(), torch.ones(3, 2)[:, 0]):
        room = joined.room([biases[0], other], x)
        assert room is not None
        assert joined.copies(room) == []


def test_biases_that_were_made_for_a_call_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is let go; where they are joined stays the same."""
    Stream(monkeypatch)
    layers, one, x = [quest.Linear(16, n, True) for n in (3, 4)], frozen.Frozen(), torch.zeros(2)
    layers[1].bias = None
    with torch.no_grad():
        rooms = [joint.joined(layers, one, x) for _ in range(3)]
    assert len({room.data_ptr() for room in rooms if room is not None}) == 1
    assert one.biases.copies(rooms[0]) == one.biases.copies(rooms[2]) == []
    ((_, memory),) = one.biases.values()
    assert one.biases.copies(memory) == []


def test_kinds_of_calls_that_were_seen_once_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MOST_CALLS", 3)
    calls = direct.Calls()
    for kind, call in ((1, direct.NEVER), (2, None), (3, direct.NEVER), (4, None), (5, None)):
        direct._keep(calls, (kind,), call)
    assert list(calls) == [(1,), (3,), (5,)]
    direct._keep(calls, (5,), direct.NEVER)
    direct._keep(calls, (6,), None)
    assert list(calls) == [(3,), (5,), (6,)]


def test_a_bias_in_a_transform_has_no_address() -> None:
    """Mapped over biases, a layer whose calls are kept takes the plain way."""
    layer = quest.Linear(16, 3, True, "w4a4").eval().freeze()
    x, biases = torch.randn(2, 16), torch.randn(4, 3)

    def call(bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"bias": bias}, (x,))
        return y

    with torch.no_grad():
        expected = torch.stack([call(bias) for bias in biases])
        assert layer._frozen is not None
        layer._frozen.calls["kind",] = None
        assert torch.equal(torch.func.vmap(call)(biases), expected)


def test_the_oldest_call_goes() -> None:
    calls = direct.Calls()
    for i in range(direct.MOST_CALLS + 2):
        direct._keep(calls, (i,), None)
    assert list(calls) == [(i,) for i in range(2, direct.MOST_CALLS + 2)]
    direct._keep(calls, (2,), (None, (), None))
    assert next(iter(calls)) == (2,)
    assert len(calls) == direct.MOST_CALLS


def test_what_is_no_tensor_is_told() -> None:
    """Also where calls are kept."""
    layer = quest.Linear(16, 4, False, "w4a4").eval().freeze()
    held = layer._frozen
    assert held is not None
    held.calls["kind",] = None
    with torch.no_grad(), pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        layer([1.0])


def test_calls_are_of_no_use_to_a_copy() -> None:
    calls = direct.Calls({("kind",): (object(), (), None)})
    for twin in (copy.deepcopy(calls), pickle.loads(pickle.dumps(calls))):
        assert type(twin) is direct.Calls
        assert not twin


def test_it_is_for_a_gpu() -> None:
    layer = quest.Linear(256, 48, recipe="w4a4").freeze()
    held = layer._frozen
    assert held is not None
    x = torch.randn(3, 256)
    made = dataclasses.replace(
        held, operand=layer.weight, scale=x, sums=x, spec=layer.recipe.activation.spec,
        names="uniform4,uniform4", kinds="integers,integers",
    )  # fmt: skip
    assert direct.linear(x, made, None, torch.float32) is None
    assert direct.again(made, (x,), (None,)) is None
    made.calls["kind",] = object(), (), None
    assert direct.again(made, (x,), (None,)) is None

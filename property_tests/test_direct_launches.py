"""The launches of a frozen layer that nothing watches; no GPU.

What comes out of the fakes of `fake_launches` is what the operators give.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import quest
from property_tests.fake_launches import Kernels, Stream
from quest import direct, eager, frozen, lowbit, paths
from quest.kernels import blocks, forms, hopper, outputs

pytestmark = pytest.mark.whole

WIDTH, OUT = 256, 24
CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    direct._plan.cache_clear()
    yield Kernels(monkeypatch)
    direct._plan.cache_clear()


def _held(name: str, width: int = WIDTH) -> frozen.Frozen:
    """A weight that is frozen as on Hopper."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "has_integers", lambda *_: True)
        return frozen.freeze(torch.randn(OUT, width), quest.recipe(name))


def _expected(x: Tensor, held: frozen.Frozen, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y by the operators."""
    operand = lowbit.operand(lowbit.as_rows(x), held.spec, held.kinds.partition(",")[0])
    y = frozen.multiply(operand, held, bias, x.shape[-1], dtype, False)
    return y.view(*x.shape[:-1], OUT)


def _tensors(held: frozen.Frozen) -> list[Tensor]:
    found = (held.operand, held.scale, held.sums, held.packed)
    return [t for t in found if t is not None]


RECIPES = ["w4a4", "w1a1", "w2a4", "w4a2", "w8a8", "w1.58a1.58"]


@pytest.mark.parametrize("name", RECIPES)
def test_launches_on_addresses(name: str, kernels: Kernels) -> None:
    """One kernel quantizes, one multiplies: in the dtype asked for, of any input and bias."""
    held, kernels.activation = _held(name), quest.recipe(name).activation
    wide = torch.randn(2, 3, 2 * WIDTH + 1).bfloat16()
    bias = torch.randn(OUT)
    for x, given, dtype in (
        (wide[..., :WIDTH].contiguous(), None, torch.bfloat16),
        (wide[..., :WIDTH].float(), bias, torch.float16),
        (wide[..., 1::2], bias.bfloat16(), torch.float32),
        (torch.randn(40 * WIDTH + 1)[1:].view(40, WIDTH), bias, torch.float32),
        (torch.randn(40, WIDTH).bfloat16(), bias.half(), torch.bfloat16),
        (torch.randn(40, 1, WIDTH), None, torch.float32),
    ):
        kernels.written.clear()
        kernels.asked.clear()
        kernels.memory[:] = [*_tensors(held), *([] if given is None else [given])]
        made = direct.linear(x, held, given, dtype)
        assert made is not None
        (y,) = made
        assert y.dtype == dtype
        torch.testing.assert_close(y, _expected(x, held, given, dtype))
        packed = held.packed is not None and x.shape[0] == 2
        last = "few" if packed else "product"
        assert kernels.take() == ["blocks", last]
        # Operand, scale and sums fill one allocation.
        ((before, end),) = kernels.asked
        ends = [before]
        for first, after in sorted(kernels.written):
            assert first == ends[-1]
            ends.append(after)
        assert ends[-1] == end
    for empty in (wide[:0, :, :WIDTH], wide[:, :0, :WIDTH]):
        made = direct.linear(empty, held, bias, torch.float16)
        assert made is not None
        (y,) = made
        assert (y.shape, y.dtype) == ((*empty.shape[:-1], OUT), torch.float16)
    assert kernels.take() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_launches_behind_a_gate_or_a_norm(name: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """One kernel makes rows and quantizes them, of inputs where they lie; one multiplies."""
    held, kernels.activation = _held(name), quest.recipe(name).activation
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(2, 3, 2 * WIDTH, generator=g).to(dtype)
    weight, bias = torch.linspace(-1, 2, WIDTH).to(dtype), torch.randn(OUT, generator=g)
    many = torch.randn(2, 40, WIDTH, generator=g).to(dtype)
    for x, other, given in (
        (wide[..., :WIDTH], wide[..., WIDTH:], None),
        (wide[..., WIDTH:], wide[..., :WIDTH], bias.to(dtype)),
        (many[0], many[1], bias),
        (many[0, 0], many[1, 0], None),
    ):
        for way, norm in (("gated", None), ("normed", (weight, 0.25)), ("added", (weight, 0.5))):
            for noted in (kernels.written, kernels.asked, kernels.given):
                noted.clear()
            kernels.memory[:] = [*_tensors(held), *([] if given is None else [given])]
            xs = (x,) if way == "normed" else (x, other)
            made = direct.behind(xs, held, given, norm)
            assert made is not None
            if norm is None:
                rows = eager.gated(x, other)
            else:
                h, rows = eager.normed(x, None if way == "normed" else other, *norm)
            assert len(made) == (2 if way == "added" else 1)
            if way == "added":
                assert torch.equal(made[1], h)
                assert made[1].is_contiguous()
            assert (made[0].dtype, made[0].shape) == (dtype, (*x.shape[:-1], OUT))
            torch.testing.assert_close(made[0], _expected(rows, held, given, dtype))
            packed = held.packed is not None and x.shape != (40, WIDTH)
            assert kernels.take() == [way, "few" if packed else "product"]
            ((first, second, read, eps),) = kernels.given
            assert first.data_ptr() == x.data_ptr()
            assert second is None or second.data_ptr() == other.data_ptr()
            assert (read, eps) == ((None, 0.0) if norm is None else norm)
            ((before, end),) = kernels.asked
            ends = [before]
            for start, after in sorted(kernels.written):
                assert start == ends[-1]
                ends.append(after)
            assert ends[-1] == end
    empty = wide[:0, :, :WIDTH]
    for norm in (None, (weight, 0.25)):
        made = direct.behind((empty, empty), held, bias, norm)
        assert made is not None
        assert [t.shape for t in made] == [(0, 3, OUT), (0, 3, WIDTH)][: 1 if norm is None else 2]
    assert kernels.take() == []


def test_a_prologue_makes_an_operand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless more is asked for: no mask, no packed codes, no rows, no sum with a residual."""
    told: list[tuple[Any, ...]] = []
    kernel = SimpleNamespace(launch=lambda *values: told.append(values))
    monkeypatch.setattr(blocks, "_kernel", lambda *_: kernel)
    monkeypatch.setattr(blocks, "_grid", lambda *_, **__: (7, (8, 9), 1))
    program, x = (
        SimpleNamespace(step=0.5, threshold=2.0, levels=16, estimator=0),
        torch.zeros(3, 256),
    )
    first, at = x.to(torch.bfloat16), (16, 32, 48)
    blocks.launch_prologue(first, first, program, forms.INTEGERS, 0, blocks.GATED, *at)
    here = first.data_ptr()
    assert told == [
        (7, here, 32, 16, 0, 48, 0, 8, 9, 0.5, 2.0, here, 0, 32, 32, 0, 0, 0.0),
    ]  # fmt: skip


def test_the_kernel_of_a_prologue_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without a mask by threshold, without the rows, and without packed codes."""
    asked: list[tuple[Any, ...]] = []

    def kernel(*given: Any) -> Any:
        asked.append(given)
        return SimpleNamespace(launch=lambda *_: None)

    monkeypatch.setattr(blocks, "_kernel", kernel)
    monkeypatch.setattr(blocks, "_grid", lambda *_, **__: (7, (8, 9), 1))
    program = SimpleNamespace(step=0.5, threshold=2.0, levels=16, estimator=0)
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    blocks.launch_prologue(x, x, program, forms.INTEGERS, 0, blocks.GATED, 16, 32, 48)
    assert asked == [
        (1, torch.bfloat16, 16, False, forms.INTEGERS, 0, None, blocks.GATED, False, 0)
    ]


def test_no_launches_behind_a_gate(kernels: Kernels) -> None:
    """Before a compressed weight, one whose sums are to be doubled, and one without columns."""
    many = torch.randn(paths.SPARSE_ROWS, 128).bfloat16()
    assert direct.behind((many, many), _held("w4a4-2:4", 128), None) is None
    x = many[:3].repeat(1, 2)
    assert direct.behind((x, x), _held("w4a8"), None, (x[0], 0.25)) is None
    # A sum with a residual is to be made all the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "has_integers", lambda *_: True)
        none = frozen.freeze(torch.empty(0, WIDTH), quest.recipe("w4a4"))
    assert direct.behind((x, x), none, None, (x[0], 0.25)) is None
    assert not kernels.seen


def test_what_has_another_way(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are to be doubled; rows that the quantizers don't take; compressed weights."""
    x, held = torch.randn(3, WIDTH), _held("w4a4")
    kernels.memory += _tensors(held)
    assert direct.linear(x, held, None, torch.float32) is not None
    kernels.seen.clear()
    assert direct.linear(x.double(), held, None, torch.float32) is None
    for name, width in (("w4a8", WIDTH), ("w8a4", WIDTH), ("w4a4", 136), ("fp4", WIDTH)):
        assert direct.linear(x[:, :width], _held(name, width), None, torch.float32) is None
    many = torch.randn(paths.SPARSE_ROWS, 128)
    held = _held("w4a4-2:4", 128)
    kernels.memory += _tensors(held)
    assert direct.linear(many, held, None, torch.float32) is None
    assert not kernels.seen
    assert direct.linear(many[:-1], held, None, torch.float32) is not None
    direct._plan.cache_clear()
    monkeypatch.setattr(hopper, "unavailable", lambda device: f"{device} has no wgmma")
    assert direct.linear(x, _held("w4a4"), None, torch.float32) is None


# --- recorded calls ---------------------------------------------------------------------------


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    return Stream(monkeypatch)


def _twice(x: Tensor, run: Callable[[], Tensor]) -> direct.Calls:
    """What is kept after two calls."""
    held = frozen.Frozen()
    for _ in range(2):
        assert direct.recorded(held, (x,), (None,), lambda: (run(),)) is not None
    return held.calls


def test_which_inputs_are_recorded(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of some elements, at a multiple of 16 bytes, on the device that is current."""
    monkeypatch.setattr(direct, "MOST_ELEMENTS", 12)
    made = torch.empty(3)
    sizes = {n: bool(_twice(torch.zeros(n), lambda: made)) for n in (0, 1, 12, 13)}
    assert sizes == {0: False, 1: True, 12: True, 13: False}
    x = torch.zeros(13)[1:]
    assert x.data_ptr() % 16
    assert not _twice(x, lambda: made)
    x, held = torch.zeros(8), frozen.Frozen()
    for _ in range(2):
        assert direct.again(held, (x,), (None,)) is None
        direct.recorded(held, (x,), (None,), lambda: (made,))
    assert direct.again(held, (x,), (None,)) is not None
    stream.device = 0
    assert direct.again(held, (x,), (None,)) is None
    assert not _twice(torch.zeros(8), lambda: made)


class _Elsewhere(Tensor):
    def get_device(self) -> int:
        return 1


def test_inputs_of_two_devices_are_another_call(stream: Stream) -> None:
    """Which is told; no launch is given the address of another device."""
    held, xs = frozen.Frozen(), (torch.zeros(8), torch.zeros(8))
    for _ in range(2):
        direct.recorded(held, xs, (), lambda: (torch.empty(3),))
    assert direct.again(held, xs, ()) is not None
    assert direct.again(held, (xs[0], xs[1].as_subclass(_Elsewhere)), ()) is None


def test_calls_behind_a_gate_or_a_norm_are_recorded(kernels: Kernels, stream: Stream) -> None:
    """Each kind by itself: what stands before, what it reads, where rows lie."""
    held = _held("w4a4")
    wide, other = torch.randn(2, 3, 2 * WIDTH).bfloat16()
    gate, up, apart = wide[:, :WIDTH], wide[:, WIDTH:], other[:, :WIDTH]
    weights = torch.ones(2, WIDTH).bfloat16()
    bias = torch.randn(OUT)
    kernels.memory[:] = [*_tensors(held), bias]
    kinds: list[tuple[Any, ...]] = [
        ((gate, up), None, None), ((gate, up), bias, None), ((gate.clone(), up), None, None),
        ((gate, up), None, (weights[0], 0.25)), ((gate, up), None, (weights[0], 0.5)),
        ((gate, up), None, (weights[1], 0.25)), ((gate,), None, (weights[0], 0.25)),
    ]  # fmt: skip
    for i, (xs, given, norm) in enumerate(kinds):
        for n in range(2):
            assert direct.behind(xs, held, given, norm) is not None
            assert len(kernels.take()) == 2
            assert (list(held.calls.values())[-1] is None) == (n == 0)
        assert len(held.calls) == i + 1
        call = list(held.calls.values())[-1]
        assert call is not None
        launches, likes, memory = call
        assert launches.told[: -len(likes)] == (stream.number, *(x.data_ptr() for x in xs))
        assert memory is not None
        made = direct.behind(xs, held, given, norm)
        assert made is not None
        assert not kernels.take()
        assert [t.shape for t in made] == [(3, OUT), (3, WIDTH)][: len(likes)]
        assert len(likes) == (2 if norm is not None and len(xs) == 2 else 1)
        assert launches.queued == [tuple(t.data_ptr() for t in (*xs, *made))]
    # Others that lie alike.
    first = held.calls[next(iter(held.calls))]
    assert first is not None
    assert direct.behind((apart, up), held, None) is not None
    assert first[0].queued[-1][:2] == (apart.data_ptr(), up.data_ptr())
    assert not kernels.take()
    # Rows that are no multiple of 16 bytes apart would be copied.
    odd = torch.randn(3, WIDTH + 4).bfloat16()[:, :WIDTH]
    for _ in range(3):
        direct.behind((odd, up), held, None)
        assert len(kernels.take()) == 2
    assert len(held.calls) == len(kinds)


def test_rows_that_are_views() -> None:
    """Of inputs with any number of axes; each in one piece, at a multiple of 16 bytes."""
    x = torch.empty(4, 6, 16, dtype=torch.bfloat16)
    narrow = torch.empty(3, 4, 7)
    for fits in (
        x, x[0], x[0, 0], x[..., :8], x[0, :, :8], x[:, :1, :8], x[:1, :, :8], x[::2, :1], x[:, 1],
        narrow, narrow[0, 0], torch.empty(3, 12)[:, :8], torch.empty(()).expand(1, 1),
    ):  # fmt: skip
        assert direct._in_rows(fits)
        assert fits.reshape(-1, fits.shape[-1]).data_ptr() == fits.data_ptr()
    for other in (
        x[:, :3], x.mT, x[..., ::2], x[0, 0, ::2], x[..., :1].expand(4, 6, 8), narrow[..., :4],
        torch.empty(3, 12, dtype=torch.bfloat16)[:, :8],
    ):  # fmt: skip
        assert not direct._in_rows(other)


def test_a_layer_of_nothing_but_its_input_is_the_one_that_is_looked_for() -> None:
    """A call is recorded by `how`, and a layer looks for it by `PLAIN`."""
    assert direct.how(None, False, False, None) == direct.PLAIN


def test_memory_between_kernels_is_held_with_the_call(stream: Stream) -> None:
    """Which the next input's launches use again; what is not recorded has its own."""
    used: list[Tensor] = []

    def run() -> Tensor:
        used.append(direct._between(100, CPU))
        return torch.empty(3, 5)

    x = torch.zeros(4, 8)
    ((launches, (like,), (memory, biases)),) = _twice(x, run).values()  # type: ignore[misc]
    assert biases is None
    assert memory is used[1]
    assert memory is not used[0]
    assert like.shape == (3, 5)
    assert launches.told[:2] == (stream.number, x.data_ptr())
    assert _twice(torch.zeros(4, 8), run)
    assert used[3] is memory
    assert direct._between(100, CPU).data_ptr() != memory.data_ptr()
    with outputs.poisoned(7):  # as what comes from the place where kernels get memory
        assert (direct._between(100, CPU) == 7).all()


def test_a_call_that_fails_while_it_is_recorded(stream: Stream) -> None:
    """What comes after it is not recorded, and has its own memory."""
    held, x = frozen.Frozen(), torch.zeros(8)
    used: list[Tensor] = []

    def fails() -> tuple[Tensor]:
        used.append(direct._between(100, CPU))
        raise MemoryError

    direct.recorded(held, (x,), (), lambda: (torch.empty(3),))
    with pytest.raises(MemoryError):
        direct.recorded(held, (x,), (), fails)
    assert used[0].numel() == 128  # as where it is shared
    made = [direct._between(100, CPU) for _ in range(2)]
    assert made[0].data_ptr() != made[1].data_ptr()
    assert made[0].numel() == 100


def test_memory_between_kernels_is_of_one_device(stream: Stream) -> None:
    """Each has a stream of that number."""
    used: list[Tensor] = []

    def run() -> Tensor:
        used[:] = [direct._between(100, torch.device("meta", i)) for i in (0, 1, 0)]
        return torch.empty(1)

    assert _twice(torch.zeros(8), run)
    assert used[0] is used[2]
    assert used[0] is not used[1]


def test_a_thread_that_records_nothing(stream: Stream) -> None:
    made: list[Tensor] = []

    def run() -> None:
        made.extend(direct._between(100, CPU) for _ in range(2))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert made[0].data_ptr() != made[1].data_ptr()


def test_sizes_of_memory_between_kernels(stream: Stream) -> None:
    """As many bytes as are asked for, less than twice as many: shapes that are close share them."""

    calls: list[int] = []

    def run() -> Tensor:
        calls.append(len(calls))
        return check() if len(calls) == 2 else torch.empty(1)  # the one that is recorded

    def check() -> Tensor:
        for size in (1, 2, 3, 5, 64, 65, 100, 127, 128, 129, 4096, 4097):
            held = direct._between(size, CPU)
            assert held.dtype == torch.uint8
            assert held.shape == (held.numel(),)
            assert size <= held.numel() < 2 * size
        held = direct._between(65, CPU)
        assert all(direct._between(size, CPU) is held for size in (66, 100, 127, 128))
        stream.number = 8
        other = direct._between(65, CPU)
        assert other.data_ptr() != held.data_ptr()
        stream.number = 7
        assert direct._between(65, CPU) is held
        return torch.empty(1)

    assert _twice(torch.zeros(8), run)

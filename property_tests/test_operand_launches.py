"""Which kernel the integer path launches on CUDA, and with what; the kernels are fakes, no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import quest
from quest import grids, lowbit, operands, ops, packed
from quest.kernels import blocks, decode, few, forms, hopper, pack, product, quantize, sparse

pytestmark = pytest.mark.whole

ONE, TWO, FOUR, EIGHT = (quest.Quantizer(grids.uniform(bits)) for bits in (1, 2, 4, 8))
SPREADS = {2: 32, 4: 8}  # by bits: what odd integers are multiplied by; else 1
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
X = torch.zeros(3, 128)


class Kernels:
    """Each call's kernel, arguments and keywords; numbered tensors are what they give."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.blocks = self.others = True
        patch.setattr(blocks, "supports", self._supports)
        patch.setattr(quantize, "supports", lambda program: self.others)
        patch.setattr(hopper, "unavailable", lambda device: None)
        for module, name, count in (
            (blocks, "quantize", 5), (quantize, "encode", 4),
            (pack, "pack", 1), (decode, "decode", 1), (product, "product", 1),
            (few, "product", 1),
        ):  # fmt: skip
            patch.setattr(module, name, self._kernel(module.__name__, name, count))

    def _supports(self, program: Any, x: Any) -> bool:
        assert isinstance(program, quantize.Program)
        assert isinstance(x, Tensor)
        assert program.order == x.shape[-1] == 128
        return self.blocks

    def _kernel(self, module: str, name: str, count: int) -> Any:
        def launch(*arguments: Any, **keywords: Any) -> Any:
            self.seen.append((f"{module.rpartition('.')[2]}.{name}", arguments, keywords))
            made = tuple(torch.full((1,), i) for i in range(count))
            return made if count > 1 else made[0]

        return launch

    def one(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """The only launch since this was asked last."""
        (found,) = self.seen
        self.seen.clear()
        return found


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return Kernels(monkeypatch)


def _on_cuda(name: str, *arguments: Any) -> Any:
    """The operator's kernel for CUDA, of tensors that lie elsewhere."""
    return getattr(torch.ops.quest, name).default.redispatch(CUDA, *arguments)


def _by_operator(name: str) -> Callable[[Tensor, quest.Quantizer, str], Any]:
    return lambda x, q, kind: _on_cuda(name, x, q.spec, kind)


def _numbers(made: tuple[Tensor, ...]) -> list[int]:
    return [int(t) for t in made]


FORMS = [
    (ONE, "bits", forms.PACKED, 1), (FOUR, "integers", forms.INTEGERS, 0),
    (EIGHT, "codes", forms.CODES, 0),
]  # fmt: skip


@pytest.mark.parametrize(("q", "kind", "form", "bits"), FORMS)
def test_rows_are_encoded_in_blocks_where_that_kernel_has_them(
    kernels: Kernels, q: quest.Quantizer, kind: str, form: int, bits: int
) -> None:
    asked = {"form": form, "bits": bits, "sums": True}
    grid = q.require_grid()
    for encode in (lowbit.launch_encode, _by_operator("encode")):
        assert _numbers(encode(X, q, kind)) == [0, 1, 2, 3]
        name, (x, program), keywords = kernels.one()
        assert (name, program.levels, keywords) == ("blocks.quantize", len(grid.points), asked)
        assert x.shape == X.shape
    for operand in (lowbit.launch_operand, _by_operator("operand")):
        assert _numbers(operand(X, q, kind)) == [0, 1, 3]
        name, (x, program), keywords = kernels.one()
        assert (name, keywords) == ("blocks.quantize", {**asked, "masked": False})
        assert (x.shape, program.levels) == (X.shape, len(grid.points))


@pytest.mark.parametrize(("q", "kind", "form", "bits"), FORMS)
def test_rows_that_blocks_have_not_go_to_the_general_kernel_or_to_pytorch(
    kernels: Kernels, q: quest.Quantizer, kind: str, form: int, bits: int
) -> None:
    kernels.blocks = False
    integer = operands.form_of(q, kind).integer
    assert _numbers(lowbit.launch_encode(X, q, kind)) == [0, 1, 2, 3]
    name, _, keywords = kernels.one()
    assert (name, keywords) == ("quantize.encode", {"kind": kind, "integer": integer})
    assert _numbers(lowbit.launch_operand(X, q, kind)) == [0, 1, 3]
    assert kernels.one()[0] == "quantize.encode"
    kernels.others = False
    for t, other in zip(
        lowbit.launch_encode(X, q, kind), lowbit.encode(X, q.spec, kind), strict=True
    ):
        assert torch.equal(t, other)
    assert not kernels.seen


@pytest.mark.parametrize(("q", "bits"), [(TWO, 2), (FOUR, 4)])
def test_what_is_saved_is_packed_in_one_pass_or_after_it(
    kernels: Kernels, q: quest.Quantizer, bits: int
) -> None:
    made = lowbit.launch_encode_saved(X, q, "integers")
    assert _numbers(made) == [0, 1, 2, 3, 4]
    name, _, keywords = kernels.one()
    assert name == "blocks.quantize"
    assert keywords == {"form": forms.INTEGERS, "bits": 0, "sums": True, "saved": bits}
    kernels.blocks = False
    operand = torch.zeros(3, 128, dtype=torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "encode", lambda *_, **__: (operand, 1, 2, 3))
        *first, last = lowbit.launch_encode_saved(X, q, "integers")
    assert first[0] is operand
    assert first[1:] == [1, 2, 3]
    assert int(last) == 0
    name, arguments, _ = kernels.one()
    step = 2 * SPREADS[bits]
    assert (name, arguments) == ("pack.pack", (operand, bits, step, (2**bits - 1) * step // 2))


@pytest.mark.parametrize(("q", "kind"), [(ONE, "bits"), (EIGHT, "codes")])
def test_what_is_saved_as_it_is(kernels: Kernels, q: quest.Quantizer, kind: str) -> None:
    """No form of fewer bits: the operand itself, by the kernel of `launch_encode`."""
    made = lowbit.launch_encode_saved(X, q, kind)
    assert _numbers(made) == [0, 1, 2, 3, 0]
    assert made[4] is made[0]
    name, _, keywords = kernels.one()
    assert (name, "saved" in keywords) == ("blocks.quantize", False)


def test_packing_and_decoding(kernels: Kernels) -> None:
    ternary = quest.Quantizer(grids.ternary())
    operand, scale = torch.zeros(3, 128, dtype=torch.int8), torch.ones(3, 1)
    for q, form in ((TWO, (2, 64, 96)), (FOUR, (4, 16, 120)), (ternary, (2, 64, 64))):
        _on_cuda("pack_operand", operand, q.spec)
        name, arguments, _ = kernels.one()
        assert (name, arguments[1:]) == ("pack.pack", form)
    for q, kind, (bits, stride, top) in (
        (ONE, "bits", (1, 2, 1)), (FOUR, "integers", (8, 1, 0)), (EIGHT, "codes", (8, 2, -1)),
        (FOUR, "packed4", (4, 16, 120)), (TWO, "packed2", (2, 64, 96)),
    ):  # fmt: skip
        small = torch.zeros(3, 128 * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        _on_cuda("decode", small, scale, q.spec, kind, 128, torch.bfloat16)
        name, arguments, keywords = kernels.one()
        assert (name, arguments[2:4]) == ("decode.decode", (128, _unit(q)))
        assert arguments[4] == torch.bfloat16
        assert keywords == {"bits": bits, "stride": stride, "top": top}


def _half(q: quest.Quantizer) -> float:
    """The unit of a uniform grid of even levels."""
    step = q.require_grid().step
    assert step is not None
    return step / 2


def _unit(q: quest.Quantizer) -> float:
    """The same as operands have it: what odd integers are multiplied by is divided out."""
    return _half(q) / SPREADS.get(q.require_grid().storage_bits, 1)


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def test_products(kernels: Kernels) -> None:
    width, bias = 128, torch.arange(5).bfloat16()
    scales = torch.arange(1.0, 4.0)[:, None], torch.arange(1.0, 6.0)[:, None]
    sums = torch.arange(3).int()[:, None], torch.arange(5).int()[:, None]
    for pair, kinds, factor, by, length in (
        ((ONE, ONE), ("bits", "bits"), 1, (1, 1), width),
        ((FOUR, TWO), ("integers", "integers"), 1, None, 0),
        ((EIGHT, EIGHT), ("codes", "codes"), 4, (1, 1), width),
        ((EIGHT, FOUR), ("codes", "integers"), 2, (0, 2), 0),
        ((FOUR, EIGHT), ("integers", "codes"), 2, (2, 0), 0),
    ):
        entry = (width // 8, torch.uint8) if kinds[0] == "bits" else (width, torch.int8)
        a, b = (torch.zeros(n, entry[0], dtype=entry[1]) for n in (3, 5))
        names = ",".join(q.require_grid().name for q in pair)
        for given in (None, _strided(bias), _strided(bias.float())):
            _on_cuda("product", a, b, *map(_strided, scales), *map(_strided, sums), given, names,
                     ",".join(kinds), width, torch.float16)  # fmt: skip
            name, arguments, keywords = kernels.one()
            assert (name, arguments[2]) == ("product.product", torch.float16)
            assert [t.shape[0] for t in arguments[:2]] == [3, 5]
            for key, expected in zip(("row_scale", "column_scale"), scales, strict=True):
                assert torch.equal(keywords[key], expected)
            for key, s, times in zip(("row_sum", "column_sum"), sums, by or (0, 0), strict=True):
                found = keywords[key]
                assert found is None if times == 0 else torch.equal(found, times * s)
            assert all(t.is_contiguous() for t in keywords.values() if isinstance(t, Tensor))
            made = keywords["bias"]
            assert made is None if given is None else torch.equal(made, bias.float())
            assert made is None or made.dtype == given.dtype  # the kernel reads any of three
            assert keywords["epilogue"] == (hopper.PLAIN if by is None else hopper.CORRECTED)
            assert keywords["length"] == length
            assert keywords["factor"] == factor * _unit(pair[0]) * _unit(pair[1])
    _on_cuda("accumulate", a, b)
    name, arguments, keywords = kernels.one()
    assert (name, arguments[2], keywords) == (
        "product.product", torch.int32, {"epilogue": hopper.RAW},
    )  # fmt: skip
    assert [t.shape for t in arguments[:2]] == [a.shape, b.shape]
    with pytest.raises(ValueError, match="a and b must have the same dtype"):
        _on_cuda("accumulate", a, b[:, 1:])
    with pytest.raises(ValueError, match="b must be int8, or uint8 for bits, of two axes"):
        _on_cuda("accumulate", a, b[0])


def test_products_are_launched_where_their_operands_lie(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several GPUs the current one may be another."""
    inside: list[int] = []

    @contextmanager
    def device_of(t: Tensor) -> Iterator[None]:
        inside.append(t.data_ptr())
        yield
        inside.pop()

    a, b = (torch.zeros(n, 128, dtype=torch.int8) for n in (3, 5))
    launched: list[str] = []

    def kernel(name: str) -> Callable[..., Tensor]:
        def launch(*_: Any, **__: Any) -> Tensor:
            assert inside == [a.data_ptr()]
            launched.append(name)
            return torch.zeros(1)

        return launch

    monkeypatch.setattr(ops, "device_of", device_of)
    for module in (product, sparse, few):
        monkeypatch.setattr(module, "product", kernel(module.__name__.rpartition(".")[2]))
    vectors = (
        torch.ones(3, 1), torch.ones(5, 1), torch.zeros(3, 1).int(), torch.zeros(5, 1).int(), None,
    )  # fmt: skip
    last = (*vectors, "uniform4,uniform4", "integers,integers", 128, torch.bfloat16)
    _on_cuda("accumulate", a, b)
    _on_cuda("product", a, b, *last)
    _on_cuda("sparse_product", a, b[:, :64], torch.zeros(5, 8).int(), *last)
    _on_cuda("packed_product", a, torch.zeros(5, 64, dtype=torch.uint8), *last)
    assert launched == ["product", "product", "sparse", "few"]


def test_a_device_without_the_product(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "unavailable", lambda device: f"{device} is too old")
    a, sums = torch.zeros(3, 128, dtype=torch.int8), torch.zeros(3, 1, dtype=torch.int32)
    w, scale = torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 1)
    last = (None, "uniform4,uniform4", "integers,integers", 128, torch.float32)
    for name, arguments in (
        ("accumulate", (a, a)),
        ("product", (a, a, scale, scale, sums, sums, *last)),
        ("packed_product", (a, w, scale, scale, sums, sums, *last)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="the low-bit product can't run here: cpu is too"):
            _on_cuda(name, *arguments)
    assert not kernels.seen


PACKED = [(ONE, ONE, "bits", 1), (TWO, FOUR, "integers", 4), (FOUR, TWO, "integers", 2)]


def _weight(bits: int, width: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    w = torch.zeros(5, width * bits // 8, dtype=torch.uint8)
    return w, torch.arange(1.0, 6.0)[:, None], torch.arange(5).int()[:, None]


@pytest.mark.parametrize(("q", "weight", "kind", "bits"), PACKED)
def test_packed_products(
    kernels: Kernels, q: quest.Quantizer, weight: quest.Quantizer, kind: str, bits: int
) -> None:
    w, w_scale, w_sums = _weight(bits)
    a = torch.zeros(3, 16, dtype=torch.uint8) if bits == 1 else torch.zeros(3, 128).char()
    a_scale, a_sums, bias = torch.ones(3, 1), torch.arange(3).int()[:, None], torch.arange(5.0)
    names = f"{q.grid},{weight.grid}"
    for given in (None, _strided(bias)):
        _on_cuda("packed_product", *map(_strided, (a, w, a_scale, w_scale, a_sums, w_sums)),
                 given, names, f"{kind},{kind}", 128, torch.float16)  # fmt: skip
        name, arguments, keywords = kernels.one()
        assert (name, arguments[2:]) == ("few.product", (bits, torch.float16))
        tensors = {"a_scale": a_scale, "w_scale": w_scale, "a_sum": a_sums, "w_sum": w_sums}
        for key, t in tensors.items():
            assert torch.equal(keywords[key], t)
        found = [*arguments[:2], *keywords.values()]
        assert all(t.is_contiguous() for t in found if isinstance(t, Tensor))
        assert [t.shape for t in arguments[:2]] == [a.shape, w.shape]
        made = keywords["bias"]
        assert made is None if given is None else torch.equal(made, bias)
        assert keywords["length"] == (128 if bits == 1 else 0)
        assert keywords["factor"] == _unit(q) * _half(weight)  # of codes as they are
        assert keywords["settled"] is False
    # Settled where that is said of a weight that was not copied first.
    rest = (a_scale, w_scale, a_sums, w_sums, None, names, f"{kind},{kind}", 128, torch.float16)
    for settled, codes in ((True, w), (False, w), (True, _strided(w))):
        _on_cuda("packed_product", a, codes, *rest, settled)
        assert kernels.one()[2]["settled"] is (settled and codes is w)
        packed.launch_packed(a, codes, *rest, settled)
        assert kernels.one()[2]["settled"] is (settled and codes is w)
    many = torch.zeros(few.LIMIT + 1, *a.shape[1:], dtype=a.dtype)
    n = len(many)
    with pytest.raises(ValueError, match="up to 64 rows of a multiple of 128 entries, got 65 of"):
        packed.launch_packed(
            many, w, torch.ones(n, 1), w_scale, torch.zeros(n, 1).int(), w_sums, None, names,
            f"{kind},{kind}", 128, torch.float16,
        )  # fmt: skip

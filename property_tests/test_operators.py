"""The registered operators: schema, fake tensors, autograd registration, tracing, compilation."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import quest
from quest import eager, lowbit, operands, ops, packing
from quest.conformance import inputs
from quest.kernels.hopper import unavailable
from quest.quantizer import parse

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SPECS = [
    "uniform4/hadamard/trust1.0/dense",
    "uniform1/hadamard16/clip1.3/dense",
    "ternary/identity/ste/dense",
    "e2m1/hadamard12/trust0.5/dense",
    "lloyd_max8/hadamard/trust1.0/pairs4:8",
    "uniform3/hadamard8/trust1.0/2:4",
]


def sample(kind: str, device: str, width: int = 48) -> torch.Tensor:
    """Sample inputs of all kinds, by name."""
    made = {
        "float32": lambda: inputs.draw("gaussian", (3, width), torch.float32, 0),
        "bfloat16": lambda: inputs.draw("gaussian", (2, 2, width), torch.bfloat16, 1),
        "float16": lambda: inputs.draw("heavy", (5, width), torch.float16, 2),
        "one axis": lambda: inputs.draw("gaussian", (width,), torch.float32, 3),
        "transposed": lambda: inputs.draw("gaussian", (width, 4), torch.float32, 4).t(),
        "expanded": lambda: inputs.draw("gaussian", (1, width), torch.float32, 5).expand(3, -1),
        "no rows": lambda: torch.zeros(0, width),
        "zeros": lambda: torch.zeros(2, width),
    }[kind]()
    return made.to(device)


KINDS = ["float32", "bfloat16", "float16", "one axis", "transposed", "expanded", "no rows", "zeros"]


def check(operator: Any, args: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        # What opcheck itself uses is deprecated in some versions of torch.
        warnings.simplefilter("ignore")
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_differentiable(device: str, kind: str) -> None:
    x = sample(kind, device).detach().requires_grad_()
    i = KINDS.index(kind)
    check(torch.ops.quest.hadamard, (x, (1, 16, 12)[i % 3], bool(i % 2)))
    check(torch.ops.quest.fake_quantize, (x, SPECS[i % len(SPECS)]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "transposed", "no rows"])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_codes(device: str, kind: str, packed: bool) -> None:
    for i in range(KINDS.index(kind) % 3, len(SPECS), 3):
        check(torch.ops.quest.quantize, (sample(kind, device), SPECS[i], packed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["float32", "float16", "no rows"])
def test_opcheck_backward(device: str, kind: str) -> None:
    grad = sample(kind, device, 44)
    bits = packing.pack(torch.ones_like(grad, dtype=torch.bool), 1)
    check(torch.ops.quest.masked_transpose, (grad, bits, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8", "w4a4-2:4"])
def test_opcheck_integer_path(device: str, recipe: str) -> None:
    if device == "cuda" and unavailable(torch.device("cuda")) is not None:
        pytest.skip(str(unavailable(torch.device("cuda"))))
    made = quest.recipe(recipe)
    x, w = sample("float32", device).detach(), sample("float32", device).detach()[:2] / 2
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair)
    assert kinds is not None
    a, b = (lowbit.encode(t, q.spec, k) for t, q, k in zip((x, w), pair, kinds, strict=True))
    check(torch.ops.quest.encode, (x, pair[0].spec, kinds[0]))
    check(torch.ops.quest.decode, (a[0], a[1], pair[0].spec, kinds[0], 48, torch.bfloat16))
    check(torch.ops.quest.accumulate, (a[0], b[0]))
    saved = operands.saved(pair[0], kinds[0]).kind
    if saved in operands.PACKED:
        check(torch.ops.quest.pack_operand, (a[0], pair[0].spec))
        packed = lowbit.pack_operand(a[0], pair[0].spec)
        check(torch.ops.quest.decode, (packed, a[1], pair[0].spec, saved, 48, torch.bfloat16))
    names = ",".join(q.require_grid().name for q in pair)
    vectors = (a[1], b[1], a[3], b[3], None)
    static = (names, ",".join(kinds), 48, torch.float32)
    check(torch.ops.quest.product, (a[0], b[0], *vectors, *static))
    x, w = x.requires_grad_(), w.requires_grad_()
    more = torch.ones(3, 48, device=x.device, requires_grad=True)
    pair_of_specs = (pair[0].spec, pair[1].spec, torch.float32, True)
    check(torch.ops.quest.low_bit_linear, (x, [w, more], [], *pair_of_specs))
    with torch.no_grad():
        read = torch.ops.quest.low_bit_linear(x, [w, more], [], *pair_of_specs)[2:]
    grads = [torch.ones(len(x), n, device=x.device) for n in (len(w), 3)]
    static = (pair[0].spec, pair[1].spec, 48, torch.float32, torch.bfloat16)
    backward = torch.ops.quest.low_bit_linear_backward
    check(backward, (grads, read, *static, True, [True, False]))
    for needs_x, needs_w in ((False, [True, True]), (True, [False, False])):
        made_now = backward(grads, read, *static, needs_x, needs_w)
        assert [t.dtype for t in made_now] == [torch.float32] * needs_x + [torch.bfloat16] * sum(
            needs_w
        )


@pytest.mark.parametrize("device", DEVICES)
@given(
    spec=st.sampled_from(SPECS),
    dtype=st.sampled_from(ops.DTYPES),
    lead=st.sampled_from([(), (3,), (2, 0), (2, 3)]),
    packed=st.booleans(),
)
def test_fakes_tell_shapes_and_dtypes(
    device: str, spec: str, dtype: torch.dtype, lead: tuple[int, ...], packed: bool
) -> None:
    x = inputs.draw("gaussian", (*lead, 48), dtype, 0).to(device)
    real = [*ops.quantize(x, spec, packed), *ops.fake_quantize(x, spec), ops.hadamard(x, 12, True)]
    meta = x.to("meta")
    fake = [
        *ops.quantize(meta, spec, packed), *ops.fake_quantize(meta, spec),
        ops.hadamard(meta, 12, True),
    ]  # fmt: skip
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, b.is_contiguous())
        assert a.device == x.device


def test_the_device_chooses_and_the_cpu_is_plain_torch() -> None:
    x = sample("float32", "cpu")
    for spec in SPECS:
        q = parse(spec)
        expected = eager.quantize(x, q, values=True, codes=True, packed=True)
        values, mask = ops.fake_quantize(x, spec)
        assert torch.equal(values, expected[0])
        assert torch.equal(mask, expected[3])
        for a, b in zip(ops.quantize(x, spec, True), expected[1:], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_never_alias_and_inputs_stay(device: str) -> None:
    """Even where nothing is to be done: order 1."""
    x = sample("float32", device)
    before = x.clone()
    y = ops.hadamard(x, 1, False)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    y.mul_(2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("device", DEVICES)
def test_hadamard_differentiates_twice(device: str) -> None:
    """The transform is linear: its gradient is the transpose, whose gradient is the transform."""
    x = sample("float32", device, 24).requires_grad_()
    g = inputs.draw("gaussian", (3, 24), torch.float32, 9).to(device).requires_grad_()
    (dx,) = torch.autograd.grad(ops.hadamard(x, 12, False), x, g, create_graph=True)
    assert torch.equal(dx, ops.hadamard(g, 12, True))
    v = inputs.draw("gaussian", (3, 24), torch.float32, 10).to(device)
    (dg,) = torch.autograd.grad(dx, g, v)
    assert torch.equal(dg, ops.hadamard(v, 12, False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS)
def test_fake_quantize_s_gradient_is_masked_and_rotated_back(device: str, spec: str) -> None:
    x = sample("float32", device).requires_grad_()
    g = inputs.draw("gaussian", x.shape, torch.float32, 9).to(device)
    values, mask = ops.fake_quantize(x, spec)
    assert not mask.requires_grad
    (dx,) = torch.autograd.grad(values, x, g)
    assert torch.equal(dx, ops.masked_transpose(g, mask, parse(spec).transform.order(48)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_in_another_layout(device: str) -> None:
    x = sample("float32", device).requires_grad_()
    for g in (torch.ones(48, 3, device=device).t(), torch.ones((), device=device).expand(3, 48)):
        values, _ = ops.fake_quantize(x, SPECS[0])
        (dx,) = torch.autograd.grad(values, x, g)
        (expected,) = torch.autograd.grad(ops.fake_quantize(x, SPECS[0])[0], x, g.contiguous())
        assert torch.equal(dx, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "fp4", "w4a4-2:4", "w4a16", "bf16"])
def test_compiled_equals_eager(device: str, recipe: str) -> None:
    """Bit for bit, forward and backward, in one graph."""
    torch.manual_seed(0)
    layer = quest.Linear(48, 24, bias=True, recipe=recipe, device=device)
    x = sample("float32", device)

    def step(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(layer(t)).square()

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        t = x.clone().requires_grad_()
        y = function(t)
        y.sum().backward()
        results.append((y, t.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_with_other_shapes_and_no_graph_breaks(device: str) -> None:
    torch.compiler.reset()
    layer = quest.Linear(48, 24, recipe="w4a4", device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 48), (5, 48), (2, 3, 48)):
        x = torch.randn(shape, device=device)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "grid", [quest.grids.uniform(4), quest.grids.e2m1(), quest.grids.lloyd_max(3)]
)
def test_codes_are_decoded_in_what_is_compiled(grid: quest.grids.Grid, device: str) -> None:
    """Of a grid that nobody has asked for its boundaries before."""
    torch.compiler.reset()
    q = quest.Quantizer(dataclasses.replace(grid), quest.Hadamard(16))
    compiled = torch.compile(
        lambda t: q.quantize(t).dequantize(), fullgraph=True, backend="aot_eager"
    )
    x = sample("float32", device)
    assert torch.equal(compiled(x), q(x))


@pytest.mark.parametrize("device", DEVICES)
def test_inductor(device: str) -> None:
    """The operators are opaque to it: what it generates around them may not change them."""
    torch.compiler.reset()
    q = quest.recipe("w4a4").activation
    x = sample("float32", device)
    # A precompiled header pays from the second kernel on. Scalar code would be faster still to
    # compile, but inductor remembers it, and fails in a later test that wants vectors.
    quick = {"cpp_cache_precompile_headers": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own imports and hints
        compiled = torch.compile(lambda t: q(t) * 2, fullgraph=True, options=quick)
        values = compiled(x)
    assert torch.equal(values, q(x) * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_no_parts_outlive_a_call(device: str) -> None:
    """Caches hold constants, never a tensor of the caller's, and differ by device and grid."""
    a, b = (parse(s).require_grid() for s in (SPECS[3], SPECS[4]))
    table = eager.table(a, torch.device(device))
    assert eager.table(a, torch.device(device))[0] is table[0]
    assert eager.table(b, torch.device(device))[0] is not table[0]
    assert table[0].device.type == device
    x = sample("float32", device)
    before = ops.fake_quantize(x, SPECS[3])[0]
    ops.fake_quantize(x * 3, SPECS[4])
    assert torch.equal(ops.fake_quantize(x, SPECS[3])[0], before)


OPERATORS = {
    "hadamard": lambda x: torch.ops.quest.hadamard(x, 16, False),
    "masked_transpose": lambda x: torch.ops.quest.masked_transpose(x, packing.pack(x > 0, 1), 16),
    "fake_quantize": lambda x: torch.ops.quest.fake_quantize(x, SPECS[5]),
    "quantize": lambda x: torch.ops.quest.quantize(x, SPECS[5], False),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_check_for_themselves(name: str) -> None:
    """They are reachable without the classes in front of them."""
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got"):
        OPERATORS[name](torch.ones(2, 16).double())
    with pytest.raises(ValueError, match="width 12 is not divisible"):
        OPERATORS[name](torch.ones(2, 12))


class _Subclass(torch.Tensor):
    pass


class _Mode(TorchDispatchMode):
    pass


def test_who_watches_calls_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody, in eager mode on a GPU: and each one that might."""
    x = torch.ones(3)
    assert not ops.direct(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert ops.direct(x)
    assert ops.direct(torch.nn.Parameter(x))
    assert not ops.direct(x.as_subclass(_Subclass))
    with _Mode():
        assert not ops.direct(x)
    with torch.autograd.forward_ad.dual_level():
        assert not ops.direct(x)
    seen = []

    def traced(y: torch.Tensor) -> torch.Tensor:
        seen.append(ops.direct(x))
        return y + 1

    torch.func.vmap(traced)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(traced, x, check_trace=False)
    assert seen == [False, False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not ops.direct(x)

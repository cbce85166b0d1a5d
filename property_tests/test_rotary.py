"""Layers whose queries and keys come turned: `quest.Rotary`, who takes it, and a Llama with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quest
from property_tests.fake_launches import Kept, Kernels, Stream
from property_tests.lane_marks import every_dtype
from property_tests.prologues import on_hopper
from quest import direct, frozen, joint, ops, paths, prologue, rotary, rotated_product
from quest.conformance.strategies import DTYPES
from quest.kernels import product, recorded
from quest.models import Llama, LlamaConfig
from quest.models.llama import Block, rope_angles

WIDTH, HEAD, HEADS, TOKENS = 256, 64, 3, 30
OUT, HALF = HEAD * HEADS, torch.bfloat16
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Parts = tuple[Tensor, ...]


def published(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, d_head) turned as Hugging Face's Llama does it, with each angle twice."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = (t.repeat(1, 2) for t in (cos, sin))
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def by_hand(made: Parts, cos: Tensor, sin: Tensor, count: int) -> Parts:
    """The outputs of layers (..., T, out), the first of them turned head by head."""

    def turned(y: Tensor) -> Tensor:
        heads = y.unflatten(-1, (-1, 2 * cos.shape[1])).transpose(-2, -3)
        return published(heads, cos, sin).transpose(-2, -3).flatten(-2)

    return (*map(turned, made[:count]), *made[count:])


def same(t: Tensor, other: Tensor) -> bool:
    """Bit for bit; one NaN is as good as another."""
    assert (t.shape, t.dtype) == (other.shape, other.dtype)
    kind = BITS[t.dtype.itemsize]
    equal = t.contiguous().view(kind) == other.contiguous().view(kind)
    return bool((equal | (t.isnan() & other.isnan())).all())


def all_same(made: Parts, expected: Parts) -> bool:
    return all(same(y, other) for y, other in zip(made, expected, strict=True))


def all_near(made: Parts, expected: Parts) -> bool:
    """All but for one rounding of the dtype, of sums whose terms were rounded once less.

    That is 2^-24 of a component, which is at most 2^0.5 times the largest that comes out; and each
    sum is rounded once to float32 before that: below 2^-22 of the largest in all.
    """
    unit = torch.finfo(expected[0].dtype).eps
    return all(
        torch.allclose(y, other, rtol=unit, atol=2**-22 * float(other.abs().max()))
        for y, other in zip(made, expected, strict=True)
    )


def angles(positions: int, head: int = HEAD) -> tuple[Tensor, Tensor]:
    angle = 10 * torch.randn(positions, head // 2, generator=torch.Generator().manual_seed(5))
    return angle.cos(), angle.sin()


class Layers:
    """Frozen q, k and v, stacked, as on Hopper, on a CPU whose kernels are fakes."""

    def __init__(
        self, patch: pytest.MonkeyPatch, recipe: str = "w4a4", bias: bool = True,
        dtype: torch.dtype = HALF,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        direct._plan.cache_clear()
        self.kernels = Kernels(patch)
        self.kernels.activation = quest.recipe(recipe).activation
        Stream(patch)
        patch.setattr(paths, "has_integers", lambda *_: True)
        patch.setattr(prologue, "has_kernel", lambda *_: True)
        room = torch.empty(3 * OUT, dtype=dtype)
        patch.setattr(direct.Joined, "room", lambda *_: room)
        self.all = tuple(
            quest.Linear(WIDTH, OUT, bias, recipe).to(dtype).eval().freeze() for _ in range(3)
        )
        assert joint.stack(self.all)
        one = self.all[0]._frozen
        assert one is not None
        held = frozen.stacked([layer._frozen for layer in self.all if layer._frozen is not None])
        assert held is not None
        self.held = held
        kept = (room, held.operand, held.packed, held.scale, held.sums)
        self.kernels.memory += [t for t in kept if t is not None]

    def seen(self, run: Callable[[], Any], *read: Tensor) -> list[str]:
        """What was launched, or "again" for each recorded call that was queued."""
        self.kernels.memory += read
        self.kernels.take()
        before = len(Kept.all)
        self.made = run()
        return ["again"] * (len(Kept.all) - before) + self.kernels.take()


@pytest.fixture(autouse=True)
def _no_plan() -> Iterator[None]:
    with torch.no_grad():
        yield
    direct._plan.cache_clear()


def _x(lead: tuple[int, ...] = (2, TOKENS), dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*lead, WIDTH, generator=torch.Generator().manual_seed(7)).to(dtype)


# --- on any device ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_rotation_is_the_published_one(dtype: torch.dtype) -> None:
    """Bit for bit, and so are gradients; of infinities and NaN, too."""
    g = torch.Generator().manual_seed(0)
    cos, sin = angles(5, 8)
    x, grad = (torch.randn(2, 3, 5, 8, generator=g).to(dtype) for _ in range(2))
    x[0, 0, 1, 2], x[0, 1, 1, 5], x[1, 0, 0, 0] = float("inf"), float("nan"), -0.0
    cos[3, 1], sin[3, 1] = 0.0, -0.0
    found = []
    for function in (rotary.rotate, published):
        with torch.enable_grad():
            given = x.clone().requires_grad_()
            y = function(given, cos, sin)
            y.backward(grad.to(y.dtype))
        assert given.grad is not None
        found.append((y.detach(), given.grad))
    assert all_same(*found)
    assert found[0][0].dtype == dtype


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["quest", "plain", "frozen", "stacked", "hooked"])
def test_layers_that_are_turned(kind: str, grad: bool, count: int) -> None:
    """What the layers give, and then the formula; those behind are left as they are."""
    torch.manual_seed(0)
    one = quest.Linear if kind != "plain" else nn.Linear
    layers: tuple[Any, ...] = tuple(one(WIDTH, OUT) for _ in range(3))
    if kind in ("frozen", "stacked"):
        layers = tuple(layer.eval().freeze() for layer in layers)
    if kind == "stacked":
        assert joint.stack(layers)
    if kind == "hooked":
        layers[0].register_forward_hook(lambda *_: None)
    cos, sin = angles(TOKENS)
    for lead in ((TOKENS,), (2, TOKENS), (1, 2, TOKENS), (0, TOKENS)):
        x = _x(lead, torch.float32)
        norm = nn.RMSNorm(WIDTH, 1e-5)
        with torch.set_grad_enabled(grad):
            expected = by_hand(quest.together(x, layers), cos, sin, count)
            how = quest.Rotary(cos, sin, count)
            assert all_same(quest.together(x, layers, how), expected)
            h, made = quest.normed(x, norm, layers, rotary=how)
            assert h is x
            assert all_same(made, by_hand(quest.normed(x, norm, layers)[1], cos, sin, count))
            assert made[0].requires_grad == grad


def test_layers_behind_those_that_are_turned_have_any_width() -> None:
    layers = tuple(quest.Linear(WIDTH, n) for n in (OUT, OUT, 5))
    x, (cos, sin) = _x(dtype=torch.float32), angles(TOKENS)
    made = quest.together(x, layers, quest.Rotary(cos, sin, 2))
    assert all_same(made, by_hand(quest.together(x, layers), cos, sin, 2))


@torch.enable_grad()
def test_angles_that_are_learned() -> None:
    """Their gradients are those of the formula."""
    layer, x = quest.Linear(WIDTH, OUT), _x(dtype=torch.float32)
    cos, sin = (t.requires_grad_() for t in angles(TOKENS))
    (made,) = quest.together(x, (layer,), quest.Rotary(cos, sin, 1))
    low, high = layer(x).unflatten(-1, (-1, 2, HEAD // 2)).unbind(-2)
    turned = low * cos[:, None] - high * sin[:, None], high * cos[:, None] + low * sin[:, None]
    found = [
        torch.autograd.grad(y.square().sum(), (cos, sin))
        for y in (made, torch.stack(turned, -2).flatten(-3))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_does_not_fit() -> None:
    layers = tuple(quest.Linear(WIDTH, OUT) for _ in range(3))
    norm, x, (cos, sin) = nn.RMSNorm(WIDTH, 1e-5), _x(dtype=torch.float32), angles(TOKENS)
    made = quest.Rotary
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (x, (cos, sin, 2), TypeError, r"rotary must be a quest\.Rotary, got tuple"),
        (x, made("cos", sin, 2), TypeError, r"cos must be a torch\.Tensor, got str"),
        (x, made(cos, None, 2), TypeError, r"sin must be a torch\.Tensor, got NoneType"),
        (x, made(cos.int(), sin, 2), TypeError, r"cos must be of floats, got torch\.int32"),
        (x, made(cos, sin.to(torch.complex64), 2), TypeError, "sin must be of floats"),
        (x, made(cos, sin.to("meta"), 2), ValueError, "sin must lie where x lies, cpu; got meta"),
        (x, made(cos[0], sin[0], 2), ValueError, r"cos must have shape \(T, d_head / 2\)"),
        (x, made(cos[..., None], sin[..., None], 2), ValueError, r"cos must have shape \(T, d_he"),
        (x, made(cos[:1], sin[:1], 2), ValueError, r"for the 30 rows of .* got \(1, 32\)"),
        (x, made(cos[:, :0], sin[:, :0], 2), ValueError, r"got \(30, 0\)"),
        (x, made(cos, sin[:, :1], 2), ValueError, "sin must be like cos, torch.float32 of shape"),
        (x, made(cos, sin.half(), 2), ValueError, r"got torch\.float16 of shape \(30, 32\)"),
        (x, made(cos, sin, 0), ValueError, r"rotary\.layers must be 1 to 3, as there are, got 0"),
        (x, made(cos, sin, 4), ValueError, "got 4"),
        (x, made(cos, sin, 2.0), TypeError, r"rotary\.layers must be an int, got float"),
        (x, made(cos, sin, True), TypeError, "got bool"),
        (x[0, 0], made(cos, sin, 2), ValueError, r"x must be \(\.\.\., T, in\) to be turned, got"),
        (1.0, made(cos, sin, 2), TypeError, r"x must be a torch\.Tensor, got float"),
        (x, made(*angles(TOKENS, 256), 2), ValueError, "a multiple of 256 outputs, .* 192"),
    ]  # fmt: skip
    for given, how, kind, told in wrong:
        with pytest.raises(kind, match=told):
            quest.together(given, layers, how)
        with pytest.raises(kind, match=told):
            quest.normed(given, norm, layers, rotary=how)

    class Odd(nn.Module):
        """Two heads and a half; nobody is to come as far as to call it."""

        out_features = 160

    with pytest.raises(ValueError, match=r"a multiple of 64 outputs, .* got 160"):
        quest.together(x, (Odd(),), made(cos, sin, 1))
    with pytest.raises(ValueError, match="a multiple of 64 outputs"):
        quest.together(x[..., :65], (nn.Identity(),), made(cos, sin, 1))
    with pytest.raises(TypeError, match="layers must be a sequence"):
        quest.together(x, layers[0], made(cos, sin, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers must be a sequence"):
        quest.normed(x, norm, layers[0], rotary=made(cos, sin, 1))  # type: ignore[arg-type]


# --- who takes it -----------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_kernel_multiplies_and_turns(
    recipe: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out is that of two operations; at the third call it is recorded."""
    made = Layers(monkeypatch, recipe, bias, dtype)
    norm = nn.RMSNorm(WIDTH, 1e-5, dtype=dtype)
    cos, sin = angles(TOKENS)
    for lead in ((2, TOKENS), (1, 3, TOKENS)):
        x = _x(lead, dtype)
        beside = x.flip(0).clone()
        runs: dict[str, Callable[..., Any]] = {
            "blocks": lambda *how: quest.together(x, made.all, *how),  # noqa: B023
            "normed": lambda *how: quest.normed(x, norm, made.all, None, *how)[1],  # noqa: B023
            "added": lambda *how: quest.normed(x, norm, made.all, beside, *how)[1],  # noqa: B023
        }
        for first, run in runs.items():
            made.held.calls.clear()
            assert made.seen(run, x, beside) == [first, "product"]
            expected = by_hand(made.made, cos, sin, 2)
            made.held.calls.clear()
            how = quest.Rotary(cos, sin, 2)
            for _ in range(2):
                assert made.seen(lambda: run(how), cos, sin) == [first, "rotated product"]  # noqa: B023
                assert all_same(made.made, expected)
            with monkeypatch.context() as patch:
                patch.setattr(quest.Linear, "check", lambda *_: pytest.fail("checked again"))
                assert made.seen(lambda: run(how)) == ["again"]  # noqa: B023
            told, addresses = Kept.all[-1]
            xs = (x, beside, cos, sin) if first == "added" else (x, cos, sin)
            assert addresses[: len(xs)] == tuple(t.data_ptr() for t in xs)
            assert told.told[1 : len(xs) + 1] == addresses[: len(xs)]
            # As many columns less are another call, and so are none.
            fewer = quest.Rotary(cos, sin, 1)
            assert made.seen(lambda: run(fewer)) == [first, "rotated product"]  # noqa: B023
            assert made.seen(run) == [first, "product"]
            # Elsewhere, the same.
            others = quest.Rotary(cos.clone(), sin.clone(), 2)
            assert made.seen(lambda: run(others)) == ["again"]  # noqa: B023
            assert Kept.all[-1][1][len(xs) - 2 : len(xs)] == tuple(t.data_ptr() for t in others[:2])


@pytest.mark.whole
def test_angles_that_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are copied for the kernel at each call."""
    made = Layers(monkeypatch)
    x, (cos, sin) = _x(), angles(TOKENS)
    apart = torch.empty(TOKENS, HEAD)[:, : HEAD // 2].copy_(cos)

    class Never(Kept):
        def __init__(self, *_: object, copies: object) -> None:
            raise ValueError("the addresses stand in other places")

    monkeypatch.setattr(recorded, "Again", Never)
    made.seen(lambda: quest.together(x, made.all), x)
    expected = by_hand(made.made, cos, sin, 2)
    for _ in range(4):
        how = quest.Rotary(apart, sin, 2)
        found = made.seen(lambda: quest.together(x, made.all, how), cos, sin)  # noqa: B023
        assert found == ["blocks", "rotated product"]
        assert all_same(made.made, expected)


@pytest.mark.whole
@pytest.mark.parametrize(
    "case",
    ["few rows", "hooked", "grad", "not frozen", "values", "autocast", "2:4",
     "float64 angles", "heads of 48", "not stacked"],
)  # fmt: skip
def test_who_does_not_take_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of the layers and of a rotation all the same; also when recorded."""
    tokens = {"few rows": 3, "2:4": paths.SPARSE_ROWS}.get(case, TOKENS)
    made = Layers(monkeypatch, "w4a4-2:4" if case == "2:4" else "w4a4")
    layers: tuple[Any, ...] = made.all
    cos, sin = angles(tokens, 48 if case == "heads of 48" else HEAD)
    x = _x((1, tokens))
    if case == "hooked":
        layers[0].register_forward_hook(lambda *_: None)
    elif case == "not frozen":
        layers = tuple(layer.train() for layer in layers)
    elif case == "not stacked":
        layers = layers[::-1]
    elif case == "float64 angles":
        cos, sin = cos.double(), sin.double()
    elif case == "values":
        monkeypatch.setattr(paths, "allows", lambda path: path == "values")
    if case in ("2:4", "autocast", "not frozen", "values", "grad", "hooked", "not stacked"):
        monkeypatch.setattr(ops, "direct", lambda _: False)
        monkeypatch.setattr(paths, "choose", lambda *_: "values")
    if case == "autocast":
        layers = tuple(layer.float().freeze() for layer in layers)
        x = x.float()
    monkeypatch.setattr(
        rotated_product, "launch_rotated_product", lambda *_: pytest.fail("not for it")
    )

    def run(*how: quest.Rotary) -> Parts:
        cast = torch.autocast("cpu", HALF, enabled=case == "autocast")
        with torch.set_grad_enabled(case == "grad"), cast:
            return quest.together(x, layers, *how)

    expected = by_hand(tuple(t.detach() for t in run()), cos, sin, 2)
    made.held.calls.clear()
    how = quest.Rotary(cos, sin, 2)
    for _ in range(2):
        seen = made.seen(lambda: run(how), x)
        assert "rotated product" not in seen
        assert all_same(tuple(t.detach() for t in made.made), expected)
        assert made.made[0].requires_grad == (case == "grad")


@pytest.mark.parametrize(("lead", "last"), [((1, 3), "few"), ((2, TOKENS), "rotated product")])
def test_a_recorded_call_is_turned_once(
    lead: tuple[int, int], last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it where it is of few rows, whose launches know nothing of angles, and there alone."""
    made = Layers(monkeypatch)
    x, (cos, sin) = _x(lead), angles(lead[1])
    how = quest.Rotary(cos, sin, 2)
    for _ in range(2):
        launched = made.seen(lambda: quest.together(x, made.all, how), x, cos, sin)
        assert launched == ["blocks", last]
    written: list[Tensor] = []
    real = direct.again

    def again(*given: Any) -> Any:
        found = real(*given)
        if found is not None:  # what the launches would write
            found[0].copy_(torch.arange(found[0].numel()).view(found[0].shape) % 97)
            written.append(found[0].clone())
        return found

    monkeypatch.setattr(direct, "again", again)
    assert made.seen(lambda: quest.together(x, made.all, how)) == ["again"]
    parts = written[0].split(OUT, -1)
    assert all_same(made.made, by_hand(parts, cos, sin, 2) if last == "few" else parts)


@pytest.mark.whole
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w4a4-2:4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_operators(recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something watches: one operator, and the bits of two operations."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    torch.manual_seed(0)
    layers = tuple(
        quest.Linear(WIDTH, OUT, True, recipe).to(dtype).eval().freeze() for _ in range(3)
    )
    assert joint.stack(layers)
    seen: list[int] = []
    real = frozen.rotated_product
    monkeypatch.setattr(
        frozen, "rotated_product", lambda *told: (seen.append(told[-1]), real(*told))[1]
    )
    norm = nn.RMSNorm(WIDTH, 1e-5, dtype=dtype)
    for lead in ((2, TOKENS), (1, 1)):
        x, (cos, sin) = _x(lead, dtype), angles(lead[-1])
        how = quest.Rotary(cos, sin, 2)
        taken = dtype != torch.float32 and (recipe == "w4a4-2:4" or lead != (1, 1))
        for kernel in (False, True):
            monkeypatch.setattr(prologue, "has_kernel", lambda *_, kernel=kernel: kernel)
            assert all_same(
                quest.together(x, layers, how), by_hand(quest.together(x, layers), cos, sin, 2)
            )
            expected = by_hand(quest.normed(x, norm, layers)[1], cos, sin, 2)
            assert all_same(quest.normed(x, norm, layers, rotary=how)[1], expected)
            assert seen == ([2 * OUT] * 2 if taken else [])
            seen.clear()


def test_which_products_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Layers(monkeypatch, "w8a8")
    x = _x()
    for head, fits in ((32, True), (64, True), (128, True), (16, False), (48, False), (256, False)):
        turned = product.Turned(*angles(TOKENS, head), 2 * OUT)
        assert made.held.turns(x, turned) == fits
        assert made.held.turns(x.half(), turned) == fits
        assert not made.held.turns(x.float(), turned)
        assert not made.held.turns(x, turned._replace(cos=turned.cos.double()))
    assert not frozen.Frozen(values=x).turns(x, product.Turned(*angles(TOKENS), 64))
    # A layer whose weight is higher than it says: all that comes out is turned, behind it.
    for says, taken in ((3 * OUT, True), (2 * OUT, False)):
        one: Any = (SimpleNamespace(out_features=says),)
        turned = joint.turns(x, one, made.held, quest.Rotary(*angles(TOKENS), 1))
        assert (turned is not None) == taken


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, whose product turns by angles that are made in it; the same bits."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    torch.manual_seed(0)
    layers = tuple(
        quest.Linear(WIDTH, OUT, True, "w4a4").to(HALF).eval().freeze() for _ in range(3)
    )
    assert joint.stack(layers)
    x, (cos, sin) = _x(), angles(TOKENS)
    turned: list[int] = []
    real = rotated_product.eager_rotated_product
    monkeypatch.setattr(
        rotated_product, "eager_rotated_product",
        lambda *told: (turned.append(told[-1]), real(*told))[1],
    )  # fmt: skip

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Parts:
        return quest.together(x, layers, quest.Rotary(cos * 1, sin.T.contiguous().T, 2))

    expected = by_hand(quest.together(x, layers), cos, sin, 2)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for _ in range(2):
        assert all_same(compiled(x, cos, sin), expected)
    assert turned == [2 * OUT] * 2
    torch.compiler.reset()


# --- in a model -------------------------------------------------------------------------------


def published_logits(model: Llama, tokens: Tensor) -> Tensor:
    """A Llama by its formulas, with the rotation as it is published."""
    cos, sin = rope_angles(model.config, tokens.shape[-1], tokens.device)
    x = model.embed_tokens(tokens)
    for layer in model.layers:
        assert isinstance(layer, Block)
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            each(h).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for each in attention.inputs
        )
        mixed = F.scaled_dot_product_attention(
            published(q, cos, sin), published(k, cos, sin), v, is_causal=True
        )
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(-2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(model.norm(x))
    return logits


@every_dtype
def test_logits_and_gradients_are_those_of_the_published_rotation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(61, 2, 128, 2)).to(dtype)
    for parameter in model.parameters():
        parameter.mul_(5 if parameter.ndim == 2 else 1.1)
    tokens = torch.arange(2 * 50).view(2, 50) % 61
    found = []
    with torch.enable_grad():
        for logits in (model(tokens), published_logits(model, tokens)):
            made = torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))
            found.append((logits.detach(), *made))
    assert all_same(*found)
    assert same(model(tokens), found[0][0])


@pytest.mark.whole
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 60])
def test_a_block_of_a_llama(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen: that of its layers, called one after another; queries and keys are turned once."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    config = LlamaConfig(16, 1, 256, 4)
    torch.manual_seed(0)
    model = Llama(config).to(dtype)
    quest.freeze_(quest.quantize_(model, "w4a4"))
    seen: list[int] = []
    real = frozen.rotated_product
    monkeypatch.setattr(
        frozen, "rotated_product", lambda *told: (seen.append(told[-1]), real(*told))[1]
    )
    ids = torch.arange(2 * tokens).view(2, tokens) % 16
    expected = published_logits(model, ids)
    assert not seen
    assert same(model(ids), expected)
    assert seen == ([] if tokens == 3 or dtype == torch.float32 else [2 * 256])
    # Where something must see a module's call, it does.
    seen.clear()
    model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    assert same(model(ids), expected)
    assert seen == ([] if tokens == 3 or dtype == torch.float32 else [2 * 256])


def test_angles_of_whole_heads() -> None:
    """Of an even number of heads they would fit: twice as wide heads, half as many."""
    config = LlamaConfig(16, 1, 256, 4)
    block, x = Llama(config).layers[0], torch.randn(1, 5, 256)
    cos, sin = (t.repeat(1, 2) for t in rope_angles(config, 5, x.device))
    for called in (lambda: block.self_attn(x, cos, sin), lambda: block(x, cos, sin)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="must have 32 col"):
                called()


# --- on a GPU ---------------------------------------------------------------------------------


@on_hopper
@pytest.mark.whole
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8", "w4a4-2:4"])
@pytest.mark.parametrize("tokens", [3, 40, 600])
def test_layers_on_hopper(tokens: int, recipe: str, compiled: bool) -> None:
    """Eager, recorded, compiled and in a CUDA graph: the bits of two operations, but where torch's
    compiler turns: it contracts a product with its sum.
    """
    packed, compressed = {"w1a1": 3, "w4a4": 3}.get(recipe), {"w4a4-2:4": 600}.get(recipe)
    same_as = all_near if compiled and tokens in (packed, compressed) else all_same
    torch.manual_seed(0)
    cos, sin = (t.cuda() for t in angles(tokens))
    for dtype in (torch.bfloat16, torch.float16):
        layers = tuple(
            quest.Linear(512, OUT, True, recipe).to("cuda", dtype).eval().freeze() for _ in range(3)
        )
        assert joint.stack(layers)
        x = torch.randn(2, tokens, 512, device="cuda").to(dtype)

        def run(x: Tensor, cos: Tensor, sin: Tensor) -> Parts:
            return quest.together(x, layers, quest.Rotary(cos, sin, 2))  # noqa: B023

        def by_two(x: Tensor, cos: Tensor, sin: Tensor) -> Parts:
            return by_hand(quest.together(x, layers), cos, sin, 2)  # noqa: B023

        expected = by_two(x, cos, sin)
        if compiled:
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True)
        for _ in range(4):
            assert same_as(run(x, cos, sin), expected)
        others = x.flip(0).contiguous(), sin.clone(), cos.clone()
        assert same_as(run(*others), by_two(*others))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(x, cos, sin)
        x.copy_(others[0])
        graph.replay()
        assert same_as(captured, by_two(x, cos, sin))


@on_hopper
@pytest.mark.whole
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("tokens", [3, 60, 600])
def test_a_model_on_hopper(tokens: int, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its products turn is what rotations behind them make: eager and recorded."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 2, 512, 4)).to("cuda", HALF)
    quest.freeze_(quest.quantize_(model, recipe))
    ids = torch.arange(2 * tokens, device="cuda").view(2, tokens) % 16
    with monkeypatch.context() as patch:
        patch.setattr(frozen.Frozen, "turns", lambda *_: False)
        expected = model(ids)
    for _ in range(4):
        assert same(model(ids), expected)

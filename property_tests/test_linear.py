"""The linear layer: its gradients, its dtypes, its life as a module."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from quest import paths
from quest.conformance import inputs, judges, lanes, oracle
from quest.conformance.examine import accumulation
from quest.reference import bounds, hadamard

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RECIPES = ["w4a4", "w1a1", "w8a8", "w1.58a1.58", "fp4", "w4a4-2:4", "w4a4-4:8", "w4a16", "bf16"]
SEEDS = st.integers(0, 2**16)


def unit(device: str) -> float:
    """Unit roundoff of the device's products."""
    return accumulation(lanes.Lane("any", device, "dispatch"))


def made_layer(
    recipe: str | quest.Recipe, device: str, dtype: torch.dtype, seed: int, bias: bool = True,
    shape: tuple[int, int] = (24, 48),
) -> quest.Linear:  # fmt: skip
    layer = quest.Linear(shape[1], shape[0], bias, recipe, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(inputs.draw("heavy", shape, dtype, seed))
        if bias:
            layer.bias.copy_(inputs.draw("gaussian", shape[:1], dtype, seed + 1))
    return layer


def frozen(q: quest.Quantizer, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, mask) of an operand, as constants in float64 on the CPU."""
    if q.grid is None:
        return q(t).double().cpu(), torch.ones(t.shape, dtype=torch.bool)
    return q(t).double().cpu(), q.quantize(t).mask.cpu()


def surrogate(
    layer: quest.Linear, x: torch.Tensor, grad: torch.Tensor
) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of the layer with codes, scales and masks frozen, by autograd in float64.

    An operand is values + mask * (x - x0) H: its value at x0 and its masked slope there.
    """
    block = layer.recipe.weight.transform.order(x.shape[-1])
    h = torch.from_numpy(hadamard.matrix(block) / math.sqrt(block))
    leaves, operands, masks = [], [], []
    parts = ((layer.recipe.activation, x), (layer.recipe.weight, layer.weight))
    for q, t in parts:
        values, mask = frozen(q, t.detach())
        start = t.detach().double().cpu()
        leaf = start.clone().requires_grad_()
        turned = ((leaf - start).reshape(len(leaf), -1, block) @ h).reshape(leaf.shape)
        leaves.append(leaf)
        operands.append(values + mask * turned)
        masks.append(mask)
    bias = None if layer.bias is None else layer.bias.detach().double().cpu().requires_grad_()
    y = torch.nn.functional.linear(operands[0], operands[1], bias)
    y.backward(grad.double().cpu())
    out = {"y": y, "dx": leaves[0].grad, "dw": leaves[1].grad}
    if bias is not None:
        out["db"] = bias.grad
    return {k: v.detach().numpy() for k, v in out.items()}, (masks[0], masks[1])


def gradients(layer: quest.Linear, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layer itself gives, on the CPU, with the operands that it multiplied."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    out = {"y": y, "dx": x.grad, "dw": layer.weight.grad}
    if layer.bias is not None:
        out["db"] = layer.bias.grad
    with torch.no_grad():
        out |= {"x_hat": layer.recipe.activation(x), "w_hat": layer.recipe.weight(layer.weight)}
    return {k: v.detach().cpu() for k, v in out.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
@given(seed=SEEDS)
def test_backward_is_that_of_the_frozen_surrogate(
    recipe: str, dtype: torch.dtype, device: str, seed: int
) -> None:
    """By autograd in float64, which knows nothing of the layer's formula; then by the judge."""
    made: Any = recipe
    if seed % 2 and recipe != "bf16":
        # A block that is not symmetric.
        made = quest.recipe(recipe, transform=quest.Hadamard(12))
    layer = made_layer(made, device, dtype, seed, bias=bool(seed % 3))
    x = inputs.draw("gaussian", (5, 48), dtype, seed + 2).to(device)
    grad = inputs.draw("gaussian", (5, 24), dtype, seed + 3).to(device)
    with paths.only("values"):  # integers are judged elsewhere, by narrower bounds
        out = gradients(layer, x, grad)
    expected, masks = surrogate(layer, x, grad)
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    args = (x.cpu(), layer.weight.detach().cpu(), grad.cpu(), bias, layer.recipe)
    for verdict in judges.layer(*args, out, masks, unit(device)):
        verdict.require()
    # The judge's own formula, from the surrogate: float64 against float64.
    exact = {k: torch.from_numpy(v) for k, v in expected.items()}
    order = layer.recipe.weight.transform.order(48)
    g, xh, wh = oracle.lift(grad), oracle.lift(out["x_hat"]), oracle.lift(out["w_hat"])
    for name, a, m, mask in (("dx", g, wh, masks[0]), ("dw", g.T, xh, masks[1])):
        formula = hadamard.apply_transpose((a @ m) * mask.numpy(), order)
        size = bounds.absolute_sum(np.abs(a) @ np.abs(m), order)
        # 2^-53 times the terms of both sums, and their order's.
        slack = bounds.gamma(2 * (48 + 24 + order), 2.0**-53) * size
        assert (np.abs(exact[name].numpy() - formula) <= slack).all(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_is_the_product_of_the_operands(recipe: str, device: str) -> None:
    layer = made_layer(recipe, device, torch.float32, 0)
    x = inputs.draw("gaussian", (5, 48), torch.float32, 2).to(device)
    expected = torch.nn.functional.linear(
        layer.recipe.activation(x), layer.recipe.weight(layer.weight), layer.bias
    )
    with paths.only("values"):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "w4a16", "bf16"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_needs_a_gradient_gets_one(
    recipe: str, needs: tuple[bool, bool], device: str
) -> None:
    layer = made_layer(recipe, device, torch.float32, 0, bias=False)
    x = inputs.draw("gaussian", (5, 48), torch.float32, 2).to(device)
    grad = inputs.draw("gaussian", (5, 24), torch.float32, 3).to(device)
    both = gradients(layer, x, grad)
    layer.zero_grad()
    layer.weight.requires_grad_(needs[1])
    x = x.detach().requires_grad_(needs[0])
    y = layer(x)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(grad)
    for t, name, wanted in ((x, "dx", needs[0]), (layer.weight, "dw", needs[1])):
        assert (t.grad is not None) == wanted
        if t.grad is not None:
            assert torch.equal(t.grad.cpu(), both[name])
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w4a4-2:4", "w4a16"])
def test_shapes(recipe: str, device: str) -> None:
    """One axis, three axes, no rows: the rows of a matrix, in another shape."""
    layer = made_layer(recipe, device, torch.float32, 0)
    x = inputs.draw("gaussian", (6, 48), torch.float32, 2).to(device)
    grad = inputs.draw("gaussian", (6, 24), torch.float32, 3).to(device)
    flat = gradients(layer, x, grad)
    deep = gradients(layer, x.reshape(2, 3, 48), grad.reshape(2, 3, 24))
    # The same operands bit for bit; products of another shape may sum in another order.
    assert torch.equal(deep["x_hat"].reshape(6, 48), flat["x_hat"])
    assert deep["y"].shape == (2, 3, 24)
    assert deep["dx"].shape == (2, 3, 48)
    tight = 2 * bounds.gamma(48 + 24, unit(device))
    size = float((flat["x_hat"].abs() @ flat["w_hat"].abs().t()).max())
    assert (deep["y"].reshape(6, 24) - flat["y"]).abs().max() <= tight * (size + 4)
    one = layer(x[0])
    assert one.shape == (24,)
    assert (one.cpu() - flat["y"][0]).abs().max() <= tight * (size + 4)
    for shape in ((0, 48), (2, 0, 48)):
        empty = torch.zeros(shape, device=device, requires_grad=True)
        layer.zero_grad()
        y = layer(empty)
        assert y.shape == (*shape[:-1], 24)
        y.sum().backward()
        assert empty.grad is not None
        assert empty.grad.shape == shape
        assert (layer.weight.grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "fp4", "w4a16"])
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts(recipe: str, layout: str, device: str) -> None:
    layer = made_layer(recipe, device, torch.float32, 0)
    dense = inputs.draw("gaussian", (6, 48), torch.float32, 2)
    grad = inputs.draw("gaussian", (6, 24), torch.float32, 3)
    if layout == "expanded":
        dense, grad = inputs.equal_rows(dense), torch.ones(6, 24)  # the gradient of a sum
    plain = gradients(layer, dense.to(device), grad.to(device))
    x = lanes.transfer(inputs.lay_out(dense, layout), device)
    g = lanes.transfer(inputs.lay_out(grad, layout), device)
    assert g.stride() == inputs.lay_out(grad, layout).stride()
    out = gradients(layer, x, g)
    for name in ("x_hat", "w_hat"):
        assert torch.equal(out[name], plain[name])
    bias = layer.bias.detach().cpu()
    masks = (layer.recipe.activation, dense), (layer.recipe.weight, layer.weight.detach().cpu())
    found = judges.layer(
        dense, layer.weight.detach().cpu(), grad, bias, layer.recipe, out,
        tuple(frozen(q, t)[1] for q, t in masks), unit(device),
    )  # fmt: skip
    if device == "cpu":  # there the masks are those of the layer, bit for bit
        for verdict in found:
            verdict.require()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w4a16"])
def test_a_weight_in_another_layout(recipe: str, device: str) -> None:
    layer = made_layer(recipe, device, torch.float32, 0)
    x = inputs.draw("gaussian", (6, 48), torch.float32, 2).to(device)
    before = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert not layer.weight.is_contiguous()
    assert torch.equal(layer.recipe.weight(layer.weight).contiguous(),
                       layer.recipe.weight(layer.weight.contiguous()))  # fmt: skip
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast(recipe: str, device: str) -> None:
    """The input is rounded to bfloat16 first, the weight quantized in its own dtype."""
    layer = made_layer(recipe, device, torch.float32, 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs.draw("gaussian", (5, 48), dtype, 2).to(device).requires_grad_()
        with torch.autocast(device, torch.bfloat16), paths.only("values"):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        with torch.no_grad():
            expected = torch.nn.functional.linear(
                layer.recipe.activation(x.bfloat16()),
                layer.recipe.weight(layer.weight).bfloat16(),
                layer.bias.bfloat16(),
            )
        assert torch.equal(y, expected)
        layer.zero_grad()
        y.float().sum().backward()
        assert x.grad is not None
        assert (x.grad.dtype, layer.weight.grad.dtype) == (dtype, torch.float32)
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "w2a2", "fp4", "w4a4-2:4"])
def test_no_gradient_flows_through_the_scale(recipe: str, device: str) -> None:
    """The exact Jacobian product is (g mask) H^T: the direction of the scale itself gets nothing
    more than what passes the mask.
    """
    q = quest.recipe(recipe).weight
    x = inputs.draw("gaussian", (3, 48), torch.float32, 0).to(device).requires_grad_()
    values = q(x)
    g = inputs.draw("gaussian", (3, 48), torch.float32, 1).to(device)
    (dx,) = torch.autograd.grad(values, x, g)
    mask = oracle.lift(q.quantize(x).mask)
    exact = hadamard.apply_transpose(oracle.lift(g) * mask, q.transform.order(48))
    bound = bounds.output(exact, bounds.rotation(oracle.lift(g) * mask, 16), "float32")
    judges.close("dx", dx, exact, bound).require()
    # With the scale's own term it would be far from it.
    x64, sigma = oracle.lift(x), oracle.lift(q.quantize(x).scale)
    term = (oracle.lift(g) * oracle.lift(values) / sigma).sum(-1, keepdims=True) * x64 / sigma / 48
    assert (np.abs(term) > 100 * bound).any()


@pytest.mark.parametrize("device", DEVICES)
def test_codes_and_scales_hold_no_graph(device: str) -> None:
    """What `quantize` and `pack` give is constant: a loss made of it must not fail later."""
    q = quest.recipe("w4a4-2:4").weight
    x = inputs.draw("gaussian", (3, 48), torch.float32, 0).to(device).requires_grad_()
    for t in (q.quantize(x), q.pack(x), q.pack(x).unpack()):
        for part in (t.codes, t.scale, t.mask, t.keep):
            assert part is not None
            assert part.grad_fn is None
    assert not q.quantize(x).dequantize().requires_grad
    # The input is still a leaf that trains.
    q(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_accumulate(device: str) -> None:
    layer = made_layer("w4a4", device, torch.float32, 0)
    xs = [inputs.draw("gaussian", (4, 48), torch.float32, s).to(device) for s in (5, 6)]
    single = []
    for x in xs:
        layer.zero_grad()
        layer(x).square().sum().backward()
        single.append((layer.weight.grad.clone(), layer.bias.grad.clone()))
    layer.zero_grad()
    for x in xs:
        layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, single[0][0] + single[1][0])
    assert torch.equal(layer.bias.grad, single[0][1] + single[1][1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_used_twice_in_one_graph(device: str) -> None:
    layer = made_layer("w2a2", device, torch.float32, 0, bias=False, shape=(48, 48))
    x = inputs.draw("gaussian", (4, 48), torch.float32, 5).to(device).requires_grad_()
    layer(layer(x)).sum().backward()
    total = layer.weight.grad.clone()
    layer.zero_grad()
    hidden = layer(x.detach()).detach().requires_grad_()
    layer(hidden).sum().backward()
    layer(x.detach()).backward(hidden.grad)
    assert torch.equal(layer.weight.grad, total)


@pytest.mark.parametrize("device", DEVICES)
def test_a_backward_can_be_repeated(device: str) -> None:
    """Saved tensors are not changed."""
    layer = made_layer("w4a4-2:4", device, torch.float32, 0)
    x = inputs.draw("gaussian", (4, 48), torch.float32, 5).to(device).requires_grad_()
    y = layer(x)
    grads = [torch.autograd.grad(y.sum(), [x, layer.weight], retain_graph=True) for _ in range(2)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "fp4", "w4a4-4:8"])
def test_rows_of_zeros_and_nan_keep_to_themselves(
    recipe: str, dtype: torch.dtype, device: str
) -> None:
    layer = made_layer(recipe, device, dtype, 0)
    clean = inputs.draw("gaussian", (4, 48), dtype, 2)
    x = clean.clone()
    x[1], x[2, 7] = 0.0, math.nan
    y, plain = layer(x.to(device)), layer(clean.to(device))
    assert torch.equal(y[1], layer.bias)
    assert y[2].isnan().all()
    for row in (0, 3):
        assert torch.equal(y[row], plain[row])
    t = x.to(device).requires_grad_()
    layer(t)[[0, 1, 3]].sum().backward()
    assert t.grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_still_learns(dtype: torch.dtype, device: str) -> None:
    """Its mask is 1: a weight row of zeros gets the gradient of the dense layer's rotated back."""
    layer = made_layer("w4a4", device, dtype, 0)
    with torch.no_grad():
        layer.weight[3] = 0
    x = inputs.draw("gaussian", (4, 48), dtype, 2).to(device)
    layer(x).sum().backward()
    assert (layer.weight.grad[3] != 0).any()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_is_that_of_nn_linear(bias: bool) -> None:
    dense = torch.nn.Linear(48, 24, bias)
    layer = quest.Linear(48, 24, bias, "w4a4")
    assert list(layer.state_dict()) == list(dense.state_dict())
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.weight, dense.weight)
    back = torch.nn.Linear(48, 24, bias)
    back.load_state_dict(layer.state_dict())
    assert torch.equal(back.weight, dense.weight)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = quest.Linear(48, 24, bias, "w2a2")
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other.weight, dense.weight)
    assert other.recipe == quest.recipe("w2a2")


def copied(layer: quest.Linear, how: str) -> quest.Linear:
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "pickle":
        made: quest.Linear = pickle.loads(pickle.dumps(layer))
        return made
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded: quest.Linear = torch.load(stream, weights_only=False)
    return loaded


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_copies(recipe: str, how: str) -> None:
    layer = made_layer(recipe, "cpu", torch.float32, 0)
    x = inputs.draw("gaussian", (4, 48), torch.float32, 5)
    expected = layer(x)
    other = copied(layer, how)
    assert other.recipe == layer.recipe
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(x), expected)


def test_from_linear_shares_parameters_and_mode() -> None:
    dense = torch.nn.Linear(48, 24).eval()
    dense.weight.requires_grad_(False)
    layer = quest.Linear.from_linear(dense, "w4a4")
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert not layer.training
    assert not layer.weight.requires_grad
    without = quest.Linear.from_linear(torch.nn.Linear(8, 8, bias=False), "w4a4")
    assert without.bias is None


def test_meta_layers_cost_nothing_and_keep_shapes() -> None:
    layer = quest.Linear(1 << 20, 1 << 20, recipe="w4a4-2:4", device="meta")
    assert layer(torch.empty(3, 1 << 20, device="meta")).shape == (3, 1 << 20)


def test_set_recipe() -> None:
    layer = made_layer("w4a4", "cpu", torch.float32, 0)
    weight, x = layer.weight, inputs.draw("gaussian", (4, 48), torch.float32, 5)
    layer.set_recipe("w2a2")
    assert layer.weight is weight
    assert torch.equal(layer(x), made_layer("w2a2", "cpu", torch.float32, 0)(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bf16_recipe_is_nn_linear(dtype: torch.dtype, device: str) -> None:
    layer = made_layer("bf16", device, dtype, 0)
    x = inputs.draw("gaussian", (4, 48), dtype, 5).to(device)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a16", "w1a16", "w8a16"])
def test_weight_only_rotates_activations_and_rounds_weights(recipe: str, device: str) -> None:
    layer = made_layer(recipe, device, torch.float32, 0)
    made = layer.recipe
    x = inputs.draw("gaussian", (4, 48), torch.float32, 5).to(device)
    rotated = made.activation(x)
    exact = hadamard.apply(oracle.lift(x), 16)
    judges.rotated(x.cpu(), rotated.cpu(), 16, False).require()
    # Not one of few levels, and the row's own norm.
    assert rotated[0].unique().numel() == 48
    assert np.allclose(np.linalg.norm(exact), np.linalg.norm(oracle.lift(x)), rtol=1e-12)
    levels = made.weight(layer.weight)[0].unique().numel()
    assert levels <= made.weight.require_grid().levels


def test_weight_only_of_weights_on_the_grid_is_the_dense_layer() -> None:
    """Where rounding the weights changes nothing, H cancels: the dense layer's function."""
    q = quest.recipe("w4a16").weight
    grid = q.require_grid()
    rng = np.random.default_rng(0)
    # Rotated weights that are points times an RMS-consistent scale; then their dense form.
    half = np.array(grid.points)[rng.integers(0, 16, (24, 48))]
    sigma = np.sqrt(np.mean(half**2, -1, keepdims=True))
    on_grid = hadamard.apply_transpose(half / sigma, 16)
    rounded = oracle.lift(q(torch.from_numpy(on_grid).float()))
    back = hadamard.apply_transpose(rounded, 16)
    layer = quest.Linear(48, 24, recipe="w4a16")
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(on_grid))
    x = inputs.draw("gaussian", (4, 48), torch.float32, 5)
    expected = oracle.lift(x) @ back.T
    size = np.abs(oracle.lift(x)) @ np.abs(back).T
    # Rotation of x (4 additions, exact norm), product of 48 terms: with cancelling H the sums of
    # magnitudes grow by at most the block's 16.
    bound = bounds.gamma(48 + 4 + 2, bounds.U32) * 16 * size
    assert (np.abs(oracle.lift(layer(x)) - expected) <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_lower_the_loss(recipe: str, device: str) -> None:
    torch.manual_seed(0)
    layer = quest.Linear(64, 32, bias=True, recipe=recipe).to(device)
    target = torch.randn(32, 64, device=device) / 4
    x = torch.randn(256, 64, device=device)
    y = x @ target.t()
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]

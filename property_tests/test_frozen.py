"""A frozen weight: the same numbers, for as long as the weight is the one that was frozen."""

from __future__ import annotations

import copy

import pytest
import torch

import quest
from quest import lowbit, operands, paths
from quest.conformance import examine, inputs, oracle
from quest.conformance.lanes import Lane, all_lanes
from quest.kernels.hopper import unavailable
from quest.quantizer import parse
from quest.reference import bounds, quantize

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
RECIPES = ["w4a4", "w1a1", "w8a8", "w1.58a1.58", "fp4", "w4a4-2:4", "w4a16", "bf16"]


def _layer(recipe: str = "w4a4", device: str = "cpu", **options: object) -> quest.Linear:
    torch.manual_seed(0)
    layer = quest.Linear(256, 48, True, recipe, device=device)
    return layer.to(**options) if options else layer


def _same_path(layer: quest.Linear, x: torch.Tensor) -> torch.Tensor:
    """What a new layer with this weight gives, on the path that a frozen one takes."""
    free = quest.Linear(256, 48, True, layer.recipe, device=x.device, dtype=layer.weight.dtype)
    free.load_state_dict(layer.state_dict())
    on_integers = paths.has_integers(x, layer.recipe)
    with torch.no_grad(), paths.only("integers" if on_integers else "values"):
        y: torch.Tensor = free(x)
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_numbers(recipe: str, dtype: torch.dtype, device: str) -> None:
    layer = _layer(recipe, device, dtype=dtype)
    x = torch.randn(2, 5, 256, device=device, dtype=dtype)
    expected = _same_path(layer, x)
    layer.eval().freeze()
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    uniform = layer.recipe.activation.grid is not None and recipe != "fp4"
    if device == "cuda" and layer._frozen.path == "integers" and uniform:
        # Few rows are quantized by kernels that add squares in another order: judges, no equality.
        lane = next(lane for lane in all_lanes() if lane.name == "triton-cuda")
        w, rows = layer.weight.detach().cpu(), x.reshape(10, 256).cpu()
        for verdict in examine.frozen(lane, rows, w, layer.bias.detach().cpu(), layer.recipe):
            verdict.require()
    else:
        assert torch.equal(y, expected)


def test_it_is_the_frozen_weight_that_is_used() -> None:
    layer = _layer().eval().freeze()
    x = torch.randn(3, 256)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data.neg_()
        assert torch.equal(layer(x), before)  # documented: this way needs another freeze()
        layer.freeze()
        assert not torch.equal(layer(x), before)


def test_gradients_come_from_the_weight() -> None:
    layer = _layer().eval().freeze()
    x = torch.randn(3, 256)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        "load",
        "assign",
        "dtype",
        "train",
        "recipe",
        "from_linear",
        "in place",
        "replaced",
        "optimizer",
        "reset",
    ],
)
def test_what_makes_it_new(change: str) -> None:
    layer = _layer().eval().freeze()
    x = torch.randn(3, 256)
    other = quest.Linear(256, 48, True, "w4a4")
    if change == "load":
        layer.load_state_dict(other.state_dict())
    elif change == "assign":
        layer.load_state_dict(other.state_dict(), assign=True)
    elif change == "in place":
        with torch.no_grad():
            layer.weight.neg_()
    elif change == "replaced":
        layer.weight = torch.nn.Parameter(-layer.weight.detach())
    elif change == "optimizer":
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        layer(x).square().sum().backward()
        optimizer.step()
    elif change == "reset":
        layer.reset_parameters()
    elif change == "dtype":
        layer, x = layer.bfloat16(), x.bfloat16()
    elif change == "train":
        layer.train()
        layer.weight.data.neg_()
        layer.eval()
    elif change == "recipe":
        layer.set_recipe("w1a1")
    else:
        layer = quest.Linear.from_linear(layer, "w2a2")
    with torch.no_grad():
        assert torch.equal(layer(x), _same_path(layer, x))


def test_a_call_with_another_weight() -> None:
    layer = _layer().eval().freeze()
    x, other = torch.randn(3, 256), _layer().weight.detach().neg()
    with torch.no_grad():
        own = layer(x)
        y = torch.func.functional_call(layer, {"weight": other}, (x,))
        assert not torch.equal(y, own)
        assert torch.equal(layer(x), own)


def test_a_forced_path_is_not_the_frozen_one() -> None:
    layer = _layer("w4a16").eval().freeze()
    with (
        torch.no_grad(),
        paths.only("integers"),
        pytest.raises(ValueError, match="there is no integer product"),
    ):
        layer(torch.randn(3, 256))
    layer = _layer("w4a4").eval().freeze()
    x = torch.randn(3, 256)
    with torch.no_grad(), paths.only("integers"):
        free = _layer("w4a4")
        assert torch.equal(layer(x), free(x))


def test_a_state_in_a_dtype_without_a_quantizer() -> None:
    layer = _layer().eval().freeze()
    layer.load_state_dict(_layer().double().state_dict(), assign=True)
    assert layer._frozen is None


def test_a_dtype_without_a_quantizer_drops_it() -> None:
    layer = _layer().eval().freeze().double()
    assert layer._frozen is None


def test_the_court_of_frozen_integers_bites() -> None:
    """Without a GPU: operands and y as the integers' path gives them, right and wrong."""
    made = quest.recipe("w4a4")
    x, w = torch.randn(5, 256), torch.randn(24, 256)
    pair = zip((x, w), (made.activation, made.weight), strict=True)
    (a, a_scale, _, a_sums), (b, b_scale, _, b_sums) = (
        lowbit.encode(t, q.spec, "integers") for t, q in pair
    )
    y = lowbit.product(
        a, b, a_scale, b_scale, a_sums, b_sums, None, "uniform4,uniform4", "integers,integers", 256,
        torch.float32,
    )  # fmt: skip

    class Stub(Lane):
        def call(self, stage: str, *tensors: torch.Tensor, **static: object) -> dict[str, object]:
            assert stage == "frozen"
            return out

    lane = Stub("stub", "cpu", "dispatch")
    for wrong, right in ((y, True), (y * (1 + 2.0**-20), False), (y[:, :-1], False)):
        out = {"y": wrong, "a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
        found = examine.frozen(lane, x, w, None, made)
        assert found
        assert all(v.failure is None for v in found) == right


@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w2a4"])
def test_the_court_of_frozen_rows_bites(recipe: str) -> None:
    """Without a GPU: an operand, its scale and its sums, right and wrong."""
    made = quest.recipe(recipe)
    x, w = torch.randn(5, 256), torch.randn(24, 256)
    kind = (operands.kinds(made.activation, made.weight) or ("",))[0]
    b, b_scale, _, b_sums = lowbit.encode(w, made.weight.spec, kind)
    a, scale, _, sums = lowbit.encode(x, made.activation.spec, kind)
    names = ",".join(q.require_grid().name for q in (made.activation, made.weight))
    y = lowbit.product(
        a, b, scale, b_scale, sums, b_sums, None, names, f"{kind},{kind}", 256, torch.float32
    )
    right = {"y": y, "a": a, "a_scale": scale, "a_sums": sums, "b": b, "b_scale": b_scale}

    class Stub(Lane):
        def call(self, stage: str, *tensors: torch.Tensor, **static: object) -> dict[str, object]:
            return out

    lane = Stub("stub", "cpu", "dispatch")
    turned = a.clone()
    turned[3, 2] = ~turned[3, 2] if kind == "bits" else -turned[3, 2]
    wrong = {
        "frozen codes": {"a": turned},
        "frozen scale": {"a_scale": scale * (1 + 2.0**-10)},
        "frozen sums": {"a_sums": sums + 2},
        "frozen operand": {"a": a[:, :-1]},
        "frozen y": {"y": y * (1 + 2.0**-20)},
    }
    for stage, change in {"": {}, **wrong}.items():
        out = right | change
        found = examine.frozen(lane, x, w, None, made)
        failed = {v.stage for v in found if v.failure is not None}
        assert (stage in failed) if stage else not failed


def test_a_scale_off_by_more_than_a_butterfly_s_sums() -> None:
    """But by less than those of tensor cores, which rows of float32 do not have."""
    made, w = quest.recipe("w4a4"), torch.randn(24, 256)
    x = inputs.draw("gaussian", (5, 256), torch.float32, 0)
    a, _, _, a_sums = lowbit.encode(x, made.activation.spec, "integers")
    b, b_scale, _, b_sums = lowbit.encode(w, made.weight.spec, "integers")
    x64 = oracle.lift(x)
    sigma = quantize.scale(x64)
    near, far = (
        bounds.scale(x64, 128, sigma, by) for by in (bounds.BUTTERFLY, examine.TENSOR_CORES)
    )
    scale = torch.from_numpy(sigma + (near + far) / 2).float()
    y = lowbit.product(
        a, b, scale, b_scale, a_sums, b_sums, None, "uniform4,uniform4", "integers,integers", 256,
        torch.float32,
    )  # fmt: skip
    out = {"y": y, "a": a, "a_scale": scale, "a_sums": a_sums, "b": b, "b_scale": b_scale}

    class Stub(Lane):
        def call(self, stage: str, *tensors: torch.Tensor, **static: object) -> dict[str, object]:
            return out

    found = examine.frozen(Stub("stub", "cuda", "dispatch"), x, w, None, made)
    assert {v.stage for v in found if v.failure is not None} == {"frozen scale"}


def test_whose_sums_are_those_of_tensor_cores() -> None:
    """Of a quantizer in CUDA C++, for 16 bits, a uniform grid and blocks of 128; nobody else's."""
    taken, gpu = "uniform4/hadamard128/ste/dense", Lane("triton-cuda", "cuda", "dispatch")
    cases = [
        (gpu, torch.bfloat16, taken, True), (gpu, torch.float16, taken, True),
        (Lane("cuda-emulator", "cpu", "emulated"), torch.float16, taken, True),
        (gpu, torch.float32, taken, False),
        (Lane("torch-cuda", "cuda", "eager"), torch.float16, taken, False),
        (Lane("triton-interpreter", "cpu", "launch"), torch.float16, taken, False),
        *(
            (gpu, torch.float16, spec, False) for spec in (
                "uniform4/hadamard64/ste/dense", "uniform4/identity/ste/dense",
                "e2m1/hadamard128/ste/dense", "uniform4/hadamard128/ste/2:4",
                quest.recipe("bf16").activation.spec,
            )
        ),
    ]  # fmt: skip
    for lane, dtype, spec, expected in cases:
        sums = examine.sums_of(lane, torch.empty(1, 256, dtype=dtype), parse(spec))
        assert sums == (examine.TENSOR_CORES if expected else bounds.BUTTERFLY), (lane, dtype, spec)


def test_a_copy_and_a_state_dict() -> None:
    layer = _layer().eval().freeze()
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(3, 256)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    layer = _layer(device=device).eval().freeze()
    x = torch.randn(3, 256, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, _same_path(layer, x))


def test_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
    quest.quantize_(model, "w4a4")
    x = torch.randn(3, 256)
    with torch.no_grad():
        expected = model(x)
    assert quest.freeze_(model) is model
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"model has no quest\.Linear: quest\.quantize_"):
        quest.freeze_(torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        quest.freeze_("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path must be one of values, integers, got 'ints'"):
        paths.only("ints").__enter__()


def test_a_forced_path_that_is_not_there() -> None:
    layer = _layer("w4a16")
    with paths.only("integers"), pytest.raises(ValueError, match="there is no integer product"):
        layer(torch.randn(3, 256))


def test_the_rule_on_a_cpu() -> None:
    made = quest.recipe("w4a4")
    assert paths.choose(torch.empty(1 << 14, 128), made) == "values"
    with paths.only("integers"):
        assert paths.choose(torch.empty(1, 128), made) == "integers"
    assert paths.choose(torch.empty(1 << 14, 128), made) == "values"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_rule_on_hopper() -> None:
    x = torch.empty(1, 128, device="cuda")
    expected = "values" if unavailable(x.device) else "integers"
    assert paths.choose(x, quest.recipe("w4a4")) == expected
    assert paths.choose(x, quest.recipe("w4a16")) == "values"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8"])
@pytest.mark.parametrize("rows", [3, 512])
def test_compiled(rows: int, recipe: str, device: str) -> None:
    """One graph, whatever the path; frozen and not."""
    # In bfloat16: inductor warns where float32 products have no TF32.
    layer = _layer(recipe, device, dtype=torch.bfloat16)
    x = torch.randn(rows, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    expected = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
    for p, q in zip(
        torch.autograd.grad(compiled(x).sum(), (x, layer.weight)), expected, strict=True
    ):
        # The same operators. On a GPU cuBLAS may sum in another order where a gradient is laid out
        # otherwise: the default tolerance of the dtype, and no judge.
        torch.testing.assert_close(p, q, **({"rtol": 0, "atol": 0} if device == "cpu" else {}))
    layer.eval().freeze()
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8", "fp4"])
@pytest.mark.parametrize("rows", [3, 40, 512])
@pytest.mark.parametrize("frozen", [False, True])
def test_under_cuda_graphs(frozen: bool, rows: int, recipe: str) -> None:
    layer = _layer(recipe, "cuda", dtype=torch.bfloat16).eval()
    if frozen:
        layer.freeze()
    still = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(still)  # compiles outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(still)
        for seed in range(2):
            torch.manual_seed(seed)
            still.copy_(torch.randn(rows, 256))
            graph.replay()
            torch.testing.assert_close(y, layer(still), rtol=0, atol=0)

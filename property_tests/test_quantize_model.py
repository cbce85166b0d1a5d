"""quantize_ on whole models: what is replaced, what stays, and that the model still trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import quest

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
RECIPES = ["w4a4", "w1a1", "w1.58a1.58", "fp4", "w4a4-2:4", "w4a16", "bf16"]


class Block(nn.Module):
    """A pre-norm transformer block of plain parts."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


class Tiny(nn.Module):
    """Embedding, two blocks, a head that may be tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.Sequential(Block(), Block())
        self.lm_head = nn.Linear(32, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.blocks(self.embed(tokens)))


def tiny(tied: bool = False) -> Tiny:
    torch.manual_seed(0)
    return Tiny(tied)


TOKENS = torch.arange(24).reshape(2, 12)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def replaced(model: nn.Module) -> set[str]:
    return {name for name, module in linears(model) if isinstance(module, quest.Linear)}


def same_parameters(model: nn.Module, before: dict[str, nn.Parameter]) -> None:
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, parameter in after.items():
        assert parameter is before[name], name


BODY = {
    f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out", "mlp.0", "mlp.2")
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_names_values_and_the_head_stay(recipe: str, device: str) -> None:
    model = tiny().to(device)
    before, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    assert quest.quantize_(model, recipe) is model
    assert replaced(model) == BODY
    assert type(model.lm_head) is nn.Linear
    same_parameters(model, before)
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(
        m.recipe == quest.recipe(recipe) for _, m in linears(model) if m is not model.lm_head
    )
    loss = model(TOKENS.to(device)).square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_computes_what_the_model_did(device: str) -> None:
    model = tiny().to(device)
    expected = model(TOKENS.to(device))
    quest.quantize_(model, "bf16")
    assert torch.equal(model(TOKENS.to(device)), expected)


def test_a_layer_computes_its_recipe() -> None:
    model = tiny()
    quest.quantize_(model, "w2a2")
    layer = model.blocks[0].qkv
    x = torch.randn(3, 32)
    alone = quest.Linear(32, 96, recipe="w2a2")
    alone.weight = layer.weight
    assert torch.equal(layer(x), alone(x))
    assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("mode", [True, False])
def test_training_mode_and_frozen_parameters_stay(mode: bool) -> None:
    model = tiny().train(mode)
    model.blocks[0].out.weight.requires_grad_(False)
    model.blocks[1].eval()
    flags = {n: m.training for n, m in model.named_modules()}
    quest.quantize_(model, "w4a4")
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert not model.blocks[0].out.weight.requires_grad


def test_filter_fn_sees_modules_and_names() -> None:
    seen: list[tuple[str, type]] = []

    def only_mlp(module: nn.Module, name: str) -> bool:
        seen.append((name, type(module)))
        return ".mlp." in name

    model = tiny()
    quest.quantize_(model, "w4a4", filter_fn=only_mlp)
    assert replaced(model) == {n for n in BODY if "mlp" in n}
    assert {n for n, _ in seen} == BODY | {"lm_head"}
    assert {t for _, t in seen} == {nn.Linear}
    # An explicit filter may choose the head.
    model = tiny()
    quest.quantize_(model, "w4a4", filter_fn=lambda module, name: module.out_features == 50)
    assert replaced(model) == {"lm_head"}


@pytest.mark.parametrize("head", ["lm_head", "output", "head", "embed_out", "classifier", "score"])
def test_heads_by_name(head: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), head: nn.Linear(8, 8)})
    quest.quantize_(model, "w4a4")
    assert replaced(model) == {"body"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_head_by_method(wrapped: bool) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.words = nn.Linear(8, 8), nn.Linear(8, 8)

        def get_output_embeddings(self) -> nn.Module:
            return self.words

    model = Named()
    quest.quantize_(nn.Sequential(model) if wrapped else model, "w4a4")
    assert replaced(model) == {"body"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_that_are_computed_are_not_tied() -> None:
    """An embedding and a layer that register none, as by torch's older weight_norm, share none."""
    words, body = (nn.utils.weight_norm(m) for m in (nn.Embedding(8, 8), nn.Linear(8, 8)))
    assert "weight" not in {**words._parameters, **body._parameters}
    model = nn.ModuleDict({"words": words, "body": body})
    quest.quantize_(model, "w4a4")
    assert isinstance(body, quest.Linear)


def test_quantizing_again_with_another_recipe() -> None:
    model = tiny()
    before = dict(model.named_parameters())
    quest.quantize_(model, "w4a4")
    quest.quantize_(model, "w2a2", filter_fn=lambda module, name: ".mlp." in name)
    assert {n for n, m in linears(model) if isinstance(m, quest.Linear)} == BODY
    for name in BODY:
        wanted = "w2a2" if "mlp" in name else "w4a4"
        assert model.get_submodule(name).recipe == quest.recipe(wanted)
    same_parameters(model, before)
    quest.quantize_(model, "bf16")
    assert torch.equal(model(TOKENS), tiny()(TOKENS))


def test_a_recipe_object_with_overrides() -> None:
    model = tiny()
    quest.quantize_(model, quest.recipe("w4a4", estimator=quest.STE()))
    assert model.blocks[0].qkv.recipe.weight.estimator == quest.STE()


def test_tied_weights_stay_tied() -> None:
    model = tiny(tied=True)
    quest.quantize_(model, "w4a4", filter_fn=lambda module, name: True)
    assert isinstance(model.lm_head, quest.Linear)
    assert model.lm_head.weight is model.embed.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    model(TOKENS).square().mean().backward()
    assert model.embed.weight.grad.isfinite().all()
    # And weights that two layers share.
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pair[1].weight = pair[0].weight
    quest.quantize_(pair, "w4a4")
    assert pair[0].weight is pair[1].weight


def test_a_head_that_is_the_embedding_s_weight() -> None:
    """Whatever it is called: a table of values is not a quantized matrix, too."""
    model = nn.ModuleDict(
        {"wte": nn.Embedding(50, 32), "body": nn.Linear(32, 32), "unembed": nn.Linear(32, 50)}
    )
    quest.quantize_(model, "w4a4")
    assert type(model["unembed"]) is quest.Linear  # nothing says that it is a head
    model["unembed"] = nn.Linear(32, 50, bias=False)
    model["unembed"].weight = model["wte"].weight
    quest.quantize_(model, "w4a4")
    assert type(model["unembed"]) is nn.Linear
    assert type(model["body"]) is quest.Linear


def test_shared_modules_stay_one() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared,
                           "c": nn.ModuleList([nn.Sequential(shared)])})  # fmt: skip
    quest.quantize_(model, "w4a4")
    assert isinstance(model["b"], quest.Linear)
    assert model["a"][0] is model["b"] is model["c"][0][0]
    assert model["b"].weight is shared.weight


def test_modules_stay_the_modules_that_they_are() -> None:
    """And what is registered or held elsewhere stays with them."""
    model, seen = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), list[object]()
    layer, state, x = model[0], copy.deepcopy(model.state_dict()), torch.randn(4, 16)
    layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    handle = layer.register_forward_hook(lambda module, *_: seen.append(module))
    quest.quantize_(model, "w4a4")
    assert model[0] is layer
    assert type(layer) is quest.Linear
    model.load_state_dict(state)
    model(x)
    assert seen == [layer, layer]
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_a_layer_that_was_compiled_by_itself() -> None:
    """Is compiled anew: for what it is now, and for another recipe."""
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(4, 16)
    model[0].compile(backend="eager")
    before = model(x)
    for recipe in ("w1a1", "w4a4"):
        quest.quantize_(model, recipe)
        y = model(x)
        assert torch.equal(y, model[0].forward(x))
        assert not torch.equal(y, before)
        before = y
    quest.freeze_(model)
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_a_forward_of_its_own_goes_past_no_quantized_layer() -> None:
    """As libraries put it there that move weights; nothing is changed then."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    real = model[1].forward
    model[1].forward = lambda x: real(x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^1: its forward was replaced"):
        quest.quantize_(model, "w4a4")
    assert not replaced(model)
    quest.quantize_(model, "w4a4", lambda module, name: name == "0")
    assert replaced(model) == {"0"}


@pytest.mark.parametrize("filter_fn", [[], "0", 0])
def test_a_filter_is_a_function(filter_fn: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(TypeError, match="filter_fn must be a function or None, got"):
        quest.quantize_(model, "w4a4", filter_fn)
    assert not replaced(model)


@pytest.mark.parametrize(
    ("groups", "error", "told"),
    [
        (("q", "k"), TypeError, r"Attention\.shared_inputs must hold groups of names, .* got 'q'"),
        ((3,), TypeError, "must hold groups of names"),
        ((("q", "v"),), ValueError, "names 'v', and there is no such module"),
        ((("q", "recipe"),), ValueError, "names 'recipe', and there is no such module"),
    ],
)
def test_groups_that_name_no_layers(groups: Any, error: type[Exception], told: str) -> None:
    class Attention(nn.Module):
        shared_inputs = groups
        recipe = "w4a4"

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = quest.Linear(16, 16), quest.Linear(16, 16)

    with pytest.raises(error, match=told):
        quest.freeze_(Attention())


def test_groups_of_wrapped_modules() -> None:
    """As attributes: of what is compiled, tied, lacking on purpose or behind a property."""

    class Attention(nn.Module):
        shared_inputs = (("q", "k"), ("q", "again"), ("q", "none"), ("q", "own"))

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = quest.Linear(16, 16), quest.Linear(16, 16)
            self.again, self.none = self.q, None

        @property
        def own(self) -> nn.Module:
            return self.k

    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        model = nn.Sequential(wrap(Attention()))
        quest.freeze_(model)
        q = next(m for m in model.modules() if isinstance(m, quest.Linear))
        assert q.current().whole is not None


def test_what_is_refused_is_not_frozen() -> None:
    class Attention(nn.Module):
        shared_inputs = (("q", ["k"]),)

        def __init__(self) -> None:
            super().__init__()
            self.q = quest.Linear(16, 16)

    model = Attention()
    with pytest.raises(ValueError, match="and there is no such module"):
        quest.freeze_(model)
    assert model.training
    assert model.q.current() is None


def test_a_head_by_any_of_its_names_is_left_alone() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(16, 16), "body": nn.Linear(16, 16)})
    model["lm_head"] = model["proj"]
    quest.quantize_(model, "w4a4")
    assert type(model["proj"]) is nn.Linear
    assert type(model["body"]) is quest.Linear


def test_layers_of_other_widths_are_not_stacked() -> None:
    class Other(nn.Module):
        shared_inputs = (("q", "k"),)

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = quest.Linear(16, 16), quest.Linear(32, 16)

    model = quest.freeze_(Other())
    assert isinstance(model.q, quest.Linear)
    assert isinstance(model.k, quest.Linear)
    assert model.q.current().whole is model.k.current().whole is None


def test_a_shared_module_is_asked_for_by_each_of_its_names() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    quest.quantize_(model, "w4a4", lambda module, name: name == "b.0")
    assert type(model["a"]) is quest.Linear


def test_a_transformer_layer_of_which_nothing_is_quantized_keeps_its_fused_path() -> None:
    """And no other module gets what keeps torch from it."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.ModuleDict({"encoder": layer, "out": nn.Sequential(nn.Linear(32, 32))})
    before = layer.activation_relu_or_gelu
    assert before
    quest.quantize_(model, "w4a4", lambda module, name: name == "out.0")
    assert layer.activation_relu_or_gelu == before
    quest.quantize_(model, "w4a4")
    assert layer.activation_relu_or_gelu == 0
    assert not hasattr(model["out"], "activation_relu_or_gelu")


def test_subclasses_and_other_modules_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({
        "mine": Mine(8, 8), "conv": nn.Conv1d(8, 8, 1), "bilinear": nn.Bilinear(8, 8, 8),
        "plain": nn.Linear(8, 8),
    })  # fmt: skip
    quest.quantize_(model, "w4a4")
    assert replaced(model) == {"plain"}
    assert type(model["mine"]) is Mine


def test_device_and_dtype_stay() -> None:
    model = tiny().bfloat16()
    quest.quantize_(model, "w4a4")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(TOKENS).dtype == torch.bfloat16
    meta = tiny().to("meta")
    quest.quantize_(meta, "w4a4")
    assert meta(TOKENS.to("meta")).shape == (2, 12, 50)


def test_an_optimizer_made_before_still_trains() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    quest.quantize_(model, "w4a4")
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        logits = model(TOKENS)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("device", DEVICES)
def test_torch_s_own_transformer_layer(device: str) -> None:
    """linear1 and linear2 are quantized; attention's out_proj is a subclass and stays."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, device=device)
    quest.quantize_(model, "w2a2")
    assert replaced(model) == {"linear1", "linear2"}
    x = torch.randn(2, 5, 32, device=device)
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_torch_s_transformer_layer_is_quantized_in_evaluation_too(device: str) -> None:
    """Its fused path reads the weights and skips the layers' forward; that must not happen."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, device=device)
    quest.quantize_(model, "w2a2")
    x = torch.randn(2, 5, 32, device=device)
    calls = []
    inner = model.linear1.forward
    model.linear1.forward = lambda t: calls.append(1) or inner(t)  # type: ignore[method-assign]
    model.eval()
    with torch.no_grad():
        model(x)
    assert calls, "evaluation went past the quantized layers"


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    } | changes)  # fmt: skip
    return LlamaForCausalLM(config)


PROJECTIONS = {
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_hugging_face_llama(recipe: str, tied: bool, device: str) -> None:
    model = llama(tie_word_embeddings=tied).to(device)
    before, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    tokens = TOKENS.to(device)
    with torch.no_grad():
        dense = model(tokens).logits
    quest.quantize_(model, recipe)
    assert replaced(model) == PROJECTIONS
    assert type(model.lm_head) is nn.Linear
    same_parameters(model, before)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    out = model(tokens, labels=tokens)
    assert torch.equal(out.logits, dense) == (recipe == "bf16")
    assert out.loss.isfinite()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_hugging_face_round_trip(tmp_path: Any) -> None:
    """A checkpoint of the quantized model is one of the dense model, and loads again."""
    model = llama()
    quest.quantize_(model, "w4a4")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert replaced(again) == set()
    quest.quantize_(again, "w4a4")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_hugging_face_generates() -> None:
    model = llama()
    quest.quantize_(model, "w4a4")
    model.eval()
    made = model.generate(TOKENS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 7)

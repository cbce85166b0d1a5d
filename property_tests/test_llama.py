"""The Llama: what its formulas imply, and agreement with Hugging Face's on the same weights."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quest.models import SIZES, Llama, LlamaConfig
from quest.models.llama import rope_angles
from quest.rotary import rotate

TINY = LlamaConfig(vocab_size=37, layers=2, width=64, heads=2)


@pytest.fixture(scope="module")
def model() -> Llama:
    """A tiny model whose projections are large enough for attention to matter."""
    torch.manual_seed(0)
    built = Llama(TINY)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(5 if parameter.ndim == 2 else 1.1)
    return built


@settings(deadline=None)  # the first call starts torch's threads
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 17),
    cut=st.integers(0, 16),
    seed=st.integers(0, 9),
)
def test_logits_have_their_shape_and_do_not_see_the_future(
    model: Llama, batch: int, length: int, cut: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(37, (batch, length), generator=generator)
    cut = min(cut, length)
    changed = tokens.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % 37
    with torch.no_grad():
        logits, after = model(tokens), model(changed)
    assert logits.shape == (batch, length, 37)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(after[:, :cut], logits[:, :cut], rtol=1e-5, atol=1e-5)
    if cut < length:
        assert (after[:, cut:] - logits[:, cut:]).abs().amax() > 1e-3


@pytest.mark.parametrize("shape", [(), (7,), (1, 2, 7)])
def test_tokens_are_sequences_of_a_batch(model: Llama, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"tokens must be (B, T), got shape {shape}")):
        model(torch.zeros(shape, dtype=torch.long))


def test_the_past_is_seen(model: Llama) -> None:
    tokens = torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 0] = 30
    with torch.no_grad():
        assert (model(changed)[0, -1] - model(tokens)[0, -1]).abs().amax() > 1e-3


@given(t=st.integers(0, 50), s=st.integers(0, 50), shift=st.integers(0, 50))
def test_rotated_products_depend_on_the_distance_alone(t: int, s: int, shift: int) -> None:
    cos, sin = (table.double() for table in rope_angles(TINY, 101, torch.device("cpu")))
    q, k = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(t))

    def product(at: int, to: int) -> float:
        return torch.dot(rotate(q, cos[at], sin[at]), rotate(k, cos[to], sin[to])).item()

    # float32 angles of up to 100 radians are rounded by 100 * 2**-24 each, times |q| |k| < 100
    assert product(t, s) == pytest.approx(product(t + shift, s + shift), abs=2e-3)
    assert rotate(q, cos[t], sin[t]).norm().item() == pytest.approx(q.norm().item(), rel=1e-6)


def test_rotation_uses_theta_10000() -> None:
    cos, sin = rope_angles(TINY, 3, torch.device("cpu"))
    assert cos.shape == sin.shape == (3, 16)
    for i in range(16):
        angle = 2 * 10000 ** (-2 * i / 32)
        assert cos[2, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[2, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_every_norm_has_the_epsilon_of_the_architecture() -> None:
    norms = [m for m in Llama(replace(TINY, norm_eps=0.5)).modules() if isinstance(m, nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [0.5] * (2 * TINY.layers + 1)


def test_initial_standard_deviations() -> None:
    torch.manual_seed(1)
    fresh = Llama(LlamaConfig(vocab_size=256, layers=4, width=256, heads=4))
    for name, parameter in fresh.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(8) if writes else 0.02
        # 65536 draws or more: five standard errors of a standard deviation are 1.4%
        assert parameter.std().item() == pytest.approx(std, rel=0.014), name
        assert abs(parameter.mean().item()) < 5 * std / 256, name


def test_logits_equal_those_of_hugging_face(model: Llama) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=37,
            hidden_size=64,
            intermediate_size=TINY.hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": value
        for name, value in model.state_dict().items()
    }
    theirs.load_state_dict(weights)  # strict: every name and shape agrees
    tokens = torch.arange(60).reshape(2, 30) % 37
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_block_is_its_formula_without_a_gradient(model: Llama, dtype: torch.dtype) -> None:
    """Where norms may be taken over by quantizers; and a hook sees what each module gets."""
    torch.manual_seed(1)
    block, config = copy.deepcopy(model.layers[0]).to(dtype), model.config
    x = torch.randn(2, 5, 64, dtype=dtype)
    angles = [t.to(dtype) for t in rope_angles(config, 5, x.device)]
    h = x + block.self_attn(block.input_layernorm(x), *angles)
    normed = block.post_attention_layernorm(h)
    expected = h + block.mlp(normed)
    with torch.no_grad():
        assert torch.equal(block(x, *angles), expected)
        seen: list[torch.Tensor] = []
        block.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0]))
        assert torch.equal(block(x, *angles), expected)
        assert torch.equal(seen[0], normed)
        compiled: list[int] = []
        block.self_attn.compile(backend=lambda made, _: compiled.append(1) or made.forward)
        block(x, *angles)
        assert compiled
        block.mlp = nn.Identity()  # a user's own
        assert torch.equal(block(x, *angles), h + normed)


def test_compiles_as_one_graph(model: Llama) -> None:
    tokens = torch.arange(20).reshape(2, 10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize(
    ("size", "hidden", "millions"),
    # without embeddings and head: layers * (4 d**2 + 3 d hidden), and a norm's d here and there
    [("demo", 768, 3.4), ("30M", 1792, 30.5), ("50M", 2048, 49.5), ("100M", 2816, 102.8),
     ("200M", 3584, 203.2), ("430M", 4608, 443.1), ("800M", 5632, 822.2)],
)  # fmt: skip
def test_sizes(size: str, hidden: int, millions: float) -> None:
    with torch.device("meta"):
        model = Llama(SIZES[size].architecture(32000))
    assert model.config.hidden == hidden
    assert model.lm_head.weight is not model.embed_tokens.weight
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Linear))
    inner = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers"))
    assert inner / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0: must be at least 1"),
        ({"heads": 3}, "width is 64: must be a multiple of 2 \\* heads = 6"),
        ({"heads": 64}, "multiple of 2 \\* heads = 128"),
    ],
)
def test_impossible_architectures(change: dict[str, int], message: str) -> None:
    fields = {"vocab_size": 37, "layers": 2, "width": 64, "heads": 2}
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**(fields | change))

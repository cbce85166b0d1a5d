"""A Llama decoder in full precision (arXiv 2302.13971), in the sizes that QuEST published.

Every linear layer is a plain ``nn.Linear``, so that ``quest.quantize_(model, recipe)`` can replace
all of them but the output head. Submodules carry the names of Hugging Face's ``LlamaForCausalLM``
(there with the prefix ``model.`` except for ``lm_head``), whose logits this model reproduces from
the same weights.

Shapes: ``B`` sequences, ``T`` tokens, width ``d``, ``h`` heads of width ``d / h``, vocabulary
``V``. The file holds no cache for generation and no dropout: it is what training needs.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quest.joint import hooked, together
from quest.mlp import normed_swiglu, swiglu
from quest.prologue import normed
from quest.residual import apart
from quest.rotary import Rotary

INIT_STD = 0.02


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one model.

    Raises ``ValueError`` where the width does not split into heads of an even width (rotary
    embeddings turn pairs) or where a count is below 1.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width", "heads"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width}: must be a multiple of 2 * heads = {2 * self.heads}"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """The width inside the MLP: 8/3 of the model's, rounded up to a multiple of 256."""
        return -(-8 * self.width // (3 * 256)) * 256


@dataclass(frozen=True)
class Size:
    """An architecture without its vocabulary, and how it is trained unless one says otherwise.

    ``batch`` is in sequences of ``seq`` tokens a step, ``tokens`` the whole of training.
    """

    layers: int
    width: int
    heads: int
    lr: float
    tokens: int
    batch: int = 512
    seq: int = 512

    def architecture(self, vocab_size: int) -> LlamaConfig:
        return LlamaConfig(vocab_size, self.layers, self.width, self.heads)


# The published models (arXiv 2502.05003, appendix), and one that two CPU cores train in minutes.
SIZES: dict[str, Size] = {
    "demo": Size(4, 256, 4, lr=2e-3, tokens=400 * 8 * 128, batch=8, seq=128),
    "30M": Size(6, 640, 5, lr=1.2e-3, tokens=3_000_000_000),
    "50M": Size(7, 768, 6, lr=1.2e-3, tokens=5_000_000_000),
    "100M": Size(8, 1024, 8, lr=6e-4, tokens=10_000_000_000),
    "200M": Size(10, 1280, 10, lr=3e-4, tokens=20_000_000_000),
    "430M": Size(13, 1664, 13, lr=1.5e-4, tokens=43_000_000_000),
    "800M": Size(16, 2048, 16, lr=7.5e-5, tokens=80_000_000_000),
}


def rope_angles(config: LlamaConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), float32, ``(T, d/2h)`` each.

    Pair ``i`` of a head turns by ``t * theta ** (-2i / (d/h))`` at position ``t``; the pair is made
    of the components ``i`` and ``i + d/2h``, as in Hugging Face's Llama.
    """
    pairs = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32)
    frequency = config.rope_theta ** (-pairs / config.head_width)
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Causal self-attention with rotary positions: ``(B, T, d)`` to ``(B, T, d)``."""

    shared_inputs = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """The layers that see the module's input."""
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary = self.rotary(cos, sin)
        out: Tensor = self.o_proj(self.mixed(together(x, self.inputs, rotary)))
        return out

    def rotary(self, cos: Tensor, sin: Tensor) -> Rotary:
        """How queries and keys are turned by the angles of `rope_angles`.

        Raises ``ValueError`` where these are not of half a head's width.
        """
        half = self.q_proj.out_features // (2 * self.heads)
        if cos.shape[-1] != half:
            raise ValueError(
                f"cos and sin must have {half} columns, half a head's width, got {cos.shape[-1]}"
            )
        return Rotary(cos, sin, 2)

    def mixed(self, projected: tuple[Tensor, ...]) -> Tensor:
        """What `o_proj` sees, of the outputs of `inputs`, queries and keys turned."""
        q, k, v = (
            torch.unflatten(each, -1, (self.heads, -1)).transpose(1, 2)  # (B, h, T, d/h)
            for each in projected
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(-2)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``, ``(B, T, d)`` to the same.

    recompute: the backward computes gate(x) and up(x) again; see `quest.swiglu`.
    """

    recompute = False
    shared_inputs = (("gate_proj", "up_proj"),)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    @property
    def inputs(self) -> tuple[nn.Module, nn.Module]:
        """The layers that see the module's input."""
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj, self.up_proj, self.down_proj, recompute=self.recompute)


class Block(nn.Module):
    """One pre-norm layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        if torch.is_grad_enabled() or not (_own(attention, Attention) and _own(mlp, MLP)):
            x = x + attention(self.input_layernorm(x), cos, sin)
            out: Tensor = x + mlp(self.post_attention_layernorm(x))
            return out
        # The same, where a frozen layer's quantizer takes over the norm before it, and its product
        # the rotary embedding or the sum behind it; what `o_proj` leaves to be added, the second
        # norm's kernel adds.
        rotary = attention.rotary(cos, sin)
        _, projected = normed(x, self.input_layernorm, attention.inputs, rotary=rotary)
        y, rest = apart(attention.mixed(projected), attention.o_proj, x)
        norm, (gate, up) = self.post_attention_layernorm, mlp.inputs
        _, out = normed_swiglu(y, norm, gate, up, mlp.down_proj, rest, add=True)
        return out


def _own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of this file, and nothing waits for its call."""
    return type(module) is kind and not hooked(module)


class Llama(nn.Module):
    """Token ids to the logits of the next token.

    All matrices start normal with standard deviation 0.02, the two that write into the residual
    stream with ``0.02 / sqrt(2 * layers)``, so that its variance does not grow with the depth.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    def recompute_(self, blocks: bool | int = True) -> Llama:
        """Let the backward compute the wide activations again, or keep them; returns the model.

        blocks: all, none, or of how many, the first ones: each takes some memory less and some
        time more. Raises ``ValueError`` for a number that the model does not have, ``TypeError``
        for what is no whole number.
        """
        most = len(self.layers)
        count = blocks * most if isinstance(blocks, bool) else operator.index(blocks)
        if not 0 <= count <= most:
            raise ValueError(f"blocks is {blocks}: must be from 0 to {most}, the model's")
        for i, block in enumerate(self.layers):
            for module in block.modules():
                if isinstance(module, MLP):
                    module.recompute = i < count
        return self

    def reset_parameters(self) -> None:
        """Draw every matrix anew from the global generator, and set the norms to one."""
        residual = INIT_STD / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual if writes_residual else INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` ``(B, T)``, integers below the vocabulary's size, to logits ``(B, T, V)``.

        Raises ``ValueError`` for another number of axes.
        """
        if tokens.ndim != 2:  # attention would mix others, and nothing would fail
            raise ValueError(f"tokens must be (B, T), got shape {tuple(tokens.shape)}")
        cos, sin = rope_angles(self.config, tokens.shape[-1], tokens.device)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

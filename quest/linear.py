"""The linear layer with quantized operands, and its use in whole models.

y = Q(x H) Q(w H)^T + b: both operands are rotated, so H cancels and the forward needs no inverse.
The product is one of values or, where `paths` says so, one of integers.
The backward masks in the rotated domain and brings both gradients back with H^T; autograd composes
it from the operators. Source: method, section 5; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import direct, frozen, ops, paths
from .lowbit_linear import low_bit_linear, saves
from .recipes import Recipe, recipe

HEADS = frozenset({"lm_head", "output", "head", "embed_out", "classifier", "score"})


class Linear(nn.Linear):
    """`torch.nn.Linear` with quantized weight and activation; drop-in, with the same state dict.

    bias: False unless asked for, where `torch.nn.Linear` has one. recipe: a name such as "w4a4", or
    a `Recipe`. Raises ValueError where the recipe's Hadamard block or sparsity group does not
    divide in_features.
    """

    _frozen: frozen.Frozen | None = None
    _recipe: Recipe

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        recipe: str | Recipe = "w4a4",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given: object = bias  # any text is as good as True, and a recipe stands third elsewhere
        if isinstance(given, str | Recipe):
            raise TypeError(f"bias must be True or False, got {bias!r}: name it, recipe={bias!r}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.set_recipe(recipe)

    @property
    def recipe(self) -> Recipe:
        """How it quantizes; assigning one, or its name, is `set_recipe`."""
        return self._recipe

    @recipe.setter
    def recipe(self, name: str | Recipe) -> None:
        self.set_recipe(name)

    def set_recipe(self, name: str | Recipe) -> None:
        """Change the recipe; the weight stays, and what was frozen of it is dropped."""
        self._recipe = _fitting(self, recipe(name))
        self._frozen = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str | Recipe) -> Self:
        """A layer with the parameters and hooks of `linear`; not compiled, if that was by itself.

        Raises TypeError where it is no `torch.nn.Linear`, ValueError where its own `forward` was
        replaced, which would go past the quantized one, and where its class computes something
        else or a parametrization its parameters, which would be lost.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        _require_forward(linear)
        if type(linear).forward not in (nn.Linear.forward, Linear.forward, cls.forward):
            raise ValueError(
                f"linear must have torch.nn.Linear's forward, and {type(linear).__name__} has one "
                "of its own, which would be lost"
            )
        if parametrize.is_parametrized(linear):
            raise ValueError(
                "linear must hold its parameters, and is parametrized: parametrize the layer that "
                "is made of it"
            )
        made = cls.__new__(cls)
        # Everything that it holds, its hooks too; the registries themselves are not shared.
        made.__dict__.update(
            {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(linear).items()}
        )
        made._compiled_call_impl = None  # the other layer's, as where a module is copied
        hooks: dict[int, Any] = made._load_state_dict_pre_hooks
        for key, hook in hooks.items():
            # They would be called with the other layer, and not where that is gone.
            if getattr(hook, "with_module", False):
                hooks[key] = type(hook)(hook.hook, made)
        made.set_recipe(name)
        return made

    def freeze(self) -> Self:
        """Quantize the weight once, for inference; returns the layer.

        The weight stays, and the state dict with it. What was quantized is used in
        `torch.no_grad()` or `inference_mode()`. It is made again where the weight is another, has
        moved or was changed in place; a change through `weight.data`, or one that a compiled call
        should see, needs another `freeze()`, and so does one that PyTorch does not count, as by an
        optimizer's fused step, a collective or another library, or of a weight that was made in
        `inference_mode()`. `train()` drops it. Raises
        ValueError where the weight is split among processes.
        """
        _require_here(self)
        self._frozen = frozen.freeze(self.weight, self.recipe)
        return self

    def _refreeze(self) -> None:
        # In a dtype that has no quantizer, or of a shard, there is nothing to freeze, and forward
        # says so.
        if self._frozen is not None:
            self._frozen = None
            if self.weight.dtype in ops.DTYPES and not (_is_split(self) or _is_shard(self)):
                self.freeze()

    def train(self, mode: bool = True) -> Self:
        """As in `torch.nn.Module`; training drops a frozen weight."""
        if mode:
            self._frozen = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._refreeze()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refreeze()

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out_features) for x (..., in_features) float32, bfloat16 or float16.

        Under autocast x is rounded to its dtype first, and y has that; the weight is quantized in
        its own.
        """
        if not torch.compiler.is_compiling() and (made := self._again(x)) is not None:
            return made
        self.check(x)
        x = self.cast(x)
        held = None if torch.is_grad_enabled() else self.current()
        if held is not None:
            return frozen.linear(x, held, self.bias, self.recipe)
        if paths.choose(x, self.recipe) == "integers":
            return self._integers(x)
        values = self.recipe.activation(x)
        weights = self.recipe.weight(self.weight)
        return nn.functional.linear(values, weights, self.bias)

    def _again(self, x: Tensor) -> Tensor | None:
        """y where a call like this one was checked and recorded; see `direct`."""
        held = self._frozen
        if held is None or not held.calls or torch.is_grad_enabled() or self.settled() is None:
            return None
        made = direct.again(held, (x,), (self._parameters["bias"],))
        return None if made is None else made[0]

    def settled(self) -> frozen.Frozen | None:
        """The frozen weight, if the weight and the bias are the layer's own and that one is of it.

        None where `current` may have one, too: this takes the host a fifth of the time.
        """
        # As attributes they are searched for, which takes as long as a tenth of the call.
        held, own = self._frozen, self._parameters
        weight = own.get("weight")
        # What is not among them is computed anew at each call, by a parametrization for one.
        if held is None or weight is None or "bias" not in own or not held.is_of(weight):
            return None
        return held

    def _integers(self, x: Tensor) -> Tensor:
        specs = self.recipe.activation.spec, self.recipe.weight.spec
        bias = [] if self.bias is None else [self.bias]
        y: Tensor = low_bit_linear(
            x, [self.weight], bias, *specs, x.dtype, saves(x, [self.weight], bias)
        )[0]
        return y

    def current(self) -> frozen.Frozen | None:
        """The frozen weight, made again where the weight has changed; None where there is none."""
        held = self._frozen
        if held is None:
            return None
        if not (torch.compiler.is_compiling() or held.is_of(self.weight)):
            self._refreeze()
            held = self._frozen
        return held if held is not None and paths.allows(held.path) else None

    def hold(self, held: frozen.Frozen) -> None:
        """Use this frozen weight, the same numbers as its own."""
        self._frozen = held

    @staticmethod
    def out_dtype(x: Tensor) -> torch.dtype:
        """The dtype of what comes out: that of autocast where it is on for x, else x's."""
        if not _autocast(x) or x.dtype not in ops.DTYPES:
            return x.dtype
        return torch.get_autocast_dtype(x.device.type)

    @classmethod
    def cast(cls, x: Tensor) -> Tensor:
        """x in the dtype of autocast where that is on, as `torch.nn.Linear` takes it."""
        return x.to(cls.out_dtype(x))

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x (..., in_features) fits the layer."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"x must be dense, got a {'nested' if x.is_nested else x.layout} one")
        _require_whole(self)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have {self.in_features} columns (in_features), got shape {tuple(x.shape)}"
            )
        if x.device != self.weight.device:
            raise ValueError(f"x is on {x.device}, the weight on {self.weight.device}")
        if x.dtype != self.weight.dtype and not _autocast(x):
            raise TypeError(
                f"x must have the weight's dtype {self.weight.dtype} outside autocast, "
                f"got {x.dtype}"
            )
        ops.check_tangents(x, *(p for p in (self.weight, self.bias) if p is not None))

    def extra_repr(self) -> str:
        """in_features, out_features, bias and the recipe."""
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


def _autocast(x: Tensor) -> bool:
    """Whether autocast is on where x lies; "meta" has none to ask for."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _fitting(linear: nn.Linear, made: Recipe) -> Recipe:
    """The recipe; TypeError or ValueError where it does not fit the layer."""
    made.weight.check(linear.weight)
    made.activation.transform.order(linear.in_features)
    return made


def _is_split(linear: nn.Linear) -> bool:
    """Whether the weight is a DTensor."""
    weight = linear.weight
    return type(weight) not in ops.OWN and hasattr(weight, "device_mesh")


def _require_whole(linear: nn.Linear) -> None:
    """Raise ValueError where the weight is split among processes."""
    if _is_split(linear):
        raise ValueError(
            "the weight is a DTensor: quest has no tensor parallelism, and freezes weights before "
            "they are sharded (FSDP2 trains)"
        )


def _is_shard(linear: nn.Linear) -> bool:
    """Whether the weight is what FullyShardedDataParallel leaves between forwards: flat, or freed.

    Freed, it has its shape and no memory, and whoever reads it ends the process.
    """
    weight = linear.weight
    freed = type(weight) in ops.OWN and weight.numel() and not weight.untyped_storage().size()
    return weight.ndim != 2 or bool(freed)


def _require_here(linear: nn.Linear) -> None:
    """Raise ValueError where the weight is split among processes, or not there."""
    _require_whole(linear)
    if _is_shard(linear):
        raise ValueError(
            "the weight is a shard, as FullyShardedDataParallel leaves it between forwards: freeze "
            "weights before they are sharded"
        )


def _require_forward(linear: nn.Module) -> None:
    """Raise ValueError where what is called is not the class's `forward`, but one of its own."""
    if "forward" in vars(linear):
        raise ValueError(
            "its forward was replaced, as by libraries that move weights: what stands there would "
            "go past the quantized layer. Quantize first"
        )


def _is_body(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    # Of modules in it, too: the model may stand in a wrapper's.
    heads = {getattr(m, "get_output_embeddings", lambda: None)() for m in model.modules()}
    # As registered: what a parametrization computes is another tensor each time.
    tables = {
        id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, nn.Embedding)
    } - {id(None)}
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[2] in HEADS or id(module._parameters.get("weight")) in tables:
            heads.add(module)  # whatever else it is called
    return lambda module, _: module not in heads


def quantize_(
    model: nn.Module,
    name: str | Recipe,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Make the `nn.Linear` modules of `model` quantized ones, in place; returns `model`.

    They stay the modules that they are, of another class: parameters keep their values and names,
    hooks stay, and so does what was compiled, which is compiled anew when it is called. One that
    stands in several places, also of another model, is quantized in all of them.
    filter_fn(module, qualified name) says which; by default all but the output head (what
    `get_output_embeddings()` of the model or a module in it returns, layers called lm_head, output,
    head, embed_out, classifier or score, and those that share an embedding's weight), which the
    method leaves in the model's dtype. Layers inside a container so called are quantized, the last
    one, too, as that of RobertaForSequenceClassification. Subclasses of `nn.Linear` other than
    `quest.Linear` are left alone. Raises ValueError where no module matches, a width does not fit
    the recipe or the `forward` of a module was itself replaced; the model is then unchanged.
    """
    made = recipe(name)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function or None, got {type(filter_fn).__name__}")
    wanted = _is_body(model) if filter_fn is None else filter_fn
    if isinstance(model, nn.Linear):
        raise TypeError(
            "model is itself a torch.nn.Linear: use quest.Linear.from_linear(model, ...)"
        )
    chosen: dict[nn.Linear, None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) in (nn.Linear, Linear) and wanted(module, path):
            try:
                _require_forward(module)
                _fitting(module, made)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from None
            chosen[module] = None
    if not chosen:
        raise ValueError("model has no torch.nn.Linear that filter_fn selects")
    for layer in chosen:
        layer.__class__ = Linear
        assert isinstance(layer, Linear)
        layer.set_recipe(made)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # made for the fused path, see below
        if isinstance(module, nn.TransformerEncoderLayer) and not chosen.keys().isdisjoint(
            module.children()
        ):
            # In evaluation its fused path reads the weights and never calls the layers; without a
            # known activation torch takes the plain path.
            module.activation_relu_or_gelu = 0
    return model


def freeze_(model: nn.Module) -> nn.Module:
    """Put `model` into evaluation mode and freeze its `quest.Linear` modules; returns `model`.

    See `Linear.freeze`. The weights of layers that a module calls together, named in its
    `shared_inputs`, come to lie in one tensor: see `quest.together`. Raises ValueError where
    there is none, or a weight is split among processes; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    if not layers:
        raise ValueError("model has no quest.Linear: quest.quantize_ makes them")
    from . import joint  # which is made of these layers

    groups = [
        _shared(path, module, names)
        for path, module in model.named_modules()
        for names in getattr(module, "shared_inputs", ())
    ]
    for layer in layers:
        _require_here(layer)
    model.eval()
    for layer in layers:
        layer.freeze()
    for group in groups:
        joint.stack(group)
    return model


def _shared(path: str, module: nn.Module, names: object) -> list[Any]:
    """The layers of a group in `shared_inputs`; TypeError or ValueError where it names none.

    None for one that the module lacks on purpose.
    """
    where = f"{path or type(module).__name__}.shared_inputs"
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f'{where} must hold groups of names, as (("q", "k", "v"),), got {names!r}')
    # As attributes: a wrapper, as of a compiled module, has those of what it wraps.
    made = [getattr(module, str(name), module) for name in names]
    missing = [
        repr(name)
        for name, layer in zip(names, made, strict=True)
        if layer is module or not isinstance(layer, nn.Module | None)
    ]
    if missing:
        raise ValueError(f"{where} names {', '.join(missing)}, and there is no such module")
    return made

"""LoRA through peft: put adapters into any model, read them, take them out, save them.

Factors leave this file in the orientation of the weight *as stored*: the update of a module is ``B @ A``
flattened to [n, rest], whether the module is a ``Linear`` [out, in], a transformers ``Conv1D`` [in, out], an
embedding or a convolution. So whoever merges them needs to know nothing about layers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atoll.adapters.low_rank import LowRankUpdate
from atoll.core.errors import AtollError
from atoll.core.tree import Tree, copy_

if TYPE_CHECKING:
    from peft import PeftModel


def under(name: str, patterns: Sequence[str]) -> bool:
    """True when a module (or tensor) is meant: a pattern is a run of whole words of its dotted name."""
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def target_modules(model: nn.Module, targets: Sequence[str] = (), except_for: Sequence[str] = ()) -> list[str]:
    """Names of the modules that get an adapter.

    Args:
        targets: patterns such as ``"q_proj"`` or ``"layers.0"``; empty: every linear layer whose weight is
            its own (an output layer that is tied to the embedding is left alone: merging into it would change
            both).
        except_for: patterns of modules that must not get one.

    Raises:
        AtollError: nothing matches, or a named module cannot be merged into.
    """
    tied = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    out, possible = [], []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        linear = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        adaptable = linear or isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)
        if not name or not adaptable or under(name, except_for):
            continue
        alone = tied[id(weight)] == 1
        if linear and alone:
            possible.append(name)
        if targets and under(name, targets):
            if not alone or getattr(module, "groups", 1) != 1:
                raise AtollError(
                    f"`{name}` cannot have a mergeable adapter: its weight is tied or grouped. Leave it out."
                )
            out.append(name)
    out = out if targets else possible
    if not out:
        few = ", ".join(possible[:6]) or "it has none"
        raise AtollError(f"No module matches targets {list(targets)}. Linear layers of this model: {few}.")
    return out


def inject(model: nn.Module, modules: Sequence[str], ranks: Mapping[int, float]) -> nn.Module:
    """Give ``modules`` one adapter a rank, named ``rank<r>``; ``ranks`` maps each to its alpha. In place."""
    wrapped: Any = None
    for rank, alpha in ranks.items():
        wrapped = _add(model if wrapped is None else wrapped, modules, rank, alpha, f"rank{rank}")
    return model


def adapt(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ()) -> PeftModel:
    """``model`` under peft's wrapper with one fresh adapter; see :func:`target_modules` for ``targets``."""
    out: PeftModel = _add(model, target_modules(model, targets), rank, alpha, "default")
    return out


def _add(model: Any, modules: Iterable[str], rank: int, alpha: float, name: str) -> Any:
    """Add one adapter to a plain model or to one that has some already; returns peft's wrapper."""
    from peft import LoraConfig, PeftModel, get_peft_model

    exactly = "|".join(re.escape(m) for m in modules)  # a list would match other modules with such an ending
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly)
    with warnings.catch_warnings():  # peft finds out itself which layers are stored transposed, and tells
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks transformers the old way
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
    return model


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The injected layers by the name that the plain model gives them."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def activate(layers: Mapping[str, Any], rank: int) -> None:
    """Use and train the adapters of this rank alone."""
    for layer in layers.values():
        layer.set_adapter(f"rank{rank}")


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Views (A [r, m], B [n, r]) of an adapter, without its scale, for the weight as stored."""
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()
        return b.T, a.T
    a, b = layer.lora_A[adapter].weight.detach().flatten(1), layer.lora_B[adapter].weight.detach().flatten(1)
    return (b.T, a.T) if getattr(layer, "fan_in_fan_out", False) else (a, b)


def read(layers: Mapping[str, Any], rank: int) -> LowRankUpdate:
    """A copy of the adapters of this rank, with their scale alpha / r."""
    name = f"rank{rank}"
    pairs = {m: factors(layer, name) for m, layer in layers.items()}
    scale = {m: float(layer.scaling[name]) for m, layer in layers.items()}
    a = {m: pair[0].clone(memory_format=torch.contiguous_format) for m, pair in pairs.items()}
    b = {m: pair[1].clone(memory_format=torch.contiguous_format) for m, pair in pairs.items()}
    return LowRankUpdate(a, b, scale)


def fresh_(layers: Mapping[str, Any], rank: int, generator: torch.Generator) -> None:
    """Restart the adapters of this rank: A uniform in +-1/sqrt(m) (as in peft, drawn on the CPU), B zero."""
    for layer in layers.values():
        a, b = factors(layer, f"rank{rank}")
        bound = 1 / math.sqrt(a.shape[1])
        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        b.zero_()


def unwrap(model: nn.Module) -> nn.Module:
    """Take all adapters out again, in place: the base layers with what was merged into them."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base_layer)
    model.__dict__.pop("peft_config", None)
    return model


def as_peft(model: nn.Module, update: LowRankUpdate) -> PeftModel:
    """``model`` (plain, the base) with ``update`` as its adapter; ``save_pretrained`` stores the latter."""
    rank = max((update.rank(m) for m in update.A), default=1)
    out: PeftModel = _add(model, update.A, rank, rank, "default")
    parts = update.pad(rank).parts()
    into: Tree = {}
    for name, layer in lora_layers(model).items():
        into[f"A {name}"], into[f"B {name}"] = factors(layer, "default")
    copy_(into, {f"{part} {m}": t for part in ("A", "B") for m, t in parts[part].items()})
    return out

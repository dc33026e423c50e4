"""LoRA adapters of which one factor is drawn once for all and the other one travels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt
from torch import nn

from atoll.adapters.lora import activate, inject, lora_layers, target_modules, under, unwrap
from atoll.core.tree import Parts, copy_, named_tensors
from atoll.federated.method import Share, SiteInfo, Split
from atoll.federated.share.parameters import floating_names


@dataclass(frozen=True)
class OneSidedLora(Share):
    """The factor that starts at zero trains and travels; the random one follows from the run's seed, so every site has
    it.

    The update is linear in what travels: the mean of the factors is the factor of the mean, which it is not when both
    factors train. So replies may be averaged, clipped, summed under masks and noised like any other update.

    Args:
        rank: of the adapters.
        alpha: LoRA's alpha (the update is scaled by alpha / rank); None: twice the rank.
        targets: patterns of the modules to adapt, e.g. ``("q_proj", "v_proj")``; empty: every linear layer.
        also: patterns of modules that train in full, such as a new head; all others are frozen.
    """

    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] | None = None
    targets: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        alpha = self.alpha if self.alpha is not None else 2.0 * self.rank
        inject(model, target_modules(model, self.targets, self.also), {self.rank: alpha})
        activate(lora_layers(model), self.rank)
        for name, p in model.named_parameters():
            fixed = ".lora_A." in name or ".lora_embedding_B." in name
            p.requires_grad_((".lora_" in name and not fixed) or under(name, self.also))
        return model

    def split(self, model: nn.Module) -> Split:
        return Split(shared=tuple(floating_names(model)))

    def export(self, model: nn.Module, replica: Parts) -> nn.Module:
        """A copy of the model without adapters, everything merged."""
        out = copy.deepcopy(model)
        copy_(named_tensors(out), replica["weights"])
        layers: dict[str, Any] = lora_layers(out)
        for layer in layers.values():
            layer.merge(adapter_names=[f"rank{self.rank}"])
        return unwrap(out)

"""Everything but the normalisation layers travels: what FedBN shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.core.tree import named_tensors
from atoll.federated.method import Share, Split
from atoll.federated.share.parameters import floating_names
from atoll.models.norm_free import NORMS


@dataclass(frozen=True)
class WithoutNorms(Share):
    """Normalisation layers are private: scales, shifts, running statistics and their counters.

    Layers are known by their type, whatever the model calls them.
    """

    def split(self, model: nn.Module) -> Split:
        private = norm_names(model)
        kept = set(private)
        return Split(shared=tuple(n for n in floating_names(model) if n not in kept), private=tuple(private))


def norm_names(model: nn.Module) -> list[str]:
    """Tensors of the normalisation layers, frozen parameters excepted, in the model's order."""
    layers = {name for name, module in model.named_modules() if isinstance(module, NORMS)}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    return [n for n in named_tensors(model) if n.rpartition(".")[0] in layers and n not in frozen]

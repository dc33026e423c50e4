"""What sites share of a distillation: the networks that learn, not the teacher, which everybody has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.core.errors import AtollError
from atoll.diffusion.distillation import Distillation
from atoll.federated.method import Share, SiteInfo, Split
from atoll.federated.share.parameters import floating_names


@dataclass(frozen=True)
class Learned(Share):
    """Share the trainable parameters and float buffers of a distillation's networks: student, fake score, heads."""

    def prepare(self, model: nn.Module, site: SiteInfo | None) -> nn.Module:
        if not isinstance(model, Distillation):
            raise AtollError("distil_at_sites makes students of a generator; use `task: distilling`.")
        return model

    def split(self, model: nn.Module) -> Split:
        return Split(shared=tuple(n for n in floating_names(model) if n.startswith("learned.")))

"""Any of our networks, starting from weights in a file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from atoll.data.dataset import Info
from atoll.models.mlp import MLP
from atoll.models.model import ModelBuilder
from atoll.models.weights import load_weights, read_weights


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ModelBuilder):
    """``network`` with the weights at ``path``.

    Args:
        network: the builder that the weights belong to.
        path: a ``.safetensors`` file, or a folder that holds ``model.safetensors`` (such as a run's
            ``model``).
        fresh: tensors whose names start with one of these are drawn anew, e.g. ``["dense2."]`` for a new
            head.
    """

    path: str
    network: ModelBuilder = MLP()
    fresh: tuple[str, ...] = ()

    @property
    def architecture(self) -> ModelBuilder:
        return self.network.architecture

    def build(self, info: Info, outputs: int) -> nn.Module:
        model = self.network.build(info, outputs)
        load_weights(model, read_weights(self.path), self.path, self.fresh)
        return model
